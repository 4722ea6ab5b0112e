"""Parse Binance Spot stream frames into fixed-size rows, exactly or not at all.

Two paths give the same rows. The fast path takes the documented form only (compact JSON, keys in
the order of the venue's "WebSocket Streams" page) and touches each byte once. Everything else goes
to the slow path, a strict JSON reader that takes any key order, white space, escapes and extra
keys, and that alone decides why a frame is refused. Nothing here allocates, logs or waits.

A decimal is accepted when value * 10^8 is an integer that fits its column; it is never rounded.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport INT64_MAX
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from tradecore.schema import KLINE_DECIMALS, TICKER_DECIMALS

from tradecore._rows cimport FLAG_BUYER_IS_MAKER, FLAG_CLOSED


cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    typedef unsigned __int128 tc_uint128;

    #define TC_LIKELY(x) __builtin_expect(!!(x), 1)

    static inline uint64_t tc_load8(const char *p) {
        uint64_t word;
        memcpy(&word, p, 8);
        return word;
    }
    /* How many of the 8 bytes, from the first, are ASCII digits; `digits` gets their values. */
    static inline int tc_digits8(const char *p, uint64_t *digits) {
        uint64_t x = tc_load8(p) ^ 0x3030303030303030ULL;
        uint64_t other = ((x + 0x7676767676767676ULL) | x) & 0x8080808080808080ULL;
        *digits = x;
        return other ? __builtin_ctzll(other) >> 3 : 8;
    }
    /* Value of the first `count` (1..8) digits of a word from tc_digits8 (little endian). */
    static inline uint64_t tc_value8(uint64_t digits, int count) {
        digits <<= 64 - 8 * count;
        digits = digits * 10 + (digits >> 8);
        return (((digits & 0x000000FF000000FFULL) * 0x000F424000000064ULL)
              + (((digits >> 16) & 0x000000FF000000FFULL) * 0x0000271000000001ULL)) >> 32;
    }
    static inline uint64_t tc_tail8(const char *p, int size) {
        return tc_load8(p) & (size >= 8 ? ~0ULL : ~0ULL >> (64 - 8 * size));
    }
    """
    ctypedef unsigned long long uint128_t "tc_uint128"
    bint likely "TC_LIKELY"(bint condition) noexcept nogil
    uint64_t load8 "tc_load8"(const char *p) noexcept nogil
    int digits8 "tc_digits8"(const char *p, uint64_t *digits) noexcept nogil
    uint64_t value8 "tc_value8"(uint64_t digits, int count) noexcept nogil
    uint64_t tail8 "tc_tail8"(const char *p, int size) noexcept nogil


cdef enum:
    E8 = 100_000_000
    MAX_DEPTH = 64
    # int64 at scale 1e-8 ends at 92233720368.54775807.
    MAX_FRACTION = 54775807
    # Longest needed string that is looked at after its escapes are resolved.
    TEXT_MAX = 256

cdef int64_t MAX_WHOLE = <int64_t>92233720368
# Times lie within 2000-01-01 .. 2100-01-01; a number above 1e14 is microseconds, else milliseconds.
cdef int64_t TIME_MIN_US = <int64_t>946684800000000
cdef int64_t TIME_MAX_US = <int64_t>4102444800000000
cdef int64_t MICROSECONDS_FROM = <int64_t>100000000000000

cdef int64_t[9] POW10
POW10[:] = [1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000]

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


# ---------------------------------------------------------------------------------------------
# Symbols: bytes of the venue's spelling -> small dense id
# ---------------------------------------------------------------------------------------------

cdef inline uint32_t _hash(const char *name, Py_ssize_t size) noexcept nogil:
    cdef uint64_t h = <uint64_t>size
    cdef Py_ssize_t i
    for i in range(size):
        h = (h ^ <uint8_t>name[i]) * <uint64_t>0x9E3779B97F4A7C15
        h ^= h >> 29
    return <uint32_t>(h >> 32)


cdef inline const symbol_entry_t *_find(
    const symbol_table_t *symbols, const char *name, Py_ssize_t size
) noexcept nogil:
    """Look a symbol up by its exact bytes; NULL when it is not in the table."""
    cdef uint32_t i
    cdef const symbol_entry_t *entry
    if size <= 0 or size > SYMBOL_MAX_BYTES:
        return NULL
    i = _hash(name, size) & symbols.mask
    while True:
        entry = &symbols.slots[i]
        if entry.size == 0:
            return NULL
        if entry.size == size and memcmp(entry.name, name, size) == 0:
            return entry
        i = (i + 1) & symbols.mask


cdef int _require_id(list names, int symbol_id) except -1:
    # Without this an id of nobody reads wild memory: lists are indexed unchecked here.
    if not 0 <= symbol_id < len(names):
        raise IndexError(f"no symbol has the id {symbol_id}")
    return 0


