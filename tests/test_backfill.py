"""Holes filled from a simulated exchange into a real database, held against the market."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fill_desk import Desk, desk, rows_of, running, today_us, until

from tradecore import clock
from tradecore.backfill import dumps, engine, plan, step
from tradecore.backfill.engine import Backfill
from tradecore.errors import TransientStoreError
from tradecore.rest import trades
from tradecore.rest.budget import RestError
from tradecore.store.holes import OpenHole
from tradecore.store.store import Store

BTC, ETH = "BTCUSDT", "ETHUSDT"


async def test_holes_are_filled_and_stay_one_row_each(
    migrated_database: str, tmp_path: Path
) -> None:
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first + 9), (first + 4000, first + 4099))
        await d.capture(BTC, (first + 4110, first + 4110))
        other = d.market.first_id(ETH)
        await d.capture(ETH, (other, other), (other + 1500, other + 1500))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, first, first + 4110))
            await until(lambda: d.whole(ETH, other, other + 1500))
            await until(lambda: backfill.stats.holes_filled == 3)
        await d.prove(BTC, first, first + 4110)
        await d.prove(ETH, other, other + 1500)
        assert await d.gaps(BTC) == [
            (first + 10, first + 3999, "filled", "rest"),
            (first + 4100, first + 4109, "filled", "rest"),
        ]
        assert await d.gaps(ETH) == [(other + 1, other + 1499, "filled", "rest")]
        assert backfill.stats.filled == {"rest": 3990 + 10 + 1499, "dump": 0}
        assert d.client.requests["historicalTrades", "200"] == 4 + 1 + 2


async def test_a_hole_shrinks_from_above(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first), (first + 5000, first + 5000))
        steps: list[list[OpenHole]] = []
        backfill = d.backfill()
        left: set[tuple[int, int]] = set()

        async def look() -> bool:
            holes = await d.store.open_holes()
            left.update((hole.first_id, hole.last_id) for hole in holes)
            assert len(holes) <= 1
            steps.append(holes)
            return not holes

        async with running(backfill):
            await until(look)
        assert {begin for begin, _ in left} == {first + 1}
        assert len(left) > 1, "it was seen while it shrank"


async def test_one_page_fills_all_holes_that_it_reaches(
    migrated_database: str, tmp_path: Path
) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, *((i, i + 8) for i in range(1000, 3000, 10)), (3000, 3000))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 3000))
            await until(lambda: backfill.stats.holes_filled == 200)
        assert d.client.requests.total() <= 3
        assert backfill.stats.filled["rest"] == 200
        await d.prove(BTC, 1000, 3000)


async def test_fresh_ids_come_from_memory_while_the_database_lags(
    migrated_database: str, tmp_path: Path
) -> None:
    """What historicalTrades does not have yet the newest trades do."""
    async with desk(migrated_database, tmp_path, rest_lag=3600) as d:
        newest = await _newest(d, BTC)
        await d.capture(BTC, (newest - 300, newest - 200), (newest - 100, newest))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, newest - 300, newest))
        assert d.client.requests["historicalTrades", "200"] == 0
        await d.prove(BTC, newest - 300, newest)


async def _newest(d: object, symbol: str) -> int:
    day = await d.exchange.get("/api/v3/ticker/24hr", symbol=symbol)  # type: ignore[attr-defined]
    return int(day["lastId"])


async def test_a_lagging_database_is_waited_for(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, rest_lag=3, rate=2000, epoch=-60) as d:
        newest = await _newest(d, BTC)
        await d.capture(BTC, (newest - 3000, newest - 2500), (newest, newest))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, newest - 3000, newest))
        assert backfill.stats.retries["lag"] > 0
        await d.prove(BTC, newest - 3000, newest)


async def test_others_may_fill_it_first(migrated_database: str, tmp_path: Path) -> None:
    """A hole that the feed fills within its grace costs no request."""
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        backfill = d.backfill(grace=lambda _: 0.5)
        async with running(backfill):
            await d.capture(BTC, (first, first), (first + 9, first + 9))
            backfill.wake([(BTC, first + 1, first + 8)])
            await d.capture(BTC, (first + 1, first + 8))
            await until(lambda: backfill.idle)
        assert d.client.requests.total() == 0
        assert backfill.stats.holes_filled == 0


async def test_max_age(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, rate=30) as d:
        first = d.market.first_id(BTC)
        newest = await _newest(d, BTC)
        middle = (first + newest) // 2
        await d.capture(BTC, (first, first), (first + 100, first + 100), (newest, newest))
        age_s = 200.0
        backfill = d.backfill(max_age_s=age_s)
        async with running(backfill):
            await until(lambda: d.whole(BTC, newest - 1000, newest))
            await until(lambda: backfill.idle)
        (lower, upper) = sorted(await d.store.open_holes(), key=lambda hole: hole.first_id)
        assert lower[1:3] == (first + 1, first + 99), "wholly older: for the command"
        assert upper.first_id == first + 101
        assert middle < upper.last_id < newest - 1000, "newest pages first, until they are too old"


async def test_age_is_counted_from_the_newest_stored_trade(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A venue whose clock is far behind ours, or a clock of ours that is far ahead."""
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first), (first + 50, first + 50))
        real = clock.wall_ns
        monkeypatch.setattr(clock, "wall_ns", lambda: real() + 400 * 86_400 * 10**9)
        async with running(d.backfill()):
            await until(lambda: d.whole(BTC, first, first + 50))


