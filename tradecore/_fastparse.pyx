"""Parse Binance Spot stream frames into fixed-size rows, exactly or not at all.

Two paths give the same rows. The fast path, here, takes the documented form only (compact JSON,
keys in the order of the venue's "WebSocket Streams" page) and touches each byte once. Everything
else goes to the slow path, `_slowparse`, which alone decides why a frame is refused. Neither
allocates, logs or waits.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.string cimport memcmp

from tradecore.schema import KLINE_DECIMALS, TICKER_DECIMALS

from tradecore._event cimport (
    BAD_NUMBER,
    BAD_TIME,
    BINARY,
    DUPLICATE_KEY,
    EVENT_CONTROL,
    EVENT_KLINE,
    EVENT_SHUTDOWN,
    EVENT_TICKER,
    EVENT_TRADE,
    INVALID_UTF8,
    MALFORMED,
    MISSING_KEY,
    NEGATIVE,
    NOT_FAST,
    OUT_OF_RANGE,
    OVERSIZED,
    UNKNOWN_EVENT,
    UNKNOWN_SYMBOL,
    WRONG_TYPE,
)
from tradecore._numbers cimport decimal128, fast_e8, fast_time, fast_uint, to_us
from tradecore._rows cimport (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    SYMBOL_MAX_BYTES,
    decimal128_t,
    kline_row_t,
    ticker_row_t,
    trade_row_t,
)
from tradecore._slowparse cimport parse_slow
from tradecore._symbols cimport SymbolTable, find_wide, is_name, symbol_entry_t
from tradecore._words cimport find48, likely, read_bool


CAUSES = {
    -MALFORMED: "malformed",
    -INVALID_UTF8: "invalid_utf8",
    -UNKNOWN_EVENT: "unknown_event",
    -MISSING_KEY: "missing_key",
    -DUPLICATE_KEY: "duplicate_key",
    -WRONG_TYPE: "wrong_type",
    -BAD_NUMBER: "bad_number",
    -OUT_OF_RANGE: "out_of_range",
    -NEGATIVE: "negative",
    -BAD_TIME: "bad_time",
    -UNKNOWN_SYMBOL: "unknown_symbol",
    -OVERSIZED: "oversized",
    -BINARY: "binary",
}
"""Why a frame was refused, by the negated status: the values of the metric label `cause`."""


cdef inline bint _is(const char *p, const char *literal, size_t size) noexcept nogil:
    return likely(memcmp(p, literal, size) == 0)


cdef int _fast_trade(
    const char *p, const char *end, const symbol_table_t *symbols,
    const char *lower, Py_ssize_t lower_size, event_t *event,
) noexcept nogil:
    """Read `"e":"trade",...}` from `p`; `lower` is the stream's symbol, NULL for a raw frame.

    Every read below is covered: the fixed bytes between and after two fields are more than any
    field reader looks ahead, and the frame's length is checked against the least possible first.
    """
    cdef trade_row_t *row = &event.trade
    cdef const symbol_entry_t *entry
    cdef const char *name
    cdef uint32_t buyer_is_maker
    cdef int size
    # From `"e"` to the end of the shortest frame, with slack for the 24-byte look-ahead.
    if end - p < 100 or not _is(p, b'"e":"trade","E":', 16):
        return NOT_FAST
    p = fast_time(p + 16, &event.event_us)
    if p == NULL or not _is(p, b',"s":"', 6):
        return NOT_FAST
    name = p + 6
    if lower != NULL:
        p = name + lower_size
    else:
        p = name + find48(name, b'"')
    # Behind the name: `","t":1,"p":"1.1","q":"1.1","T":<13>,"m":true,"M":true}` is >= 60 bytes.
    if end - p < 60 or not _is(p, b'","t":', 6):
        return NOT_FAST
    entry = find_wide(symbols, name, p - name)
    if entry == NULL or (lower != NULL and not is_name(entry.lower, lower, lower_size)):
        return NOT_FAST
    p = fast_uint(p + 6, &row.trade_id)
    if p == NULL or end - p < 52 or not _is(p, b',"p":"', 6):
        return NOT_FAST
    p = fast_e8(p + 6, &row.price_e8)
    if p == NULL or end - p < 46 or not _is(p, b'","q":"', 7):
        return NOT_FAST
    p = fast_e8(p + 7, &row.quantity_e8)
    if p == NULL or end - p < 38 or not _is(p, b'","T":', 6):
        return NOT_FAST
    p = fast_time(p + 6, &row.trade_us)
    if p == NULL or end - p < 19 or not _is(p, b',"m":', 5):
        return NOT_FAST
    p += 5
    size = read_bool(p, &buyer_is_maker)
    p += size
    if size == 0 or not _is(p, b',"M":', 5):
        return NOT_FAST
    p += 5
    if end - p >= 5 and _is(p, b"true}", 5):
        p += 5
    elif end - p >= 6 and _is(p, b"false}", 6):
        p += 6
    else:
        return NOT_FAST
    if end - p != (lower != NULL) or (lower != NULL and p[0] != b"}"):
        return NOT_FAST
    row.symbol_id = <uint32_t>entry.symbol_id
    row.flags = <uint16_t>(FLAG_BUYER_IS_MAKER * buyer_is_maker)
    return EVENT_TRADE


cdef inline const char *_fast_int_key(
    const char *p, const char *end, char key, int64_t *out
) noexcept nogil:
    """Read `"k":<integer>` and the comma or brace behind it; -1 is the only negative taken."""
    if end - p < 32 or p[0] != b'"' or p[1] != key or p[2] != b'"' or p[3] != b":":
        return NULL
    p += 4
    if p[0] == b"-":
        if p[1] != b"1":
            return NULL
        out[0] = -1
        p += 2
    else:
        p = fast_uint(p, out)
        if p == NULL:
            return NULL
    return p + 1 if p[0] == b"," else NULL


cdef inline const char *_fast_decimal_key(
    const char *p, const char *end, char key, bint signed_, decimal128_t *out
) noexcept nogil:
    """Read `"k":"<decimal>",`."""
    cdef const char *start
    if end - p < 8 or p[0] != b'"' or p[1] != key or not _is(p + 2, b'":"', 3):
        return NULL
    p += 5
    start = p
    while p < end and p[0] != b'"':
        p += 1
    if end - p < 2 or p[1] != b"," or decimal128(start, p, signed_, out) < 0:
        return NULL
    return p + 2


cdef inline const char *_fast_symbol(
    const char *p, const char *end, const symbol_table_t *symbols, uint32_t *symbol_id
) noexcept nogil:
    """Read `"s":"<symbol>",`."""
    cdef const char *start
    cdef const symbol_entry_t *entry
    # At least 15 more keys follow in a ticker and in a kline.
    if end - p < 64 or not _is(p, b'"s":"', 5):
        return NULL
    start = p + 5
    p = start + find48(start, b'"')
    if p[1] != b",":
        return NULL
    entry = find_wide(symbols, start, p - start)
    if entry == NULL:
        return NULL
    symbol_id[0] = <uint32_t>entry.symbol_id
    return p + 2


cdef int _fast_ticker(
    const char *p, const char *end, const symbol_table_t *symbols, ptrdiff_t closing,
    event_t *event,
) noexcept nogil:
    cdef ticker_row_t *row = &event.ticker
    cdef int64_t n
    cdef int i
    p = _fast_int_key(p, end, b"E", &event.event_us)
    if p == NULL or to_us(event.event_us, &row.event_us) < 0:
        return NOT_FAST
    event.event_us = row.event_us
    p = _fast_symbol(p, end, symbols, &row.symbol_id)
    if p == NULL:
        return NOT_FAST
    for i in range(15):
        p = _fast_decimal_key(p, end, (<const char *>b"pPwxcQbBaAohlvq")[i], i < 2,
                              &row.decimals[i])
        if p == NULL:
            return NOT_FAST
    p = _fast_int_key(p, end, b"O", &row.open_us)
    if p == NULL or to_us(row.open_us, &row.open_us) < 0:
        return NOT_FAST
    p = _fast_int_key(p, end, b"C", &row.close_us)
    if p == NULL or to_us(row.close_us, &row.close_us) < 0:
        return NOT_FAST
    p = _fast_int_key(p, end, b"F", &row.first_id)
    if p == NULL:
        return NOT_FAST
    # `L` and `n` stand too near the end for the wide reader.
    if not _tail_int(&p, end, b"L", &row.last_id) or p >= end or p[0] != b",":
        return NOT_FAST
    p += 1
    if not _tail_int(&p, end, b"n", &n) or n < 0 or end - p != closing or p[0] != b"}":
        return NOT_FAST
    if closing == 2 and p[1] != b"}":
        return NOT_FAST
    row.trade_count = n
    row.flags = 0
    return EVENT_TICKER


cdef inline bint _tail_int(
    const char **cursor, const char *end, char key, int64_t *out
) noexcept nogil:
    """Read `"k":<integer>` byte by byte, leaving the cursor behind the last digit."""
    cdef const char *p = cursor[0]
    cdef const char *start
    cdef int64_t value = 0
    cdef bint negative = False
    if end - p < 5 or p[0] != b'"' or p[1] != key or p[2] != b'"' or p[3] != b":":
        return False
    p += 4
    if p[0] == b"-":
        negative = True
        p += 1
    start = p
    while p < end and b"0" <= p[0] <= b"9" and p - start < 18:
        value = value * 10 + (p[0] - 48)
        p += 1
    if p == start or (start[0] == b"0" and p - start > 1) or (negative and value != 1):
        return False
    out[0] = -value if negative else value
    cursor[0] = p
    return True


# Where o c h l v of the wire stand in a row: open high low close volume.
cdef int[5] KLINE_PLACES
KLINE_PLACES[:] = [0, 3, 1, 2, 4]


cdef int _fast_kline(
    const char *p, const char *end, const symbol_table_t *symbols, ptrdiff_t closing,
    event_t *event,
) noexcept nogil:
    cdef kline_row_t *row = &event.kline
    cdef uint32_t inner_symbol_id
    cdef int i
    p = _fast_int_key(p, end, b"E", &event.event_us)
    if p == NULL or to_us(event.event_us, &row.event_us) < 0:
        return NOT_FAST
    event.event_us = row.event_us
    p = _fast_symbol(p, end, symbols, &row.symbol_id)
    if p == NULL or end - p < 5 or not _is(p, b'"k":{', 5):
        return NOT_FAST
    p = _fast_int_key(p + 5, end, b"t", &row.open_us)
    if p == NULL or to_us(row.open_us, &row.open_us) < 0:
        return NOT_FAST
    p = _fast_int_key(p, end, b"T", &row.close_us)
    if p == NULL or to_us(row.close_us, &row.close_us) < 0:
        return NOT_FAST
    p = _fast_symbol(p, end, symbols, &inner_symbol_id)
    if p == NULL or inner_symbol_id != row.symbol_id:
        return NOT_FAST
    if end - p < 9 or not _is(p, b'"i":"1m",', 9):
        return NOT_FAST
    p = _fast_int_key(p + 9, end, b"f", &row.first_id)
    if p == NULL:
        return NOT_FAST
    p = _fast_int_key(p, end, b"L", &row.last_id)
    if p == NULL:
        return NOT_FAST
    for i in range(5):
        p = _fast_decimal_key(p, end, (<const char *>b"ochlv")[i], False,
                              &row.decimals[KLINE_PLACES[i]])
        if p == NULL:
            return NOT_FAST
    p = _fast_int_key(p, end, b"n", &row.trade_count)
    if p == NULL or row.trade_count < 0 or end - p < 11:
        return NOT_FAST
    if _is(p, b'"x":true,', 9):
        row.flags = FLAG_CLOSED
        p += 9
    elif _is(p, b'"x":false,', 10):
        row.flags = 0
        p += 10
    else:
        return NOT_FAST
    for i in range(3):
        p = _fast_decimal_key(p, end, (<const char *>b"qVQ")[i], False, &row.decimals[5 + i])
        if p == NULL:
            return NOT_FAST
    if end - p < 5 or not _is(p, b'"B":"', 5):
        return NOT_FAST
    p += 5
    while p < end and (b"0" <= p[0] <= b"9" or p[0] == b"."):
        p += 1
    if end - p != closing + 2 or not _is(p, b'"}}', 3) or (closing == 2 and p[3] != b"}"):
        return NOT_FAST
    return EVENT_KLINE


cdef inline int _fast(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    cdef const char *p = data
    cdef const char *end = data + size
    cdef const char *lower = NULL
    cdef Py_ssize_t lower_size = 0
    cdef ptrdiff_t closing = 1
    cdef bint is_kline = False
    if size < 64:
        return NOT_FAST
    if _is(p, b'{"stream":"', 11):
        lower = p + 11
        # No symbol holds a quote or an escape: what has one before the `@` matches none.
        lower_size = find48(lower, b"@")
        p = lower + lower_size
        closing = 2
        if end - p < 64:
            return NOT_FAST
        if _is(p, b'@trade","data":{', 16):
            return _fast_trade(p + 16, end, symbols, lower, lower_size, event)
        if _is(p, b'@ticker","data":{"e":"24hrTicker",', 34):
            p += 34
        elif _is(p, b'@kline_1m","data":{"e":"kline",', 31):
            p += 31
            is_kline = True
        else:
            return NOT_FAST
        # The stream's name must be of a known symbol (so that its bytes are good UTF-8).
        if not _known_lower(symbols, lower, lower_size):
            return NOT_FAST
        if is_kline:
            return _fast_kline(p, end, symbols, closing, event)
        return _fast_ticker(p, end, symbols, closing, event)
    if p[0] != b"{":
        return NOT_FAST
    p += 1
    if _is(p, b'"e":"trade"', 11):
        return _fast_trade(p, end, symbols, NULL, 0, event)
    if _is(p, b'"e":"24hrTicker",', 17):
        return _fast_ticker(p + 17, end, symbols, closing, event)
    if _is(p, b'"e":"kline",', 12):
        return _fast_kline(p + 12, end, symbols, closing, event)
    return NOT_FAST


cdef inline bint _known_lower(
    const symbol_table_t *symbols, const char *lower, Py_ssize_t size
) noexcept nogil:
    """Tell whether a stream's symbol is the lower-case form of one in the table."""
    cdef char name[SYMBOL_MAX_BYTES + 7]
    cdef Py_ssize_t i
    cdef const symbol_entry_t *entry
    if size > SYMBOL_MAX_BYTES:
        return False
    for i in range(size):
        name[i] = lower[i] - 32 if 97 <= lower[i] <= 122 else lower[i]
    entry = find_wide(symbols, name, size)
    return entry != NULL and is_name(entry.lower, lower, size)