cdef class SymbolTable:
    """Append-only table of symbols; ids are dense from 0 and hold for the table's life."""

    def __cinit__(self):
        self._names = []
        self._utf8 = []
        self.table.mask = 63
        self.table.slots = <symbol_entry_t *>calloc(64, sizeof(symbol_entry_t))
        if self.table.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.table.slots)

    def __len__(self):
        return len(self._names)

    def add(self, str symbol not None):
        """Return the id of `symbol`, adding it if needed.

        Raises ValueError for an empty symbol, one of more than SYMBOL_MAX_BYTES UTF-8 bytes, and
        one that JSON must escape: the fast path compares a frame's bytes as they stand.
        """
        cdef bytes name = symbol.encode()
        known = self.get(symbol)
        if known is not None:
            return known
        if not 0 < len(name) <= SYMBOL_MAX_BYTES:
            raise ValueError(f"symbol {symbol!r} must have 1 to {SYMBOL_MAX_BYTES} UTF-8 bytes")
        if any(byte < 0x20 or byte == 0x22 or byte == 0x5C for byte in name):
            raise ValueError(f"symbol {symbol!r} holds a control character, a quote or a backslash")
        if 2 * (len(self._names) + 1) > self.table.mask:
            self._grow()
        symbol_id = len(self._names)
        self._names.append(symbol)
        self._utf8.append(name)
        self._insert(name, len(name), symbol_id)
        return symbol_id

    def get(self, str symbol not None):
        """Return the id of `symbol`, or None."""
        cdef bytes name = symbol.encode()
        cdef const symbol_entry_t *entry = _find(&self.table, name, len(name))
        return None if entry == NULL else entry.symbol_id

    def name(self, int symbol_id):
        """Return the symbol of an id; IndexError if there is none."""
        _require_id(self._names, symbol_id)
        return self._names[symbol_id]

    def utf8(self, int symbol_id):
        """Return the UTF-8 bytes of the symbol of an id; IndexError if there is none."""
        _require_id(self._names, symbol_id)
        return self._utf8[symbol_id]

    cdef int _grow(self) except -1:
        cdef uint32_t count = 2 * (self.table.mask + 1)
        cdef symbol_entry_t *slots = <symbol_entry_t *>calloc(count, sizeof(symbol_entry_t))
        if slots == NULL:
            raise MemoryError
        free(self.table.slots)
        self.table.slots = slots
        self.table.mask = count - 1
        for symbol_id, name in enumerate(self._utf8):
            self._insert(name, len(name), symbol_id)
        return 0

    cdef void _insert(self, const char *name, Py_ssize_t size, int symbol_id) noexcept:
        cdef uint32_t i = _hash(name, size) & self.table.mask
        cdef symbol_entry_t *entry
        cdef Py_ssize_t k
        while self.table.slots[i].size:
            i = (i + 1) & self.table.mask
        entry = &self.table.slots[i]
        entry.size = <uint16_t>size
        entry.symbol_id = symbol_id
        memcpy(entry.name, name, size)
        for k in range(size):
            # Stream names are lower case in ASCII letters only; other bytes stay as they are.
            entry.lower[k] = name[k] + 32 if 65 <= name[k] <= 90 else name[k]


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------

cdef inline int _to_us(int64_t value, int64_t *out) noexcept nogil:
    """Bring a venue time in ms or us to us."""
    if value <= MICROSECONDS_FROM:
        if value < 0:
            return BAD_TIME
        value *= 1000
    if not TIME_MIN_US <= value < TIME_MAX_US:
        return BAD_TIME
    out[0] = value
    return 1


cdef inline const char *_fast_uint(const char *p, int64_t *out) noexcept nogil:
    """Read 1..18 digits without a leading zero; NULL if it is anything else.

    Reads up to 24 bytes from `p`; the caller has checked that they are there.
    """
    cdef uint64_t digits
    cdef uint64_t value
    cdef int count = digits8(p, &digits)
    if count == 0 or (p[0] == b"0" and count > 1):
        return NULL
    value = value8(digits, count)
    if count == 8:
        p += 8
        count = digits8(p, &digits)
        if count:
            value = value * <uint64_t>POW10[count] + value8(digits, count)
            if count == 8:
                p += 8
                count = digits8(p, &digits)
                if count > 2:
                    return NULL
                if count:
                    value = value * <uint64_t>POW10[count] + value8(digits, count)
    out[0] = <int64_t>value
    return p + count


cdef inline const char *_fast_time(const char *p, int64_t *out) noexcept nogil:
    p = _fast_uint(p, out)
    if p == NULL or _to_us(out[0], out) < 0:
        return NULL
    return p


