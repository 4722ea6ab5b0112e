"""The back-fill when something is in its way: database, venue, refused rows, very many holes."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from fakes import simulated_exchange
from fill_desk import Desk, desk, running, today_us, until
from rest_desk import odd_server

from tradecore import clock
from tradecore.backfill import dumps, table
from tradecore.backfill.engine import Backfill
from tradecore.backfill.work import UnderWay
from tradecore.rest import dump, trades
from tradecore.rest.budget import RestError
from tradecore.store.embedded import EmbeddedPostgres

BTC, ETH = "BTCUSDT", "ETHUSDT"


def under_way(backfill: Backfill) -> tuple[UnderWay, ...]:
    return backfill.stats.under_way


async def test_the_database_goes_away(pg_server: EmbeddedPostgres, tmp_path: Path) -> None:
    dsn = str(pg_server.dsn)
    async with simulated_exchange(rate=60, epoch=-900, first_id=1000, symbols=BTC) as exchange:
        d = Desk(exchange, dsn, None, tmp_path)
        await d.store.open()
        await d.capture(BTC, (1000, 1000), (30_000, 30_000))
        backfill = d.backfill()
        try:
            async with running(backfill):
                await until(lambda: backfill.stats.filled["rest"] > 2000)
                await pg_server.stop()
                await until(lambda: backfill.stats.retries["database"] > 0)
                await pg_server.start()
                await until(lambda: d.whole(BTC, 1000, 30_000))
            d.conn = await asyncpg.connect(dsn)
            await d.prove(BTC, 1000, 30_000)
            await d.conn.close()
        finally:
            await d.client.close()
            await d.store.close()


async def test_rows_that_the_database_refuses(migrated_database: str, tmp_path: Path) -> None:
    """They stay a hole, parked once, and neither stop the others nor ask the venue for ever."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.conn.execute("ALTER TABLE raw_trades ADD CHECK (trade_id NOT IN (1050, 1051))")
        await d.capture(BTC, (1000, 1000), (1100, 1100), (1200, 1200))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1052, 1200))
            await until(lambda: d.whole(BTC, 1000, 1049))
            await until(lambda: any("dead_letters" in one.why for one in backfill.stats.under_way))
        (hole,) = await d.store.open_holes()
        assert hole[1:3] == (1050, 1051)
        assert d.client.requests["historicalTrades", "200"] < 10
        assert await d.conn.fetchval("SELECT count(*) FROM dead_letters") == 2


async def test_one_trade_in_fifty_that_the_database_refuses(
    migrated_database: str, tmp_path: Path
) -> None:
    """However many there are, the venue is asked for a page now and then; all come in the end."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.conn.execute("ALTER TABLE raw_trades ADD CONSTRAINT odd CHECK (trade_id % 50 <> 0)")
        await d.capture(BTC, (1001, 6001))
        backfill = d.backfill(look_s=0.2)
        asked = d.client.requests
        async with running(backfill):
            await until(lambda: len(backfill._table.later) == 100)
            assert asked.total() <= 2
            await d.capture(BTC, (6002, 8001))
            backfill.wake([(BTC, i, i) for i in range(6050, 8001, 50)])
            await until(lambda: len(backfill._table.later) == 140)
            assert asked.total() <= 2
        await d.conn.execute("ALTER TABLE raw_trades DROP CONSTRAINT odd")
        async with running(d.backfill(look_s=0.2)):
            await until(lambda: d.whole(BTC, 1001, 8001))
        assert asked.total() <= 20
        await d.prove(BTC, 1001, 8001)


async def test_a_newest_trade_that_the_database_refuses(
    migrated_database: str, tmp_path: Path
) -> None:
    """It is asked for once, however often it is told of; one above it is asked for at once."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.conn.execute("ALTER TABLE raw_trades ADD CHECK (trade_id <> 3000)")
        await d.capture(BTC, (2990, 2999))
        backfill = d.backfill()
        async with running(backfill):
            for _ in range(5):
                backfill.reach(BTC, 3000)
                await until(lambda: not backfill._busy and not backfill._woken.is_set())
                await asyncio.sleep(0.1)
            assert d.client.requests.total() <= 3
            backfill.reach(BTC, 3001)
            await until(lambda: d.whole(BTC, 3001, 3001))
        assert await d.conn.fetchval("SELECT count(*) FROM dead_letters") == 1


