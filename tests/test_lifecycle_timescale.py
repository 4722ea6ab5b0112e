"""Old days on TimescaleDB in full: compression, and the server's own jobs."""

import asyncio
import time
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from lifecycle_desk import (
    DAY,
    START,
    Trade,
    candles_done,
    check,
    days_of,
    expected,
    give_up,
    history,
    opened,
    put,
    put_tickers,
    rows_of,
    shuffled,
    unfilled,
    us,
)
from store_desk import Database, at

from tradecore._symbols import SymbolTable
from tradecore.lifecycle import LifecycleStats
from tradecore.store.candle_windows import TRY_TO_REFRESH
from tradecore.store.candles import WIDTHS
from tradecore.store.verify import verify

pytestmark = pytest.mark.every_level

full = pytest.mark.only_levels("community", "timescale")


DROPPER, REFRESHING = "tradecore_drop_expired", ("policy_refresh_continuous_aggregate",)


async def jobs_of_server(db: Database, *names: str) -> list[int]:
    rows = await db.conn.fetch(
        "SELECT job_id FROM timescaledb_information.jobs WHERE proc_name = ANY($1::text[])"
        " ORDER BY 1",
        names,
    )
    return [row[0] for row in rows]


async def compressed(db: Database, **changed: Any) -> LifecycleStats:
    async with opened(db.dsn, **changed) as lifecycle:
        await lifecycle.round()
        assert lifecycle.stats.trouble == {}
        return lifecycle.stats


@full
async def test_past_days_are_compressed_and_stay_the_same(db: Database) -> None:
    trades = history("BTCUSDT", days=4, every_s=20) + history("ETHUSDT", days=4, every_s=60)
    await put(db, trades)
    await put_tickers(db, 4)
    before = await db.conn.fetch("SELECT * FROM raw_trades ORDER BY timestamp, symbol, trade_id")
    stats = await compressed(db, retention_s=None, compress_after_s=86_400)
    assert stats.chunks["tickers", "compressed"] == 4  # by us, or by a policy that works
    assert (stats.chunks["raw_trades", "compressed"], stats.chunks["raw_trades", "open"]) == (4, 0)
    old, new = stats.saved["raw_trades"]
    assert 0 < new < old
    rows = await db.conn.fetch("SELECT * FROM raw_trades ORDER BY timestamp, symbol, trade_id")
    assert rows == before
    await db.check_ledger()
    await check(db, expected(trades, {}, START), START)


@full
async def test_backfill_into_compressed_days(db: Database) -> None:
    """Holes in thirty compressed days are filled by one batch, again and again, and exactly."""
    all_trades = history("BTCUSDT", days=30, every_s=150)
    missing = [one for one in all_trades if one.trade_id % 3 == 1]
    symbols = SymbolTable()
    await put(db, [one for one in all_trades if one.trade_id % 3], symbols)
    await compressed(db, retention_s=None, compress_after_s=86_400)
    filler = [one for one in all_trades if one.trade_id % 3 == 0]
    assert missing
    began = time.monotonic()
    result = await db.sink.write_trades(rows_of(filler, symbols), symbols=symbols, filled_by="rest")
    took_s = time.monotonic() - began
    assert (result.stored, result.duplicate, result.parked) == (len(filler), 0, 0)
    assert took_s < 30
    again = await db.sink.write_trades(rows_of(filler, symbols), symbols=symbols)
    assert (again.stored, again.duplicate) == (0, len(filler))
    await check(db, expected(all_trades, {}, START), START)
    # One that the ledger does not know is a doubled key; the batch goes through the staging table.
    stray = all_trades[100]._replace(symbol="ETHUSDT")
    await db.conn.execute(
        "INSERT INTO raw_trades (timestamp, symbol, price, quantity, side, trade_id)"
        " VALUES ($1, 'ETHUSDT', 1, 1, 'BUY', $2)",
        at(stray.us),
        stray.trade_id,
    )
    some = [one._replace(symbol="ETHUSDT") for one in all_trades[90:110]]
    result = await db.sink.write_trades(rows_of(some, symbols), symbols=symbols)
    assert (result.stored, result.duplicate) == (19, 1)
    assert (await verify(db.conn)).differences == []
    async with opened(db.dsn, retention_s=None, compress_after_s=86_400) as lifecycle:
        await lifecycle.round()
        assert lifecycle.stats.chunks["raw_trades", "compressed"] == 30  # again
        before = lifecycle.stats.compressed["raw_trades"]
        await put(db, [Trade("BNBUSDT", 5, all_trades[50].us)])
        await lifecycle.round()  # at most once an hour
        assert lifecycle.stats.compressed["raw_trades"] == before
    assert (await verify(db.conn)).differences == []