cdef inline const char *_fast_e8(const char *p, int64_t *out) noexcept nogil:
    """Read digits '.' 1..8 digits as an int64 at scale 1e-8; NULL if it is anything else.

    Reads up to 24 bytes from `p`; the caller has checked that they are there.
    """
    cdef uint64_t digits
    cdef uint64_t whole
    cdef uint64_t fraction
    cdef int count = digits8(p, &digits)
    if count == 0:
        return NULL
    whole = value8(digits, count)
    p += count
    if count == 8 and p[0] != b".":
        count = digits8(p, &digits)
        if count > 3 or count == 0:
            return NULL
        whole = whole * <uint64_t>POW10[count] + value8(digits, count)
        p += count
    if p[0] != b".":
        return NULL
    p += 1
    count = digits8(p, &digits)
    if count == 0:
        return NULL
    fraction = value8(digits, count) * <uint64_t>POW10[8 - count]
    if whole >= <uint64_t>MAX_WHOLE and (whole > <uint64_t>MAX_WHOLE or fraction > MAX_FRACTION):
        return NULL
    out[0] = <int64_t>(whole * E8 + fraction)
    return p + count


cdef int _decimal128(
    const char *p, const char *end, bint signed_, decimal128_t *out
) noexcept nogil:
    """Read the whole of p..end as a decimal at scale 1e-8 that fits NUMERIC(38, 8)."""
    cdef uint128_t value = 0
    cdef bint negative = False
    cdef bint overflow = False
    cdef int whole_digits = 0
    cdef int places = 0
    if p < end and p[0] == b"-":
        negative = True
        p += 1
    if p == end or not b"0" <= p[0] <= b"9":
        return BAD_NUMBER
    while p < end and b"0" <= p[0] <= b"9":
        if whole_digits or p[0] != b"0":
            whole_digits += 1
        if whole_digits <= 30:
            value = value * 10 + <uint128_t>(p[0] - 48)
        else:
            overflow = True
            whole_digits = 31
        p += 1
    if p < end:
        if p[0] != b".":
            return BAD_NUMBER
        p += 1
        if p == end:
            return BAD_NUMBER
        while p < end:
            if not b"0" <= p[0] <= b"9":
                return BAD_NUMBER
            if places < 8:
                value = value * 10 + <uint128_t>(p[0] - 48)
                places += 1
            elif p[0] != b"0":
                overflow = True
            p += 1
    if overflow:
        return OUT_OF_RANGE
    value *= <uint128_t>POW10[8 - places]
    if negative and value != 0:
        if not signed_:
            return NEGATIVE
        value = ~value + 1
    out.lo = <uint64_t>value
    out.hi = <int64_t>(value >> 64)
    return 1


# ---------------------------------------------------------------------------------------------
# Fast path: the documented bytes and nothing else
# ---------------------------------------------------------------------------------------------

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
    cdef uint16_t flags = 0
    # From `"e"` to the end of the shortest frame, with slack for the 24-byte look-ahead.
    if end - p < 100 or not _is(p, b'"e":"trade","E":', 16):
        return NOT_FAST
    p = _fast_time(p + 16, &event.event_us)
    if p == NULL or not _is(p, b',"s":"', 6):
        return NOT_FAST
    name = p + 6
    if lower != NULL:
        p = name + lower_size
    else:
        p = name
        while p < end and p[0] != b'"' and p - name <= SYMBOL_MAX_BYTES:
            p += 1
    # Behind the name: `","t":1,"p":"1.1","q":"1.1","T":<13>,"m":true,"M":true}` is >= 60 bytes.
    if end - p < 60 or not _is(p, b'","t":', 6):
        return NOT_FAST
    entry = _find(symbols, name, p - name)
    if entry == NULL or (lower != NULL and memcmp(entry.lower, lower, lower_size) != 0):
        return NOT_FAST
    p = _fast_uint(p + 6, &row.trade_id)
    if p == NULL or end - p < 52 or not _is(p, b',"p":"', 6):
        return NOT_FAST
    p = _fast_e8(p + 6, &row.price_e8)
    if p == NULL or end - p < 46 or not _is(p, b'","q":"', 7):
        return NOT_FAST
    p = _fast_e8(p + 7, &row.quantity_e8)
    if p == NULL or end - p < 38 or not _is(p, b'","T":', 6):
        return NOT_FAST
    p = _fast_time(p + 6, &row.trade_us)
    if p == NULL or end - p < 19 or not _is(p, b',"m":', 5):
        return NOT_FAST
    p += 5
    if _is(p, b'true,"M":', 9):
        flags = FLAG_BUYER_IS_MAKER
        p += 9
    elif _is(p, b'false,"M":', 10):
        p += 10
    else:
        return NOT_FAST
    if end - p >= 5 and _is(p, b"true}", 5):
        p += 5
    elif end - p >= 6 and _is(p, b"false}", 6):
        p += 6
    else:
        return NOT_FAST
    if end - p != (lower != NULL) or (lower != NULL and p[0] != b"}"):
        return NOT_FAST
    row.symbol_id = <uint32_t>entry.symbol_id
    row.flags = flags
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
        p = _fast_uint(p, out)
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
    if end - p < 2 or p[1] != b"," or _decimal128(start, p, signed_, out) < 0:
        return NULL
    return p + 2


