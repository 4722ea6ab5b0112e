"""Candles are what the stored trades say, on every level, whatever came late or was dropped."""

import asyncio
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from candle_desk import check_candles, stored_candles
from store_desk import NAMES, Database, at, trades

from tests.daemon import daemon
from tests.fakes import simulated_exchange
from tradecore.clock import wall_ns
from tradecore.errors import TransientStoreError
from tradecore.schema import FLAG_BUYER_IS_MAKER
from tradecore.store import candle_windows, candles
from tradecore.store.candles import WIDTHS, CandleKind, read_kind, whole_candles
from tradecore.store.migrate import detect_level

pytestmark = pytest.mark.every_level

DAY_US = 86_400_000_000
MINUTE = timedelta(minutes=1)
START_US = 1_790_000_000_000_000 // DAY_US * DAY_US - 30 * DAY_US
"""A midnight, weeks before the present of the tests."""


def made(symbol_id: int, trade_id: int, us: int, seed: int = 0) -> dict[str, int]:
    rng = random.Random(symbol_id * 1_000_003 + trade_id + seed)
    return {
        "symbol_id": symbol_id,
        "trade_id": trade_id,
        "price_e8": rng.choice([1, rng.randrange(1, 10**9), rng.randrange(1, 2**63)]),
        "quantity_e8": rng.choice([1, rng.randrange(1, 10**9), rng.randrange(1, 2**63)]),
        "trade_us": us,
        "recv_ns": us * 1000,
        "flags": FLAG_BUYER_IS_MAKER if rng.random() < 0.5 else 0,
    }


def market(first_us: int, end_us: int, count: int, first_id: int = 1) -> list[dict[str, int]]:
    """Trades of two symbols, some of them in one microsecond, ids ascending with time."""
    found = []
    for symbol_id in (0, 1):
        rng = random.Random(symbol_id + count)
        times = sorted(rng.randrange(first_us, end_us) for _ in range(count))
        times[1:4] = [times[1]] * 3
        found += [made(symbol_id, first_id + i, us) for i, us in enumerate(times)]
    return found


async def kind_of(db: Database) -> CandleKind:
    return await read_kind(db.conn, await detect_level(db.conn))


async def refresh(*arguments: Any, **options: Any) -> None:
    """Refresh; again where a policy of the server is at the same candles, as the daemon does."""
    for _ in range(50):
        try:
            return await candles.refresh(*arguments, **options)
        except TransientStoreError as error:
            if error.reason != "55P03":
                raise
            await asyncio.sleep(0.1)
    raise AssertionError("somebody else refreshes without an end")


async def fenced(db: Database) -> list[tuple[datetime, datetime]]:
    """Move the fence as the daemon does; return the spans to compute anew."""
    await candle_windows.move_fence(db.conn, timedelta())
    return (await candle_windows.read_waiting(db.conn)).spans


async def work_off(db: Database, **options: Any) -> list[tuple[datetime, datetime]]:
    """Compute all that waits as the daemon does; return what it was."""
    kind = await kind_of(db)
    ids, spans = await candle_windows.read_waiting(db.conn)
    for first, end in spans if len(spans) < 10 else [(spans[0][0], spans[-1][1])]:
        await refresh(db.conn, kind, first, end, **options)
        await candle_windows.settle(db.conn, ids, first, end)
    assert (await candle_windows.read_waiting(db.conn)).ids == []
    return spans


