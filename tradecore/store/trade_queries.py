"""Reads trades for clients, by id and by time: the answer is JSON text, made by the database.

The only key of raw_trades leads with the time, so that ids are turned into times first: the ledger
says which ids are stored, its marks about when, and the candles in which minutes. Then no minute is
read that has none of the trades, however rare the symbol is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from tradecore.store.queries import EMPTY, CandleTables, Page, moment
from tradecore.store.times import time_window

_MINUTE_US = 60_000_000
_FRESH_MINUTES = 3
"""So many minutes before the newest trade are read even if they have no candle yet."""

# Without the ids that are kept in the ledger for their place only: see sql/011_lifecycle.sql.
_WITH_ROWS = """
SELECT * FROM (
    SELECT c.first_id + (c.first_time < s.ledger_from)::int AS first_id, c.last_id
    FROM ({ranges}) AS c, store_state AS s
) AS r WHERE first_id <= last_id
"""
_NEWEST_RANGES = (
    _WITH_ROWS.format(
        ranges="SELECT * FROM trade_coverage WHERE symbol = $1 ORDER BY first_id DESC LIMIT $2"
    )
    + "ORDER BY first_id DESC"
)
_RANGES_FROM = (
    _WITH_ROWS.format(
        ranges="""
    (SELECT * FROM trade_coverage WHERE symbol = $1 AND first_id <= $2
     ORDER BY first_id DESC LIMIT 1)
    UNION ALL
    (SELECT * FROM trade_coverage WHERE symbol = $1 AND first_id > $2
     ORDER BY first_id LIMIT $3)
"""
    )
    + "AND last_id >= $2 ORDER BY first_id"
)

# The venue cuts quoteQty at the quote asset's decimals; side is the taker's.
_PAGE = """
SELECT count(*) AS rows, max(us) AS last_us, convert_to(concat('[', string_agg(concat(
    '{{"id":', trade_id, ',"price":"', price, '","qty":"', quantity, '","quoteQty":"',
    trunc(price * quantity, 8), '","time":', us / {unit}, ',"isBuyerMaker":',
    CASE WHEN side = 'SELL' THEN 'true' ELSE 'false' END, ',"isBestMatch":true}}'
), ','), ']'), 'UTF8') AS body
FROM (SELECT *, (date_part('epoch', timestamp) * 1000000)::int8 AS us
      FROM ({source}) AS picked ORDER BY trade_id) AS sorted
"""
_COLUMNS = "t.timestamp, t.trade_id, t.price, t.quantity, t.side"
_BETWEEN = "t.symbol = $1 AND t.timestamp >= $2 AND t.timestamp <= $3"
_BY_TIME = f"""
SELECT {_COLUMNS} FROM raw_trades AS t WHERE {_BETWEEN}
ORDER BY t.timestamp {{order}}, t.trade_id {{order}} LIMIT $4
"""
_BY_ID = f"""
SELECT {_COLUMNS} FROM raw_trades AS t WHERE {_BETWEEN} AND t.trade_id BETWEEN $4 AND $5
"""
_BY_MINUTE = f"""
SELECT {_COLUMNS}
FROM (SELECT bucket FROM {{minutes}} WHERE symbol = $1 AND bucket >= $2 AND bucket <= $3
          AND last_id >= $4 AND first_id <= $5
      UNION SELECT unnest($6::timestamptz[])) AS m