cdef inline const char *_fast_symbol(
    const char *p, const char *end, const symbol_table_t *symbols, uint32_t *symbol_id
) noexcept nogil:
    """Read `"s":"<symbol>",`."""
    cdef const char *start
    cdef const symbol_entry_t *entry
    if end - p < 8 or not _is(p, b'"s":"', 5):
        return NULL
    p += 5
    start = p
    while p < end and p[0] != b'"':
        p += 1
    if end - p < 2 or p[1] != b",":
        return NULL
    entry = _find(symbols, start, p - start)
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
    if p == NULL or _to_us(event.event_us, &row.event_us) < 0:
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
    if p == NULL or _to_us(row.open_us, &row.open_us) < 0:
        return NOT_FAST
    p = _fast_int_key(p, end, b"C", &row.close_us)
    if p == NULL or _to_us(row.close_us, &row.close_us) < 0:
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


cdef int _fast_kline(
    const char *p, const char *end, const symbol_table_t *symbols, ptrdiff_t closing,
    event_t *event,
) noexcept nogil:
    cdef kline_row_t *row = &event.kline
    cdef uint32_t inner_symbol_id
    cdef int i
    p = _fast_int_key(p, end, b"E", &event.event_us)
    if p == NULL or _to_us(event.event_us, &row.event_us) < 0:
        return NOT_FAST
    event.event_us = row.event_us
    p = _fast_symbol(p, end, symbols, &row.symbol_id)
    if p == NULL or end - p < 5 or not _is(p, b'"k":{', 5):
        return NOT_FAST
    p = _fast_int_key(p + 5, end, b"t", &row.open_us)
    if p == NULL or _to_us(row.open_us, &row.open_us) < 0:
        return NOT_FAST
    p = _fast_int_key(p, end, b"T", &row.close_us)
    if p == NULL or _to_us(row.close_us, &row.close_us) < 0:
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
    # On the wire o c h l v; in the row open high low close volume.
    for i in range(5):
        p = _fast_decimal_key(p, end, (<const char *>b"ochlv")[i], False,
                              &row.decimals[(<const char *>b"\0\3\1\2\4")[i]])
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
        p = lower
        while p < end and p[0] != b"@":
            # A quote, an escape or a long name: let the slow path look at it.
            if p[0] == b'"' or p[0] == b"\\" or p - lower > SYMBOL_MAX_BYTES:
                return NOT_FAST
            p += 1
        lower_size = p - lower
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
    cdef char name[SYMBOL_MAX_BYTES]
    cdef Py_ssize_t i
    cdef const symbol_entry_t *entry
    if size > SYMBOL_MAX_BYTES:
        return False
    for i in range(size):
        name[i] = lower[i] - 32 if 97 <= lower[i] <= 122 else lower[i]
    entry = _find(symbols, name, size)
    return entry != NULL and memcmp(entry.lower, lower, size) == 0


# ---------------------------------------------------------------------------------------------
# Slow path: strict JSON, any order
# ---------------------------------------------------------------------------------------------

cdef enum:
    KIND_NONE = 0
    KIND_STRING = 1
    KIND_NUMBER = 2
    KIND_BOOL = 3
    KIND_OBJECT = 4
    KIND_OTHER = 5

    # Keys that are needed have one ASCII character, or are one of these.
    KEY_STREAM = 128
    KEY_DATA = 129
    KEY_RESULT = 130
    KEY_ERROR = 131
    KEY_CODE = 132
    KEY_ID = 133
    KEY_COUNT = 134

ctypedef struct cursor_t:
    const char *p
    const char *end

# A value's bytes; for strings what stands between the quotes.
ctypedef struct value_t:
    const char *start
    const char *end
    uint8_t kind
    uint8_t escaped
    uint8_t doubled

ctypedef struct object_t:
    value_t values[KEY_COUNT]