async def test_trades_of_another_time_are_not_stored(
    migrated_database: str, tmp_path: Path
) -> None:
    """REST has other trades under these ids: another venue's, or of a symbol listed anew."""
    async with desk(migrated_database, tmp_path, first_id=1000, absent=f"{BTC}=1300-1310") as d:
        rows = rows_of(d.market, BTC, 1000, 1400, d.symbols.add(BTC))
        ids = rows["trade_id"]
        rows = rows[(ids < 1050) | ((ids >= 1150) & (ids < 1290)) | (ids >= 1320)]
        rows["trade_us"] -= 3_600_000_000
        await d.store.write_trades(rows)
        await d.capture(ETH, (1000, 1010), (1020, 1030))
        backfill = d.backfill()
        async with running(backfill):
            backfill.wake([(BTC, 1050, 1149)])
            await until(lambda: d.whole(ETH, 1000, 1030))
            await until(lambda: len(backfill.stats.under_way) == 2)
            await until(lambda: not backfill._busy)
        assert {hole[1:3] for hole in await d.store.open_holes()} == {(1050, 1149), (1290, 1319)}
        assert await d.conn.fetchval("SELECT count(*) FROM raw_trades") == len(rows) + 31
        for one in backfill.stats.under_way:
            assert f"are of {_shown(rows, one.first_id - 1)} and" in one.why, one.why
            assert "BINANCE_REST_URL" in one.why and BTC in one.why
        assert d.client.requests.total() < 12, "and not asked again and again"


def _shown(rows: Any, trade_id: int) -> str:
    time_us = int(rows["trade_us"][rows["trade_id"] == trade_id][0])
    return f"{datetime.fromtimestamp(time_us // 10**6, UTC):%Y-%m-%d %H:%M:%S}Z"


async def test_a_newest_trade_of_another_time_is_not_stored(
    migrated_database: str, tmp_path: Path
) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        rows = rows_of(d.market, BTC, 1000, 1400, d.symbols.add(BTC))
        rows["trade_us"] += 3_600_000_000
        await d.store.write_trades(rows)
        backfill = d.backfill()
        async with running(backfill):
            backfill.reach(BTC, await _newest(d, BTC))
            await until(lambda: "older than that" in (backfill.stats.last_error or ""))
        assert (await d.store.bounds(BTC))[BTC].last_id == 1399


async def test_dumps_of_another_time_are_not_stored(migrated_database: str, tmp_path: Path) -> None:
    morning_s = (today_us() - 3 * plan.DAY_US) // 10**6 + 6 * 3600  # an hour later is the same day
    options = {**DAYS, "rest_keep": 100, "epoch": morning_s}
    async with desk(migrated_database, tmp_path, **options) as d:
        rows = rows_of(d.market, BTC, 1000, 1300, d.symbols.add(BTC))
        rows = rows[(rows["trade_id"] < 1100) | (rows["trade_id"] > 1200)]
        rows["trade_us"] += 3_600_000_000
        await d.store.write_trades(rows)
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: any("_DUMP_URL" in one.why for one in backfill.stats.under_way))
        assert [hole[1:3] for hole in await d.store.open_holes()] == [(1100, 1200)]


