import asyncio
import random
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch

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
from tradecore.errors import TransientStoreError
from tradecore.lifecycle import Lifecycle
from tradecore.store import chunks as chunks_of
from tradecore.store import horizon, trim
from tradecore.store.candles import WIDTHS, read_kind, refresh
from tradecore.store.chunks import chunks, read_server
from tradecore.store.migrate import detect_level
from tradecore.store.verify import verify

pytestmark = pytest.mark.every_level


async def test_the_ledger_is_that_of_the_rows_above_the_horizon(db: Database) -> None:
    trades = [
        *history("BTCUSDT", days=3.5, every_s=60),
        *history("ETHUSDT", days=3.5, every_s=900, first_id=500),
        *history("OLDUSDT", days=1.5, every_s=900),
        *history("NEWUSDT", days=1, every_s=900, begin=START + 2.5 * DAY),
    ]
    await put(db, trades)
    await candles_done(db.conn)
    gaps = await unfilled(db.conn)
    assert gaps == {}
    for days in (1, 2, 3):
        to = START + days * DAY
        assert await give_up(db, to) >= 1
        await check(db, expected(trades, gaps, to), to)
    assert await give_up(db, START + 3 * DAY) == 0


async def test_holes_and_times_that_do_not_ascend(db: Database) -> None:
    midnight = START + DAY
    stored, missing = [], []
    for seed in range(60):
        some, lacking = shuffled(seed, f"S{seed:03}USDT", midnight)
        stored += some
        missing += lacking
    await put(db, stored)
    for one in missing[::3]:
        await db.sink.close_absent(one.symbol, one.trade_id, one.trade_id, {"source": "test"})
    await candles_done(db.conn)
    gaps = await unfilled(db.conn)
    assert set(gaps.values()) == {"open", "absent"}
    await give_up(db, midnight)
    await check(db, expected(stored, gaps, midnight), midnight)
    # What was missing and comes after all is stored as far as it is young enough.
    result = [one for one in missing if one.us >= us(midnight)]
    symbols = SymbolTable()
    await put(db, missing, symbols)
    both = [*stored, *result]
    kept = {(one.symbol, one.trade_id) for one in both if one.us >= us(midnight)}
    rows = await db.conn.fetch(
        "SELECT symbol, trade_id FROM raw_trades WHERE timestamp >= $1", midnight
    )
    assert {(row[0], row[1]) for row in rows} == kept
    assert (await verify(db.conn)).differences == []
    await candles_done(db.conn)
    later = midnight + DAY
    await give_up(db, later)
    assert (await verify(db.conn)).differences == []


async def test_a_silent_symbol_keeps_its_last_id(db: Database) -> None:
    await put(db, history("OLDUSDT", days=0.5, every_s=3600, first_id=100))
    await put(db, history("BTCUSDT", days=3, every_s=3600))
    await candles_done(db.conn)
    await give_up(db, START + 2 * DAY)
    ranges = "SELECT first_id, last_id FROM trade_coverage WHERE symbol = 'OLDUSDT' ORDER BY 1"
    assert await db.conn.fetch(ranges) == [(111, 111)]
    # It trades again: what it printed meanwhile is a hole, and the next id is none.
    symbols = SymbolTable()
    await put(db, [Trade("OLDUSDT", 120, us(START + 2.5 * DAY))], symbols)
    assert await db.gaps() == [(112, 119, "unknown", "open", None)]
    await put(db, [Trade("OLDUSDT", 112, us(START + 2.2 * DAY))], symbols)
    assert await db.conn.fetch(ranges) == [(111, 112), (120, 120)]
    report = await verify(db.conn)
    assert report.differences == [], [str(one) for one in report.differences]
    await candles_done(db.conn)
    await give_up(db, START + 3 * DAY)
    assert await db.conn.fetch(ranges) == [(120, 120)]
    assert (await verify(db.conn)).differences == []


