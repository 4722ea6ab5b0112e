"""One step of the retention horizon in the ledger: see `horizon`, where it stands."""

import json
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from tradecore.store.candles import EPOCH
from tradecore.store.horizon import DAY, FIRST_ROW, State, at_us, to_us
from tradecore.store.ledger import MAX_ID, Range, join
from tradecore.store.statements import columns_of
from tradecore.store.trimming import (
    Gone,
    Low,
    Trimmed,
    is_stub,
    lost_spans,
    rows_across,
    trim_symbol,
)

log = logging.getLogger(__name__)

_HOUR = timedelta(hours=1)
_TRIM_LIMIT = "5s"

_US = "(extract(epoch FROM {}) * 1000000)::int8"


_OLD_RANGES = f"""
SELECT symbol, first_id, last_id, {_US.format("first_time")}, {_US.format("last_time")}
FROM trade_coverage WHERE first_time < $1::timestamptz ORDER BY symbol, first_id
"""
_COUNT = """
SELECT symbol, count(*), max(trade_id) FROM raw_trades
WHERE timestamp >= $1::timestamptz AND timestamp < $2::timestamptz GROUP BY symbol
"""

# Each hour that has trades of a symbol has a mark; the first ones by id are the first by time.
_FIRST_HOUR = """
SELECT n.symbol, date_trunc('hour', min(m.timestamp))
FROM unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, first_id, last_id)
CROSS JOIN LATERAL (
    SELECT timestamp FROM trade_times
    WHERE symbol = n.symbol AND trade_id BETWEEN n.first_id AND n.last_id
      AND timestamp >= $4::timestamptz
    ORDER BY trade_id LIMIT 3
) AS m GROUP BY n.symbol
"""
_FIRST_TIME = """
SELECT date_trunc('hour', min(timestamp)) FROM raw_trades
WHERE timestamp >= $4::timestamptz AND symbol = $1::text AND trade_id BETWEEN $2 AND $3
"""
_LOWEST = f"""
SELECT t.symbol, min(t.trade_id), {_US.format("min(t.timestamp)")}
FROM raw_trades AS t
JOIN unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, first_id, last_id)
    ON t.symbol = n.symbol AND t.trade_id BETWEEN n.first_id AND n.last_id
WHERE t.timestamp >= $4::timestamptz AND t.timestamp < $5::timestamptz
GROUP BY t.symbol
"""

_LOCK_ALL = "SELECT FROM trade_symbols ORDER BY symbol FOR UPDATE"
_NEXT_RANGES = """
SELECT n.symbol, min(c.first_id), max(c.last_id)
FROM unnest($1::text[]) AS n (symbol)
JOIN trade_coverage AS c ON c.symbol = n.symbol AND c.first_time >= $2::timestamptz
GROUP BY n.symbol
"""
_OPEN_GAPS = """
SELECT n.symbol FROM unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, below, above)
WHERE EXISTS (SELECT FROM trade_gaps AS g WHERE g.symbol = n.symbol AND g.state = 'open'
              AND g.first_id > n.below AND g.last_id < n.above)
"""
_SURVIVORS = f"""
SELECT trade_id, {_US.format("timestamp")} FROM raw_trades
WHERE timestamp >= $2::timestamptz AND timestamp < $3::timestamptz AND symbol = $1::text
  AND trade_id < $4::int8 ORDER BY trade_id
"""
_TIMES = f"""
SELECT {_US.format("min(timestamp)")}, {_US.format("max(timestamp)")} FROM raw_trades
WHERE timestamp >= $2::timestamptz AND timestamp <= $3::timestamptz AND symbol = $1::text
  AND trade_id BETWEEN $4::int8 AND $5::int8
"""