DAYS = {"epoch": -3 * 86_400, "rate": 0.2, "first_id": 1000, "rest_keep": 100}
"""An exchange three days old; all but its newest trades are in its dumps alone."""


async def test_a_disk_that_takes_nothing_ends_nothing(
    migrated_database: str, tmp_path: Path
) -> None:
    """A file stands where the folder of the dumps is to be; then it is gone."""
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        (tmp_path / "dumps").write_text("in the way")
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: any("cannot be written" in one.why for one in under_way(backfill)))
            (tmp_path / "dumps").unlink()
            await until(lambda: d.whole(BTC, 1000, 1300))
        await d.prove(BTC, 1000, 1300)


async def test_an_error_of_the_disk_that_nobody_expects(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        backfill = d.backfill()
        real = backfill._filler.step
        fails = [True]

        async def step(work: Any) -> Any:
            if fails:
                fails.pop()
                raise OSError(5, "Input/output error")
            return await real(work)

        monkeypatch.setattr(backfill._filler, "step", step)
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 1300))
        assert backfill.stats.retries["dump"] == 1


async def test_newest_first_and_bounded(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More holes than are held in memory: all are filled, the newest first."""
    monkeypatch.setattr(table, "MAX_HOLES", 4)
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        spans = [(i, i + 5) for i in range(1000, 16_000, 1500)]
        await d.capture(BTC, *spans)
        backfill = d.backfill(look_s=0.2)
        held = []

        async def whole() -> bool:
            held.append(len(backfill._table.active))
            return await d.whole(BTC, 1000, spans[-1][1])

        async with running(backfill):
            backfill.wake([(BTC, first - 1494, first - 1) for first, _ in spans[1:]])
            await until(whole)
        assert max(held) <= 4
        await d.prove(BTC, 1000, spans[-1][1])
        order = [
            row["first_id"]
            for row in await d.conn.fetch("SELECT first_id FROM trade_gaps ORDER BY filled_at")
        ]
        assert order == sorted(order, reverse=True)


async def test_holes_that_cannot_be_filled_keep_none_waiting(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are held, and all newer than one that can be filled."""
    monkeypatch.setattr(table, "MAX_HOLES", 4)
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        refused = ", ".join(str(i) for i in range(3010, 3100, 10))
        await d.conn.execute(f"ALTER TABLE raw_trades ADD CHECK (trade_id NOT IN ({refused}))")
        await d.capture(ETH, (1000, 1005), (1010, 1015))
        await d.capture(BTC, *((i + 1, i + 9) for i in range(3000, 3100, 10)))
        backfill = d.backfill(look_s=0.2)
        held = []

        async def whole() -> bool:
            held.append(len(backfill._table.active))
            return await d.whole(ETH, 1000, 1015)

        async with running(backfill):
            await until(whole)
        assert max(held) <= 4
        assert len(await d.store.open_holes()) == 9
        assert d.client.requests["historicalTrades", "200"] < 25


async def test_very_many_holes_at_once_are_left_to_the_look(
    migrated_database: str, tmp_path: Path
) -> None:
    async with desk(migrated_database, tmp_path) as d:
        backfill = d.backfill()
        backfill.wake([(BTC, i, i) for i in range(0, 20_000, 2)])
        assert backfill.idle
        backfill.wake([(BTC, i, i) for i in range(0, 400, 2)])
        assert len(backfill._table.active) == 200


async def test_a_dump_host_that_refuses_is_left_alone(
    migrated_database: str, tmp_path: Path
) -> None:
    """Its 403 is about all days of all holes."""
    refusal = (403, {}, b"no")
    async with desk(migrated_database, tmp_path, **DAYS) as d, odd_server(refusal) as odd:
        last = d.market.next_id(BTC, today_us() - 3_600_000_000)
        await d.capture(BTC, (1000, 1100), (1200, 1300), (last, last))
        await d.capture(ETH, (1000, 1001), (1003, 1003))
        backfill = d.backfill(max_age_s=10 * 86_400, dump_url=odd.url, dump_retry_s=1800.0)
        async with running(backfill):
            await until(lambda: len(under_way(backfill)) == 3)
            await until(lambda: all("HTTP 403" in one.why for one in under_way(backfill)))
        assert len(odd.asked) == 1


@pytest.mark.parametrize("trouble", ["checksum", "503"])
async def test_a_dump_host_that_is_out_of_order_for_a_moment(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """What fails is asked for again soon, though dumps that are not there are left for long."""
    real = dump.fetch_day
    asked_s = []

    async def fetch_day(*about: Any) -> Any:
        asked_s.append(clock.mono_ns() / 1e9)
        if len(asked_s) > 2:
            return await real(*about)
        if trouble == "checksum":
            raise RestError("broken", "its checksum is another one")
        raise RestError("unreachable", "HTTP 503", status=503)

    monkeypatch.setattr(dump, "fetch_day", fetch_day)
    monkeypatch.setattr(dumps, "_TROUBLE_S", (0.4, 1.0))
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        backfill = d.backfill(max_age_s=10 * 86_400, dump_retry_s=1800.0)
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 1300))
        first, second = (b - a for a, b in pairwise(asked_s[:3]))
        assert first >= 0.3 and second >= 0.75


