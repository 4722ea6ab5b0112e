"""Turns a trade id into a time: marks beside the ledger, by ids and by hours of trade time."""

from collections.abc import Mapping, Sequence

import asyncpg
import numpy as np

from tradecore.store.batch import Keep, Rows, live_rows
from tradecore.store.ledger import Range
from tradecore.store.statements import TRADES

MARK_EVERY = 65_536
"""An id that is a multiple of this leaves a mark when it is stored."""

_HOUR_US = 3_600_000_000

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


class Hours:
    """The hours of trade time that have a mark, as far as is remembered: two of each symbol.

    One is where the feed is, the other where history is being filled in. An hour that is forgotten
    gets another mark, which does no harm.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}

    def has(self, symbol: str, piece: Range) -> bool:
        """Tell whether all of the piece is in one hour that has a mark."""
        hour = piece.first_us // _HOUR_US
        return hour == piece.last_us // _HOUR_US and hour in self._last.get(symbol, ())

    def add(self, symbol: str, hour: int) -> bool:
        """Note a mark; return whether it is needed."""
        known = self._last.get(symbol, (-1, -1))
        if hour in known:
            return False
        newest = known[0]
        self._last[symbol] = (hour, newest) if hour > newest else (newest, hour)
        return True

    def forget(self) -> None:
        """Start anew: marks may have been noted that were not committed."""
        self._last.clear()


async def write_marks(
    conn: asyncpg.Connection,
    names: Mapping[int, str],
    pieces: Mapping[int, Sequence[Range]],
    rows: Rows,
    keep: Keep,
    hours: Hours,
) -> None:
    """Enter the marks of the rows to keep, which form `pieces`; mostly there are none.

    Every id that is a multiple of MARK_EVERY leaves one, and of each symbol the first row of an
    hour that is not in `hours`. Call `hours.forget()` when the transaction fails.
    """
    fresh: list[int] = []
    by_id = False
    for symbol_id, ranges in pieces.items():
        name = names[symbol_id]
        for piece in ranges:
            by_id = by_id or piece.last_id // MARK_EVERY * MARK_EVERY >= piece.first_id
            if not hours.has(name, piece):
                fresh.append(symbol_id)
                break
    if not (by_id or fresh):
        return
    live = (keep != 0) & live_rows(rows, TRADES)
    marked = (rows["trade_id"] % MARK_EVERY == 0) & live
    if fresh:
        those = np.flatnonzero(np.isin(rows["symbol_id"], fresh) & live)
        owners, when = rows["symbol_id"][those].astype(np.int64), rows["trade_us"][those]
        keys, firsts = np.unique((owners << 32) + when // _HOUR_US, return_index=True)
        # The oldest last: history is filled in from above, so that its next page meets that hour.
        for key, first in zip(keys[::-1].tolist(), firsts[::-1].tolist(), strict=True):
            if hours.add(names[key >> 32], key & 0xFFFFFFFF):
                marked[those[first]] = True
    found = rows[marked]
    if len(found):
        await conn.execute(
            _ADD_MARKS,
            [names[symbol_id] for symbol_id in found["symbol_id"].tolist()],
            found["trade_id"].tolist(),
            found["trade_us"].tolist(),
        )


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