_REMOVE_RANGES = "DELETE FROM trade_coverage WHERE first_time < $1::timestamptz"
_ADD_RANGES = """
INSERT INTO trade_coverage (symbol, first_id, last_id, first_time, last_time)
SELECT symbol, first_id, last_id, timestamptz 'epoch' + first_us * interval '1 microsecond',
       timestamptz 'epoch' + last_us * interval '1 microsecond'
FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int8[], $5::int8[])
    AS n (symbol, first_id, last_id, first_us, last_us)
"""
_REMOVE_GAPS = """
DELETE FROM trade_gaps AS g USING unnest($1::text[], $2::int8[]) AS n (symbol, below)
WHERE g.symbol = n.symbol AND g.first_id < n.below AND g.state <> 'filled'
"""
_ADD_GAPS = """
INSERT INTO trade_gaps (symbol, first_id, last_id, cause, state, filled_at, evidence)
SELECT symbol, first_id, last_id, 'retention', 'absent', now(), $4::jsonb
FROM unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, first_id, last_id)
"""
_REMOVE_MARKS = """
DELETE FROM trade_times AS m USING unnest($1::text[], $2::int8[]) AS n (symbol, through)
WHERE m.symbol = n.symbol AND m.trade_id <= n.through AND m.timestamp < $3::timestamptz
"""
_TRIMMED = "UPDATE store_state SET ledger_from = $1::timestamptz"