def test_the_pauses_after_trouble_with_a_dump() -> None:
    pauses = [dumps.trouble_s(tries, 1800.0) for tries in range(5)]
    for pause_s, longest_s in zip(pauses, (10, 60, 600, 1800, 1800), strict=True):
        assert 0.75 * longest_s <= pause_s <= longest_s


async def test_a_dump_that_takes_its_time_holds_up_what_needs_none(
    migrated_database: str, tmp_path: Path
) -> None:
    """All workers would wait for one another's dumps."""

    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response(status=404)

    symbols = [f"S{i}USDT" for i in range(6)]
    options = {**DAYS, "symbols": ",".join([BTC, *symbols])}
    async with desk(migrated_database, tmp_path, **options) as d, odd_server(hang) as odd:
        for symbol in symbols:
            first = d.market.first_id(symbol)
            await d.capture(symbol, (first, first), (first + 9, first + 9))
        backfill = d.backfill(max_age_s=10 * 86_400, dump_url=odd.url)
        async with running(backfill):
            await until(lambda: len(under_way(backfill)) == len(symbols) and odd.asked)
            await until(lambda: len([w for w in backfill._table.active.values() if w.lost]) == 6)
            newest = d.market.next_id(BTC, clock.wall_ns() // 1000) - 1
            await d.capture(BTC, (newest - 10, newest - 10), (newest, newest))
            backfill.wake([(BTC, newest - 9, newest - 1)])
            await until(lambda: d.whole(BTC, newest - 10, newest))
        assert len(odd.asked) == 1


async def test_a_venue_that_hangs_and_comes_back(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000, rest_hang=3) as d:
        await d.capture(BTC, (1000, 1000), (1200, 1200))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 1200))
        await d.prove(BTC, 1000, 1200)


