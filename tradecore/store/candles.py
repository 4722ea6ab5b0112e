"""Brings candles up to date for a window of trade time: one function for tables and aggregates.

A candle is computed from the trades that are stored, the wider ones from the next narrower ones, so
the order is bottom up. It is always computed as a whole, never added to: whatever came late or
twice, the same trades give the same candle.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import asyncpg

from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.migrate import Level
from tradecore.store.pool import read_timescale

WIDTHS: dict[str, timedelta] = {
    "1m": timedelta(minutes=1),
    "5m": timedelta(minutes=5),
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "4h": timedelta(hours=4),
    "1d": timedelta(days=1),
}
"""The widths that are kept, in tables candles_1m to candles_1d; each is a multiple of the one
before. Candles begin at multiples of their width since 1970, in UTC, as the venue's do."""

REFRESH_LIMIT_S = 120.0

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Since TimescaleDB 2.28 a refresh by hand is cut into transactions of 10 buckets, unless told.
_BATCHES = """, options => '{"buckets_per_batch": 10080}'"""

_COLUMNS = (
    "bucket, symbol, open, high, low, close, volume, quote_volume, trade_count,"
    " taker_buy_base_volume, taker_buy_quote_volume, first_id, last_id"
)

# The least array is that of the least trade id: half the cost of sorting prices by id.
_FROM_TRADES = """
SELECT date_bin('1 minute', timestamp, '1970-01-01 00:00+0') AS bucket, symbol,
       (min(ARRAY[trade_id, price]))[2] AS open, max(price) AS high, min(price) AS low,
       (max(ARRAY[trade_id, price]))[2] AS close, sum(quantity) AS volume,
       sum(price * quantity) AS quote_volume, count(*) AS trade_count,
       sum(CASE WHEN side = 'BUY' THEN quantity ELSE 0 END) AS taker_buy_base_volume,
       sum(CASE WHEN side = 'BUY' THEN price * quantity ELSE 0 END) AS taker_buy_quote_volume,
       min(trade_id) AS first_id, max(trade_id) AS last_id
FROM raw_trades WHERE timestamp >= $1::timestamptz AND timestamp < $2::timestamptz
GROUP BY 1, 2
"""
_FROM_CANDLES = """
SELECT date_bin('{seconds} seconds', bucket, '1970-01-01 00:00+0') AS bucket, symbol,
       (array_agg(open ORDER BY bucket))[1] AS open, max(high) AS high, min(low) AS low,
       (array_agg(close ORDER BY bucket DESC))[1] AS close, sum(volume) AS volume,
       sum(quote_volume) AS quote_volume, sum(trade_count)::bigint AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume,
       min(first_id) AS first_id, max(last_id) AS last_id
FROM candles_{below} WHERE bucket >= $1::timestamptz AND bucket < $2::timestamptz
GROUP BY 1, 2
"""
_PUT = f"""
WITH fresh AS MATERIALIZED ({{source}}),
gone AS (
    DELETE FROM candles_{{width}} AS c
    WHERE c.bucket >= $1::timestamptz AND c.bucket < $2::timestamptz
      AND (c.symbol, c.bucket) NOT IN (SELECT symbol, bucket FROM fresh)
)
INSERT INTO candles_{{width}} AS c ({_COLUMNS}) SELECT {_COLUMNS} FROM fresh
ON CONFLICT (symbol, bucket) DO UPDATE
SET open = excluded.open, high = excluded.high, low = excluded.low, close = excluded.close,
    volume = excluded.volume, quote_volume = excluded.quote_volume,
    trade_count = excluded.trade_count,
    taker_buy_base_volume = excluded.taker_buy_base_volume,
    taker_buy_quote_volume = excluded.taker_buy_quote_volume,
    first_id = excluded.first_id, last_id = excluded.last_id
WHERE (c.open, c.high, c.low, c.close, c.volume, c.quote_volume, c.trade_count,
       c.taker_buy_base_volume, c.taker_buy_quote_volume, c.first_id, c.last_id)
    IS DISTINCT FROM
      (excluded.open, excluded.high, excluded.low, excluded.close, excluded.volume,
       excluded.quote_volume, excluded.trade_count, excluded.taker_buy_base_volume,
       excluded.taker_buy_quote_volume, excluded.first_id, excluded.last_id)
"""


