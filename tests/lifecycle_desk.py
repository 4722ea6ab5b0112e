"""Trades of some days, the store that has them, and the slow oracle of what retention leaves."""

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg
import numpy as np
from store_desk import EPOCH, Database, at

from tradecore._symbols import SymbolTable
from tradecore.lifecycle import Lifecycle
from tradecore.schema import TRADE_DTYPE
from tradecore.settings import Settings
from tradecore.store import horizon, trim
from tradecore.store.chunks import chunks, read_server
from tradecore.store.migrate import detect_level
from tradecore.store.partitions import Partitions
from tradecore.store.store import Store
from tradecore.store.verify import verify
from tradecore.values import Secret

DAY = timedelta(days=1)
HOUR_US = 3_600_000_000
START = datetime(2024, 8, 8, tzinfo=UTC)
"""The first day of all tests: a midnight that is long past."""


def us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


class Trade(NamedTuple):
    symbol: str
    trade_id: int
    us: int


def rows_of(trades: Iterable[Trade], symbols: SymbolTable) -> Any:
    listed = list(trades)
    rows = np.zeros(len(listed), TRADE_DTYPE)
    for row, one in zip(rows, listed, strict=True):
        known = symbols.get(one.symbol)
        row["symbol_id"] = symbols.add(one.symbol) if known is None else known
        row["trade_id"], row["trade_us"] = one.trade_id, one.us
        row["price_e8"], row["quantity_e8"] = 10**8 + one.trade_id, 10**7 + one.trade_id % 1000
    return rows


def history(
    symbol: str, *, days: float, every_s: float, first_id: int = 1, begin: datetime = START
) -> list[Trade]:
    """One trade each so many seconds."""
    count = int(days * 86_400 / every_s)
    return [Trade(symbol, first_id + n, us(begin) + int(n * every_s * 1e6)) for n in range(count)]


def shuffled(seed: int, symbol: str, midnight: datetime) -> tuple[list[Trade], list[Trade]]:
    """Trades around a midnight whose times do not ascend; (those stored, those missing)."""
    rng = random.Random(seed)
    first_id = rng.randrange(1, 1000)
    when = us(midnight) - rng.randrange(0, 7200) * 10**6
    trades = []
    for n in range(rng.randrange(1, 120)):
        when += rng.choice((0, 1, 1000, 10**6, 60 * 10**6, 600 * 10**6))
        wrong = rng.choice((0, 0, 0, 1, 1000, 5 * 10**6, 1800 * 10**6))
        trades.append(Trade(symbol, first_id + n, when + rng.choice((-1, 1)) * wrong))
    missing = [one for one in trades[1:-1] if rng.random() < rng.choice((0.0, 0.1))]
    if len(trades) > 20 and rng.random() < 0.5:
        low = rng.randrange(1, len(trades) - 8)
        missing += trades[low : low + rng.randrange(1, 7)]
    lost = set(missing)
    return [one for one in trades if one not in lost], sorted(lost)


async def put(db: Database, trades: Iterable[Trade], symbols: SymbolTable | None = None) -> None:
    symbols = symbols or SymbolTable()
    listed = list(trades)
    for begin in range(0, len(listed), 8192):
        await db.sink.write_trades(rows_of(listed[begin : begin + 8192], symbols), symbols=symbols)


def settings(**changed: Any) -> Settings:
    return Settings(**changed)


async def candles_done(conn: asyncpg.Connection, through: datetime | None = None) -> None:
    """Let the horizon pass: as if all candles were computed."""
    await conn.execute("DELETE FROM candle_windows")
    await conn.execute(
        "UPDATE store_state SET candles_through = coalesce($1, clock_timestamp())", through
    )


async def unfilled(conn: asyncpg.Connection) -> dict[tuple[str, int], str]:
    """Return the state of each id in trade_gaps that is not filled."""
    return {
        (row["symbol"], trade_id): row["state"]
        for row in await conn.fetch("SELECT * FROM trade_gaps WHERE state <> 'filled'")
        for trade_id in range(row["first_id"], row["last_id"] + 1)
    }


class Left(NamedTuple):
    """What is left above a horizon, id by id."""

    rows: dict[tuple[str, int], int]
    ranges: list[tuple[str, int, int, datetime | None, datetime]]
    """Symbol, ids, times; the first time of a range that begins with a stub is None."""
    gaps: dict[tuple[str, int], str]


