"""The retention horizon: what is older is no part of the record any more.

A step of it goes over one day that has trades, so that it is bounded however much is too old:

    1  raise_horizon   no older trade is stored from now on (see `sink`): what is below is frozen
    2  survey          count what is below, and find the first trade above, of each symbol
    3  trim            one transaction takes the old ids out of the ledger and moves ledger_from
    4  trim_audits     and what else speaks of them (all three: see `trim`)

and then the rows may be dropped (see `chunks`). A crash anywhere leaves a state from which the next
step goes on. The horizon is a UTC midnight and never moves back: below it candles are all that is
left.

Where somebody else has dropped all days up to one, it moves over these at once.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from tradecore.store.candle_windows import finite
from tradecore.store.candles import EPOCH
from tradecore.store.statements import LOCK_OUT_WRITERS

DAY = timedelta(days=1)

_FENCE_LIMIT = "1s"
"""How long writers may have to wait behind a horizon that waits for one of them."""

_STATE = """
SELECT raw_from, ledger_from, candles_through, clock_timestamp() AS now,
       (SELECT max(last_time) FROM trade_coverage) AS newest,
       (SELECT min(lower(minutes)) FROM candle_windows WHERE NOT isempty(minutes)) AS waiting
FROM store_state
"""
FIRST_ROW = """
SELECT min(timestamp) FROM raw_trades WHERE timestamp >= $1::timestamptz
    AND timestamp < $2::timestamptz
"""
"""Time of the first row there."""

# Not over minutes whose candles are still to be computed: they could not be any more.
_RAISE = """
UPDATE store_state SET raw_from = $1::timestamptz
WHERE raw_from < $1::timestamptz AND candles_through >= $1::timestamptz AND NOT EXISTS (
    SELECT FROM candle_windows WHERE NOT isempty(minutes) AND lower(minutes) < $1::timestamptz)
"""


# Each hour of trades has a mark, so that the last mark of days without rows tells the last of them
# that had rows. The ledger alone does not: a range may begin with the id of a trade given up.
_LOST = """
SELECT date_trunc('day', max(m.timestamp), 'UTC') + interval '1 day'
FROM trade_coverage AS c
JOIN trade_times AS m ON m.symbol = c.symbol AND m.trade_id BETWEEN c.first_id AND c.last_id
WHERE c.first_time < $2::timestamptz AND c.last_time >= $1::timestamptz
  AND m.timestamp >= $1::timestamptz AND m.timestamp < $2::timestamptz
"""
_RAISE_OVER_LOST = (
    "UPDATE store_state SET raw_from = $1::timestamptz WHERE raw_from < $1::timestamptz",
    """
UPDATE candle_windows SET minutes = minutes - tstzmultirange(tstzrange(NULL, $1::timestamptz))
WHERE lower(minutes) < $1::timestamptz
""",
    "DELETE FROM candle_windows WHERE isempty(minutes)",
)

_IS_UNTIDY = """
SELECT EXISTS (SELECT FROM trade_audits WHERE open_time < $1::timestamptz)
    OR EXISTS (SELECT FROM audit_state WHERE proven_from < $1::timestamptz
               OR audited_through < $1::timestamptz OR lower(no_kline) < $1::timestamptz)
    OR EXISTS (SELECT FROM dead_letters WHERE parked_at < $1::timestamptz)
"""


class State(NamedTuple):
    """Where the horizon stands, and what bounds it; None: at the beginning of time."""

    raw_from: datetime | None
    ledger_from: datetime | None
    candles_through: datetime | None
    now: datetime
    """The server's clock."""
    newest: datetime | None
    """Time of the newest stored trade; None without trades."""
    waiting: datetime | None
    """The first minute whose candles have to be computed anew; None: there is none."""


async def read_state(conn: asyncpg.Connection) -> State:
    """Return the state. Raises asyncpg errors."""
    row = await conn.fetchrow(_STATE)
    assert row is not None
    return State(
        finite(row["raw_from"]),
        finite(row["ledger_from"]),
        finite(row["candles_through"]),
        row["now"],
        row["newest"],
        row["waiting"],
    )