async def test_zero_age_asks_nothing(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first), (first + 9, first + 9))
        backfill = d.backfill(max_age_s=0)
        async with running(backfill):
            backfill.wake([(BTC, first + 1, first + 8)])
            backfill.reach(BTC, first + 20)
            assert backfill.idle


async def test_reach(migrated_database: str, tmp_path: Path) -> None:
    """The page at the venue's end opens the hole below it with its cause, and that is filled."""
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first + 10))
        newest = await _newest(d, BTC)
        assert newest > first + 3000
        backfill = d.backfill()
        async with running(backfill):
            backfill.reach(BTC, newest, "restart")
            backfill.reach(ETH, 10**12)  # nothing of it is stored: no history to reach from
            await until(lambda: d.whole(BTC, first, newest))
            await until(lambda: backfill.idle)
        await d.prove(BTC, first, newest)
        assert await d.conn.fetchval("SELECT cause FROM trade_gaps WHERE symbol = $1", BTC) == (
            "restart"
        )
        assert ETH not in await d.store.bounds()


async def test_reach_for_an_id_that_there_is_not(migrated_database: str, tmp_path: Path) -> None:
    """The venue told too high an id: what it has is stored, and its latest word counts."""
    async with desk(migrated_database, tmp_path) as d:
        newest = await _newest(d, BTC)
        await d.capture(BTC, (newest - 1000, newest - 500))
        backfill = d.backfill()
        async with running(backfill):
            backfill.reach(BTC, newest + 10**6)
            await until(lambda: d.whole(BTC, newest - 1000, newest))
            await until(lambda: backfill.stats.retries["lag"] >= 2)
            backfill.reach(BTC, newest)
            await until(lambda: backfill.idle)
        stored = (await d.store.bounds(BTC))[BTC]
        await d.prove(BTC, newest - 1000, stored.last_id)


