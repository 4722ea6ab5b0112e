"""Daily dumps, ids that the venue does not have, and pauses: the market's own history."""

import csv
import io
import zipfile
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from itertools import pairwise

import aiohttp
import pytest
from fakes import SimulatedExchange, simulated_exchange
from hypothesis import given
from hypothesis import strategies as st

from tradecore.simulate.market import Market
from tradecore.simulate.pauses import Pauses
from tradecore.simulate.words import E8, candle_of

EPOCH_US = 1_767_225_600_000_000


async def fetch(exchange: SimulatedExchange, symbol: str, name: str) -> tuple[int, bytes]:
    url = f"{exchange.rest}/data/spot/daily/trades/{symbol}/{name}"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.read()


async def dump(exchange: SimulatedExchange, symbol: str, day: date) -> list[list[str]]:
    name = f"{symbol}-trades-{day}"
    status, data = await fetch(exchange, symbol, f"{name}.zip")
    assert status == 200
    status, line = await fetch(exchange, symbol, f"{name}.zip.CHECKSUM")
    assert (status, line.decode()) == (200, f"{sha256(data).hexdigest()}  {name}.zip\n")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == [f"{name}.csv"]
        return list(csv.reader(io.TextIOWrapper(archive.open(f"{name}.csv"))))


async def test_dumps_hold_the_days_that_are_over() -> None:
    today = datetime.now(UTC).date()
    days = [today - timedelta(days=age) for age in (3, 2, 1)]
    epoch = datetime(days[0].year, days[0].month, days[0].day, 18, tzinfo=UTC).timestamp()
    async with simulated_exchange(
        rate=0.05, epoch=int(epoch), symbols="BTCUSDT,PEPEUSDT", absent_every=17
    ) as exchange:
        market = exchange.truth
        expected = market.first_id("BTCUSDT")
        for day in days:
            rows = await dump(exchange, "BTCUSDT", day)
            ids = [int(row[0]) for row in rows]
            end = market.next_id("BTCUSDT", int(rows[-1][4]))
            trades = market.trades("BTCUSDT", expected, end)
            assert ids == [trade.trade_id for trade in trades]
            assert [int(row[4]) for row in rows] == [trade.trade_us for trade in trades]
            assert [int(Decimal(row[1]) * E8) for row in rows] == [t.price_e8 for t in trades]
            assert [int(Decimal(row[2]) * E8) for row in rows] == [t.quantity_e8 for t in trades]
            assert all(Decimal(r[1]) * Decimal(r[2]) == Decimal(r[3]) for r in rows)
            assert {row[5] for row in rows} == {"True", "False"}
            for us in (trades[0].trade_us, trades[-1].trade_us):
                assert datetime.fromtimestamp(us / 1e6, UTC).date() == day
            expected = end
        for missing in (today, days[0] - timedelta(days=1)):
            name = f"BTCUSDT-trades-{missing}.zip"
            assert (await fetch(exchange, "BTCUSDT", name))[0] == 404
        assert (await fetch(exchange, "BTCUSDT", "BTCUSDT-trades-never.zip"))[0] == 404
        assert (await exchange.state())["rest"]["dump"] == 9


async def test_broken_checksums_and_late_dumps() -> None:
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    options = {"rate": 0.05, "epoch": -3 * 86_400, "symbols": "BTCUSDT"}
    async with simulated_exchange(**options, dump_broken_checksum=True) as exchange:
        with pytest.raises(AssertionError):
            await dump(exchange, "BTCUSDT", yesterday)
    before = yesterday - timedelta(days=1)
    async with simulated_exchange(**options, dump_until=before) as exchange:
        assert await dump(exchange, "BTCUSDT", before)
        assert (await fetch(exchange, "BTCUSDT", f"BTCUSDT-trades-{yesterday}.zip"))[0] == 404


async def test_ids_that_do_not_exist_are_in_no_page() -> None:
    async with simulated_exchange(
        rate=200, epoch=-60, symbols="BTCUSDT", first_id=[1], absent=["BTCUSDT=100-1500"]
    ) as exchange:
        for start, want in (
            (90, [*range(90, 100), *range(1501, 1511)]),
            (200, [*range(1501, 1521)]),
        ):
            rows = await exchange.get(
                "/api/v3/historicalTrades", symbol="BTCUSDT", fromId=start, limit=20
            )
            assert [row["id"] for row in rows] == want
        newest = await exchange.get("/api/v3/trades", symbol="BTCUSDT", limit=1000)
        assert len(newest) == 1000
        day = await exchange.get("/api/v3/ticker/24hr", symbol="BTCUSDT")
        assert day["count"] == day["lastId"] - day["firstId"] + 1 - 1401


@given(start=st.integers(0, 4_000), size=st.integers(1, 3_000), every=st.integers(0, 9))
def test_candles_leave_out_what_does_not_exist(start: int, size: int, every: int) -> None:
    market = Market(
        symbols=("BTCUSDT",),
        rate=50,
        epoch_us=EPOCH_US,
        first_id={"*": 7},
        absent={"BTCUSDT": [(900, 3_100), (4_000, 4_000)]},
        absent_every=every if every != 1 else 2,
    )
    first = 7 + start
    trades = market.trades("BTCUSDT", first, first + size)
    assert [t.trade_id for t in trades] == [
        i for i in range(first, first + size) if market.has("BTCUSDT", i)
    ]
    assert market.count("BTCUSDT", first, first + size) == len(trades)
    candle = market.candle("BTCUSDT", first, first + size)
    assert candle == (candle_of(trades) if trades else None)
    assert candle is None or candle.trade_count == len(trades)


def test_the_market_is_rebuilt_from_its_arguments() -> None:
    market = Market(absent={"BTCUSDT": [(5, 9)]}, absent_every=40, pauses={"*": [[3, None]]})
    assert Market(**market.arguments()).arguments() == market.arguments()  # type: ignore[arg-type]


SPANS = st.lists(st.tuples(st.integers(0, 20_000_000), st.integers(0, 5_000_000)), max_size=4)


@given(everywhere=SPANS, here=SPANS, at_us=st.integers(0, 40_000_000))
def test_nothing_is_printed_inside_a_pause(
    everywhere: list[tuple[int, int]], here: list[tuple[int, int]], at_us: int
) -> None:
    pauses = {
        name: [(EPOCH_US + a, EPOCH_US + a + length) for a, length in spans]
        for name, spans in (("*", everywhere), ("BTCUSDT", here))
    }
    market = Market(symbols=("BTCUSDT",), rate=100, epoch_us=EPOCH_US, pauses=pauses)
    first = market.first_id("BTCUSDT")
    trades = market.trades("BTCUSDT", first, first + 1_500)
    assert all(a.trade_us <= b.trade_us for a, b in pairwise(trades))
    for spans in pauses.values():
        for a, b in spans:
            assert not any(a <= trade.trade_us < b for trade in trades)
    upto = sum(trade.trade_us <= EPOCH_US + at_us for trade in trades)
    if upto < len(trades):
        assert market.next_id("BTCUSDT", EPOCH_US + at_us) == first + upto
    for trade in trades[::100]:
        assert market.trade_us("BTCUSDT", trade.trade_id) == trade.trade_us


def test_a_pause_without_an_end_ends_when_told() -> None:
    pauses = Pauses()
    pauses.add("*", 100)
    pauses.add("A", 150, 180)
    assert pauses.inner_us("A", 10**15) == 99
    pauses.end("*", 200)
    assert pauses.of("A") == ((100, 200),)
    assert pauses.inner_us("A", 250) == 150
    assert pauses.arguments() == {"*": [[100, 200]], "A": [[150, 180]]}
