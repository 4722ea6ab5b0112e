"""Tables go up a level with everything that is in them."""

import asyncio
from contextlib import suppress
from datetime import timedelta

import asyncpg
import pytest
from candle_desk import check_candles, stored_candles
from store_desk import Database, at, trades
from test_candles import DAY_US, START_US, fenced, market, work_off

from tradecore._symbols import SymbolTable
from tradecore.errors import TransientStoreError
from tradecore.lifecycle import Lifecycle
from tradecore.settings import Settings
from tradecore.store.candles import WIDTHS
from tradecore.store.migrate import (
    Level,
    check,
    detect_level,
    load_migrations,
    migrate,
    reach_timescale,
)
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.raise_level import possible_level, raise_level
from tradecore.store.store import Store
from tradecore.store.verify import verify
from tradecore.values import Secret

pytestmark = [pytest.mark.every_level, pytest.mark.only_levels("apache", "community", "timescale")]


async def migrate_at(conn: asyncpg.Connection, level: Level) -> None:
    """Make the tables of a lower level than the server would let them be."""
    await conn.execute(
        "CREATE TABLE schema_migrations (version int PRIMARY KEY, name text NOT NULL,"
        " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    for migration in load_migrations():
        async with conn.transaction():
            if level != "plain":
                await reach_timescale(conn)
            await conn.execute(migration.render(level))
            await conn.execute(
                "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.checksum,
            )


@pytest.mark.parametrize("before", ["plain", "apache"])
async def test_everything_is_there_afterwards(database: str, before: Level, level: str) -> None:
    pool = await open_pool(database, 1)
    conn = await asyncpg.connect(database)
    try:
        await migrate_at(conn, before)
        after = "apache" if level == "apache" else "community"
        db = Database(database, pool, conn)
        rows = market(START_US, START_US + 2 * DAY_US, 300)
        await db.sink.write_trades(trades(*rows))
        days = {at(START_US + n * DAY_US).date() for n in range(2)}
        await Partitions().ensure(conn, "tickers", days)
        await conn.execute(
            "INSERT INTO tickers (timestamp, symbol, event_time) SELECT timestamp, symbol,"
            " max(timestamp) FROM raw_trades GROUP BY 1, 2"
        )
        await conn.execute(
            "INSERT INTO klines (timestamp, symbol, is_closed)"
            " SELECT date_trunc('minute', timestamp), symbol, true FROM raw_trades GROUP BY 1, 2"
        )
        await fenced(db)
        await work_off(db)
        # The candles of the first day are all that is left of it.
        candles = {name: await stored_candles(conn, name) for name in WIDTHS}
        horizon = at(START_US + DAY_US)
        async with conn.transaction():
            await conn.execute("DELETE FROM raw_trades WHERE timestamp < $1", horizon)
            await conn.execute("UPDATE store_state SET raw_from = $1", horizon)
        stored = {
            table: await conn.fetch(f"SELECT * FROM {table} ORDER BY timestamp, symbol")
            for table in ("tickers", "klines")
        }
        stored["raw_trades"] = await conn.fetch("SELECT * FROM raw_trades ORDER BY 1, 2, trade_id")

        assert (await possible_level(conn) == before) == (before == after)
        assert await raise_level(conn) == ((before, after) if before != after else (after, after))
        assert await detect_level(conn) == after
        assert (await check(conn)).current
        assert await migrate(conn) == []
        for table, expected in stored.items():
            order = "1, 2, trade_id" if table == "raw_trades" else "1, 2"
            assert await conn.fetch(f"SELECT * FROM {table} ORDER BY {order}") == expected
        keys = await conn.fetch(
            "SELECT conname, contype FROM pg_constraint"
            " WHERE conrelid = 'raw_trades'::regclass AND contype IN ('u', 'p')"
        )
        assert [row["conname"] for row in keys] == ["raw_trades_timestamp_symbol_trade_id_key"]
        await fenced(db)
        await work_off(db, raw_from=horizon, closed=horizon + timedelta(days=30))
        for name in WIDTHS:
            assert await stored_candles(conn, name) == candles[name], name
        assert await raise_level(conn) == (after, after), "once is enough"

        # It goes on as if it had never been otherwise.
        more = market(START_US + 2 * DAY_US, START_US + 3 * DAY_US, 40, first_id=301)
        with suppress(TransientStoreError):  # a sink that knew it as it was looks again
            assert (await db.sink.write_trades(trades(*more))).stored == 80
        result = await db.sink.write_trades(trades(*more))
        assert result.stored + result.duplicate == 80
        await conn.execute("UPDATE store_state SET raw_from = '-infinity'")
        await work_off(db)
    finally:
        await conn.close()
        await pool.close()


@pytest.mark.only_levels("community", "timescale")
@pytest.mark.parametrize("before", ["plain", "apache"])
async def test_candles_below_the_horizon_are_carried_over(database: str, before: Level) -> None:
    """They show at once, and no job of the server computes them from trades that are gone."""
    pool = await open_pool(database, 1)
    conn = await asyncpg.connect(database)
    try:
        await migrate_at(conn, before)
        db = Database(database, pool, conn)
        today = (await conn.fetchval("SELECT clock_timestamp()")).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
        first_us = int((today - timedelta(days=4)).timestamp()) * 1_000_000
        await db.sink.write_trades(trades(*market(first_us, first_us + 4 * DAY_US, 600)))
        await fenced(db)
        await work_off(db)
        candles = {name: await stored_candles(conn, name) for name in WIDTHS}
        horizon = today - timedelta(days=1)
        await conn.execute("DELETE FROM raw_trades WHERE timestamp < $1", horizon)
        await conn.execute("UPDATE store_state SET raw_from = $1, ledger_from = $1", horizon)
        assert await raise_level(conn) == (before, "community")
        await refreshed_by_jobs(conn)
        for name in WIDTHS:
            assert await stored_candles(conn, name) == candles[name], name
        settings = Settings(
            database_url=Secret(database), retention_s=86_400, compress_after_s=None, db_pool_size=3
        )
        store = Store(settings, SymbolTable())
        await store.open()
        try:
            lifecycle = Lifecycle(store, settings)
            await lifecycle.round()
            assert await refreshed_by_jobs(conn) == 0  # not before all are computed
            await fenced(db)
            await work_off(db, raw_from=horizon, closed=today)
            await lifecycle.round()
            assert lifecycle.stats.trouble == {}
        finally:
            await store.close()
        assert await refreshed_by_jobs(conn) == len(WIDTHS)
        for name in WIDTHS:
            assert await stored_candles(conn, name) == candles[name], name
        assert lifecycle.stats.jobs.jobs[0].name == "retention"
    finally:
        await conn.close()
        await pool.close()


async def refreshed_by_jobs(conn: asyncpg.Connection) -> int:
    """Let each job refresh that there is, the widest first; return their number."""
    jobs = await conn.fetch(
        "SELECT job_id FROM timescaledb_information.jobs"
        " WHERE proc_name = 'policy_refresh_continuous_aggregate' ORDER BY job_id DESC"
    )
    for (job_id,) in jobs:
        for _ in range(50):
            try:
                await conn.execute(f"CALL run_job({job_id})")
                break
            except asyncpg.LockNotAvailableError:  # the server itself is at it
                await asyncio.sleep(0.1)
    return len(jobs)


async def test_the_newest_tables_need_no_raise(db: Database) -> None:
    level = await detect_level(db.conn)
    assert await possible_level(db.conn) == level
    assert await raise_level(db.conn) == (level, level)
    await check_candles(db.conn)
    assert (await verify(db.conn)).rows == 0