def target_of(state: State, retention: timedelta, host_now: datetime) -> datetime:
    """Return the midnight at which the horizon is to stand.

    A clock that is ahead must not cost trades: ages count from the earliest of the server's clock,
    ours, and the newest stored trade.
    """
    now = min(state.now, host_now, state.newest or state.now)
    return midnight(now - retention)


def held_back(state: State, target: datetime) -> datetime:
    """Return how far the horizon may go now: candles are computed before their trades go."""
    through = state.candles_through
    if through is None:
        return EPOCH
    return min(target, midnight(through), midnight(state.waiting or target))


async def next_horizon(conn: asyncpg.Connection, state: State, target: datetime) -> datetime | None:
    """Return where the next step ends: at the end of the first day that has trades, at most at
    `target`; None when there is nothing to do. A step that was broken off comes first.
    """
    if state.raw_from is not None and state.raw_from != state.ledger_from:
        return state.raw_from
    if target <= (state.raw_from or EPOCH):
        return None
    ledger_from = state.ledger_from or EPOCH
    first = await conn.fetchval(FIRST_ROW, ledger_from, target)
    if first is None:
        return target
    begin = midnight(first)
    # Over days without trades first, by themselves: theirs may have been dropped by others.
    return begin if begin > ledger_from else begin + DAY


async def raise_horizon(conn: asyncpg.Connection, horizon: datetime) -> bool:
    """Let no older trade be stored from now on; False: candles below are not computed yet.

    Raises LockNotAvailableError when a writer does not end in time.
    """
    async with conn.transaction(isolation="read_committed"):
        await conn.execute(f"SET LOCAL lock_timeout = '{_FENCE_LIMIT}'")
        await conn.execute(LOCK_OUT_WRITERS)
        await conn.execute(_RAISE, horizon)
        return bool(await conn.fetchval("SELECT raw_from >= $1 FROM store_state", horizon))


async def lost_through(
    conn: asyncpg.Connection, state: State, first_day: datetime | None
) -> datetime | None:
    """Return the end of the last day of the record that somebody else has dropped, with all before.

    `first_day` is the first one that is there as a table, None when there is none. None: nothing is
    lost, or days before it are still there.
    """
    begin = state.ledger_from or EPOCH
    end = midnight(first_day or state.now)
    if end <= begin or state.raw_from != state.ledger_from:
        return None
    if await conn.fetchval(FIRST_ROW, begin, end) is not None:
        return None
    lost: datetime | None = await conn.fetchval(_LOST, begin, end)
    return lost


async def raise_over_lost(conn: asyncpg.Connection, state: State, horizon: datetime) -> bool:
    """Raise the horizon over days that are gone, and wait for no candles of them any more.

    They can never be computed. False: there are rows after all. Raises LockNotAvailableError when a
    writer does not end in time.
    """
    async with conn.transaction(isolation="read_committed"):
        await conn.execute(f"SET LOCAL lock_timeout = '{_FENCE_LIMIT}'")
        await conn.execute(LOCK_OUT_WRITERS)
        if await conn.fetchval(FIRST_ROW, state.ledger_from or EPOCH, horizon) is not None:
            return False
        for statement in _RAISE_OVER_LOST:
            await conn.execute(statement, *([horizon] if "$1" in statement else []))
        return True


async def is_untidy(conn: asyncpg.Connection, horizon: datetime) -> bool:
    """Tell whether the cross-check or dead_letters still speak of what is below the horizon."""
    return bool(await conn.fetchval(_IS_UNTIDY, horizon))


def midnight(moment: datetime) -> datetime:
    """Return the begin of its UTC day."""
    return moment - (moment - EPOCH) % DAY


def at_us(us: int) -> datetime:
    """Return the time of microseconds since 1970."""
    return EPOCH + timedelta(microseconds=us)


def to_us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)
