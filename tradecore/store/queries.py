"""Reads candles, tickers and prices for clients: the answer is JSON text, made by the database.

Every statement has time bounds on both sides: without a lower one a continuous aggregate is
computed from all that was not refreshed yet, and the newest rows of a rare symbol are searched in
all partitions. Where the bounds are not known, windows are tried, each wider than the last.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import asyncpg

from tradecore import clock
from tradecore.store.candles import EPOCH
from tradecore.store.grids import LAST_US, TABLES, Grid

_WIDEN = 8
_BETWEEN = "15m"
"""Candles under way that are wider are made of these first, and of minutes last."""
_SETTLED_KEPT_NS = 2 * 10**9

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
_NEWEST = "SELECT (date_part('epoch', max(bucket)) * 1000000)::int8 FROM {table}"
_BEHIND = """
SELECT EXISTS (SELECT FROM candle_windows
               WHERE minutes && tstzrange($1::timestamptz, $2::timestamptz, '[]'))
"""
_HAS_AGGREGATES = "SELECT to_regclass('timescaledb_information.continuous_aggregates') IS NOT NULL"
_AGGREGATES = """
SELECT view_name, format('%I.%I', materialization_hypertable_schema,
                         materialization_hypertable_name) AS name
FROM timescaledb_information.continuous_aggregates
WHERE view_schema = current_schema() AND view_name = ANY($1::text[])
"""

# Prices and sums of quantities have 8 decimals from raw_trades. The exact sum of price x quantity
# has 16: what is behind the eighth is cut off. `at` counts milli- or microseconds.
_PAGE = """
SELECT count(*) AS rows, max(at) * {unit} AS last_us, convert_to(concat('[', string_agg(concat(
    '[', at, ',"', open, '","', high, '","', low, '","', close, '","', volume, '",', {end} - 1,
    ',"', trunc(quote_volume, 8), '",', trade_count, ',"', trunc(taker_buy_base_volume, 8),
    '","', trunc(taker_buy_quote_volume, 8), '","0"]'
), ','), ']'), 'UTF8') AS body
FROM (SELECT *, (date_part('epoch', bucket) * {per_second})::int8 AS at
      FROM ({source}) AS picked ORDER BY bucket) AS sorted
"""
_ROWS = """
(SELECT * FROM {table} WHERE symbol = $1 AND bucket >= $2 AND bucket < $3) AS c
"""
_COLUMNS = (
    "open, high, low, close, volume, quote_volume, trade_count, taker_buy_base_volume,"
    " taker_buy_quote_volume, first_id, last_id"
)
_SUMS = """
(min(ARRAY[first_id, open]))[2] AS open, max(high) AS high, min(low) AS low,
(max(ARRAY[last_id, close]))[2] AS close, sum(volume) AS volume,
sum(quote_volume) AS quote_volume, sum(trade_count)::int8 AS trade_count,
sum(taker_buy_base_volume) AS taker_buy_base_volume,
sum(taker_buy_quote_volume) AS taker_buy_quote_volume, min(first_id) AS first_id,
max(last_id) AS last_id
"""
# The candles that are over, and those under way, made of narrower ones: {rest}.
_ROWS_AND_REST = f"""
(SELECT bucket, {_COLUMNS} FROM {{table}}
 WHERE symbol = $1 AND bucket >= $2 AND bucket < {{settled}}
 UNION ALL
 SELECT date_bin('{{seconds}} seconds', bucket, '1970-01-01 00:00+0') AS bucket, {_SUMS}
 FROM ({{rest}}) AS parts GROUP BY 1) AS c
