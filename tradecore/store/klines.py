"""Stores klines that came by REST beside those of the stream."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from tradecore.schema import FLAG_CLOSED, KLINE_DECIMALS
from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.statements import affected
from tradecore.store.transaction import transaction

_LIMIT_S = 30.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_PUT = """
INSERT INTO klines AS k
    (timestamp, symbol, close_time, open, high, low, close, volume, quote_volume,
     taker_buy_base_volume, taker_buy_quote_volume, trade_count, first_id, last_id, is_closed)
SELECT timestamptz 'epoch' + open_us * interval '1 microsecond', $1::text,
       timestamptz 'epoch' + close_us * interval '1 microsecond', open, high, low, close, volume,
       quote_volume, taker_base, taker_quote, n, first_id, last_id, true
FROM unnest($2::int8[], $3::int8[], $4::numeric[], $5::numeric[], $6::numeric[], $7::numeric[],
            $8::numeric[], $9::numeric[], $10::numeric[], $11::numeric[], $12::int8[],
            $13::int8[], $14::int8[])
    AS r (open_us, close_us, open, high, low, close, volume, quote_volume, taker_base,
          taker_quote, n, first_id, last_id)
ON CONFLICT (timestamp, symbol) DO UPDATE
SET event_time = NULL, close_time = excluded.close_time, open = excluded.open,
    high = excluded.high, low = excluded.low, close = excluded.close, volume = excluded.volume,
    quote_volume = excluded.quote_volume, taker_buy_base_volume = excluded.taker_buy_base_volume,
    taker_buy_quote_volume = excluded.taker_buy_quote_volume, trade_count = excluded.trade_count,
    first_id = excluded.first_id, last_id = excluded.last_id, is_closed = true, received_at = NULL
WHERE NOT k.is_closed
"""

# All minutes of the answer are looked at next, with a kline or without.
_ASKED = """
WITH asked AS (
    SELECT s.symbol, gap
    FROM audit_state AS s, unnest(s.no_kline * tstzmultirange($2::tstzrange)) AS gap
    WHERE s.symbol = $1::text
)
INSERT INTO trade_audits (symbol, open_time, state, reason, retry_at, asked_at)
SELECT symbol, minute, 'waiting', 'kline', '-infinity', clock_timestamp()
FROM asked, generate_series(lower(gap), upper(gap) - interval '1 minute', interval '1 minute')
    AS minute
ON CONFLICT DO NOTHING
"""
_LOCK = "SELECT FROM audit_state WHERE symbol = $1::text FOR UPDATE"
_TAKE = """
UPDATE audit_state SET no_kline = no_kline - tstzmultirange($2::tstzrange) WHERE symbol = $1::text
"""


async def put_klines(
    pool: asyncpg.Pool,
    symbol: str,
    rows: NDArray[np.void],
    *,
    asked_us: tuple[int, int] | None = None,
) -> int:
    """Store closed klines of `symbol` (KLINE_DTYPE) that came by REST; return how many are new.

    One that is stored and closed is left alone, one that is not closed is not stored. Ids of -1
    are unknown here and stored as NULL. `asked_us`: the open times (first, end) that the venue was
    asked for and answered in full: where it has no kline, no more is asked, and the minute is
    proven when no trade is stored either. Raises TransientStoreError.
    """
    closed = rows[(rows["flags"] & FLAG_CLOSED) != 0]
    columns: list[list[Any]] = [closed["open_us"].tolist(), closed["close_us"].tolist()]
    columns += [[_decimal(value) for value in closed[name]] for name in KLINE_DECIMALS]
    columns.append(closed["trade_count"].tolist())
    columns += [
        [None if value < 0 else value for value in closed[name].tolist()]
        for name in ("first_id", "last_id")
    ]
    try:
        async with asyncio.timeout(_LIMIT_S):
            async with transaction(pool, _LIMIT_S) as conn:
                stored = affected(await conn.execute(_PUT, symbol, *columns))
                if asked_us is not None:
                    first, end = (_EPOCH + timedelta(microseconds=us) for us in asked_us)
                    await conn.execute(_LOCK, symbol)
                    for statement in (_ASKED, _TAKE):
                        await conn.execute(statement, symbol, asyncpg.Range(first, end))
    except TROUBLE as exc:
        raise as_transient(exc, "store klines") from exc
    return stored


def _decimal(value: Any) -> Decimal:
    """Return a DECIMAL128 exactly; arithmetic on Decimals would round to 28 digits."""
    return Decimal(f"{(int(value['hi']) << 64) + int(value['lo'])}e-8")