async def test_holes_that_are_opened_again_are_looked_for_soon(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told of at once, while it has nothing to do, and while it looks."""
    monkeypatch.setattr(engine, "_LOOK_AGAIN_S", 0.5)
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        backfill = d.backfill(look_s=600.0)
        real = d.store.bounds

        async def bounds(*about: Any) -> Any:
            if await d.store.open_holes(symbol=BTC) == []:
                await d.capture(BTC, (1000, 1000), (1010, 1010))
                backfill.look_soon()
            return await real(*about)

        monkeypatch.setattr(d.store, "bounds", bounds)
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 1010))
            monkeypatch.setattr(d.store, "bounds", real)
            await until(lambda: backfill.idle)
            await d.capture(ETH, (1000, 1000), (1010, 1010))
            backfill.look_soon()
            await until(lambda: d.whole(ETH, 1000, 1010))


async def test_pause(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first), (first + 9, first + 9))
        paused = [True]
        looked = []
        backfill = d.backfill(paused=lambda: looked.append(1) or paused[0])
        async with running(backfill):
            await until(lambda: len(looked) > 4)
            assert d.client.requests.total() == 0
            paused[0] = False
            await until(lambda: d.whole(BTC, first, first + 9))


async def test_errors_of_the_venue_are_passed(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, rest_error_every=2) as d:
        first = d.market.first_id(BTC)
        await d.capture(BTC, (first, first), (first + 3001, first + 3001))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, first, first + 3001))
        assert d.client.requests["historicalTrades", "503"] > 0
        await d.prove(BTC, first, first + 3001)


async def test_a_delisted_symbol_blocks_nobody(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, strict_symbols=True) as d:
        gone, first = d.market.first_id("GONEUSDT"), d.market.first_id(BTC)
        await d.capture("GONEUSDT", (gone, gone), (gone + 50, gone + 50))
        await d.capture(BTC, (first, first), (first + 50, first + 50))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, first, first + 50))
            await until(lambda: backfill.stats.retries["refused"] > 0)
        (hole,) = await d.store.open_holes()
        assert hole.symbol == "GONEUSDT"


async def test_what_the_venue_does_not_have_is_closed_as_absent(
    migrated_database: str, tmp_path: Path
) -> None:
    """Alone, in a row, at both ends of a hole, and inside a page: with the evidence."""
    absent = [f"{BTC}=1010-1012", f"{BTC}=1050-1050", f"{BTC}=2000-4500", f"{BTC}=5099-5099"]
    async with desk(migrated_database, tmp_path, first_id=1000, absent=absent) as d:
        await d.capture(BTC, (1000, 1009), (1013, 1020), (5100, 5110))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.closed(BTC))
        await d.prove(BTC, 1000, 5110)
        rows = await d.gaps(BTC)
        closed = [row[:2] for row in rows if row[2] == "absent"]
        assert closed == [(1010, 1012), (1050, 1050), (2000, 4500), (5099, 5099)]
        assert backfill.stats.holes_absent == 4
        assert backfill.stats.ids_absent == 3 + 1 + 2501 + 1
        for first_id, last_id, evidence in await d.conn.fetch(
            "SELECT first_id, last_id, evidence::text FROM trade_gaps WHERE state = 'absent'"
        ):
            told = json.loads(evidence)
            assert told["source"] == "rest"
            assert (told["id_below"], told["id_above"]) == (first_id - 1, last_id + 1)
            first, second = (datetime.fromisoformat(one["asked_at"]) for one in told["replies"])
            assert (second - first).total_seconds() >= 0.3


async def test_many_absent_ids(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000, absent_every=100) as d:
        assert d.market.has(BTC, 1001)
        assert d.market.has(BTC, 3001)
        await d.capture(BTC, (1001, 1001), (3001, 3001))
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.closed(BTC))
        await d.prove(BTC, 1001, 3001)
        assert backfill.stats.ids_absent == 2000 - d.market.count(BTC, 1002, 3002)
        assert backfill.stats.ids_absent > 15
        assert d.client.requests["historicalTrades", "200"] <= 8, "one reply confirms many"


DAYS = {"epoch": -3 * 86_400, "rate": 0.2, "first_id": 1000}
"""An exchange three days old, with some thousand trades of BTCUSDT a day."""


async def test_dumps_have_what_rest_has_no_longer(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, rest_keep=100, **DAYS) as d:
        folder = tmp_path / "dumps"
        (folder / "backfill-dumps").mkdir(parents=True)
        left = folder / "backfill-dumps" / f"{BTC}-trades-2020-01-01.zip.part"
        own = folder / f"{BTC}-trades-2020-01-01.zip"
        left.write_bytes(b"of a process that was killed")
        own.write_bytes(b"an operator's")
        last = d.market.next_id(BTC, today_us() - 3_600_000_000)
        await d.capture(BTC, (1000, 1100), (1200, 1300), (last, last))
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, last))
        await d.prove(BTC, 1000, last)
        assert backfill.stats.filled["dump"] == last - 1000 - 101 - 101
        assert [path for path in folder.rglob("*") if path.is_file()] == [own]
        assert {row[2:] for row in await d.gaps(BTC)} == {("filled", "dump")}


def _beginning_late(
    monkeypatch: pytest.MonkeyPatch, begins: int, is_late: Callable[[], bool]
) -> list[int]:
    """Let REST have nothing below `begins` while `is_late` says so; the list of what is asked."""
    real = trades.historical
    asked: list[int] = []

    async def historical(client: Any, symbol: str, from_id: int, limit: int = 1000) -> Any:
        asked.append(from_id)
        if is_late():
            from_id = max(from_id, begins)
        return await real(client, symbol, from_id, limit)

    monkeypatch.setattr(trades, "historical", historical)
    return asked


async def test_one_reply_that_begins_too_late_loses_nothing(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a replica with a short history; those that have all answer a moment later."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1000), (1200, 1200))
        asked = _beginning_late(monkeypatch, 1210, lambda: len(asked) <= 2)
        backfill = d.backfill()
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1000, 1200))
        assert backfill.stats.filled == {"rest": 199, "dump": 0}
        assert len(asked) <= 4, "a page, two probes, and a page perhaps"


async def test_what_rest_has_lost_today_is_asked_for_again(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dump can have it yet. The newest hole is asked for, and frees the others."""
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1000), (1200, 1200), (3000, 3000))
        late = [True]
        asked = _beginning_late(monkeypatch, 3010, lambda: bool(late))
        backfill = d.backfill(rest_again_s=1.0, dump_retry_s=1800.0)
        async with running(backfill):
            await until(lambda: len([w for w in backfill._table if w.lost]) == 2)
            assert all("REST has nothing older" in one.why for one in backfill.stats.under_way)
            before = len(asked)
            await asyncio.sleep(3)
            assert 2 <= len(asked) - before <= 5, "the newest hole alone"
            late.clear()
            await until(lambda: d.whole(BTC, 1000, 3000))
        await d.prove(BTC, 1000, 3000)
        assert backfill.stats.filled["dump"] == 0