@full
async def test_retention_over_compressed_days(db: Database) -> None:
    stored, missing = [], []
    for seed in range(20):
        some, lacking = shuffled(seed, f"S{seed:03}USDT", START + 2 * DAY)
        stored += some
        missing += lacking
    stored += history("BTCUSDT", days=4.5, every_s=60)
    await put(db, stored)
    gaps = await unfilled(db.conn)
    await candles_done(db.conn)
    days = 2.4 * 86_400
    stats = await compressed(db, retention_s=int(days), compress_after_s=86_400)
    assert stats.horizon_us == us(START + 2 * DAY)
    await check(db, expected(stored, gaps, START + 2 * DAY), START + 2 * DAY)


@full
async def test_the_policies_are_those_of_the_settings(db: Database) -> None:
    async def policies() -> list[tuple[Any, ...]]:
        rows = await db.conn.fetch(
            "SELECT hypertable_name, proc_name, (config->>'compress_after')::interval"
            " FROM timescaledb_information.jobs"
            " WHERE hypertable_name IN ('raw_trades', 'tickers') ORDER BY 1, 2"
        )
        return [tuple(row) for row in rows]

    def wanted(compress: timedelta | None) -> list[tuple[Any, ...]]:
        tables = ("raw_trades", "tickers") if compress else ()
        return [(table, "policy_compression", compress) for table in tables]

    await put(db, history("BTCUSDT", days=5, every_s=3600))
    await compressed(db, retention_s=2 * 86_400, compress_after_s=86_400)
    # Candles are not computed: no policy of the server may refresh them.
    assert await policies() == wanted(timedelta(days=1))
    assert await jobs_of_server(db, *REFRESHING) == []
    assert len(await jobs_of_server(db, DROPPER)) == 1
    await candles_done(db.conn)
    stats = await compressed(db, retention_s=3 * 86_400, compress_after_s=2 * 86_400)
    assert await policies() == wanted(timedelta(days=2))
    refreshing = await jobs_of_server(db, *REFRESHING)
    assert len(refreshing) == len(WIDTHS)
    assert "retention" in [one.name for one in stats.jobs.jobs]
    await compressed(db, retention_s=50 * 86_400, compress_after_s=None)
    assert await policies() == wanted(None)
    assert await jobs_of_server(db, *REFRESHING) == refreshing
    assert len(await jobs_of_server(db, DROPPER)) == 1
    stats = await compressed(db, retention_s=None, compress_after_s=None)
    assert await jobs_of_server(db, DROPPER) == []
    assert "retention" not in [one.name for one in stats.jobs.jobs]


@full
@pytest.mark.parametrize("retention_s", [86_400, None])
async def test_nothing_is_dropped_that_the_ledger_holds(
    db: Database, retention_s: int | None
) -> None:
    """Whatever the server's clock says, and however long no daemon ran."""
    trades = history("BTCUSDT", days=4, every_s=600)
    await put(db, trades)
    await put_tickers(db, 4)
    for table in ("raw_trades", "tickers"):  # of an older version, or by hand
        await db.conn.execute(
            f"SELECT add_retention_policy('{table}', interval '3 days',"
            " initial_start => 'infinity')"
        )
    await compressed(db, retention_s=retention_s, compress_after_s=None)
    for job_id in await jobs_of_server(db, "policy_retention", DROPPER):
        await db.conn.execute(f"CALL run_job({job_id})")
    assert await jobs_of_server(db, "policy_retention") == []
    assert len(await days_of(db, "tickers")) == 4
    await check(db, expected(trades, {}, START), START)


@full
async def test_the_server_drops_what_is_given_up(db: Database) -> None:
    trades = history("BTCUSDT", days=4, every_s=600)
    await put(db, trades)
    await put_tickers(db, 4)
    await compressed(db, retention_s=86_400, compress_after_s=None)  # waits for candles
    (job_id,) = await jobs_of_server(db, DROPPER)
    await candles_done(db.conn)
    to = START + 2 * DAY
    await give_up(db, to)
    assert len(await days_of(db, "raw_trades")) >= 3  # the server may be at it already
    await db.conn.execute(f"CALL run_job({job_id})")
    for table in ("raw_trades", "tickers"):
        assert min(await days_of(db, table)) == to.date()
    await check(db, expected(trades, {}, to), to)