@dataclass(frozen=True, slots=True)
class CandleKind:
    """How the candles of this database are made."""

    aggregates: bool
    """Continuous aggregates of TimescaleDB; else tables."""
    call: str = ""
    """What refreshes an aggregate, by its full name."""
    options: str = ""
    """What `call` is given besides the window."""


async def read_kind(conn: asyncpg.Connection, level: Level) -> CandleKind:
    """Find out how to refresh; changes nothing."""
    if level != "community":
        return CandleKind(aggregates=False)
    timescale = await read_timescale(conn)
    row = await conn.fetchrow(
        "SELECT quote_ident($1::text) AS schema, EXISTS (SELECT FROM pg_proc"
        " WHERE proname = 'refresh_continuous_aggregate' AND 'options' = ANY(proargnames)"
        " AND pronamespace = quote_ident($1::text)::regnamespace) AS options",
        timescale.schema,
    )
    assert row is not None
    return CandleKind(
        aggregates=True,
        call=f"{row['schema']}.refresh_continuous_aggregate",
        options=_BATCHES if row["options"] else "",
    )


async def refresh(
    conn: asyncpg.Connection,
    kind: CandleKind,
    first: datetime,
    end: datetime,
    *,
    raw_from: datetime | None = None,
    closed: datetime | None = None,
) -> None:
    """Compute all candles anew that have trades of `first` <= time < `end`, bottom up.

    Nothing below `raw_from`, the retention horizon (a midnight), is touched: there the candles are
    all that is left. Aggregates wider than a minute that are not over at `closed` are left to be
    computed when they are read, which costs less and is never late; None: none are left. `conn`
    must not be in a transaction. Raises TransientStoreError.
    """
    if raw_from is not None:
        first = max(first, raw_from)
    if first >= end:
        return
    try:
        async with asyncio.timeout(REFRESH_LIMIT_S):
            if kind.aggregates:
                for width, step in WIDTHS.items():
                    begin, until = whole_candles(first, end, width)
                    if closed is not None and width != "1m":
                        until = min(until, closed - (closed - EPOCH) % step)
                    if begin < until:
                        await _refresh_aggregate(conn, kind, width, begin, until)
            else:
                async with conn.transaction(isolation="read_committed"):
                    for width in WIDTHS:
                        window = whole_candles(first, end, width)
                        await conn.execute(_PUTS[width], *window, timeout=REFRESH_LIMIT_S)
    except TROUBLE as exc:
        raise as_transient(exc, "refresh candles") from exc


async def _refresh_aggregate(
    conn: asyncpg.Connection, kind: CandleKind, width: str, first: datetime, end: datetime
) -> None:
    # A procedure that commits inside cannot run in a transaction, nor with bound parameters.
    await conn.execute(
        f"CALL {kind.call}('candles_{width}', '{first.isoformat()}'::timestamptz,"
        f" '{end.isoformat()}'::timestamptz{kind.options})",
        timeout=REFRESH_LIMIT_S,
    )


def whole_candles(first: datetime, end: datetime, width: str) -> tuple[datetime, datetime]:
    """Return the window of whole candles around `first` <= time < `end`."""
    step = WIDTHS[width]
    return first - (first - EPOCH) % step, end + (EPOCH - end) % step


def _make_puts() -> Iterator[tuple[str, str]]:
    below = None
    for width, step in WIDTHS.items():
        seconds = int(step.total_seconds())
        source = _FROM_CANDLES.format(seconds=seconds, below=below) if below else _FROM_TRADES
        yield width, _PUT.format(source=source, width=width)
        below = width


_PUTS = dict(_make_puts())