async def test_the_horizon_waits_for_candles(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3, every_s=3600))
    await candles_done(db.conn, START + 1.5 * DAY)
    state = await horizon.read_state(db.conn)
    assert horizon.held_back(state, START + 2 * DAY) == START + DAY
    assert not await horizon.raise_horizon(db.conn, START + 2 * DAY)
    await candles_done(db.conn)
    await put(db, [Trade("ETHUSDT", 1, us(START + 1.2 * DAY))])  # a late one
    state = await horizon.read_state(db.conn)
    assert horizon.held_back(state, START + 2 * DAY) == START + DAY
    assert not await horizon.raise_horizon(db.conn, START + 2 * DAY)
    assert await horizon.raise_horizon(db.conn, START + DAY)


def test_a_clock_that_is_ahead_costs_nothing() -> None:
    newest = START + 2.7 * DAY
    state = horizon.State(None, None, None, START + 3000 * DAY, newest, None)
    assert horizon.target_of(state, DAY, START + 2000 * DAY) == START + DAY
    state = state._replace(newest=START + 4000 * DAY)
    assert horizon.target_of(state, DAY, START + 3 * DAY) == START + 2 * DAY
    assert horizon.target_of(state, timedelta(days=1.5), START + 3 * DAY) == START + DAY


# ---- the daemon's part ---------------------------------------------------------------------------


async def test_days_below_the_horizon_are_dropped(db: Database) -> None:
    trades = history("BTCUSDT", days=5.5, every_s=600)
    await put(db, trades)
    await put_tickers(db, 6)
    await candles_done(db.conn)
    async with opened(db.dsn, retention_s=2 * 86_400, compress_after_s=None) as lifecycle:
        await lifecycle.round()
        stats = lifecycle.stats
        to = START + 3 * DAY
        assert stats.trouble == {}
        assert stats.horizon_us == us(to)
        assert (stats.dropped["raw_trades"], stats.dropped["tickers"]) == (3, 3)
        for table in ("raw_trades", "tickers"):
            days = await days_of(db, table)
            assert min(days) == to.date()
            assert stats.chunks[table, "open"] == len(days)
        await check(db, expected(trades, {}, to), to)
        assert await db.conn.fetchval("SELECT min(timestamp) FROM tickers") == to
        await lifecycle.round()
        assert stats.dropped["raw_trades"] == 3
        assert stats.rounds == 2


@pytest.mark.two_sessions
async def test_a_database_that_goes_is_no_trouble_of_old_trades(db: Database) -> None:
    """The health of the database tells it, and nothing is left of it when it is back."""
    async with opened(db.dsn, retention_s=3 * 86_400) as lifecycle:
        await lifecycle.round()
        # Every session of the daemon ends in the middle of the next round.
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1"
        read_server = chunks_of.read_server

        async def cut(conn: asyncpg.Connection, level: Any) -> Any:
            await db.conn.execute(kill, conn.get_server_pid())
            return await read_server(conn, level)

        with patch.object(chunks_of, "read_server", cut), pytest.raises(TransientStoreError):
            await lifecycle.round()
        assert lifecycle.stats.trouble == {}
        assert not lifecycle.stats.failures.total()
        await lifecycle.round()
        assert lifecycle.stats.rounds == 2


async def test_off_is_off(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3, every_s=600))
    await candles_done(db.conn)
    before = await days_of(db, "raw_trades")
    async with opened(db.dsn, retention_s=None, compress_after_s=None) as lifecycle:
        await lifecycle.round()
        assert (lifecycle.stats.trouble, lifecycle.stats.horizon_us) == ({}, None)
    assert await days_of(db, "raw_trades") == before


@pytest.mark.two_sessions
async def test_one_daemon_of_several_does_it(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3.5, every_s=600))
    await candles_done(db.conn)
    key = "hashtext(current_schema())"
    async with opened(db.dsn, retention_s=86_400, compress_after_s=None) as lifecycle:
        await db.conn.fetchval(f"SELECT pg_advisory_lock({0x74636C66}, {key})")
        await lifecycle.round()
        assert lifecycle.stats.horizon_us is None
        assert lifecycle.stats.chunks["raw_trades", "open"] > 0  # but it looks
        await db.conn.fetchval(f"SELECT pg_advisory_unlock({0x74636C66}, {key})")
        await lifecycle.round()
        assert lifecycle.stats.horizon_us == us(START + 2 * DAY)