CROSS JOIN LATERAL (
    SELECT * FROM raw_trades AS t WHERE {_BETWEEN} AND t.trade_id BETWEEN $4 AND $5
        AND t.timestamp >= m.bucket AND t.timestamp < m.bucket + interval '1 minute' OFFSET 0
) AS t
"""


class _Ids(NamedTuple):
    first: int
    last: int
    stored: int
    """How many of them are stored."""


async def trades_by_time(
    conn: asyncpg.Connection,
    symbol: str,
    from_us: int,
    to_us: int,
    limit: int,
    *,
    newest: bool = False,
    micro: bool = False,
) -> Page:
    """Return the oldest (or newest) trades of `from_us` <= time <= `to_us`, by ascending id."""
    source = _BY_TIME.format(order="DESC" if newest else "ASC")
    return await _page(conn, source, micro, symbol, moment(from_us), moment(to_us), limit)


async def newest_trades(
    conn: asyncpg.Connection,
    tables: CandleTables,
    symbol: str,
    last_us: int,
    limit: int,
    *,
    micro: bool = False,
) -> Page:
    """Return the newest `limit` stored trades; `last_us` is the time of the newest."""
    page = await trades_by_time(
        conn, symbol, last_us - _MINUTE_US, last_us + _MINUTE_US, limit, newest=True, micro=micro
    )
    if page.rows >= limit:
        return page
    ranges = await conn.fetch(_NEWEST_RANGES, symbol, limit)
    ids = _newest(ranges, limit)
    if ids is None or page.rows >= ids.stored:
        return page
    return await _by_ids(conn, tables, symbol, ids, micro)


async def trades_from(
    conn: asyncpg.Connection,
    tables: CandleTables,
    symbol: str,
    from_id: int,
    limit: int,
    *,
    micro: bool = False,
) -> Page:
    """Return the first `limit` stored trades whose id is `from_id` or greater."""
    ids = _oldest(await conn.fetch(_RANGES_FROM, symbol, from_id, limit), from_id, limit)
    return EMPTY if ids is None else await _by_ids(conn, tables, symbol, ids, micro)


async def _by_ids(
    conn: asyncpg.Connection, tables: CandleTables, symbol: str, ids: _Ids, micro: bool
) -> Page:
    """Return the stored trades of these ids, looking in more places until all are found."""
    page = EMPTY
    for whole_range in (False, True):
        below = await time_window(conn, symbol, ids.first, whole_range=whole_range)
        above = await time_window(conn, symbol, ids.last, whole_range=whole_range)
        if below is None or above is None:  # gone since the ledger was read
            return page
        low_us = min(below[0], above[0]) // _MINUTE_US * _MINUTE_US
        high_us = max(below[1], above[1])
        bounds = moment(low_us), moment(high_us)
        fresh = [
            moment((high_us // _MINUTE_US - back) * _MINUTE_US) for back in range(_FRESH_MINUTES)
        ]
        by_minute = _BY_MINUTE.format(minutes=tables.names["1m"])
        span = (ids.first, ids.last)
        page = await _page(conn, by_minute, micro, symbol, *bounds, *span, fresh)
        if page.rows < ids.stored:
            page = await _page(conn, _BY_ID, micro, symbol, *bounds, *span)
        if page.rows >= ids.stored:
            return page
    return page


def _newest(ranges: Sequence[asyncpg.Record], limit: int) -> _Ids | None:
    """Return the last `limit` ids of ranges that descend."""
    count, first = 0, 0
    for row in ranges:
        taken = min(limit - count, row["last_id"] - row["first_id"] + 1)
        count, first = count + taken, row["last_id"] - taken + 1
        if count == limit:
            break
    return _Ids(first, ranges[0]["last_id"], count) if ranges else None


def _oldest(ranges: Sequence[asyncpg.Record], from_id: int, limit: int) -> _Ids | None:
    """Return the first `limit` ids from `from_id` on of ranges that ascend."""
    count, last, begin = 0, 0, from_id
    for row in ranges:
        begin = max(from_id, row["first_id"]) if not count else begin
        start = max(from_id, row["first_id"])
        taken = min(limit - count, row["last_id"] - start + 1)
        count, last = count + taken, start + taken - 1
        if count == limit:
            break
    return _Ids(begin, last, count) if ranges else None


async def _page(conn: asyncpg.Connection, source: str, micro: bool, *arguments: object) -> Page:
    statement = _PAGE.format(source=source, unit=1 if micro else 1000)
    row = await conn.fetchrow(statement, *arguments)
    return Page(row["body"], row["rows"], row["last_us"])