cdef bint _valid_utf8(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """Check UTF-8 as RFC 3629 has it: no overlong forms, no surrogates, at most U+10FFFF."""
    cdef uint8_t c
    cdef int more
    cdef uint32_t point
    cdef uint32_t least
    while p < end:
        c = p[0]
        p += 1
        if c < 0x80:
            continue
        if 0xC2 <= c <= 0xDF:
            more, point, least = 1, c & 0x1F, 0x80
        elif 0xE0 <= c <= 0xEF:
            more, point, least = 2, c & 0x0F, 0x800
        elif 0xF0 <= c <= 0xF4:
            more, point, least = 3, c & 0x07, 0x10000
        else:
            return False
        if end - p < more:
            return False
        while more:
            if p[0] & 0xC0 != 0x80:
                return False
            point = point << 6 | (p[0] & 0x3F)
            p += 1
            more -= 1
        if point < least or point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
            return False
    return True


cdef inline void _skip_space(cursor_t *c) noexcept nogil:
    while c.p < c.end and (
        c.p[0] == b" " or c.p[0] == b"\t" or c.p[0] == b"\n" or c.p[0] == b"\r"
    ):
        c.p += 1


cdef inline bint _take(cursor_t *c, char byte) noexcept nogil:
    if c.p < c.end and c.p[0] == byte:
        c.p += 1
        return True
    return False


cdef inline int _hex4(const char *p) noexcept nogil:
    """Value of four hex digits, -1 if they are not."""
    cdef int value = 0
    cdef int i
    cdef char ch
    for i in range(4):
        ch = p[i]
        if b"0" <= ch <= b"9":
            value = value * 16 + ch - 48
        elif b"a" <= ch <= b"f":
            value = value * 16 + ch - 87
        elif b"A" <= ch <= b"F":
            value = value * 16 + ch - 55
        else:
            return -1
    return value


cdef bint _scan_string(cursor_t *c, value_t *value) noexcept nogil:
    """Step over a string; the cursor stands on its opening quote."""
    cdef uint8_t byte
    if not _take(c, b'"'):
        return False
    value.kind = KIND_STRING
    value.start = c.p
    value.escaped = 0
    while c.p < c.end:
        byte = <uint8_t>c.p[0]
        if byte == b'"':
            value.end = c.p
            c.p += 1
            return True
        if byte < 0x20:
            return False
        c.p += 1
        if byte != b"\\":
            continue
        value.escaped = 1
        if c.p >= c.end:
            return False
        byte = <uint8_t>c.p[0]
        c.p += 1
        if byte == b"u":
            if c.end - c.p < 4 or _hex4(c.p) < 0:
                return False
            c.p += 4
        elif not (byte == b'"' or byte == b"\\" or byte == b"/" or byte == b"b" or byte == b"f"
                  or byte == b"n" or byte == b"r" or byte == b"t"):
            return False
    return False


cdef inline bint _scan_digits(cursor_t *c) noexcept nogil:
    cdef const char *start = c.p
    while c.p < c.end and b"0" <= c.p[0] <= b"9":
        c.p += 1
    return c.p > start


cdef bint _scan_number(cursor_t *c) noexcept nogil:
    _take(c, b"-")
    if not _take(c, b"0") and not _scan_digits(c):
        return False
    if _take(c, b".") and not _scan_digits(c):
        return False
    if _take(c, b"e") or _take(c, b"E"):
        if not _take(c, b"+"):
            _take(c, b"-")
        return _scan_digits(c)
    return True


cdef inline bint _scan_word(cursor_t *c, const char *word, Py_ssize_t size) noexcept nogil:
    if c.end - c.p < size or memcmp(c.p, word, size) != 0:
        return False
    c.p += size
    return True


cdef bint _scan_value(cursor_t *c, int depth, value_t *value) noexcept nogil:
    """Step over any JSON value and note where it stands."""
    cdef char first
    cdef value_t inner
    if c.p >= c.end or depth > MAX_DEPTH:
        return False
    first = c.p[0]
    if first == b'"':
        return _scan_string(c, value)
    value.start = c.p
    value.escaped = 0
    if first == b"{":
        value.kind = KIND_OBJECT
        if not _scan_object(c, depth, NULL):
            return False
    elif first == b"[":
        value.kind = KIND_OTHER
        c.p += 1
        _skip_space(c)
        if not _take(c, b"]"):
            while True:
                _skip_space(c)
                if not _scan_value(c, depth + 1, &inner):
                    return False
                _skip_space(c)
                if _take(c, b"]"):
                    break
                if not _take(c, b","):
                    return False
    elif first == b"t":
        value.kind = KIND_BOOL
        if not _scan_word(c, b"true", 4):
            return False
    elif first == b"f":
        value.kind = KIND_BOOL
        if not _scan_word(c, b"false", 5):
            return False
    elif first == b"n":
        value.kind = KIND_OTHER
        if not _scan_word(c, b"null", 4):
            return False
    else:
        value.kind = KIND_NUMBER
        if not _scan_number(c):
            return False
    value.end = c.p
    return True


cdef bint _scan_object(cursor_t *c, int depth, object_t *found) noexcept nogil:
    """Step over an object; with `found`, note the values of the keys that events use."""
    cdef value_t key
    cdef value_t value
    cdef int index
    if depth > MAX_DEPTH or not _take(c, b"{"):
        return False
    _skip_space(c)
    if _take(c, b"}"):
        return True
    while True:
        _skip_space(c)
        if not _scan_string(c, &key):
            return False
        _skip_space(c)
        if not _take(c, b":"):
            return False
        _skip_space(c)
        value.doubled = 0
        if not _scan_value(c, depth + 1, &value):
            return False
        if found != NULL:
            index = _key_index(&key)
            if index >= 0:
                value.doubled = found.values[index].kind != KIND_NONE
                found.values[index] = value
        _skip_space(c)
        if _take(c, b"}"):
            return True
        if not _take(c, b","):
            return False


cdef Py_ssize_t _unescape(const value_t *value, char *out, Py_ssize_t room) noexcept nogil:
    """Resolve a string's escapes into `out` as UTF-8; -1 when it does not fit or is no text."""
    cdef const char *p = value.start
    cdef Py_ssize_t size = 0
    cdef int point
    cdef int low
    cdef char ch
    while p < value.end:
        # At most four bytes are written below.
        if size + 4 > room:
            return -1
        if p[0] != b"\\":
            out[size] = p[0]
            size += 1
            p += 1
            continue
        ch = p[1]
        p += 2
        if ch != b"u":
            if ch == b"b":
                ch = 8
            elif ch == b"f":
                ch = 12
            elif ch == b"n":
                ch = 10
            elif ch == b"r":
                ch = 13
            elif ch == b"t":
                ch = 9
            out[size] = ch
            size += 1
            continue
        point = _hex4(p)
        p += 4
        if 0xD800 <= point <= 0xDFFF:
            if point > 0xDBFF or value.end - p < 6 or p[0] != b"\\" or p[1] != b"u":
                return -1
            low = _hex4(p + 2)
            if not 0xDC00 <= low <= 0xDFFF:
                return -1
            p += 6
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
        if point < 0x80:
            out[size] = <char>point
            size += 1
        elif point < 0x800:
            out[size] = <char>(0xC0 | point >> 6)
            out[size + 1] = <char>(0x80 | point & 0x3F)
            size += 2
        elif point < 0x10000:
            out[size] = <char>(0xE0 | point >> 12)
            out[size + 1] = <char>(0x80 | point >> 6 & 0x3F)
            out[size + 2] = <char>(0x80 | point & 0x3F)
            size += 3
        else:
            out[size] = <char>(0xF0 | point >> 18)
            out[size + 1] = <char>(0x80 | point >> 12 & 0x3F)
            out[size + 2] = <char>(0x80 | point >> 6 & 0x3F)
            out[size + 3] = <char>(0x80 | point & 0x3F)
            size += 4
    return size


cdef inline const char *_text(
    const value_t *value, char *scratch, Py_ssize_t *size
) noexcept nogil:
    """A string's text: its own bytes, or `scratch` (TEXT_MAX bytes) when it has escapes."""
    if not value.escaped:
        size[0] = value.end - value.start
        return value.start
    size[0] = _unescape(value, scratch, TEXT_MAX)
    return NULL if size[0] < 0 else scratch


cdef inline bint _equals(const value_t *value, const char *literal, Py_ssize_t size) noexcept nogil:
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t length
    cdef const char *text = _text(value, scratch, &length)
    return text != NULL and length == size and memcmp(text, literal, size) == 0


cdef int _key_index(const value_t *key) noexcept nogil:
    """Slot of a key in object_t; -1 for a key that no event uses."""
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t size
    cdef const char *text = _text(key, scratch, &size)
    if text == NULL:
        return -1
    if size == 1:
        return text[0] if text[0] > 0 else -1
    if size == 6:
        if memcmp(text, b"stream", 6) == 0:
            return KEY_STREAM
        if memcmp(text, b"result", 6) == 0:
            return KEY_RESULT
    if size == 4:
        if memcmp(text, b"data", 4) == 0:
            return KEY_DATA
        if memcmp(text, b"code", 4) == 0:
            return KEY_CODE
    if size == 5 and memcmp(text, b"error", 5) == 0:
        return KEY_ERROR
    if size == 2 and memcmp(text, b"id", 2) == 0:
        return KEY_ID
    return -1


cdef inline bint _letter_doubled(const value_t *values) noexcept nogil:
    """Tell whether a key of one letter, as all keys of an event are, stands twice.

    Also one that is not needed: the venue never doubles a key, so what sent this is not to be
    trusted with the others either.
    """
    cdef int i
    for i in range(<int>b"A", <int>b"z" + 1):
        if values[i].kind != KIND_NONE and values[i].doubled:
            return True
    return False


cdef inline int _need(const value_t *value, uint8_t kind) noexcept nogil:
    if value.kind == KIND_NONE:
        return MISSING_KEY
    if value.doubled:
        return DUPLICATE_KEY
    if value.kind != kind:
        return WRONG_TYPE
    return 1


cdef int _read_int(const value_t *value, int64_t least, int64_t *out) noexcept nogil:
    """Read an integer of at least `least` (0 or -1)."""
    cdef const char *p = value.start
    cdef int64_t number = 0
    cdef int digit
    cdef bint negative = False
    cdef int status = _need(value, KIND_NUMBER)
    if status < 0:
        return status
    if p[0] == b"-":
        negative = True
        p += 1
    while p < value.end:
        if not b"0" <= p[0] <= b"9":
            return BAD_NUMBER
        digit = p[0] - 48
        if number > (INT64_MAX - digit) // 10:
            return OUT_OF_RANGE
        number = number * 10 + digit
        p += 1
    if negative:
        number = -number
    if number < least:
        return NEGATIVE
    out[0] = number
    return 1


cdef int _read_time(const value_t *value, int64_t *out) noexcept nogil:
    cdef int64_t number = 0
    cdef int status = _read_int(value, 0, &number)
    return status if status < 0 else _to_us(number, out)


cdef int _read_decimal(const value_t *value, bint signed_, decimal128_t *out) noexcept nogil:
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t size
    cdef const char *text
    cdef int status = _need(value, KIND_STRING)
    if status < 0:
        return status
    text = _text(value, scratch, &size)
    if text == NULL:
        return BAD_NUMBER
    return _decimal128(text, text + size, signed_, out)


cdef int _read_e8(const value_t *value, int64_t *out) noexcept nogil:
    cdef decimal128_t wide
    cdef int status = _read_decimal(value, False, &wide)
    if status < 0:
        return status
    if wide.hi != 0 or wide.lo > <uint64_t>INT64_MAX:
        return OUT_OF_RANGE
    out[0] = <int64_t>wide.lo
    return 1


cdef int _read_bool(const value_t *value, bint *out) noexcept nogil:
    cdef int status = _need(value, KIND_BOOL)
    if status > 0:
        out[0] = value.start[0] == b"t"
    return status


cdef int _read_symbol(
    const value_t *value, const symbol_table_t *symbols, uint32_t *out
) noexcept nogil:
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t size
    cdef const char *text
    cdef const symbol_entry_t *entry = NULL
    cdef int status = _need(value, KIND_STRING)
    if status < 0:
        return status
    text = _text(value, scratch, &size)
    if text != NULL:
        entry = _find(symbols, text, size)
    if entry == NULL:
        return UNKNOWN_SYMBOL
    out[0] = <uint32_t>entry.symbol_id
    return 1


cdef int _slow_trade(
    const value_t *v, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    cdef trade_row_t *row = &event.trade
    cdef bint buyer_is_maker = False
    cdef int status = _read_time(&v[<int>b"E"], &event.event_us)
    if status > 0:
        status = _read_symbol(&v[<int>b"s"], symbols, &row.symbol_id)
    if status > 0:
        status = _read_int(&v[<int>b"t"], 0, &row.trade_id)
    if status > 0:
        status = _read_e8(&v[<int>b"p"], &row.price_e8)
    if status > 0:
        status = _read_e8(&v[<int>b"q"], &row.quantity_e8)
    if status > 0:
        status = _read_time(&v[<int>b"T"], &row.trade_us)
    if status > 0:
        status = _read_bool(&v[<int>b"m"], &buyer_is_maker)
    if status < 0:
        return status
    row.flags = FLAG_BUYER_IS_MAKER if buyer_is_maker else 0
    return EVENT_TRADE


cdef int _slow_ticker(
    const value_t *v, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    cdef ticker_row_t *row = &event.ticker
    cdef int i
    cdef int status = _read_time(&v[<int>b"E"], &row.event_us)
    if status > 0:
        event.event_us = row.event_us
        status = _read_symbol(&v[<int>b"s"], symbols, &row.symbol_id)
    for i in range(15):
        if status > 0:
            status = _read_decimal(&v[<int>(<const char *>b"pPwxcQbBaAohlvq")[i]], i < 2,
                                   &row.decimals[i])
    if status > 0:
        status = _read_time(&v[<int>b"O"], &row.open_us)
    if status > 0:
        status = _read_time(&v[<int>b"C"], &row.close_us)
    if status > 0:
        status = _read_int(&v[<int>b"F"], -1, &row.first_id)
    if status > 0:
        status = _read_int(&v[<int>b"L"], -1, &row.last_id)
    if status > 0:
        status = _read_int(&v[<int>b"n"], 0, &row.trade_count)
    if status < 0:
        return status
    row.flags = 0
    return EVENT_TICKER


cdef int _slow_kline(
    const value_t *v, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    cdef kline_row_t *row = &event.kline
    cdef object_t kline
    cdef const value_t *k = &kline.values[0]
    cdef cursor_t c
    cdef uint32_t inner_symbol_id = 0
    cdef bint closed = False
    cdef int i
    cdef int status = _read_time(&v[<int>b"E"], &row.event_us)
    if status > 0:
        event.event_us = row.event_us
        status = _read_symbol(&v[<int>b"s"], symbols, &row.symbol_id)
    if status > 0:
        status = _need(&v[<int>b"k"], KIND_OBJECT)
    if status < 0:
        return status
    for i in range(KEY_COUNT):
        kline.values[i].kind = KIND_NONE
    c.p = v[<int>b"k"].start
    c.end = v[<int>b"k"].end
    _scan_object(&c, 1, &kline)
    if _letter_doubled(k):
        return DUPLICATE_KEY
    status = _need(&k[<int>b"i"], KIND_STRING)
    if status > 0 and not _equals(&k[<int>b"i"], b"1m", 2):
        status = UNKNOWN_EVENT
    if status > 0:
        status = _read_symbol(&k[<int>b"s"], symbols, &inner_symbol_id)
    if status > 0 and inner_symbol_id != row.symbol_id:
        status = UNKNOWN_SYMBOL
    if status > 0:
        status = _read_time(&k[<int>b"t"], &row.open_us)
    if status > 0:
        status = _read_time(&k[<int>b"T"], &row.close_us)
    if status > 0:
        status = _read_int(&k[<int>b"f"], -1, &row.first_id)
    if status > 0:
        status = _read_int(&k[<int>b"L"], -1, &row.last_id)
    for i in range(8):
        if status > 0:
            status = _read_decimal(&k[<int>(<const char *>b"ohlcvqVQ")[i]], False,
                                   &row.decimals[i])
    if status > 0:
        status = _read_int(&k[<int>b"n"], 0, &row.trade_count)
    if status > 0:
        status = _read_bool(&k[<int>b"x"], &closed)
    if status < 0:
        return status
    row.flags = FLAG_CLOSED if closed else 0
    return EVENT_KLINE


cdef int _slow(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    cdef object_t found
    cdef const value_t *v = &found.values[0]
    cdef cursor_t c
    cdef int i
    cdef int status
    if not _valid_utf8(<const uint8_t *>data, <const uint8_t *>data + size):
        return INVALID_UTF8
    for i in range(KEY_COUNT):
        found.values[i].kind = KIND_NONE
    c.p = data
    c.end = data + size
    _skip_space(&c)
    if not _scan_object(&c, 0, &found):
        return MALFORMED
    _skip_space(&c)
    if c.p != c.end:
        return MALFORMED
    if v[<int>b"e"].kind == KIND_NONE:
        if v[KEY_STREAM].kind == KIND_NONE and v[KEY_DATA].kind == KIND_NONE:
            for i in range(KEY_RESULT, KEY_COUNT):
                if v[i].kind != KIND_NONE:
                    return EVENT_CONTROL
            return MISSING_KEY
        status = _need(&v[KEY_STREAM], KIND_STRING)
        if status > 0:
            status = _need(&v[KEY_DATA], KIND_OBJECT)
        if status < 0:
            return status
        c.p = v[KEY_DATA].start
        c.end = v[KEY_DATA].end
        for i in range(KEY_COUNT):
            found.values[i].kind = KIND_NONE
        _scan_object(&c, 1, &found)
    status = _need(&v[<int>b"e"], KIND_STRING)
    if status < 0:
        return status
    if _letter_doubled(v):
        return DUPLICATE_KEY
    if _equals(&v[<int>b"e"], b"trade", 5):
        return _slow_trade(v, symbols, event)
    if _equals(&v[<int>b"e"], b"24hrTicker", 10):
        return _slow_ticker(v, symbols, event)
    if _equals(&v[<int>b"e"], b"kline", 5):
        return _slow_kline(v, symbols, event)
    if _equals(&v[<int>b"e"], b"serverShutdown", 14):
        status = _read_time(&v[<int>b"E"], &event.event_us)
        return EVENT_SHUTDOWN if status > 0 else status
    return UNKNOWN_EVENT


cdef int parse_event_c(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    """Parse one frame into the member of `event` that its status names."""
    cdef int status = _fast(data, size, symbols, event)
    if likely(status != NOT_FAST):
        return status
    return _slow(data, size, symbols, event)


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
        status = _slow(data, len(payload), &symbols.table, &event)
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