@pytest.mark.two_sessions
async def test_a_reader_delays_the_drop_and_no_writer_waits(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3.5, every_s=600))
    await candles_done(db.conn)
    reader = await asyncpg.connect(db.dsn)
    symbols = SymbolTable()
    async with opened(db.dsn, retention_s=86_400, compress_after_s=None) as lifecycle:
        await reader.execute("BEGIN")
        await reader.fetchval("SELECT count(*) FROM raw_trades")
        with patch.object(chunks_of, "_DETACH_LIMIT", "2s"):
            turn = asyncio.create_task(lifecycle.round())
            for n in range(10):
                async with asyncio.timeout(1.5):
                    await put(db, [Trade("BTCUSDT", 10_000 + n, us(START + 3.6 * DAY))], symbols)
                await asyncio.sleep(0.1)
            await turn
        assert lifecycle.stats.trouble == {}
        assert lifecycle.stats.dropped.total() == 0
        assert (await verify(db.conn)).differences == []
        await reader.execute("ROLLBACK")
        await lifecycle.round()
        assert lifecycle.stats.dropped["raw_trades"] == 2
    await reader.close()
    assert min(await days_of(db, "raw_trades")) == (START + 2 * DAY).date()


async def test_a_step_that_was_broken_off_is_ended(db: Database) -> None:
    trades = history("BTCUSDT", days=4.5, every_s=600)
    await put(db, trades)
    await candles_done(db.conn)
    to = START + 2 * DAY
    state = await horizon.read_state(db.conn)
    for step in (START, START + DAY):  # as far as it got: nothing is stored below, nothing trimmed
        assert await horizon.raise_horizon(db.conn, step)
        report = await verify(db.conn)
        assert (report.differences, report.rows) == ([], len(trades))
        if step == START:
            await trim.trim(db.conn, state, step, await trim.survey(db.conn, state, step))
    symbols = SymbolTable()
    late = [Trade("ETHUSDT", n, us(START + 0.9 * DAY) + n * 10**9) for n in range(20)]
    result = await db.sink.write_trades(rows_of(late, symbols), symbols=symbols)
    kept = [one for one in late if at(one.us) >= START + DAY]
    assert (result.stored, result.expired) == (len(kept), len(late) - len(kept))
    await candles_done(db.conn)
    async with opened(db.dsn, retention_s=int(2.4 * 86_400), compress_after_s=None) as lifecycle:
        await lifecycle.round()
        assert lifecycle.stats.trouble == {}
    await check(db, expected([*trades, *kept], {}, to), to)


