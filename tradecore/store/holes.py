"""Reads the ledger for those who repair, show or ask: what is missing, and what is there.

All of it costs by the number of holes, never by the number of trades: it reads the open rows of
trade_gaps, which have an index of their own, and ranges of trade_coverage through its key.
"""

from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

_US = "(extract(epoch FROM {}) * 1000000)::int8"

# An absent part may stand between an open one and the stored trades, hence "nearest".
_BELOW = f"""
    SELECT {_US.format("last_time")} AS us FROM trade_coverage
    WHERE symbol = h.symbol AND first_id < h.first_id ORDER BY first_id DESC LIMIT 1
"""
_ABOVE = f"""
    SELECT {_US.format("first_time")} AS us FROM trade_coverage
    WHERE symbol = h.symbol AND first_id > h.last_id ORDER BY first_id LIMIT 1
"""

_OPEN_HOLES = f"""
SELECT h.symbol, h.first_id, h.last_id, h.cause, {_US.format("h.detected_at")},
       below.us, above.us
FROM trade_gaps AS h CROSS JOIN LATERAL ({_BELOW}) AS below CROSS JOIN LATERAL ({_ABOVE}) AS above
WHERE h.state = 'open' AND ($1::text IS NULL OR h.symbol = $1)
ORDER BY above.us DESC, h.symbol, h.first_id DESC LIMIT $2
"""

_TIMES = f"""
SELECT h.first_id, below.us, above.us
FROM (
    SELECT $1::text AS symbol, * FROM unnest($2::int8[], $3::int8[]) AS s (first_id, last_id)
) AS h
CROSS JOIN LATERAL ({_BELOW}) AS below CROSS JOIN LATERAL ({_ABOVE}) AS above
"""

# A kline that has as many trades as ids tells that the venue had every one of them.
_COUNTED = f"""
SELECT EXISTS (
    SELECT FROM (SELECT $1::text AS symbol, $2::int8 AS first_id, $3::int8 AS last_id) AS h
    CROSS JOIN LATERAL ({_BELOW}) AS below CROSS JOIN LATERAL ({_ABOVE}) AS above
    JOIN klines AS k ON k.symbol = h.symbol
        AND k.timestamp > to_timestamp(below.us / 1e6) - interval '2 minutes'
        AND k.timestamp < to_timestamp(above.us / 1e6) + interval '1 minute'
    WHERE k.is_closed AND k.first_id <= h.last_id AND k.last_id >= h.first_id
        AND k.trade_count = k.last_id - k.first_id + 1
)
"""

_PARKED = """
SELECT count(*) = $3::int8 - $2::int8 + 1 FROM dead_letters
WHERE kind = 'trade' AND symbol = $1 AND trade_id BETWEEN $2 AND $3
"""

_STORED = """
SELECT count(*) FROM raw_trades WHERE symbol = $1
    AND timestamp >= to_timestamp($2 / 1e6) AND timestamp < to_timestamp($3 / 1e6)
"""

_SUMMARY = f"""
SELECT h.symbol, h.holes, h.ids, below.us AS first_us, h.detected_us
FROM (
    SELECT symbol, count(*) AS holes, sum(last_id - first_id + 1)::numeric AS ids,
           min(first_id) AS first_id, {_US.format("min(detected_at)")} AS detected_us
    FROM trade_gaps WHERE state = 'open' GROUP BY symbol
) AS h LEFT JOIN LATERAL ({_BELOW}) AS below ON true
"""

_NEWEST_OPEN = """
SELECT symbol, first_id, last_id, cause, state FROM trade_gaps WHERE state = 'open'
ORDER BY id DESC LIMIT $1
"""

_FATES = """
SELECT symbol, first_id, last_id, cause, state FROM (
    (SELECT * FROM trade_gaps WHERE symbol = $1 AND first_id < $2 ORDER BY first_id DESC LIMIT 1)
    UNION ALL
    (SELECT * FROM trade_gaps WHERE symbol = $1 AND first_id BETWEEN $2 AND $3)
) AS g WHERE last_id >= $2 ORDER BY first_id
"""

HORIZON = f"SELECT CASE WHEN isfinite(raw_from) THEN {_US.format('raw_from')} END FROM store_state"
"""The retention horizon: older trades are not stored."""

COUNT_OPEN = "SELECT count(*) FROM trade_gaps WHERE state = 'open'"

_BOUNDS = f"""
SELECT symbol, min(first_id), max(last_id),
       {_US.format("min(first_time)")}, {_US.format("max(last_time)")}
FROM trade_coverage WHERE $1::text IS NULL OR symbol = $1 GROUP BY symbol ORDER BY symbol
"""