cdef int parse_event_c(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    """Parse one frame into the member of `event` that its status names."""
    cdef int status = _fast(data, size, symbols, event)
    if likely(status != NOT_FAST):
        return status
    return parse_slow(data, size, symbols, event)


# ---------------------------------------------------------------------------------------------
# Python face: tests, benches and tools; the daemon calls parse_event_c
# ---------------------------------------------------------------------------------------------

class FrameError(ValueError):
    """A frame was refused: `cause` (a value of CAUSES), its `head` (first 80 bytes)."""

    def __init__(self, cause: str, head: bytes) -> None:
        self.cause = cause
        self.head = head
        super().__init__(f"{cause}: {head!r}")


cdef object _wide(decimal128_t value):
    return (<object>value.hi << 64) | value.lo


def parse_event(bytes payload not None, SymbolTable symbols not None, str path="auto"):
    """Parse one frame and return (kind, fields); see `_fastparse.pyi` for the fields.

    `path` is "auto", "fast" (FrameError with cause "not_fast" when the form is not the documented
    one) or "slow". Raises FrameError when the frame is refused.
    """
    cdef event_t event
    cdef int status
    cdef const char *data = payload
    if path == "auto":
        status = parse_event_c(data, len(payload), &symbols.table, &event)
    elif path == "fast":
        status = _fast(data, len(payload), &symbols.table, &event)
    elif path == "slow":
        status = parse_slow(data, len(payload), &symbols.table, &event)
    else:
        raise ValueError(f"path must be auto, fast or slow, not {path!r}")
    if status == EVENT_TRADE:
        return "trade", {
            "symbol_id": event.trade.symbol_id,
            "trade_id": event.trade.trade_id,
            "price_e8": event.trade.price_e8,
            "quantity_e8": event.trade.quantity_e8,
            "trade_us": event.trade.trade_us,
            "event_us": event.event_us,
            "buyer_is_maker": bool(event.trade.flags & FLAG_BUYER_IS_MAKER),
        }
    if status == EVENT_TICKER:
        return "ticker", {
            "symbol_id": event.ticker.symbol_id,
            "event_us": event.ticker.event_us,
            "open_us": event.ticker.open_us,
            "close_us": event.ticker.close_us,
            "first_id": event.ticker.first_id,
            "last_id": event.ticker.last_id,
            "trade_count": event.ticker.trade_count,
            **{name: _wide(event.ticker.decimals[i]) for i, name in enumerate(TICKER_DECIMALS)},
        }
    if status == EVENT_KLINE:
        return "kline", {
            "symbol_id": event.kline.symbol_id,
            "event_us": event.kline.event_us,
            "open_us": event.kline.open_us,
            "close_us": event.kline.close_us,
            "first_id": event.kline.first_id,
            "last_id": event.kline.last_id,
            "trade_count": event.kline.trade_count,
            **{name: _wide(event.kline.decimals[i]) for i, name in enumerate(KLINE_DECIMALS)},
            "is_closed": bool(event.kline.flags & FLAG_CLOSED),
        }
    if status == EVENT_SHUTDOWN:
        return "server_shutdown", {"event_us": event.event_us}
    if status == EVENT_CONTROL:
        return "control", {}
    raise FrameError("not_fast" if status == NOT_FAST else CAUSES[-status], payload[:80])


def row_sizes():
    """Sizes in bytes of the C rows, for the test that compares them with schema.py."""
    return {
        "trade": sizeof(trade_row_t),
        "ticker": sizeof(ticker_row_t),
        "kline": sizeof(kline_row_t),
    }
