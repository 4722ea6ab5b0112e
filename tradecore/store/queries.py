"""Reads candles, tickers and prices for clients: the answer is JSON text, made by the database.

Every statement has time bounds on both sides: without a lower one a continuous aggregate is
computed from all that was not refreshed yet, and the newest rows of a rare symbol are searched in
all partitions. Where the bounds are not known, windows are tried, each wider than the last.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import asyncpg

from tradecore.store.grids import LAST_US, TABLES, Grid

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WIDEN = 8

_SPAN = """
SELECT (SELECT (date_part('epoch', first_time) * 1000000)::int8 FROM trade_coverage
        WHERE symbol = $1 ORDER BY first_id LIMIT 1) AS first_us,
       (SELECT (date_part('epoch', last_time) * 1000000)::int8 FROM trade_coverage
        WHERE symbol = $1 ORDER BY first_id DESC LIMIT 1) AS last_us
"""
_OLDEST_DAY = """
SELECT (date_part('epoch', min(bucket)) * 1000000)::int8 FROM {table}
WHERE symbol = $1 AND bucket < $2
"""
_HAS_AGGREGATES = "SELECT to_regclass('timescaledb_information.continuous_aggregates') IS NOT NULL"
_AGGREGATES = """
SELECT view_name, format('%I.%I', materialization_hypertable_schema,
                         materialization_hypertable_name) AS name
FROM timescaledb_information.continuous_aggregates
WHERE view_schema = current_schema() AND view_name = ANY($1::text[])
"""

# Prices and sums of quantities have 8 decimals from raw_trades. The exact sum of price x quantity
# has 16: what is behind the eighth is cut off.
_PAGE = """
SELECT count(*) AS rows, max(us) AS last_us, convert_to(concat('[', string_agg(concat(
    '[', us / {unit}, ',"', open, '","', high, '","', low, '","', close, '","', volume, '",',
    end_us / {unit} - 1, ',"', trunc(quote_volume, 8), '",', trade_count, ',"',
    trunc(taker_buy_base_volume, 8), '","', trunc(taker_buy_quote_volume, 8), '","0"]'
), ','), ']'), 'UTF8') AS body
FROM (SELECT *, {end} AS end_us
      FROM (SELECT *, (date_part('epoch', bucket) * 1000000)::int8 AS us
            FROM ({source}) AS picked) AS timed ORDER BY us) AS sorted
"""
_STORED = """
SELECT * FROM {table} WHERE symbol = $1 AND bucket >= $2 AND bucket < $3
ORDER BY bucket {order} LIMIT $4
"""
_ROLLED = """
SELECT {bucket} AS bucket, (min(ARRAY[first_id, open]))[2] AS open, max(high) AS high,
       min(low) AS low, (max(ARRAY[last_id, close]))[2] AS close, sum(volume) AS volume,
       sum(quote_volume) AS quote_volume, sum(trade_count)::int8 AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume
FROM {table} WHERE symbol = $1 AND bucket >= $2 AND bucket < $3
GROUP BY 1 ORDER BY 1 {order} LIMIT $4
"""
_BINNED = "date_bin('{seconds} seconds', bucket, $5::timestamptz)"
_MONTHLY = (
    "date_trunc('month', bucket + $5::int8 * interval '1 microsecond', 'UTC')"
    " - $5::int8 * interval '1 microsecond'"
)
_MONTH_END = (
    "(date_part('epoch', date_trunc('month', bucket + $5::int8 * interval '1 microsecond', 'UTC')"
    " + interval '1 month' - $5::int8 * interval '1 microsecond') * 1000000)::int8"
)


class Span(NamedTuple):
    """From when until when there is something of a symbol, in microseconds since 1970."""

    first_us: int
    last_us: int


class Page(NamedTuple):
    """A JSON array as UTF-8."""

    body: bytes
    rows: int
    last_us: int | None
    """The last candle's begin, the last trade's time."""


EMPTY = Page(b"[]", 0, None)


def moment(us: int) -> datetime:
    """Return a time as the database takes it; beyond the years that it knows, the nearest."""
    return _EPOCH + timedelta(microseconds=min(max(us, 0), LAST_US))


async def candle_tables(conn: asyncpg.Connection) -> dict[str, str]:
    """Return by width what to read candles from.

    Of continuous aggregates it is the table below the view: the daemon refreshes it as often as it
    does the tables of other servers, and planning one of the views takes longer than the answer.
    """
    tables = {width: f"candles_{width}" for width in TABLES}
    if await conn.fetchval(_HAS_AGGREGATES):
        found = {row[0]: row[1] for row in await conn.fetch(_AGGREGATES, list(tables.values()))}
        tables = {width: found.get(name, name) for width, name in tables.items()}
    return tables


async def trade_span(conn: asyncpg.Connection, symbol: str) -> Span | None:
    """Return between which times trades of a symbol are stored; None if there is none."""
    first_us, last_us = await conn.fetchrow(_SPAN, symbol)
    return None if first_us is None else Span(first_us, last_us)


async def candle_span(
    conn: asyncpg.Connection, tables: Mapping[str, str], symbol: str
) -> Span | None:
    """Return between which times there are candles: they outlive the trades."""
    span = await trade_span(conn, symbol)
    if span is None:
        return None
    oldest_us = await conn.fetchval(
        _OLDEST_DAY.format(table=tables["1d"]), symbol, moment(span.first_us)
    )
    return span if oldest_us is None else Span(min(oldest_us, span.first_us), span.last_us)


async def candles(
    conn: asyncpg.Connection,
    tables: Mapping[str, str],
    symbol: str,
    grid: Grid,
    span: Span,
    *,
    start_us: int | None = None,
    end_us: int | None = None,
    limit: int = 500,
    micro: bool = False,
) -> Page:
    """Return candles as the venue's klines, ascending; those without a trade are left out.

    `start_us` and `end_us` bound the begins of the candles, both inclusive. With a start the oldest
    from there on, else the newest; `limit` at most. `micro`: times in microseconds, else in
    milliseconds. `tables` and `span` are those of `candle_tables` and `candle_span`.
    """
    first, last = grid.floor(span.first_us), grid.floor(span.last_us)
    if start_us is not None:
        first = max(first, grid.ceil(min(start_us, LAST_US)))
    if end_us is not None:
        last = min(last, grid.floor(min(end_us, LAST_US)))
    if first > last:
        return EMPTY
    statement = _candle_statement(grid, tables[grid.table], micro, newest=start_us is None)
    arguments = (
        () if grid.stored else (moment(grid.origin_us) if grid.width_us else grid.offset_us,)
    )
    reach = limit
    while True:
        if start_us is None:
            low, high = max(first, grid.step(last, 1 - reach)), last
        else:
            low, high = first, min(last, grid.step(first, reach - 1))
        page = Page(
            *await _page(conn, statement, symbol, low, grid.step(high, 1), limit, *arguments)
        )
        if page.rows >= limit or (low, high) == (first, last):
            return page
        reach *= _WIDEN


async def _page(
    conn: asyncpg.Connection, statement: str, symbol: str, low_us: int, end_us: int, *rest: object
) -> tuple[bytes, int, int | None]:
    row = await conn.fetchrow(statement, symbol, moment(low_us), moment(end_us), *rest)
    return row["body"], row["rows"], row["last_us"]


@lru_cache(maxsize=64)
def _candle_statement(grid: Grid, table: str, micro: bool, newest: bool) -> str:
    order = "DESC" if newest else "ASC"
    end = f"us + {grid.width_us}" if grid.width_us else _MONTH_END
    if grid.stored:
        source = _STORED.format(table=table, order=order)
    else:
        bucket = _MONTHLY
        if grid.width_us:
            bucket = _BINNED.format(seconds=grid.width_us // 1_000_000)
        source = _ROLLED.format(bucket=bucket, table=table, order=order)
    return _PAGE.format(unit=1 if micro else 1000, end=end, source=source)