_TRIM_AUDITS = (
    "SELECT FROM audit_state ORDER BY symbol FOR UPDATE",
    "DELETE FROM trade_audits WHERE open_time < $1::timestamptz",
    """
UPDATE audit_state AS s
SET audited_through = greatest(s.audited_through, $1::timestamptz),
    proven_from = greatest(s.proven_from, $1::timestamptz),
    no_kline = s.no_kline * tstzmultirange(tstzrange($1::timestamptz, NULL)),
    proven_through = least(
        greatest(s.audited_through, $1::timestamptz),
        lower(s.no_kline * tstzmultirange(tstzrange($1::timestamptz, NULL))),
        (SELECT min(open_time) FROM trade_audits WHERE symbol = s.symbol))
WHERE s.proven_from < $1::timestamptz
""",
    """
UPDATE audit_state
SET audited_through = greatest(audited_through, $1::timestamptz),
    no_kline = no_kline * tstzmultirange(tstzrange($1::timestamptz, NULL))
WHERE audited_through < $1::timestamptz OR lower(no_kline) < $1::timestamptz
""",
    "DELETE FROM dead_letters WHERE parked_at < $1::timestamptz",
)


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found of the day that is given up, and above it, by symbol."""

    gone: dict[str, Gone] = field(default_factory=dict)
    low: dict[str, Low] = field(default_factory=dict)


async def survey(conn: asyncpg.Connection, state: State, horizon: datetime) -> Survey:
    """Look at what the step is about, an hour in each statement; locks nothing.

    The trades below the horizon are frozen, so that their number is what it will be in `trim`.
    """
    found = Survey()
    first = await conn.fetchval(FIRST_ROW, state.ledger_from or EPOCH, horizon)
    begin = horizon if first is None else first - (first - EPOCH) % _HOUR
    while begin < horizon:
        for symbol, rows, last_id in await conn.fetch(
            _COUNT, max(begin, state.ledger_from or EPOCH), begin + _HOUR
        ):
            before = found.gone.get(symbol, Gone(0, -1))
            found.gone[symbol] = Gone(before.rows + rows, max(before.last_id, last_id))
        begin += _HOUR
    across = {
        symbol: ranges[-1]
        for symbol, ranges in (await _old_ranges(conn, horizon)).items()
        if ranges[-1].last_us >= to_us(horizon)
    }
    spans = [(symbol, one.first_id, one.last_id) for symbol, one in across.items()]
    hours: dict[datetime, list[tuple[str, int, int]]] = defaultdict(list)
    if spans:
        begins = dict(await conn.fetch(_FIRST_HOUR, *columns_of(spans), horizon))
        for span in spans:
            hour = begins.get(span[0]) or await conn.fetchval(_FIRST_TIME, *span, horizon)
            if hour is not None:
                hours[hour].append(span)
    for hour, those in sorted(hours.items()):
        bounds = max(hour, horizon), hour + _HOUR
        for symbol, first_id, first_us in await conn.fetch(_LOWEST, *columns_of(those), *bounds):
            one = across[symbol]
            found.low[symbol] = Low(first_id, first_us, one)
    return found


async def trim(conn: asyncpg.Connection, state: State, horizon: datetime, found: Survey) -> None:
    """Take what is below the horizon out of the ledger, in one transaction.

    Nobody stores trades meanwhile; it takes milliseconds for a few symbols and some tenths of a
    second for 1,400. Raises asyncpg errors; then nothing has changed.
    """
    async with conn.transaction(isolation="read_committed"):
        await conn.execute(
            f"SET LOCAL lock_timeout = '{_TRIM_LIMIT}'; SET LOCAL statement_timeout = '20s'"
        )
        await conn.execute(_LOCK_ALL)
        old = await _old_ranges(conn, horizon)
        trimmed = {
            symbol: await _trim_symbol(conn, state, horizon, symbol, ranges, found)
            for symbol, ranges in old.items()
        }
        await _write(conn, horizon, trimmed)
        await conn.execute(_TRIMMED, horizon)


async def trim_audits(conn: asyncpg.Connection, horizon: datetime) -> None:
    """Take what is below the horizon out of the cross-check and out of dead_letters."""
    async with conn.transaction(isolation="read_committed"):
        await conn.execute(f"SET LOCAL lock_timeout = '{_TRIM_LIMIT}'")
        for statement in _TRIM_AUDITS:
            await conn.execute(statement, *([horizon] if "$1" in statement else []))


async def _old_ranges(conn: asyncpg.Connection, horizon: datetime) -> dict[str, list[Range]]:
    """Return the ranges that begin before the horizon, by symbol, ascending."""
    ranges: dict[str, list[Range]] = defaultdict(list)
    for symbol, *rest in await conn.fetch(_OLD_RANGES, horizon):
        ranges[symbol].append(Range(*rest))
    return ranges


async def _trim_symbol(
    conn: asyncpg.Connection,
    state: State,
    horizon: datetime,
    symbol: str,
    ranges: list[Range],
    found: Survey,
) -> Trimmed:
    """Return what is left of the ranges; the rows are asked only where the survey leaves doubt."""
    gone, low = found.gone.get(symbol, Gone(0, -1)), found.low.get(symbol)
    stub_us = to_us(state.ledger_from) if state.ledger_from is not None else None
    trimmed = trim_symbol(ranges, to_us(horizon), stub_us, gone, low)
    if trimmed is not None:
        return trimmed
    return await _look_closely(conn, state, horizon, symbol, ranges, gone)


async def _look_closely(
    conn: asyncpg.Connection,
    state: State,
    horizon: datetime,
    symbol: str,
    ranges: list[Range],
    gone: Gone,
) -> Trimmed:
    """Do as `trim_symbol` where the times do not ascend with the ids around the horizon.

    What survives below the greatest id that does not is looked for until as many are found as there
    must be, a day up at most; `verify` would tell of one that is even farther from its order.
    """
    stub_us = to_us(state.ledger_from) if state.ledger_from is not None else None
    across = [one for one in ranges if one.last_us >= to_us(horizon)]
    top = gone.last_id + 1
    below = sum(
        min(one.last_id + 1, top) - one.first_id - is_stub(one, stub_us)
        for one in across
        if one.first_id < top
    )
    expected = below - rows_across(ranges, to_us(horizon), stub_us, gone)
    found: dict[int, int] = {}
    for until in (_HOUR, DAY):
        rows = await conn.fetch(_SURVIVORS, symbol, horizon, horizon + until, top)
        found = {
            trade_id: us
            for trade_id, us in rows
            if any(one.first_id <= trade_id <= one.last_id for one in across)
        }
        if len(found) >= expected:
            break
    left: list[Range] = []
    for trade_id, us in found.items():
        if left and left[-1].last_id + 1 == trade_id:
            last = left.pop()
            times = min(last.first_us, us), max(last.last_us, us)
            left.append(Range(last.first_id, trade_id, *times))
        else:
            left.append(Range(trade_id, trade_id, us, us))
    for one in across:
        first_id = max(one.first_id, top)
        if first_id > one.last_id:
            continue
        bounds = horizon, at_us(one.last_us), first_id, one.last_id
        row = await conn.fetchrow(_TIMES, symbol, *bounds)
        assert row is not None
        first_us, last_us = row[0] or to_us(horizon), row[1] or one.last_us
        left.append(Range(first_id, one.last_id, first_us, last_us))
    log.info(
        "trades around the retention horizon are not in the order of their ids",
        extra={"symbol": symbol, "horizon": str(horizon), "later": len(found)},
    )
    if len(found) != expected:
        log.warning(
            "trades at the retention horizon are not those of the ledger: run `tradecore verify`",
            extra={"symbol": symbol, "expected": expected, "found": len(found)},
        )
    return Trimmed(ranges, join(left))


async def _write(conn: asyncpg.Connection, horizon: datetime, trimmed: dict[str, Trimmed]) -> None:
    """Put what is left in the place of what was, with the stubs that are needed."""
    if not trimmed:
        return
    above = {row[0]: row[1:] for row in await conn.fetch(_NEXT_RANGES, list(trimmed), horizon)}
    lowest: dict[str, int] = {}
    stubs: dict[str, set[Range]] = {symbol: set() for symbol in trimmed}
    doubtful: list[tuple[str, int, int]] = []
    for symbol, part in trimmed.items():
        firsts = [one.first_id for one in part.left]
        lasts = [one.last_id for one in part.left]
        if symbol in above:
            firsts.append(above[symbol][0])
            lasts.append(above[symbol][1])
        lowest[symbol] = min(firsts, default=MAX_ID)
        newest = part.ranges[-1].last_id
        if newest > max(lasts, default=-1):
            stubs[symbol].add(part.cut_below(newest + 1))  # the greatest id of all stays known
        elif lowest[symbol] > part.ranges[0].first_id:
            below = part.cut_below(lowest[symbol]).last_id
            if below + 1 < lowest[symbol]:
                doubtful.append((symbol, below, lowest[symbol]))
    if doubtful:
        for (symbol,) in await conn.fetch(_OPEN_GAPS, *columns_of(doubtful)):
            stubs[symbol].add(trimmed[symbol].cut_below(lowest[symbol]))
    added: list[tuple[Any, ...]] = []
    gaps: list[tuple[Any, ...]] = []
    below_all: list[tuple[Any, ...]] = []
    marks: list[tuple[Any, ...]] = []
    for symbol, part in trimmed.items():
        ids = {one.last_id for one in stubs[symbol]}
        for one in stubs[symbol]:
            stub_us = min(one.last_us, to_us(horizon) - 1)
            added.append((symbol, one.last_id, one.last_id, stub_us, stub_us))
        added += [(symbol, *one) for one in part.left]
        gaps += [(symbol, *span) for span in lost_spans(part, lowest[symbol], ids)]
        below_all.append((symbol, min(ids | {lowest[symbol]})))
        marks.append((symbol, part.ranges[-1].last_id))
    await conn.execute(_REMOVE_RANGES, horizon)
    if added:
        await conn.execute(_ADD_RANGES, *columns_of(added))
    await conn.execute(_REMOVE_GAPS, *columns_of(below_all))
    if gaps:
        evidence = json.dumps({"source": "retention", "horizon": horizon.isoformat()})
        await conn.execute(_ADD_GAPS, *columns_of(gaps), evidence)
    await conn.execute(_REMOVE_MARKS, *columns_of(marks), horizon)
