"""What candles must be, computed trade by trade in Python from rows of raw_trades."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from typing import Any

import asyncpg

from tradecore.store.candles import WIDTHS

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXACT = Context(prec=400)
COLUMNS = (
    "bucket, symbol, open, high, low, close, volume, quote_volume, trade_count,"
    " taker_buy_base_volume, taker_buy_quote_volume, first_id, last_id"
)

Candles = dict[tuple[datetime, str], tuple[Any, ...]]


def candles_of(trades: Iterable[Any], width: timedelta) -> Candles:
    """Return the candles of rows of raw_trades, by bucket and symbol."""
    members: dict[tuple[datetime, str], list[Any]] = defaultdict(list)
    for row in trades:
        begin = row["timestamp"] - (row["timestamp"] - EPOCH) % width
        members[begin, row["symbol"]].append(row)
    return {key: _candle(rows) for key, rows in members.items()}


def _candle(rows: list[Any]) -> tuple[Any, ...]:
    rows = sorted(rows, key=lambda row: row["trade_id"])
    volume = quote = base = taker = Decimal(0)
    high = low = rows[0]["price"]
    for row in rows:
        price, quantity = row["price"], row["quantity"]
        product = EXACT.multiply(price, quantity)
        high = price if price > high else high
        low = price if price < low else low
        volume, quote = EXACT.add(volume, quantity), EXACT.add(quote, product)
        if row["side"] == "BUY":
            base, taker = EXACT.add(base, quantity), EXACT.add(taker, product)
    first, last = rows[0], rows[-1]
    return (
        *(first["price"], high, low, last["price"], volume, quote, len(rows), base, taker),
        *(first["trade_id"], last["trade_id"]),
    )


async def stored_candles(conn: asyncpg.Connection, name: str) -> Candles:
    """Return what candles_`name` shows, by bucket and symbol; no candle may come twice."""
    rows = await conn.fetch(f"SELECT {COLUMNS} FROM candles_{name}")
    found = {(row["bucket"], row["symbol"]): tuple(row)[2:] for row in rows}
    assert len(found) == len(rows)
    return found


async def check_candles(conn: asyncpg.Connection) -> None:
    """Compare the candles of every width with a recomputation from the stored trades."""
    trades = await conn.fetch("SELECT * FROM raw_trades")
    for name, width in WIDTHS.items():
        assert await stored_candles(conn, name) == candles_of(trades, width), name