_COVERED = """
SELECT greatest(first_id, $2), least(last_id, $3) FROM (
    (SELECT first_id, last_id FROM trade_coverage WHERE symbol = $1 AND first_id < $2
     ORDER BY first_id DESC LIMIT 1)
    UNION ALL
    (SELECT first_id, last_id FROM trade_coverage WHERE symbol = $1 AND first_id BETWEEN $2 AND $3)
) AS c WHERE last_id >= $2 ORDER BY first_id
"""


class OpenHole(NamedTuple):
    """Ids that are missing and may be had yet. Times in microseconds since 1970."""

    symbol: str
    first_id: int
    last_id: int
    cause: str
    detected_us: int
    below_us: int
    """Time of the nearest stored trade below; greatest of its range where times do not ascend."""
    above_us: int
    """Time of the nearest stored trade above; least of its range where times do not ascend."""

    @property
    def ids(self) -> int:
        return self.last_id - self.first_id + 1


class HoleFate(NamedTuple):
    """A row of trade_gaps: ids that were missing, and what has become of them."""

    symbol: str
    first_id: int
    last_id: int
    cause: str
    state: str
    """"open", "filled" or "absent"."""


class Bounds(NamedTuple):
    """The least and the greatest stored id of a symbol, and time, in microseconds since 1970."""

    first_id: int
    last_id: int
    first_us: int
    last_us: int


class SymbolHoles(NamedTuple):
    """Open holes of one symbol."""

    holes: int
    ids: int
    """How many ids they miss."""
    first_us: int
    """Time of the stored trade right below the first one: complete up to here, microseconds."""


class HoleSummary(NamedTuple):
    """Open holes of all symbols."""

    holes: int
    ids_missing: int
    oldest_detected_us: int | None
    by_symbol: dict[str, SymbolHoles]
    """Only symbols that have holes."""


async def open_holes(
    conn: asyncpg.Connection, symbol: str | None = None, limit: int = 1000
) -> list[OpenHole]:
    """Return at most `limit` open holes, those with the newest trade above first."""
    return [OpenHole(*row) for row in await conn.fetch(_OPEN_HOLES, symbol, limit)]


async def newest_open(conn: asyncpg.Connection, limit: int) -> list[HoleFate]:
    """Return at most `limit` open holes, those that were detected last first."""
    return [HoleFate(*row) for row in await conn.fetch(_NEWEST_OPEN, limit)]


async def hole_fates(
    conn: asyncpg.Connection, symbol: str, first_id: int, last_id: int
) -> list[HoleFate]:
    """Return the rows that have any of the ids first_id..last_id, as they are written."""
    return [HoleFate(*row) for row in await conn.fetch(_FATES, symbol, first_id, last_id)]


async def hole_times(
    conn: asyncpg.Connection, symbol: str, spans: Sequence[tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """Return by its first id the times around each hole (first id, last id), as in OpenHole."""
    columns = [span[0] for span in spans], [span[1] for span in spans]
    return {row[0]: (row[1], row[2]) for row in await conn.fetch(_TIMES, symbol, *columns)}


async def is_counted(conn: asyncpg.Connection, symbol: str, first_id: int, last_id: int) -> bool:
    """Tell whether a stored kline proves that the venue had some of the ids of a hole."""
    return bool(await conn.fetchval(_COUNTED, symbol, first_id, last_id))


async def is_parked(conn: asyncpg.Connection, symbol: str, first_id: int, last_id: int) -> bool:
    """Tell whether all trades of a hole lie in dead_letters: the database has refused them."""
    return bool(await conn.fetchval(_PARKED, symbol, first_id, last_id))


async def trades_between(conn: asyncpg.Connection, symbol: str, from_us: int, to_us: int) -> int:
    """Count the stored trades of `from_us` <= time < `to_us`; whole minutes, a day at most."""
    return int(await conn.fetchval(_STORED, symbol, from_us, to_us))


async def hole_summary(conn: asyncpg.Connection) -> HoleSummary:
    """Count what is open."""
    rows = await conn.fetch(_SUMMARY)
    return HoleSummary(
        sum(row["holes"] for row in rows),
        sum(int(row["ids"]) for row in rows),
        min((row["detected_us"] for row in rows), default=None),
        {
            row["symbol"]: SymbolHoles(row["holes"], int(row["ids"]), row["first_us"] or 0)
            for row in rows
        },
    )


async def bounds(conn: asyncpg.Connection, symbol: str | None = None) -> dict[str, Bounds]:
    """Return what is stored of each symbol, or of one, from end to end; holes do not count."""
    return {row[0]: Bounds(*row[1:]) for row in await conn.fetch(_BOUNDS, symbol)}


async def covered(
    conn: asyncpg.Connection, symbol: str, first_id: int, last_id: int
) -> list[tuple[int, int]]:
    """Return which of the ids first_id..last_id are stored, as ascending disjoint ranges."""
    return [(row[0], row[1]) for row in await conn.fetch(_COVERED, symbol, first_id, last_id)]