def expected(trades: Iterable[Trade], gaps: dict[tuple[str, int], str], horizon: datetime) -> Left:
    """Work out what is left of `trades` and of the holes between them."""
    by_symbol: dict[str, dict[int, int]] = defaultdict(dict)
    for one in trades:
        by_symbol[one.symbol][one.trade_id] = one.us
    left = Left({}, [], {})
    for symbol, times in by_symbol.items():
        kept = {i: t for i, t in times.items() if at(t) >= horizon}
        cut = {i: t for i, t in times.items() if at(t) < horizon}
        left.rows.update({(symbol, i): t for i, t in kept.items()})
        lowest = min(kept, default=2**62)
        top = max((i for i in cut if i < lowest), default=None)
        holes = {i for s, i in gaps if s == symbol}
        stub = top is not None and (
            not kept or any(gaps[symbol, i] == "open" for i in holes if top < i < lowest)
        )
        ids = {*kept, *([top] if stub and top is not None else [])}
        if cut and max(cut) > max(kept, default=2**62):
            ids.add(max(cut))  # the greatest id of all stays known
        runs: list[list[int]] = []
        for i in sorted(ids):
            if runs and runs[-1][-1] + 1 == i:
                runs[-1].append(i)
            else:
                runs.append([i])
        for run in runs:
            mine = [kept[i] for i in run if i in kept]
            begins = at(min(mine)) if len(mine) == len(run) else None
            if mine:
                left.ranges.append((symbol, run[0], run[-1], begins, at(max(mine))))
            else:
                left.ranges.append((symbol, run[0], run[-1], None, horizon))
        if ids:
            for i in range(min(ids), max(ids) + 1):
                if i not in ids:
                    left.gaps[symbol, i] = gaps.get((symbol, i), "absent")
    left.ranges.sort(key=lambda one: one[:2])
    return left


async def check(db: Database, want: Left, horizon: datetime) -> None:
    """Compare rows, ledger, holes and marks with the oracle, and let `verify` recount."""
    rows = await db.conn.fetch(
        "SELECT symbol, trade_id, timestamp FROM raw_trades WHERE timestamp >= $1", horizon
    )
    assert {(row[0], row[1]): us(row[2]) for row in rows} == want.rows
    ranges = []
    for row in await db.conn.fetch(
        "SELECT symbol, first_id, last_id, first_time, last_time FROM trade_coverage"
        ' ORDER BY symbol COLLATE "C", first_id'
    ):
        stub = row["first_time"] < horizon
        last = max(row["last_time"], horizon) if row["last_time"] < horizon else row["last_time"]
        ranges.append((*row[:3], None if stub else row["first_time"], last))
    assert ranges == want.ranges
    gaps = await unfilled(db.conn)
    assert sorted(gaps.items() ^ want.gaps.items()) == []
    marks = await db.conn.fetch("SELECT symbol, trade_id, timestamp FROM trade_times")
    assert {(row[0], row[1]): us(row[2]) for row in marks}.items() <= want.rows.items()
    assert {(s, t // HOUR_US) for (s, _), t in want.rows.items()} == {
        (row[0], us(row[2]) // HOUR_US) for row in marks
    }
    report = await verify(db.conn)
    assert report.differences == []
    assert report.rows == report.expected_rows == len(want.rows)


async def give_up(db: Database, to: Any) -> int:
    """Move the horizon step by step to `to`; return the number of steps."""
    steps = 0
    while True:
        state = await horizon.read_state(db.conn)
        step = await horizon.next_horizon(db.conn, state, to)
        if step is None:
            return steps
        assert await horizon.raise_horizon(db.conn, step)
        found = await trim.survey(db.conn, state, step)
        await trim.trim(db.conn, state, step, found)
        await trim.trim_audits(db.conn, step)
        steps += 1


@asynccontextmanager
async def opened(dsn: str, **changed: Any) -> AsyncIterator[Lifecycle]:
    """The lifecycle of a daemon with an open store."""
    settings = Settings(database_url=Secret(dsn), db_pool_size=3, **changed)
    store = Store(settings, SymbolTable())
    await store.open()
    try:
        yield Lifecycle(store, settings)
    finally:
        await store.close()


async def days_of(db: Database, table: str) -> list[date]:
    """The days that have a partition or chunk, by the rows that can be in them."""
    level = await detect_level(db.conn)
    server = await read_server(db.conn, level)
    return [one.begin.date() for one in await chunks(db.conn, server) if one.table == table]


async def put_tickers(db: Database, days: int) -> None:
    await Partitions().ensure(db.conn, "tickers", [(START + n * DAY).date() for n in range(days)])
    for n in range(days):
        await db.conn.execute(
            "INSERT INTO tickers (timestamp, symbol, event_time) SELECT t, 'BTCUSDT', t"
            " FROM generate_series($1::timestamptz, $2::timestamptz, '1 minute') AS t",
            START + n * DAY,
            START + (n + 1) * DAY - timedelta(minutes=1),
        )