async def test_what_rest_has_lost_of_a_day_that_is_over_is_asked_for_each_hour(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**DAYS, "dump_until": "2020-01-01"}
    async with desk(migrated_database, tmp_path, **options) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        late = [True]
        asked = _beginning_late(monkeypatch, 1310, lambda: bool(late))
        backfill = d.backfill(max_age_s=10 * 86_400, rest_again_s=0.1)
        async with running(backfill):
            await until(lambda: _told(backfill, "not there"))
            before = len(asked)
            await asyncio.sleep(1)
            assert len(asked) == before
            late.clear()
            real = clock.mono_ns
            monkeypatch.setattr(clock, "mono_ns", lambda: real() + 3600 * 10**9)
            await until(lambda: d.whole(BTC, 1000, 1300))


async def test_a_run_over_given_holes_tells_what_waits_for_the_end_of_the_day(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1000), (1200, 1200))
        _beginning_late(monkeypatch, 1210, lambda: True)
        backfill = d.backfill(max_age_s=float("inf"), rest_again_s=60.0, dump_retry_s=1800.0)
        (left,) = await asyncio.wait_for(backfill.fill(await d.store.open_holes()), 20)
        assert "REST has nothing older than" in left.why
        assert "comes when that day is over" in left.why


async def test_a_hole_that_a_dump_does_not_fit_spoils_no_other(
    migrated_database: str, tmp_path: Path
) -> None:
    async with desk(migrated_database, tmp_path, rest_keep=100, **DAYS) as d:
        rows = rows_of(d.market, BTC, 1000, 1300, d.symbols.add(BTC))
        ids = rows["trade_id"]
        rows = rows[(ids < 1100) | ((ids > 1110) & (ids < 1250)) | (ids > 1260)]
        rows["trade_us"][rows["trade_id"] < 1120] -= 3_600_000_000 * 10
        await d.store.write_trades(rows)
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: d.whole(BTC, 1240, 1299))
        assert [hole[1:3] for hole in await d.store.open_holes()] == [(1100, 1110)]


async def test_a_run_over_given_holes_does_not_wait_for_those_that_stay(
    migrated_database: str, tmp_path: Path
) -> None:
    """Some ids of one reply are closed as absent, others a kline counts."""
    absent = [f"{BTC}=1110-1119", f"{BTC}=1150-1159"]
    async with desk(migrated_database, tmp_path, first_id=1000, absent=absent) as d:
        await d.capture(BTC, (1000, 1109), (1120, 1149), (1160, 1300))
        await _count_by_kline(d, 1155, 1160)
        backfill = d.backfill(max_age_s=float("inf"), dump_retry_s=60.0)
        (left,) = await asyncio.wait_for(backfill.fill(await d.store.open_holes()), 20)
        assert (left.first_id, left.last_id) == (1150, 1159)
        assert backfill.stats.ids_absent == 10


