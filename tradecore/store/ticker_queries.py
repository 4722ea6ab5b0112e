"""Reads tickers, prices and statistics of windows for clients: JSON text, made by the database."""

from collections.abc import Mapping, Sequence

import asyncpg

from tradecore.store.queries import CandleTables, moment

_SECOND_US = 1_000_000
TICKER_WINDOWS_US = tuple(seconds * _SECOND_US for seconds in (10, 600, 86_400))
"""How far back the newest ticker is looked for, one after the other; older ones tell nothing."""

# The venue prints percentages with 3 decimals, all else with 8.
_TICKERS = """
SELECT DISTINCT ON (symbol) symbol, convert_to(concat('{{"symbol":"', symbol, '"', {fields},
    ',"openTime":', (date_part('epoch', open_time) * 1000000)::int8 / {unit},
    ',"closeTime":', (date_part('epoch', close_time) * 1000000)::int8 / {unit},
    ',"firstId":', first_id, ',"lastId":', last_id, ',"count":', trade_count, '}}'), 'UTF8') AS body
FROM tickers
WHERE symbol = ANY($1::text[]) AND timestamp > $2 AND timestamp <= $3
ORDER BY symbol, timestamp DESC
"""
_FULL_FIELDS = {
    "priceChange": "price_change",
    "priceChangePercent": "round(price_change_percent, 3)",
    "weightedAvgPrice": "weighted_average_price",
    "prevClosePrice": "previous_close_price",
    "lastPrice": "last_price",
    "lastQty": "last_quantity",
    "bidPrice": "best_bid_price",
    "bidQty": "best_bid_quantity",
    "askPrice": "best_ask_price",
    "askQty": "best_ask_quantity",
    "openPrice": "open_price",
    "highPrice": "high_price",
    "lowPrice": "low_price",
    "volume": "volume",
    "quoteVolume": "quote_volume",
}
_MINI = ("openPrice", "highPrice", "lowPrice", "lastPrice", "volume", "quoteVolume")

# $2 and $3: begin of the first minute and end of the last one; $4 and $5: the window as it is told.
_WINDOW = """
SELECT symbol, convert_to(concat('{{"symbol":"', symbol, '"', {fields}, ',"openTime":', $4::int8,
    ',"closeTime":', $5::int8, ',"firstId":', first_id, ',"lastId":', last_id,
    ',"count":', trade_count, '}}'), 'UTF8') AS body
FROM (
    SELECT symbol, (min(ARRAY[first_id, open]))[2] AS open, max(high) AS high, min(low) AS low,
           (max(ARRAY[last_id, close]))[2] AS close, sum(volume) AS volume,
           sum(quote_volume) AS quote_volume, sum(trade_count) AS trade_count,
           min(first_id) AS first_id, max(last_id) AS last_id
    FROM {table}
    WHERE symbol = ANY($1::text[]) AND bucket >= $2 AND bucket < $3 GROUP BY symbol
) AS w
"""
_WINDOW_FIELDS = {
    "priceChange": "close - open",
    "priceChangePercent": "round((close - open) * 100 / open, 3)",
    "weightedAvgPrice": "round(quote_volume / nullif(volume, 0), 8)",
    "openPrice": "open",
    "highPrice": "high",
    "lowPrice": "low",
    "lastPrice": "close",
    "volume": "volume",
    "quoteVolume": "trunc(quote_volume, 8)",
}

_ENDS = """
SELECT s.symbol, c.last_id, c.last_time FROM unnest($1::text[]) AS s (symbol) CROSS JOIN LATERAL (
    SELECT last_id, last_time FROM trade_coverage WHERE symbol = s.symbol
    ORDER BY first_id DESC LIMIT 1
) AS c
"""
_PRICES = """
SELECT s.symbol, convert_to(concat('{"symbol":"', s.symbol, '","price":"', t.price, '"}'), 'UTF8')
FROM unnest($1::text[], $2::timestamptz[]) AS s (symbol, last_time)
CROSS JOIN LATERAL (
    SELECT price FROM raw_trades AS r
    WHERE r.symbol = s.symbol AND r.timestamp = s.last_time
        AND r.timestamp >= $3 AND r.timestamp <= $4
    ORDER BY trade_id DESC LIMIT 1
) AS t
"""


async def newest_tickers(
    conn: asyncpg.Connection, symbols: Sequence[str], now_us: int, *, mini: bool, micro: bool
) -> dict[str, bytes]:
    """Return the newest captured ticker of each symbol that has one of the last day."""
    names = _MINI if mini else tuple(_FULL_FIELDS)
    fields = _fields({name: _FULL_FIELDS[name] for name in names})
    statement = _TICKERS.format(fields=fields, unit=1 if micro else 1000)
    found: dict[str, bytes] = {}
    high_us = now_us + TICKER_WINDOWS_US[-1]  # the clocks may differ
    for window_us in TICKER_WINDOWS_US:
        lacking = [symbol for symbol in symbols if symbol not in found]
        if not lacking:
            break
        low_us = now_us - window_us
        rows = await conn.fetch(statement, lacking, moment(low_us), moment(high_us))
        found |= {row[0]: row[1] for row in rows}
        high_us = low_us
    return found


async def window_statistics(
    conn: asyncpg.Connection,
    tables: CandleTables,
    symbols: Sequence[str],
    begin_us: int,
    end_us: int,
    shown: tuple[int, int],
    *,
    mini: bool,
) -> dict[str, bytes]:
    """Return statistics of the minutes that begin in begin_us <= time < end_us, from candles.

    `shown` is what the answer gives as its begin and end. Symbols without a trade are left out.
    """
    names = _MINI if mini else tuple(_WINDOW_FIELDS)
    fields = _fields({name: _WINDOW_FIELDS[name] for name in names})
    statement = _WINDOW.format(fields=fields, table=tables.names["1m"])
    rows = await conn.fetch(statement, list(symbols), moment(begin_us), moment(end_us), *shown)
    return {row[0]: row[1] for row in rows}


async def last_prices(conn: asyncpg.Connection, symbols: Sequence[str]) -> dict[str, bytes]:
    """Return the price of the newest stored trade of each symbol that has one."""
    ends = await conn.fetch(_ENDS, list(symbols))
    if not ends:
        return {}
    times = [row["last_time"] for row in ends]
    names = [row["symbol"] for row in ends]
    rows = await conn.fetch(_PRICES, names, times, min(times), max(times))
    return {row[0]: row[1] for row in rows}


def _fields(columns: Mapping[str, str]) -> str:
    """Return the arguments of concat() that print these members."""
    return ", ".join(f"""',"{name}":"', {column}, '"'""" for name, column in columns.items())