@pytest.mark.two_sessions
async def test_writers_and_the_horizon_at_once(db: Database) -> None:
    """Old and new trades come in while days are given up; nothing is stored twice or uncounted."""
    days = 6
    rng = random.Random(7)
    trades = [
        one
        for n in range(8)
        for one in history(f"S{n}USDT", days=days, every_s=700 + n * 300, first_id=100)
    ]
    rng.shuffle(trades)
    parts = [trades[n::4] for n in range(4)]
    await put(db, [one for one in trades if one.us >= us(START + (days - 1) * DAY)][:5])
    offered = []

    async def write(part: list[Trade]) -> None:
        symbols = SymbolTable()
        for at_row in range(0, len(part), 60):
            some = part[at_row : at_row + 60]
            result = await db.sink.write_trades(rows_of(some, symbols), symbols=symbols)
            assert result.stored + result.duplicate + result.expired == len(some)
            offered.append(result)
            await asyncio.sleep(0.01)

    async def move(lifecycle: Lifecycle) -> None:
        while len(offered) < sum(len(part) for part in parts) // 60:
            await candles_done(db.conn)
            await lifecycle.round()
            assert lifecycle.stats.trouble == {}

    keep = (days - 1) * 86_400
    at_once = "UPDATE store_state SET raw_from = $1::timestamptz WHERE raw_from < $1::timestamptz"
    async with opened(db.dsn, retention_s=keep, compress_after_s=None) as lifecycle:
        # Each late trade has candles waiting, and the horizon would wait for them.
        stack = ExitStack()
        stack.enter_context(patch.object(horizon, "_RAISE", at_once))
        stack.enter_context(patch.object(horizon, "held_back", lambda _, target: target))
        async with asyncio.TaskGroup() as group:
            group.create_task(move(lifecycle))
            for part in parts:
                group.create_task(write(part))
            await asyncio.sleep(0.2)
            lifecycle._retention = timedelta(days=2)
        lifecycle._retention = timedelta(days=1)
        await lifecycle.round()
        stack.close()
    to = START + (days - 2) * DAY
    assert sum(one.expired for one in offered) > 0
    kept = {(one.symbol, one.trade_id): one.us for one in trades if one.us >= us(to)}
    rows = await db.conn.fetch("SELECT symbol, trade_id, timestamp FROM raw_trades")
    assert {(row[0], row[1]): us(row[2]) for row in rows} == kept
    report = await verify(db.conn)
    assert (report.differences, report.rows, report.open_holes) == ([], len(kept), [])


async def test_the_proof_goes_on_above_the_horizon(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3.5, every_s=600))
    await candles_done(db.conn)
    to, later = START + 2 * DAY, START + 2.2 * DAY
    minute = timedelta(minutes=1)
    await db.conn.execute(
        "INSERT INTO audit_state (symbol, proven_from, proven_through, audited_through, no_kline)"
        " VALUES ('A', $1, $1, $3, tstzmultirange(tstzrange($1, $2))),"
        " ('B', $1, $2, $3, tstzmultirange(tstzrange($2, $3))), ('C', NULL, NULL, $1, '{}'),"
        " ('D', $2, $3, $3, '{}'), ('E', NULL, NULL, NULL, '{}')",
        START,
        later,
        START + 3 * DAY,
    )
    await db.conn.executemany(
        "INSERT INTO trade_audits (symbol, open_time, state, reason) VALUES ($1, $2, $3, 'count')",
        [("A", START + minute, "mismatch"), ("A", later + minute, "mismatch")],
    )
    await db.conn.execute(
        "INSERT INTO dead_letters (kind, symbol, payload, parked_at)"
        " VALUES ('trade', 'A', '{}', $1), ('trade', 'A', '{}', $2)",
        to - minute,
        to + minute,
    )
    await give_up(db, to)
    rows = await db.conn.fetch(
        "SELECT symbol, proven_from, proven_through, audited_through, no_kline"
        " FROM audit_state ORDER BY symbol"
    )
    whole = START + 3 * DAY
    gap = [asyncpg.Range(to, later)]
    assert [tuple(row) for row in rows] == [
        ("A", to, to, whole, gap),
        ("B", to, later, whole, [asyncpg.Range(later, whole)]),
        ("C", None, None, to, []),
        ("D", later, whole, whole, []),
        ("E", None, None, None, []),
    ]
    assert await db.conn.fetch("SELECT open_time FROM trade_audits") == [(later + minute,)]
    assert await db.conn.fetch("SELECT parked_at FROM dead_letters") == [(to + minute,)]