@pytest.mark.parametrize("has_dumps", [True, False])
async def test_a_long_past_day_comes_as_its_dump(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_dumps: bool
) -> None:
    """REST has it as well, but a page costs more of what the venue allows."""
    monkeypatch.setattr(plan, "DUMP_PAGES", 5)
    fault = {} if has_dumps else {"dump_until": "2020-01-01"}
    options = {**DAYS, "epoch": -4 * 86_400, **fault}
    async with desk(migrated_database, tmp_path, **options) as d:
        first = d.market.next_id(BTC, today_us() - 2 * plan.DAY_US) - 2000
        last = d.market.next_id(BTC, today_us() + 1_000_000)
        await d.capture(BTC, (first, first), (first + 1000, first + 1000), (last, last))
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: d.whole(BTC, first, last))
        await d.prove(BTC, first, last)
        asked = d.client.requests["historicalTrades", "200"]
        if has_dumps:
            assert backfill.stats.filled["dump"] > 20_000 and asked <= 6
        else:
            assert backfill.stats.filled["dump"] == 0 and asked > 20


async def test_a_fresh_hole_that_rest_has_no_longer(migrated_database: str, tmp_path: Path) -> None:
    """It is told of by its ids alone; its times, which name the dumps, are learnt soon after."""
    async with desk(migrated_database, tmp_path, rest_keep=100, **DAYS) as d:
        backfill = d.backfill(max_age_s=10 * 86_400, look_s=600.0)
        async with running(backfill):
            await until(lambda: backfill._next_look_s > 0)
            await d.capture(BTC, (1000, 1100), (1200, 1300))
            backfill.wake([(BTC, 1101, 1199)])
            await until(lambda: d.whole(BTC, 1000, 1300))
        await d.prove(BTC, 1000, 1300)


@pytest.mark.parametrize(
    ("found_after_h", "age_h", "is_filled"),
    [(1, 48, True), (25, 48, False), (1, 24 + 72 + 24, False)],
)
async def test_a_hole_that_was_found_in_time_waits_for_its_dump(
    migrated_database: str, tmp_path: Path, found_after_h: int, age_h: int, is_filled: bool
) -> None:
    """A day's dump comes the day after, when the hole is older than BACKFILL_MAX_AGE."""
    options = {**DAYS, "epoch": -6 * 86_400, "rest_keep": 100}
    async with desk(migrated_database, tmp_path, **options) as d:
        newest = await _newest(d, BTC)
        at_us = d.market.trade_us(BTC, newest) - age_h * 3_600_000_000
        first = d.market.next_id(BTC, at_us)
        await d.capture(BTC, (first - 101, first - 100), (first, first), (newest, newest))
        await d.conn.execute(
            "UPDATE trade_gaps SET state = 'absent' WHERE last_id = $1", newest - 1
        )
        await d.conn.execute(
            "UPDATE trade_gaps SET detected_at = to_timestamp($1) WHERE state = 'open'",
            d.market.trade_us(BTC, first) // 10**6 + found_after_h * 3600,
        )
        backfill = d.backfill(look_s=0.2)
        async with running(backfill):
            if is_filled:
                await until(lambda: d.whole(BTC, first - 101, first))
            else:
                await until(lambda: backfill._next_look_s > 0)
                assert backfill.idle


async def test_absent_by_the_dump(migrated_database: str, tmp_path: Path) -> None:
    options = {**DAYS, "absent": f"{BTC}=1110-1119", "rest_keep": 100}
    async with desk(migrated_database, tmp_path, **options) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: d.closed(BTC))
        await d.prove(BTC, 1000, 1300)
        evidence = json.loads(
            await d.conn.fetchval("SELECT evidence::text FROM trade_gaps WHERE state = 'absent'")
        )
        assert evidence["source"] == "dump"
        assert (evidence["id_below"], evidence["id_above"]) == (1109, 1120)
        assert BTC in evidence["file"]
        assert "nothing older" in evidence["rest"]
        assert len(evidence["sha256"]) == 64
        assert evidence["klines_count"] > 0, "and the venue's klines count no more than are stored"
        assert "looks" not in evidence