"""
_REST = f"""
SELECT bucket, {_COLUMNS} FROM {{table}}
WHERE symbol = $1 AND bucket >= {{first}} AND bucket < {{end}}
"""
_STORED = "SELECT * FROM {rows} ORDER BY bucket {order} LIMIT $4"
_ROLLED = f"""
SELECT {{bucket}} AS bucket, {_SUMS} FROM {{rows}} GROUP BY 1 ORDER BY 1 {{order}} LIMIT $4
"""
_BINNED = "date_bin('{seconds} seconds', bucket, $5::timestamptz)"
_MONTHLY = (
    "date_trunc('month', bucket + $5::int8 * interval '1 microsecond', 'UTC')"
    " - $5::int8 * interval '1 microsecond'"
)
_MONTH_END = (
    "(date_part('epoch', date_trunc('month', bucket + $5::int8 * interval '1 microsecond', 'UTC')"
    " + interval '1 month' - $5::int8 * interval '1 microsecond') * {per_second})::int8"
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
    return EPOCH + timedelta(microseconds=min(max(us, 0), LAST_US))


@dataclass(slots=True)
class CandleTables:
    """What to read candles from, by width.

    Of continuous aggregates it is the table below the view: planning one of the views takes longer
    than the answer. The daemon refreshes that of the minutes as often as it does the tables of
    other servers; the wider ones have only candles that are over, the rest is made of minutes.
    """

    names: dict[str, str]
    aggregates: bool
    _settled: dict[str, tuple[int, int]] = field(default_factory=dict)

    async def settled(self, conn: asyncpg.Connection, width: str) -> list[datetime]:
        """Return where the rest begins, by each source of `sources` in its order, but the first.

        An older answer does as well, so that it is kept for two seconds.
        """
        found_us = [await self._end_us(conn, width)]
        if TABLES[width] > TABLES[_BETWEEN]:
            found_us.append(max(found_us[0], await self._end_us(conn, _BETWEEN)))
        return [moment(us) for us in found_us]

    def sources(self, width: str, rests: int) -> tuple[str, ...]:
        """Return the tables to read: of this width, and where `rests` says so of narrower ones."""
        narrower = {0: (), 1: ("1m",), 2: (_BETWEEN, "1m")}[rests]
        return tuple(self.names[one] for one in (width, *narrower))

    async def _end_us(self, conn: asyncpg.Connection, width: str) -> int:
        """Return the end of the newest candle in a table, of whatever symbol."""
        now_ns = clock.mono_ns()
        known = self._settled.get(width)
        if known is None or now_ns - known[0] > _SETTLED_KEPT_NS:
            newest_us = await conn.fetchval(_NEWEST.format(table=self.names[width]))
            known = now_ns, 0 if newest_us is None else newest_us + TABLES[width]
            self._settled[width] = known
        return known[1]


async def candle_tables(conn: asyncpg.Connection) -> CandleTables:
    """Find out what to read candles from."""
    names = {width: f"candles_{width}" for width in TABLES}
    found = {}
    if await conn.fetchval(_HAS_AGGREGATES):
        found = {row[0]: row[1] for row in await conn.fetch(_AGGREGATES, list(names.values()))}
    names = {width: found.get(name, name) for width, name in names.items()}
    return CandleTables(names, bool(found))


async def trade_span(conn: asyncpg.Connection, symbol: str) -> Span | None:
    """Return between which times trades of a symbol are stored; None if there is none."""
    first_us, last_us = await conn.fetchrow(_SPAN, symbol)
    return None if first_us is None else Span(first_us, last_us)


async def are_behind(conn: asyncpg.Connection, first_us: int, end_us: int | None) -> bool:
    """Tell whether stored trades of `first_us` <= time <= `end_us` are not in candles yet."""
    end = None if end_us is None else moment(end_us)
    return bool(await conn.fetchval(_BEHIND, moment(first_us), end))


async def candles(
    conn: asyncpg.Connection,
    tables: CandleTables,
    symbol: str,
    grid: Grid,
    *,
    start_us: int | None = None,
    end_us: int | None = None,
    limit: int = 500,
    micro: bool = False,
) -> Page | None:
    """Return candles as the venue's klines, ascending; those without a trade are left out.

    `start_us` and `end_us` bound the begins of the candles, both inclusive. With a start the oldest
    from there on, else the newest; `limit` at most. `micro`: times in microseconds, else in
    milliseconds. `tables` are those of `candle_tables`. None: nothing is stored of the symbol.
    """
    ask = _Asking(conn, tables, symbol, grid, limit, micro, newest=start_us is None)
    first = grid.ceil(min(start_us or 0, LAST_US))
    last = grid.floor(LAST_US if end_us is None else min(end_us, LAST_US))
    if start_us is not None:
        # Mostly this is all, and how far the record reaches need not be known.
        high = min(last, grid.step(first, limit - 1))
        page = await ask.window(first, high) if first <= high else EMPTY
        if page.rows == limit or (page.rows and high == last):
            return page
    span = await trade_span(conn, symbol)
    if span is None:
        return None
    last = min(last, grid.floor(span.last_us))
    if start_us is None:
        low = grid.step(last, 1 - limit)
        page = await ask.window(low, last)
        if page.rows == limit:
            return page
    first = max(first, grid.floor(await _oldest_us(conn, tables, symbol, span)))
    reach = limit
    while first <= last:
        if start_us is None:
            low, high = max(first, grid.step(last, 1 - reach)), last
        else:
            low, high = first, min(last, grid.step(first, reach - 1))
        page = await ask.window(low, high)
        if page.rows == limit or (low, high) == (first, last):
            return page
        reach *= _WIDEN
    return EMPTY


async def _oldest_us(
    conn: asyncpg.Connection, tables: CandleTables, symbol: str, span: Span
) -> int:
    """Return when the candles of a symbol begin: they outlive the trades."""
    statement = _OLDEST_DAY.format(table=tables.names["1d"])
    oldest_us: int | None = await conn.fetchval(statement, symbol, moment(span.first_us))
    return span.first_us if oldest_us is None else min(oldest_us, span.first_us)


@dataclass(frozen=True, slots=True)
class _Asking:
    """One question, which is tried with several windows."""

    conn: asyncpg.Connection
    tables: CandleTables
    symbol: str
    grid: Grid
    limit: int
    micro: bool
    newest: bool

    async def window(self, low_us: int, high_us: int) -> Page:
        """Return the oldest, or newest, candles that begin in low_us <= begin <= high_us."""
        grid = self.grid
        end = moment(grid.step(high_us, 1))
        rest: list[datetime] = []
        if self.tables.aggregates and grid.table != "1m":
            rest = await self.tables.settled(self.conn, grid.table)
            rest = [] if end <= rest[0] else [max(moment(low_us), begin) for begin in rest]
        sources = self.tables.sources(grid.table, len(rest))
        statement = _candle_statement(grid, sources, self.micro, self.newest)
        origin: tuple[object, ...] = ()
        if not grid.stored:
            origin = (moment(grid.origin_us) if grid.width_us else grid.offset_us,)
        row = await self.conn.fetchrow(
            statement, self.symbol, moment(low_us), end, self.limit, *origin, *rest
        )
        return Page(row["body"], row["rows"], row["last_us"])


@lru_cache(maxsize=64)
def _candle_statement(grid: Grid, sources: tuple[str, ...], micro: bool, newest: bool) -> str:
    """Return the SQL: $1 symbol, $2 and $3 bounds, $4 limit, then the origin, then the rest's."""
    order = "DESC" if newest else "ASC"
    per_second = 1_000_000 if micro else 1000
    end = _MONTH_END.format(per_second=per_second)
    if grid.width_us:
        end = f"at + {grid.width_us * per_second // 1_000_000}"
    rows = _ROWS.format(table=sources[0])
    if len(sources) > 1:
        first = 5 if grid.stored else 6
        begins = [f"${first + n}::timestamptz" for n in range(len(sources) - 1)]
        rests = zip(sources[1:], begins, [*begins[1:], "$3"], strict=True)
        rows = _ROWS_AND_REST.format(
            table=sources[0],
            settled=begins[0],
            seconds=TABLES[grid.table] // 1_000_000,
            rest=" UNION ALL ".join(
                _REST.format(table=table, first=begin, end=until) for table, begin, until in rests
            ),
        )
    if grid.stored:
        source = _STORED.format(rows=rows, order=order)
    else:
        bucket = _MONTHLY
        if grid.width_us:
            bucket = _BINNED.format(seconds=grid.width_us // 1_000_000)
        source = _ROLLED.format(bucket=bucket, rows=rows, order=order)
    return _PAGE.format(unit=1_000_000 // per_second, per_second=per_second, end=end, source=source)
