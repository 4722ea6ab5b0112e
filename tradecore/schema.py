"""The one table of truth: row layouts, scales, flag bits, names of streams.

The dtypes below have C twins in `_rows.pxd`; `tests/test_schema.py` compares them field by field.
Prices and quantities of a single trade are int64 at scale 1e-8 (the venue's engine keeps 64-bit
mantissas, so every one fits). Values of tickers and klines are sums and do not fit: they are
128-bit two's complement at the same scale, split into `lo` and `hi`.
"""

import numpy as np

SCALE = 8
"""Decimal places of every stored price and quantity."""

E8 = 10**SCALE

STREAM_TRADE = "trade"
STREAM_TICKER = "ticker"
STREAM_KLINE = "kline_1m"
STREAMS = (STREAM_TRADE, STREAM_TICKER, STREAM_KLINE)

FLAG_BUYER_IS_MAKER = 1
"""The venue's `m`: the buyer rested in the book, so the taker sold."""
FLAG_VOID = 2
"""A slot that was torn by a crash of the host; it holds no trade and is skipped."""
FLAG_AFTER_REFUSED = 4
"""The trades of the symbol just before this one were refused because the ring was full."""
FLAG_FIRST_OF_RUN = 8
"""The first trade of the symbol since the daemon started."""
FLAG_FIRST_OF_EPOCH = 16
"""The first trade of the symbol that this connection brought; another of its line did before."""
FLAG_FAR_BELOW = 32
"""Far below the greatest id known of the symbol, or older by id and newer by time: a question of
re-listing. The row is parked, not stored."""
FLAG_CLOSED = 1
"""Kline rows only: the venue's `x`, this candle is final."""

SYMBOL_MAX_BYTES = 40
"""Longest symbol in UTF-8 bytes that a symbol table holds."""

TRADE_DTYPE = np.dtype(
    [
        ("sequence", "<i8"),
        ("trade_id", "<i8"),
        ("price_e8", "<i8"),
        ("quantity_e8", "<i8"),
        ("trade_us", "<i8"),
        ("recv_ns", "<i8"),
        ("symbol_id", "<u4"),
        ("flags", "<u2"),
        ("line", "<u2"),
        ("epoch", "<u4"),
        ("checksum", "<u4"),
    ]
)
"""One ring slot, 64 bytes. `trade_us`: the venue's `T` in microseconds since 1970. `recv_ns`: host
clock when the bytes left the socket, 0 for rows fetched later. `line`, `epoch`: which feed line
and which connection of it brought the row. `checksum` covers all bytes before it."""

DECIMAL128 = np.dtype([("lo", "<u8"), ("hi", "<i8")])

_EVENT_FIELDS = [
    ("event_us", "<i8"),
    ("recv_ns", "<i8"),
    ("open_us", "<i8"),
    ("close_us", "<i8"),
    ("first_id", "<i8"),
    ("last_id", "<i8"),
    ("trade_count", "<i8"),
]

TICKER_DECIMALS = (
    "price_change",
    "price_change_percent",
    "weighted_average_price",
    "previous_close_price",
    "last_price",
    "last_quantity",
    "best_bid_price",
    "best_bid_quantity",
    "best_ask_price",
    "best_ask_quantity",
    "open_price",
    "high_price",
    "low_price",
    "volume",
    "quote_volume",
)
"""In the venue's key order: p P w x c Q b B a A o h l v q."""

TICKER_DTYPE = np.dtype(
    _EVENT_FIELDS
    + [(name, DECIMAL128) for name in TICKER_DECIMALS]
    + [("symbol_id", "<u4"), ("flags", "<u4")]
)

KLINE_DECIMALS = (
    "open",
    "high",
    "low",
    "close",
    "volume",
    "quote_volume",
    "taker_buy_base_volume",
    "taker_buy_quote_volume",
)
"""The venue's keys o h l c v q V Q."""

KLINE_DTYPE = np.dtype(
    _EVENT_FIELDS
    + [(name, DECIMAL128) for name in KLINE_DECIMALS]
    + [("symbol_id", "<u4"), ("flags", "<u4")]
)

TRADE_COLUMNS = (
    "timestamp",
    "symbol",
    "price",
    "quantity",
    "side",
    "trade_id",
    "received_at",
)
"""COPY order of `raw_trades`."""

TICKER_COLUMNS = (
    "timestamp",
    "symbol",
    "event_time",
    *TICKER_DECIMALS,
    "open_time",
    "close_time",
    "first_id",
    "last_id",
    "trade_count",
    "received_at",
)
"""COPY order of `tickers`; `timestamp` is `event_time` cut to the whole second."""

KLINE_COLUMNS = (
    "timestamp",
    "symbol",
    "event_time",
    "close_time",
    *KLINE_DECIMALS,
    "trade_count",
    "first_id",
    "last_id",
    "is_closed",
    "received_at",
)
"""COPY order of `klines`; `timestamp` is the open time of the minute."""
