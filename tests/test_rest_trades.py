"""Pages of trades, newest ids and klines, held against the exchange's truth and odd answers."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import pytest
import pytest_asyncio
from fakes import SimulatedExchange, simulated_exchange
from hypothesis import given, settings
from hypothesis import strategies as st
from rest_desk import odd_server

from tradecore import _history
from tradecore.rest.budget import Budget, RestError
from tradecore.rest.client import RestClient
from tradecore.rest.trades import Page, historical, klines, last_ids, newest
from tradecore.schema import (
    E8,
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    KLINE_DECIMALS,
    KLINE_DTYPE,
    TRADE_DTYPE,
)

MINUTE_US = 60_000_000
SYMBOLS = ["BTCUSDT", "LUNCUSDT", "币安人生USDT"]
simulated = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exchange() -> AsyncIterator[SimulatedExchange]:
    """An exchange with ten minutes of history that keeps 5,000 trades of each symbol."""
    async with simulated_exchange(
        rate=200, epoch=-600, weight_limit=1_000_000, rest_keep=5000, strict_symbols=True
    ) as exchange:
        yield exchange


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[RestClient]:
    client = RestClient(url, Budget(None, "test"))
    try:
        yield client
    finally:
        await client.close()


# -- the exchange's truth -------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("symbol", SYMBOLS)
async def test_pages_equal_the_market(exchange: SimulatedExchange, symbol: str) -> None:
    market = exchange.truth
    async with client_of(exchange.rest) as client:
        last = await newest(client, symbol)
        assert last.first_id is not None
        page = await historical(client, symbol, last.first_id, 500)
        assert page.symbol == symbol and page.first_id == last.first_id
        for one in (page, last):
            rows = one.rows
            assert rows.dtype == TRADE_DTYPE and len(rows) > 100 and one.jumps == []
            assert one.last_id is not None
            truth = market.trades(symbol, int(rows["trade_id"][0]), one.last_id + 1)
            assert list(rows["trade_id"]) == [t.trade_id for t in truth]
            assert list(rows["price_e8"]) == [t.price_e8 for t in truth]
            assert list(rows["quantity_e8"]) == [t.quantity_e8 for t in truth]
            assert list(rows["trade_us"]) == [t.trade_us for t in truth]
            maker = rows["flags"] == FLAG_BUYER_IS_MAKER
            assert list(maker) == [t.buyer_is_maker for t in truth]
            for name in ("sequence", "recv_ns", "symbol_id", "line", "epoch", "checksum"):
                assert not rows[name].any()


@simulated
async def test_pages_at_the_ends_of_history(exchange: SimulatedExchange) -> None:
    async with client_of(exchange.rest) as client:
        oldest = await historical(client, "BTCUSDT", 0, 10)
        assert len(oldest.rows) == 10 and oldest.first_id is not None and oldest.first_id > 0
        none = await historical(client, "BTCUSDT", 10**15)
        assert len(none.rows) == 0 and none.jumps == []
        assert (none.first_id, none.last_id) == (None, None)


@simulated
async def test_newest_ids(exchange: SimulatedExchange) -> None:
    async with client_of(exchange.rest) as client:
        before = (await exchange.state())["counts"]
        assert await last_ids(client, []) == {}
        found = await last_ids(client, [*SYMBOLS, "BTCUSDT"])
        assert list(found) == SYMBOLS
        for symbol, last_id in found.items():
            page = await historical(client, symbol, last_id)
            assert page.first_id == last_id, "it is there"
        assert client.budget._own_weight() == 2 + 3 * 25
        some = await last_ids(client, [*SYMBOLS, "UNKNOWN"])
        assert some.keys() == set(SYMBOLS) and client.requests["ticker/24hr", "400"] == 1
        assert await last_ids(client, ["UNKNOWN"]) == {}
        many = await last_ids(client, [*SYMBOLS, *(f"X{i}" for i in range(200))])
        assert many.keys() == set(SYMBOLS)
        assert (await exchange.state())["counts"] == before


@simulated
@pytest.mark.parametrize("symbol", SYMBOLS)
async def test_klines_equal_the_trades(exchange: SimulatedExchange, symbol: str) -> None:
    market = exchange.truth
    async with client_of(exchange.rest) as client:
        start_us = exchange.epoch_us // MINUTE_US * MINUTE_US
        rows = await klines(client, symbol, start_us, start_us + 3600 * 10**6)
        assert rows.dtype == KLINE_DTYPE and 10 <= len(rows) <= 13
        assert list(rows["open_us"]) == [start_us + i * MINUTE_US for i in range(len(rows))]
        assert list(rows["close_us"] - rows["open_us"]) == [MINUTE_US - 1] * len(rows)
        assert list(rows["flags"]) == [FLAG_CLOSED] * (len(rows) - 1) + [0]
        assert set(rows["first_id"]) == set(rows["last_id"]) == {-1}
        part = await klines(client, symbol, start_us + MINUTE_US, start_us + 3 * MINUTE_US)
        assert len(part) == 2 and (part["open_us"] == rows["open_us"][1:3]).all()
        begin, now = market.first_id(symbol), market.next_id(symbol, int(rows["event_us"][0]))
        trades = market.trades(symbol, begin, now)
        for row in rows[:-1]:
            open_us = int(row["open_us"])
            inside = [t for t in trades if open_us <= t.trade_us < open_us + MINUTE_US]
            assert row["trade_count"] == len(inside)
            values = {name: big(row[name]) for name in KLINE_DECIMALS}
            assert values["volume"] == sum(t.quantity_e8 for t in inside)
            assert values["quote_volume"] == sum(t.quote_e8 for t in inside)
            takers = [t for t in inside if not t.buyer_is_maker]
            assert values["taker_buy_base_volume"] == sum(t.quantity_e8 for t in takers)
            assert values["taker_buy_quote_volume"] == sum(t.quote_e8 for t in takers)
            if inside:
                prices = [t.price_e8 for t in inside]
                assert (values["open"], values["close"]) == (prices[0], prices[-1])
                assert (values["high"], values["low"]) == (max(prices), min(prices))


def big(value: Any) -> int:
    return int(value["lo"]) + (int(value["hi"]) << 64)


# -- odd answers ----------------------------------------------------------------------------------

GOOD = {
    "id": 7,
    "price": "1.5",
    "qty": "2",
    "quoteQty": "3.0",
    "time": 1_700_000_000_000,
    "isBuyerMaker": False,
    "isBestMatch": True,
}


async def test_milliseconds_and_jumps() -> None:
    rows = [{**GOOD, "id": i} for i in (7, 8, 11, 20)]
    async with odd_server(orjson.dumps(rows)) as odd, client_of(odd.url) as client:
        page = await historical(client, "BTCUSDT", 7)
    assert (page.first_id, page.last_id, page.jumps) == (7, 20, [(9, 10), (12, 19)])
    assert set(page.rows["trade_us"]) == {1_700_000_000_000_000}
    assert (page.rows["price_e8"][0], page.rows["quantity_e8"][0]) == (150_000_000, 200_000_000)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"price": 1.5}, "trade 7: the price 1.5 is no text"),
        ({"price": 1}, "trade 7: the price 1 is no text"),
        ({"price": "1e5"}, "trade 7: the price '1e5' is no plain decimal"),
        ({"price": "-1"}, "negative"),
        ({"price": ""}, "no plain decimal"),
        ({"price": "1."}, "no plain decimal"),
        ({"price": " 1"}, "no plain decimal"),
        ({"price": "\u0661"}, "no plain decimal"),
        ({"price": None}, "no text"),
        ({"qty": "0.123456789"}, "trade 7: the quantity '0.123456789' does not fit"),
        ({"qty": "92233720368.54775808"}, "does not fit"),
        ({"qty": "9" * 400}, "does not fit"),
        ({"time": 1.7e12}, "time is 1700000000000.0"),
        ({"time": "1700000000000"}, "time is '1700000000000'"),
        ({"time": 1_700_000_000}, "none in ms or us"),
        ({"time": 2**70}, "time is"),
        ({"id": "7"}, "the id of a trade is '7'"),
        ({"id": 7.0}, "the id of a trade is 7.0"),
        ({"id": True}, "the id of a trade is True"),
        ({"id": -1}, "the id of a trade is -1"),
        ({"id": 2**63}, "the id of a trade is"),
        ({"isBuyerMaker": "true"}, "isBuyerMaker is 'true'"),
        ({"isBuyerMaker": None}, "isBuyerMaker is None"),
    ],
)
async def test_a_trade_that_is_not_exact_is_refused(change: dict[str, Any], text: str) -> None:
    page = json.dumps([{**GOOD, "id": 6}, {**GOOD, **change}]).encode()
    async with odd_server(page) as odd, client_of(odd.url) as client:
        with pytest.raises(RestError) as caught:
            await historical(client, "ETHUSDT", 1)
    assert caught.value.kind == "broken"
    assert text in str(caught.value) and str(caught.value).startswith("ETHUSDT: ")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "no JSON"),
        (b"<html>", "no JSON"),
        (b'[{"id":1},', "no JSON"),
        (b"{}", "no list"),
        (b"[1]", "row 0 of the page is no trade: 1"),
        (b"[{}]", "the id of a trade is None"),
        (orjson.dumps([{**GOOD, "id": 8}, GOOD]), "id 7 follows 8"),
        (orjson.dumps([GOOD, GOOD]), "id 7 follows 7"),
        (orjson.dumps([{**GOOD, "id": 3}]), "the page begins at 3"),
    ],
)
async def test_a_page_that_is_none(body: bytes, text: str) -> None:
    async with odd_server(body) as odd, client_of(odd.url) as client:
        with pytest.raises(RestError) as caught:
            await historical(client, "ETHUSDT", 5)
    assert caught.value.kind == "broken" and text in str(caught.value)


async def test_symbols_that_never_traded_and_ids_that_are_none() -> None:
    quiet = [{"symbol": "A", "lastId": -1}, {"symbol": "B", "lastId": 5}, 7, {"x": 1}]
    wrong = [{"symbol": "A", "lastId": "5"}]
    async with odd_server(*map(orjson.dumps, (quiet, wrong))) as odd, client_of(odd.url) as client:
        assert await last_ids(client, ["A", "B", "C"]) == {"A": -1, "B": 5}
        assert odd.asked[0].query == {"type": "MINI", "symbols": '["A","B","C"]'}
        with pytest.raises(RestError, match="A: ticker/24hr tells the last id '5'"):
            await last_ids(client, ["A"])


KLINE = [1_700_000_040_000, "1", "2", "0.5", "1", "9" * 30, 1_700_000_099_999, "1", 2, "1", "1"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (KLINE[:10], "is no kline"),
        ([*KLINE[:5], 1.5, *KLINE[6:]], "a value of minute 1700000040000000, 1.5,"),
        ([*KLINE[:5], "1E-8", *KLINE[6:]], "is no plain decimal"),
        ([*KLINE[:5], "9" * 31, *KLINE[6:]], "does not fit"),
        ([1, *KLINE[1:]], "none in ms or us"),
        ([1_600_000_020_000, *KLINE[1:]], "other minutes"),
        (KLINE, None),
    ],
)
async def test_klines_that_are_none(row: list[Any], text: str | None) -> None:
    start_us = KLINE[0] * 1000
    time = orjson.dumps({"serverTime": KLINE[6]})
    async with odd_server(time, orjson.dumps([row])) as odd, client_of(odd.url) as client:
        if text is None:
            (found,) = await klines(client, "A", start_us, start_us + MINUTE_US)
            assert big(found["volume"]) == int("9" * 30) * E8
            assert found["flags"] == 0, "its last millisecond is not over"
        else:
            with pytest.raises(RestError, match=text):
                await klines(client, "A", start_us, start_us + MINUTE_US)


async def test_a_venue_that_tells_no_time() -> None:
    for body in (b"[]", b"{}", b"", b'{"serverTime":1.5}'):
        async with odd_server(body) as odd, client_of(odd.url) as client:
            with pytest.raises(RestError, match="does not answer as the venue"):
                await klines(client, "A", 0, 1)


# -- an oracle ------------------------------------------------------------------------------------

decimals = st.one_of(
    st.decimals(min_value=0, max_value=10**11, places=8).map(lambda d: format(d, "f")),
    st.from_regex(r"[0-9]{0,12}\.?[0-9]{0,10}", fullmatch=True),
    st.text(alphabet="0123456789.-+eE _", max_size=12),
)


def exact_e8(text: str) -> int | None:
    """Read by Decimal; None when it has to be refused."""
    whole, point, places = text.removeprefix("-").partition(".")
    if not all(part.isascii() and part.isdigit() for part in (whole, *([places] * bool(point)))):
        return None
    value = Decimal(text).scaleb(8)
    if value != int(value) or not 0 <= value < 2**63:
        return None
    return int(value)


@settings(deadline=None)
@given(decimals)
def test_decimals_are_exact_or_refused(text: str) -> None:
    expected = exact_e8(text)
    if expected is None:
        with pytest.raises(ValueError, match="trade 7: the price"):
            _history.trade_rows([{**GOOD, "price": text}])
    else:
        (row,) = _history.trade_rows([{**GOOD, "price": text}])
        assert row["price_e8"] == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), unique=True, max_size=30).map(sorted))
def test_jumps(ids: list[int]) -> None:
    page = Page("A", _history.trade_rows([{**GOOD, "id": i} for i in ids]))
    missing = {i for first, last in page.jumps for i in range(first, last + 1)}
    assert missing == (set(range(ids[0], ids[-1])) - set(ids) if ids else set())
    assert all(first <= last for first, last in page.jumps)
    assert isinstance(page.rows, np.ndarray)
