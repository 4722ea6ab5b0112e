"""Turns a trade id into a time: marks beside the ledger, one for every 65,536th id."""

from collections.abc import Mapping, Sequence

import asyncpg

from tradecore.store.batch import Keep, Rows, live_rows
from tradecore.store.ledger import Range
from tradecore.store.statements import TRADES

MARK_EVERY = 65_536
"""An id that is a multiple of this leaves a mark when it is stored."""

_ADD_MARKS = """
INSERT INTO trade_times (symbol, trade_id, timestamp)
SELECT symbol, trade_id, timestamptz 'epoch' + us * interval '1 microsecond'
FROM unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, trade_id, us)
ON CONFLICT (symbol, trade_id) DO UPDATE SET timestamp = excluded.timestamp
"""

_WINDOW = """
SELECT (extract(epoch FROM c.first_time) * 1000000)::int8 AS first_us,
       (extract(epoch FROM c.last_time) * 1000000)::int8 AS last_us,
       (extract(epoch FROM below.timestamp) * 1000000)::int8 AS below_us,
       (extract(epoch FROM above.timestamp) * 1000000)::int8 AS above_us
FROM (SELECT * FROM trade_coverage WHERE symbol = $1 AND first_id <= $2
      ORDER BY first_id DESC LIMIT 1) AS c
LEFT JOIN LATERAL (
    SELECT timestamp FROM trade_times
    WHERE symbol = $1 AND trade_id BETWEEN c.first_id AND $2 ORDER BY trade_id DESC LIMIT 1
) AS below ON true
LEFT JOIN LATERAL (
    SELECT timestamp FROM trade_times
    WHERE symbol = $1 AND trade_id BETWEEN $2 AND c.last_id ORDER BY trade_id LIMIT 1
) AS above ON true
WHERE c.last_id >= $2
"""


async def write_marks(
    conn: asyncpg.Connection,
    names: Mapping[int, str],
    pieces: Mapping[int, Sequence[Range]],
    rows: Rows,
    keep: Keep,
) -> None:
    """Enter the marks of the rows to keep, which form `pieces`; mostly there are none."""
    if not any(_has_mark(piece) for ranges in pieces.values() for piece in ranges):
        return
    marked = (rows["trade_id"] % MARK_EVERY == 0) & (keep != 0) & live_rows(rows, TRADES)
    found = rows[marked]
    await conn.execute(
        _ADD_MARKS,
        [names[symbol_id] for symbol_id in found["symbol_id"].tolist()],
        found["trade_id"].tolist(),
        found["trade_us"].tolist(),
    )


def _has_mark(piece: Range) -> bool:
    return piece.last_id // MARK_EVERY * MARK_EVERY >= piece.first_id


async def time_window(
    conn: asyncpg.Connection, symbol: str, trade_id: int, *, whole_range: bool = False
) -> tuple[int, int] | None:
    """Return the first and last time that the trade can have, in microseconds since 1970.

    None when it is not stored. The times are those of the nearest marks in the range of the ledger
    that holds the id, else of the range's ends. This rests on times that ascend with the ids, which
    the venue has always kept (34,419 recorded trades) and nowhere promises. Who finds no trade in
    the window asks again with `whole_range`: the least and the greatest time of all of the range,
    which hold whatever the order is.
    """
    row = await conn.fetchrow(_WINDOW, symbol, trade_id)
    if row is None:
        return None
    first_us, last_us = row["first_us"], row["last_us"]
    if not whole_range:
        first_us = first_us if row["below_us"] is None else row["below_us"]
        last_us = last_us if row["above_us"] is None else row["above_us"]
    return min(first_us, last_us), max(first_us, last_us)