@pytest.mark.parametrize("days", [2, 4])
async def test_days_that_somebody_dropped_are_no_part_of_the_record(
    db: Database, days: int
) -> None:
    """Also above the horizon that RETENTION gives, and with candles that wait for their trades."""
    trades = history("BTCUSDT", days=4, every_s=600)
    trades += history("OLDUSDT", days=0.7, every_s=900)
    trades += history("BTCUSDT", days=0.5, every_s=600, begin=START + 7 * DAY, first_id=1000)
    await put(db, trades)
    gaps = await unfilled(db.conn)
    assert set(gaps.values()) == {"open"}
    await candles_done(db.conn, START + 1.3 * DAY)
    await put(db, [Trade("LATEUSDT", 1, us(START + 0.9 * DAY))])  # its minute waits
    assert await db.conn.fetchval("SELECT count(*) FROM candle_windows") == 1
    trades.append(Trade("LATEUSDT", 1, us(START + 0.9 * DAY)))
    to = START + days * DAY
    await drop_days(db, to)
    assert (await verify(db.conn)).differences
    async with opened(db.dsn, retention_s=6 * 86_400, compress_after_s=None) as lifecycle:
        await lifecycle.round()
        assert lifecycle.stats.trouble == {}
        # Not over the days after: they are a hole, and may be fetched.
        assert lifecycle.stats.horizon_us == us(to)
        await check(db, expected(trades, gaps, to), to)
        assert await db.conn.fetchval("SELECT count(*) FROM candle_windows") == 0
        await lifecycle.round()
        assert lifecycle.stats.horizon_us == us(to)
        assert lifecycle.stats.waits == ""


async def test_days_between_are_missed(db: Database) -> None:
    """Nothing is given up that comes after a day that is there; `verify` tells what is gone."""
    await put(db, history("BTCUSDT", days=4, every_s=600))
    await candles_done(db.conn)
    await drop_days(db, START + 2 * DAY, START + DAY)
    async with opened(db.dsn, retention_s=50 * 86_400, compress_after_s=None) as lifecycle:
        await lifecycle.round()
        assert lifecycle.stats.trouble == {}
        assert (lifecycle.stats.horizon_us or 0) < us(START)
    assert (await verify(db.conn)).differences


async def drop_days(db: Database, until: datetime, since: datetime = START) -> None:
    """Drop days of trades behind the back of the ledger."""
    level = await detect_level(db.conn)
    for one in await chunks(db.conn, await read_server(db.conn, level)):
        if one.table == "raw_trades" and since <= one.begin < until:
            await db.conn.execute(f"DROP TABLE {one.name}")


async def test_what_a_crash_left_in_the_proof_is_taken_out(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3.5, every_s=600))
    await candles_done(db.conn)
    to = START + 2 * DAY
    await db.conn.execute(
        "INSERT INTO audit_state (symbol, proven_from, proven_through, audited_through)"
        " VALUES ('BTCUSDT', $1, $1, $2)",
        START,
        to + DAY,
    )
    await db.conn.execute(
        "INSERT INTO trade_audits (symbol, open_time, state, reason)"
        " VALUES ('BTCUSDT', $1, 'mismatch', 'count')",
        START,
    )
    failure = asyncpg.LockNotAvailableError("somebody holds it")
    async with opened(db.dsn, retention_s=86_400, compress_after_s=None) as lifecycle:
        with patch.object(trim, "trim_audits", side_effect=failure):
            await lifecycle.round()
        assert await db.conn.fetchval("SELECT ledger_from FROM store_state") == to
        assert await db.conn.fetchval("SELECT count(*) FROM trade_audits") == 1
        await lifecycle.round()
    assert await db.conn.fetchval("SELECT count(*) FROM trade_audits") == 0
    row = await db.conn.fetchrow("SELECT proven_from, proven_through FROM audit_state")
    assert tuple(row or ()) == (to, to + DAY)


async def test_the_horizon_tells_how_long_it_waits(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3, every_s=3600))
    async with opened(db.dsn, retention_s=86_400, compress_after_s=None) as lifecycle:
        await lifecycle.round()
        since_ns = lifecycle.stats.waits_since_ns
        assert lifecycle.stats.waits
        assert 0 < since_ns <= time.monotonic_ns()
        await lifecycle.round()
        assert lifecycle.stats.waits_since_ns == since_ns
        await candles_done(db.conn)
        await lifecycle.round()
        assert (lifecycle.stats.waits, lifecycle.stats.waits_since_ns) == ("", 0)