@pytest.mark.parametrize("klines", ["away", "more", "slow to count"])
async def test_one_look_at_a_dump_proves_nothing(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, klines: str
) -> None:
    """Without klines, or a count of what is stored in their minutes, it takes two.

    With klines that count the ids it is the file that is wrong.
    """
    real = trades.klines

    async def faulty(*about: Any) -> Any:
        if klines == "away":
            raise RestError("unreachable", "no answer")
        rows = await real(*about)
        if klines == "more":
            rows["trade_count"][0] += 10
        return rows

    async def slow(*_: Any) -> int:
        raise TransientStoreError("timeout", "the database did not count in time")

    monkeypatch.setattr(trades, "klines", faulty)
    if klines == "slow to count":
        monkeypatch.setattr(Store, "trades_between", slow)
    options = {**DAYS, "absent": f"{BTC}=1110-1119", "rest_keep": 100}
    async with desk(migrated_database, tmp_path, **options) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        backfill = d.backfill(max_age_s=10 * 86_400, dump_retry_s=0.3, dump_confirm_s=1.0)
        async with running(backfill):
            if klines != "more":
                await until(lambda: d.closed(BTC))
            else:
                await until(lambda: _told(backfill, "replaced"))
                await asyncio.sleep(2.5)
                assert _told(backfill, "replaced")
                assert [h[1:3] for h in await d.store.open_holes()] == [(1110, 1119)]
                return
        evidence = json.loads(
            await d.conn.fetchval("SELECT evidence::text FROM trade_gaps WHERE state = 'absent'")
        )
        first, second = (datetime.fromisoformat(one["asked_at"]) for one in evidence["looks"])
        assert (second - first).total_seconds() >= 1.0


