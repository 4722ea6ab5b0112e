"""Keeps account of the minutes whose candles have to be computed anew, over every crash.

`store_state.candles_through` is a fence in trade time. Who stores trades of later minutes says
nothing: those candles are computed again and again. Who stores older ones, late or from history,
enters their minutes in candle_windows in the same transaction (see `sink`). The fence moves on
while no transaction with trades is open, and what it passes is entered as well: so a minute is
either above the fence, or in candle_windows, or its candles are right.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from tradecore.store.candles import EPOCH
from tradecore.store.statements import LOCK_OUT_WRITERS

_REFRESH_KEY = 0x74636364  # "tccd"; the second key of the lock is the schema
TRY_TO_REFRESH = f"SELECT pg_try_advisory_lock({_REFRESH_KEY}, hashtext(current_schema()))"
"""Only its holder refreshes; it belongs to the session."""
LOCK_OUT_REFRESH = f"SELECT pg_advisory_lock({_REFRESH_KEY}, hashtext(current_schema()))"
"""For who drops trades: a refresh that began before the horizon moved would delete candles."""

_FENCE_LIMIT_S = 0.5
"""How long writers may have to wait behind a fence that waits for one of them."""

_MINUTE = timedelta(minutes=1)
_ROWS = 500  # of candle_windows that are looked at in one go
_AHEAD_MAX = timedelta(hours=1)
"""Trades may be ahead of the server's clock, which may be slow, by so much; more is absurd."""

_STATE = """
SELECT candles_through, raw_from, clock_timestamp() AS now,
       (SELECT max(last_time) FROM trade_coverage) AS newest
FROM store_state
"""
_FIRST_CHUNK = """
SELECT min(range_start) FROM timescaledb_information.chunks
WHERE hypertable_schema = current_schema() AND hypertable_name = 'raw_trades'
"""
_FIRST_TRADE = "SELECT min(timestamp) FROM raw_trades WHERE timestamp >= $1::timestamptz"
_MOVE = "UPDATE store_state SET candles_through = $1::timestamptz"
_ADD = "INSERT INTO candle_windows (minutes) VALUES (tstzmultirange($1::tstzrange))"
_WAITING = """
SELECT array_agg(id) AS ids, range_agg(minutes) AS minutes
FROM (SELECT id, minutes FROM candle_windows ORDER BY upper(minutes) DESC LIMIT $1) AS newest
"""
_COUNT = """
SELECT coalesce(sum(extract(epoch FROM upper(part) - lower(part)) / 60), 0)::int8
FROM (SELECT unnest(range_agg(minutes)) AS part FROM candle_windows) AS parts
"""
_CUT = """
UPDATE candle_windows SET minutes = minutes - tstzmultirange($2::tstzrange)
WHERE id = ANY($1::int8[]) AND minutes && $2::tstzrange
"""
_DROP = "DELETE FROM candle_windows WHERE id = ANY($1::int8[]) AND isempty(minutes)"


class FenceState(NamedTuple):
    """Where the fence and the horizon stand; None: at the beginning of time."""

    through: datetime | None
    raw_from: datetime | None
    now: datetime
    """By the server's clock, or by the newest trade where that is ahead."""


class Waiting(NamedTuple):
    """Minutes to compute anew: rows of candle_windows, and the union of them, ascending."""

    ids: list[int]
    spans: list[tuple[datetime, datetime]]


async def read_state(conn: asyncpg.Connection) -> FenceState:
    """Return the state of the store. Raises asyncpg errors."""
    row = await conn.fetchrow(_STATE)
    assert row is not None
    now, newest = row["now"], row["newest"]
    if newest is not None and now < newest < now + _AHEAD_MAX:
        now = newest
    return FenceState(finite(row["candles_through"]), finite(row["raw_from"]), now)


async def first_chunk(conn: asyncpg.Connection) -> datetime | None:
    """Return where the first chunk of raw_trades begins, on TimescaleDB; None: there is none.

    Whoever dropped what was below, continuous aggregates must not be refreshed there: the candles
    are all that is left.
    """
    found: datetime | None = await conn.fetchval(_FIRST_CHUNK)
    return found


async def move_fence(conn: asyncpg.Connection, settle: timedelta) -> FenceState:
    """Move the fence to the last minute that ended `settle` ago; return where it stands.

    It stays where it is when a writer does not end in time; then it moves the next time. Raises
    asyncpg errors.
    """
    state = await read_state(conn)
    target = state.now - settle
    target -= (target - EPOCH) % _MINUTE
    if state.through is not None and state.through >= target:
        return state
    try:
        async with conn.transaction(isolation="read_committed"):
            await conn.execute(f"SET LOCAL lock_timeout = '{int(_FENCE_LIMIT_S * 1000)}ms'")
            await conn.execute(LOCK_OUT_WRITERS)
            state = await read_state(conn)  # as it is now that nobody writes
            first = state.through or await conn.fetchval(_FIRST_TRADE, state.raw_from or EPOCH)
            if first is not None and first < target:
                first -= (first - EPOCH) % _MINUTE
                await conn.execute(_ADD, asyncpg.Range(first, target))
            await conn.execute(_MOVE, target)
    except asyncpg.LockNotAvailableError:
        return state
    return state._replace(through=target)


async def read_waiting(conn: asyncpg.Connection) -> Waiting:
    """Return minutes to compute anew, the newest of them. Raises asyncpg errors."""
    row = await conn.fetchrow(_WAITING, _ROWS)
    if row is None or row["ids"] is None:
        return Waiting([], [])
    return Waiting(row["ids"], [(span.lower, span.upper) for span in row["minutes"]])


async def count_waiting(conn: asyncpg.Connection) -> int:
    """Count all minutes to compute anew."""
    return int(await conn.fetchval(_COUNT))


async def settle(conn: asyncpg.Connection, ids: list[int], first: datetime, end: datetime) -> None:
    """Take `first` <= minute < `end` out of these rows: their candles are right now."""
    async with conn.transaction(isolation="read_committed"):
        await conn.execute(_CUT, ids, asyncpg.Range(first, end))
        await conn.execute(_DROP, ids)


def finite(moment: datetime | None) -> datetime | None:
    """Return a moment of store_state; None for the beginning of time."""
    # asyncpg gives -infinity as the least datetime there is.
    return None if moment is None or moment.year == 1 else moment
