"""What clients must get, computed trade by trade in Python from rows of raw_trades."""

from calendar import monthrange
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Context, Decimal
from typing import Any

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXACT = Context(prec=400)
EIGHT = Decimal("1e-8")
MINUTE_US = 60_000_000
DAY_US = 1440 * MINUTE_US
WIDTHS_US = {
    **{f"{n}m": n * MINUTE_US for n in (1, 3, 5, 15, 30)},
    **{f"{n}h": n * 60 * MINUTE_US for n in (1, 2, 4, 6, 8, 12)},
    "1d": DAY_US,
    "1w": 7 * DAY_US,
}


def us_of(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def begin_and_end(us: int, interval: str, zone_us: int = 0) -> tuple[int, int]:
    """Return the candle that holds a time, by counting in that zone's clock."""
    local = us + zone_us
    if interval == "1M":
        day = EPOCH + timedelta(microseconds=local)
        first = day.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        days = monthrange(day.year, day.month)[1]
        begin = us_of(first)
        return begin - zone_us, begin + days * DAY_US - zone_us
    width = WIDTHS_US[interval]
    if interval == "1w":  # 1970-01-01 was a Thursday
        begin = (local - 4 * DAY_US) // width * width + 4 * DAY_US
    else:
        begin = local // width * width
    return begin - zone_us, begin + width - zone_us


def eight(value: Decimal) -> str:
    """Print with 8 decimals, the rest cut off."""
    return f"{value.quantize(EIGHT, rounding=ROUND_DOWN, context=EXACT):f}"


def klines(
    rows: Iterable[Any],
    interval: str,
    *,
    zone_us: int = 0,
    start_us: int | None = None,
    end_us: int | None = None,
    limit: int = 500,
    micro: bool = False,
) -> list[list[Any]]:
    """Return the venue's klines of rows of raw_trades of one symbol."""
    found: dict[tuple[int, int], list[Any]] = {}
    for row in sorted(rows, key=lambda row: row["trade_id"]):
        found.setdefault(begin_and_end(us_of(row["timestamp"]), interval, zone_us), []).append(row)
    inside = [
        (span, members)
        for span, members in sorted(found.items())
        if (start_us is None or span[0] >= start_us) and (end_us is None or span[0] <= end_us)
    ]
    picked = inside[-limit:] if start_us is None else inside[:limit]
    return [_kline(span, members, 1 if micro else 1000) for span, members in picked]


def _kline(span: tuple[int, int], rows: Sequence[Any], unit_us: int) -> list[Any]:
    sums = [Decimal(0)] * 4
    for row in rows:
        product = EXACT.multiply(row["price"], row["quantity"])
        taken = row["side"] == "BUY"
        terms = (row["quantity"], product, row["quantity"] * taken, product * taken)
        sums = [EXACT.add(total, term) for total, term in zip(sums, terms, strict=True)]
    volume, quote, taker_base, taker_quote = sums
    return [
        span[0] // unit_us,
        eight(rows[0]["price"]),
        eight(max(row["price"] for row in rows)),
        eight(min(row["price"] for row in rows)),
        eight(rows[-1]["price"]),
        eight(volume),
        span[1] // unit_us - 1,
        eight(quote),
        len(rows),
        eight(taker_base),
        eight(taker_quote),
        "0",
    ]


def trades(rows: Iterable[Any], *, micro: bool = False) -> list[dict[str, Any]]:
    """Return the venue's trades of rows of raw_trades of one symbol."""
    unit_us = 1 if micro else 1000
    return [
        {
            "id": row["trade_id"],
            "price": eight(row["price"]),
            "qty": eight(row["quantity"]),
            "quoteQty": eight(EXACT.multiply(row["price"], row["quantity"])),
            "time": us_of(row["timestamp"]) // unit_us,
            "isBuyerMaker": row["side"] == "SELL",
            "isBestMatch": True,
        }
        for row in sorted(rows, key=lambda row: row["trade_id"])
    ]