async def test_a_look_at_a_dump_outlives_trouble_of_the_database(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same dump is read again when it is over, not in the next round."""
    real, asked = Store.is_counted, []

    async def away(*about: Any) -> bool:
        asked.append(about)
        if len(asked) == 1:
            raise TransientStoreError("connection", "the database is away")
        return await real(*about)

    monkeypatch.setattr(Store, "is_counted", away)
    options = {**DAYS, "absent": f"{BTC}=1110-1119", "rest_keep": 100}
    async with desk(migrated_database, tmp_path, **options) as d:
        await d.capture(BTC, (1000, 1109), (1120, 1300))
        backfill = d.backfill(max_age_s=10 * 86_400, dump_retry_s=1800.0)
        async with running(backfill):
            await until(lambda: d.closed(BTC))
        assert len(asked) == 2


def _told(backfill: Backfill, word: str) -> bool:
    return any(word in one.why for one in backfill.stats.under_way)


@pytest.mark.parametrize("by_dump", [False, True])
async def test_a_stored_kline_disproves_absence(
    migrated_database: str, tmp_path: Path, by_dump: bool
) -> None:
    keep = {"rest_keep": 100} if by_dump else {}
    options = {**DAYS, **keep, "absent": f"{BTC}=1110-1119"}
    async with desk(migrated_database, tmp_path, **options) as d:
        await d.capture(BTC, (1000, 1109), (1120, 1300))
        await _count_by_kline(d, 1100, 1120)
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: _told(backfill, "counts these trades"))
        assert [h[1:3] for h in await d.store.open_holes()] == [(1110, 1119)]


def _passing_over(
    monkeypatch: pytest.MonkeyPatch, first_id: int, last_id: int, is_lossy: Callable[[], bool]
) -> None:
    """Let REST pass over these ids, as a database that lost them does, while `is_lossy`."""
    real = trades.historical

    async def historical(client: Any, symbol: str, from_id: int, limit: int = 1000) -> Any:
        if not is_lossy():
            return await real(client, symbol, from_id, limit)
        page = await real(client, symbol, from_id, min(limit + last_id - first_id + 1, 1000))
        ids = page.rows["trade_id"]
        return replace(page, rows=page.rows[(ids < first_id) | (ids > last_id)][:limit])

    monkeypatch.setattr(trades, "historical", historical)


async def _count_by_kline(d: Desk, first_id: int, last_id: int) -> None:
    """Store a kline of the minute of the last of these ids that counts all of them."""
    await d.conn.execute(
        "INSERT INTO klines (timestamp, symbol, first_id, last_id, trade_count, is_closed)"
        " VALUES (date_trunc('minute', to_timestamp($1)), $2, $3, $4, $5, true)",
        d.market.trade_us(BTC, last_id) // 10**6,
        *(BTC, first_id, last_id, last_id - first_id + 1),
    )


async def test_what_rest_passes_over_and_a_kline_counts_comes_from_the_dump(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when REST has to be asked again before the dump is there."""
    _passing_over(monkeypatch, 1110, 1119, lambda: True)
    real, there = dumps.Dumps.read, list[bool]()

    async def read(self: Any, *about: Any) -> Any:
        return await real(self, *about) if there else None

    monkeypatch.setattr(dumps.Dumps, "read", read)
    monkeypatch.setattr(step, "HOUR_S", 0.3)
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        await d.capture(BTC, (1000, 1109), (1120, 1300))
        await _count_by_kline(d, 1100, 1120)
        backfill = d.backfill(max_age_s=10 * 86_400, dump_retry_s=0.3)
        async with running(backfill):
            await until(lambda: _told(backfill, "counts these trades, though it gives them"))
            await until(lambda: _told(backfill, "is not there"))
            asked = d.client.requests["historicalTrades", "200"]
            await until(lambda: d.client.requests["historicalTrades", "200"] > asked + 4)
            there.append(True)
            await until(lambda: d.whole(BTC, 1000, 1300))
        await d.prove(BTC, 1000, 1300)
        assert backfill.stats.filled == {"rest": 0, "dump": 10}
        assert backfill.stats.holes_absent == 0


async def test_what_rest_passes_over_today_and_a_kline_counts_is_asked_for_again(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dump can have it yet, and REST heals; trades below that it has free no such hole."""
    lossy = [True]
    _passing_over(monkeypatch, 1110, 1119, lambda: bool(lossy))
    async with desk(migrated_database, tmp_path, first_id=1000) as d:
        await d.capture(BTC, (1000, 1109), (1120, 1300))
        await _count_by_kline(d, 1100, 1120)
        backfill = d.backfill(rest_again_s=0.8)
        async with running(backfill):
            await until(lambda: _told(backfill, "counts these trades"))
            before = d.client.requests["historicalTrades", "200"]
            await asyncio.sleep(3)
            more = d.client.requests["historicalTrades", "200"] - before
            assert 2 <= more <= 10, "two questions each time"
            assert [h[1:3] for h in await d.store.open_holes()] == [(1110, 1119)]
            lossy.clear()
            await until(lambda: d.whole(BTC, 1000, 1300))
        await d.prove(BTC, 1000, 1300)
        assert backfill.stats.filled == {"rest": 10, "dump": 0}


async def test_a_run_over_given_holes_looks_in_the_dump_for_what_a_kline_counts(
    migrated_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _passing_over(monkeypatch, 1110, 1119, lambda: True)
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        await d.capture(BTC, (1000, 1109), (1120, 1300))
        await _count_by_kline(d, 1100, 1120)
        assert await d.backfill().fill(await d.store.open_holes()) == []
        await d.prove(BTC, 1000, 1300)


@pytest.mark.parametrize(
    ("fault", "word"),
    [({"dump_broken_checksum": True}, "checksum"), ({"dump_until": "2020-01-01"}, "not there")],
)
async def test_a_hole_without_a_usable_dump_stays_open(
    migrated_database: str, tmp_path: Path, fault: dict[str, Any], word: str
) -> None:
    async with desk(migrated_database, tmp_path, rest_keep=100, **DAYS, **fault) as d:
        await d.capture(BTC, (1000, 1100), (1200, 1300))
        newest = await _newest(d, BTC)
        await d.capture(BTC, (newest - 50, newest - 40), (newest, newest))
        backfill = d.backfill(max_age_s=10 * 86_400)
        async with running(backfill):
            await until(lambda: d.whole(BTC, newest - 50, newest))
            await until(lambda: any(word in one.why for one in backfill.stats.under_way))
        holes = await d.store.open_holes()
        assert {hole.first_id for hole in holes} == {1101, 1301}
        assert backfill.stats.filled["dump"] == 0