async def test_candles_of_all_widths_equal_a_recomputation(db: Database) -> None:
    rows = market(START_US - 3 * 60_000_000, START_US + DAY_US // 4, 400)
    await db.sink.write_trades(trades(*rows))
    (span,) = await fenced(db)
    first_us = min(row["trade_us"] for row in rows)
    assert span[0] == at(first_us // 60_000_000 * 60_000_000)
    await work_off(db)
    await check_candles(db.conn)


async def test_a_refresh_again_changes_nothing(db: Database) -> None:
    await db.sink.write_trades(trades(*market(START_US, START_US + DAY_US, 50)))
    for _ in range(2):
        await refresh(db.conn, await kind_of(db), at(START_US), at(START_US + DAY_US))
        await check_candles(db.conn)


async def test_late_trades_are_entered_with_their_minutes_only(db: Database) -> None:
    rows = market(START_US, START_US + DAY_US, 300)
    late = [row for row in rows if row["trade_id"] in (7, 8, 120)]
    await db.sink.write_trades(trades(*(row for row in rows if row not in late)))
    await fenced(db)
    await work_off(db)
    await check_candles(db.conn)
    await db.sink.write_trades(trades(*late))
    minutes = {at(row["trade_us"] // 60_000_000 * 60_000_000) for row in late}
    spans = await work_off(db)
    inside = {
        first + n * MINUTE for first, end in spans for n in range(round((end - first) / MINUTE))
    }
    assert inside == minutes
    await check_candles(db.conn)


async def test_trades_above_the_fence_are_not_entered(db: Database) -> None:
    await fenced(db)
    now_us = wall_ns() // 1000
    await db.sink.write_trades(trades(made(0, 1, now_us + 2 * 3_600_000_000)))
    assert await fenced(db) == []
    await db.sink.write_trades(trades(made(0, 2, now_us - 600_000_000)))
    assert len(await fenced(db)) == 1


async def test_a_batch_is_entered_with_its_trades_or_not_at_all(db: Database) -> None:
    await fenced(db)
    await db.conn.execute("ALTER TABLE candle_windows ADD CHECK (false) NOT VALID")
    with pytest.raises(Exception, match="check"):
        await db.sink.write_trades(trades(made(0, 1, START_US)))
    assert await db.conn.fetchval("SELECT count(*) FROM raw_trades") == 0


async def test_history_from_above(db: Database) -> None:
    """Back-fill comes newest first, in pages, while the fence stands far above."""
    await fenced(db)
    rows = market(START_US, START_US + 3 * DAY_US, 600)
    for at_row in range(len(rows), 0, -100):
        await db.sink.write_trades(trades(*rows[max(0, at_row - 100) : at_row]))
    await work_off(db)
    await check_candles(db.conn)


async def test_candles_below_the_horizon_stay(db: Database) -> None:
    rows = market(START_US, START_US + 2 * DAY_US, 200)
    await db.sink.write_trades(trades(*rows))
    await fenced(db)
    await work_off(db)
    before = {name: await stored_candles(db.conn, name) for name in WIDTHS}
    horizon = at(START_US + DAY_US)
    await db.conn.execute("DELETE FROM raw_trades WHERE timestamp < $1", horizon)
    await db.conn.execute("UPDATE store_state SET raw_from = $1", horizon)
    kind = await kind_of(db)
    await refresh(db.conn, kind, at(START_US), at(START_US + 2 * DAY_US), raw_from=horizon)
    for name in WIDTHS:
        assert await stored_candles(db.conn, name) == before[name], name


async def test_trades_below_the_horizon_are_counted_and_not_stored(db: Database) -> None:
    await db.conn.execute("UPDATE store_state SET raw_from = $1", at(START_US + DAY_US))
    rows = [made(0, 1, START_US), made(0, 2, START_US + DAY_US - 1), made(0, 3, START_US + DAY_US)]
    result = await db.sink.write_trades(trades(*rows))
    assert (result.stored, result.expired) == (1, 2)
    await db.check(trades(rows[2]))


async def test_a_candle_whose_trades_are_gone_goes(db: Database) -> None:
    await db.sink.write_trades(trades(*market(START_US, START_US + DAY_US // 24, 30)))
    await fenced(db)
    await work_off(db)
    await db.conn.execute(
        "DELETE FROM raw_trades WHERE symbol = $1 AND timestamp < $2",
        NAMES[0],
        at(START_US + 20 * 60_000_000),
    )
    await refresh(db.conn, await kind_of(db), at(START_US), at(START_US + DAY_US))
    await check_candles(db.conn)


async def test_the_candle_under_way_is_there_in_every_width(db: Database) -> None:
    now_us = wall_ns() // 1000
    kind = await kind_of(db)
    rows = market(now_us - 7_200_000_000, now_us, 200)
    await db.sink.write_trades(trades(*rows[:390]))
    state = await candle_windows.move_fence(db.conn, timedelta())
    await work_off(db, closed=state.through)
    for some in (rows[390:395], rows[395:]):
        await db.sink.write_trades(trades(*some))
        assert state.through is not None
        await work_off(db, closed=state.through)
        end = state.now + 2 * MINUTE
        await refresh(db.conn, kind, state.through, end, closed=state.through)
        await check_candles(db.conn)


@pytest.mark.two_sessions
async def test_the_fence_waits_for_writers_and_not_for_long(db: Database) -> None:
    """Trades of a passing minute are committed before the fence passes it, or entered."""
    async with db.pool.acquire() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.fetchval(
            "SELECT pg_advisory_xact_lock_shared($1, hashtext(current_schema()))", 0x74637772
        )
        before = await candle_windows.read_state(db.conn)
        after = await candle_windows.move_fence(db.conn, timedelta())
        assert after.through == before.through, "a writer is under way"
        await transaction.rollback()
    assert (await candle_windows.move_fence(db.conn, timedelta())).through is not None


def test_whole_candles() -> None:
    first, end = at(START_US + 1), at(START_US + 61_000_000)
    assert whole_candles(first, end, "1m") == (at(START_US), at(START_US + 120_000_000))
    assert whole_candles(first, end, "4h")[1] == at(START_US + 4 * 3_600_000_000)
    exact = at(START_US), at(START_US + DAY_US)
    assert all(whole_candles(*exact, width) == exact for width in WIDTHS)


# -- the daemon --------------------------------------------------------------------------------


async def until_equal(conn: asyncpg.Connection) -> None:
    """Wait until no trades are on their way and all candles are what they say."""
    async with asyncio.timeout(60):
        while True:
            try:
                async with conn.transaction(isolation="repeatable_read"):
                    await check_candles(conn)
                return
            except AssertionError:
                await asyncio.sleep(0.2)


@pytest.mark.two_sessions
async def test_the_daemon_keeps_them(tmp_path: Path, migrated_database: str) -> None:
    """Kill -9 in between: minutes that were stored and not computed are computed later."""
    async with simulated_exchange(
        symbols="BTCUSDT,ETHUSDT", rate=300, epoch=-60, drop_every=500
    ) as exchange:
        environ = {
            "DATABASE_URL": migrated_database,
            "BINANCE_WEBSOCKET_URL": exchange.ws,
            "BINANCE_REST_URL": exchange.rest,
            "BINANCE_DUMP_URL": exchange.rest,
            "SUPPORTED_SYMBOLS": "BTCUSDT,ETHUSDT",
        }
        conn = await asyncpg.connect(migrated_database)
        async with daemon(tmp_path, **environ) as one:
            await one.until_stored(300)
            await one.kill()
            await one.start()
            await one.until_stored(300)
            await one.terminate()
            await one.start("run")
            await one.until_stored(1)
            async with asyncio.timeout(30):
                while not await conn.fetchval("SELECT count(*) FROM candles_1d"):
                    await asyncio.sleep(0.1)
            await exchange.fault("pause")
            await until_equal(conn)
        await conn.close()


async def test_trades_ahead_of_a_slow_server_clock_are_the_present(db: Database) -> None:
    now_us = wall_ns() // 1000
    rows = market(now_us - 600_000_000, now_us + 1_200_000_000, 50)
    await db.sink.write_trades(trades(*rows))
    state = await candle_windows.move_fence(db.conn, timedelta(seconds=5))
    assert state.now == at(max(row["trade_us"] for row in rows))
    await work_off(db, closed=state.through)
    assert state.through is not None
    await refresh(db.conn, await kind_of(db), state.through, state.now + MINUTE, closed=None)
    await check_candles(db.conn)


@pytest.mark.only_levels("community", "timescale")
async def test_a_refresh_does_not_reach_below_the_first_chunk(db: Database) -> None:
    """Somebody dropped trades, and did not ask: their candles stay."""
    rows = market(START_US, START_US + 3 * DAY_US, 200)
    await db.sink.write_trades(trades(*rows))
    await fenced(db)
    await work_off(db)
    before = {name: await stored_candles(db.conn, name) for name in WIDTHS}
    await db.conn.execute(
        "SELECT drop_chunks('raw_trades', $1::timestamptz)", at(START_US + DAY_US)
    )
    begin = await candle_windows.first_chunk(db.conn)
    assert begin == at(START_US + DAY_US)
    kind = await kind_of(db)
    await refresh(db.conn, kind, at(START_US), at(START_US + 3 * DAY_US), raw_from=begin)
    for name in WIDTHS:
        assert await stored_candles(db.conn, name) == before[name], name