@pytest.mark.parametrize("fault", ["503", "garbage", "wrong"])
async def test_a_venue_that_is_well_again_is_asked_for_all_at_once(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """However long it was out of order: it is asked every few seconds, by one hole at a time."""
    real = trades.historical
    broken = [True]
    asked_s: list[float] = []

    async def historical(client: Any, symbol: str, from_id: int, limit: int = 1000) -> Any:
        asked_s.append(clock.mono_ns() / 1e9)
        if not broken:
            return await real(client, symbol, from_id, limit)
        if fault == "wrong":
            return await real(client, symbol, from_id - 7, limit)
        raise RestError({"503": "unreachable", "garbage": "broken"}[fault], "no use")

    monkeypatch.setattr(trades, "historical", historical)
    symbols = [f"S{i}USDT" for i in range(12)]
    async with desk(migrated_database, tmp_path, symbols=",".join(symbols)) as d:
        spans = {}
        for symbol in symbols:
            first = d.market.first_id(symbol)
            spans[symbol] = first, first + 20
            await d.capture(symbol, (first, first), (first + 20, first + 20))
        backfill = d.backfill(trouble_base_s=30.0, trouble_cap_s=60.0, host_cap_s=1.0, look_s=600.0)

        async def all_whole() -> bool:
            return all([await d.whole(symbol, *span) for symbol, span in spans.items()])

        async with running(backfill):
            await until(lambda: len(asked_s) > 5)
            before = len(asked_s)
            await asyncio.sleep(5)
            assert 4 <= len(asked_s) - before <= 25
            assert max(b - a for a, b in pairwise(asked_s)) < 1.5
            broken.clear()
            healed_s = clock.mono_ns() / 1e9
            await until(all_whole)
            assert clock.mono_ns() / 1e9 - healed_s < 4


async def test_a_hole_whose_trouble_is_its_own_is_asked_for_ever_more_seldom(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trades.historical
    asked = []

    async def historical(client: Any, symbol: str, from_id: int, limit: int = 1000) -> Any:
        asked.append(symbol)
        if symbol == BTC:
            raise RestError("broken", "no use")
        return await real(client, symbol, from_id, limit)

    monkeypatch.setattr(trades, "historical", historical)
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(ETH, (1000, 1000), (6000, 6000))
        await d.capture(BTC, (1000, 1000), (6000, 6000))
        backfill = d.backfill(trouble_base_s=60.0, trouble_cap_s=60.0)
        async with running(backfill):
            await until(lambda: d.whole(ETH, 1000, 6000))
        assert asked.count(BTC) <= 4


async def test_one_bad_hole_does_not_keep_another_waiting(
    migrated_database: str, tmp_path: Path
) -> None:
    """Ids beyond the venue's newest, as after a re-listing: asked ever more seldom."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.conn.execute("INSERT INTO trade_symbols VALUES ($1)", ETH)
        await d.conn.execute(
            "INSERT INTO trade_coverage VALUES ($1, 10, 10, now(), now()),"
            " ($1, $2, $2, now(), now())",
            ETH,
            10**12,
        )
        await d.conn.execute(
            "INSERT INTO trade_gaps (symbol, first_id, last_id, cause)"
            " VALUES ($1, 11, $2, 'venue')",
            ETH,
            10**12 - 1,
        )
        await d.capture(BTC, (1000, 1000), (5000, 5000))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 5000))
            await until(lambda: backfill.stats.retries["lag"] > 2)
        assert backfill.stats.under_way[0].symbol == ETH
        assert "does not have these trades yet" in backfill.stats.under_way[0].why


async def test_cancelled_in_the_middle(migrated_database: str, tmp_path: Path) -> None:
    """What was stored until then is whole, and the next run goes on."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1000), (20_000, 20_000))
        for _ in range(3):
            backfill = d.backfill()
            async with running(backfill):
                await until(lambda stats=backfill.stats: stats.filled["rest"] > 0)
        (hole,) = await d.store.open_holes()
        assert hole.first_id == 1001
        async with running(d.backfill()):
            await until(lambda: d.whole(BTC, 1000, 20_000))
        await d.prove(BTC, 1000, 20_000)
        assert [row[2:] for row in await d.gaps(BTC)] == [("filled", "rest")]