@pytest.mark.only_levels("timescale")
async def test_the_server_drops_by_itself(db: Database) -> None:
    """Also where it reports the run as failed afterwards."""
    trades = history("BTCUSDT", days=4, every_s=600)
    await put(db, trades)
    await put_tickers(db, 4)
    await db.conn.execute("SELECT _timescaledb_functions.start_background_workers()")
    await compressed(db, retention_s=86_400, compress_after_s=None)
    (job_id,) = await jobs_of_server(db, DROPPER)
    await candles_done(db.conn)
    to = START + 2 * DAY
    await give_up(db, to)
    await db.conn.execute("SELECT alter_job($1, next_start => clock_timestamp())", job_id)
    async with asyncio.timeout(90):
        while min(await days_of(db, "tickers")) < to.date():
            await asyncio.sleep(0.5)
    assert min(await days_of(db, "raw_trades")) == to.date()
    await check(db, expected(trades, {}, to), to)


@pytest.mark.only_levels("timescale")
async def test_the_server_waits_for_a_refresh(db: Database) -> None:
    await put(db, history("BTCUSDT", days=4, every_s=600))
    await compressed(db, retention_s=86_400, compress_after_s=None)
    (job_id,) = await jobs_of_server(db, DROPPER)
    await candles_done(db.conn)
    refresher, other = await asyncpg.connect(db.dsn), await asyncpg.connect(db.dsn)
    assert await refresher.fetchval(TRY_TO_REFRESH)
    await give_up(db, START + 2 * DAY)
    run = asyncio.create_task(other.execute(f"CALL run_job({job_id})"))
    await asyncio.sleep(0.5)
    assert not run.done()
    assert len(await days_of(db, "raw_trades")) == 4
    await refresher.close()
    await run
    assert len(await days_of(db, "raw_trades")) == 2
    assert await other.fetchval(TRY_TO_REFRESH)
    await other.close()


@full
async def test_days_that_a_policy_has_dropped_leave_the_ledger(db: Database) -> None:
    trades = history("BTCUSDT", days=6, every_s=600)
    trades += history("ETHUSDT", days=6, every_s=50_000)
    trades += history("OLDUSDT", days=1, every_s=600)
    await put(db, trades)
    await candles_done(db.conn)
    await db.conn.execute(
        "SELECT drop_chunks('raw_trades', older_than => $1::timestamptz)", START + 2 * DAY
    )
    to = START + 4 * DAY
    await give_up(db, to)
    await check(db, expected(trades, {}, to), to)


@pytest.mark.only_levels("timescale")
async def test_jobs_that_fail_are_told_and_the_work_is_done(db: Database) -> None:
    """The server's jobs may work, or be reported as failed: both are told as they are."""
    await put(db, history("BTCUSDT", days=3, every_s=600))
    # A database that was copied waits up to a minute for a scheduler of its own.
    await db.conn.execute("SELECT _timescaledb_functions.start_background_workers()")
    async with opened(db.dsn, retention_s=None, compress_after_s=86_400) as lifecycle:
        async with asyncio.timeout(60):
            while lifecycle.stats.jobs.states["waiting"] or not lifecycle.stats.jobs.jobs:
                await lifecycle.round()
                await asyncio.sleep(0.5)
        stats = lifecycle.stats
        assert (stats.trouble, stats.chunks["raw_trades", "open"]) == ({}, 0)
        rows = await db.conn.fetch(
            "SELECT job_id, last_run_status FROM timescaledb_information.job_stats"
            " WHERE hypertable_name IN ('raw_trades', 'tickers')"
        )
        failed = {row["job_id"] for row in rows if row["last_run_status"] == "Failed"}
        ours = [one for one in stats.jobs.jobs if one.name.startswith("compression")]
        assert len([one for one in ours if one.state == "failed"]) == len(failed)
        if failed:
            assert "compression of raw_trades" in stats.jobs.trouble
            assert all(one.sqlstate and one.error for one in ours if one.state == "failed")