async def test_a_batch_of_refusals_leaves_the_horizon_known(db: Database) -> None:
    symbols = SymbolTable()
    await put(db, history("BTCUSDT", days=1, every_s=3600), symbols)
    await db.conn.execute("UPDATE store_state SET raw_from = $1, ledger_from = $1", START)
    await put(db, [Trade("BTCUSDT", 25, us(START + DAY))], symbols)
    assert db.sink.horizon_us == us(START)
    rows = rows_of([Trade("BTCUSDT", 26, us(START + DAY))], symbols)
    rows["trade_us"] = -1
    assert (await db.sink.write_trades(rows, symbols=symbols)).parked == 1
    assert db.sink.horizon_us == us(START)


# ---- candles -------------------------------------------------------------------------------------


async def candles_below(db: Database, moment: datetime) -> dict[str, list[tuple[Any, ...]]]:
    """All candles that end by `moment`, by width."""
    found = {}
    for width, step in WIDTHS.items():
        rows = await db.conn.fetch(
            f"SELECT * FROM candles_{width} WHERE bucket <= $1 ORDER BY bucket, symbol",
            moment - step,
        )
        found[width] = [tuple(row) for row in rows]
    return found


def minutes_of(trades: list[Trade], below: datetime) -> list[tuple[Any, ...]]:
    """Minute, symbol, open, close, volume, number and ids of trades, from the trades."""
    groups: dict[tuple[datetime, str], list[Trade]] = {}
    for one in trades:
        minute = at(one.us).replace(second=0, microsecond=0)
        if minute < below:
            groups.setdefault((minute, one.symbol), []).append(one)
    rows = []
    for key, group in sorted(groups.items()):
        group.sort(key=lambda one: one.trade_id)
        prices = [1 + Decimal(one.trade_id).scaleb(-8) for one in group]
        volume = sum((10**7 + one.trade_id % 1000 for one in group), 0)
        ids = group[0].trade_id, group[-1].trade_id
        rows.append((*key, prices[0], prices[-1], Decimal(volume).scaleb(-8), len(group), *ids))
    return rows


async def test_candles_outlive_their_trades(db: Database) -> None:
    """Whatever refreshes them later: the daemon, by hand or by a policy of the server."""
    begin = (await db.conn.fetchval("SELECT clock_timestamp()")).replace(
        hour=0, minute=0, second=0, microsecond=0
    ) - 3 * DAY
    trades = history("BTCUSDT", days=3, every_s=20, begin=begin)
    trades += history("ETHUSDT", days=3, every_s=500, begin=begin)
    await put(db, trades)
    kind = await read_kind(db.conn, await detect_level(db.conn))
    await refresh(db.conn, kind, begin, begin + 3 * DAY)
    await candles_done(db.conn)
    to = begin + 2 * DAY
    before = await candles_below(db, to)
    assert [(*row[:3], row[5], row[6], row[8], *row[11:13]) for row in before["1m"]] == minutes_of(
        trades, to
    )
    assert [row[8] for row in before["1d"]] == [4320, 173, 4320, 173]
    # The newest trade, of the last minute of a day, sets the age.
    async with opened(db.dsn, retention_s=int(0.99 * 86_400), compress_after_s=86_400) as lifecycle:
        await lifecycle.round()
        assert lifecycle.stats.trouble == {}
        assert lifecycle.stats.horizon_us == us(to)
    assert await db.conn.fetchval("SELECT min(timestamp) FROM raw_trades") == to
    assert await candles_below(db, to) == before
    await refresh(db.conn, kind, begin, begin + 3 * DAY, raw_from=to)
    assert await candles_below(db, to) == before
    if kind.aggregates:
        jobs = await db.conn.fetch(
            "SELECT job_id FROM timescaledb_information.jobs"
            " WHERE proc_name = 'policy_refresh_continuous_aggregate' ORDER BY 1"
        )
        assert len(jobs) == len(WIDTHS)
        for (job_id,) in jobs:
            await db.conn.execute(f"CALL run_job({job_id})")
        assert await candles_below(db, to) == before
