"""Encode rows to PostgreSQL's binary COPY format.

Layout, all integers big-endian (`tests/test_copyenc.py` builds the same bytes by hand):

    stream       "PGCOPY\\n\\377\\r\\n\\0" | int32 flags = 0 | int32 extension = 0 | row ...
                 | int16 -1
    row          int16 number of fields | field ...
    field        int32 length, -1 for NULL | that many bytes
    timestamptz  int64 microseconds since 2000-01-01 00:00 UTC
    int8         int64
    bool         one byte, 0 or 1
    text         UTF-8 bytes
    numeric      int16 ndigits | int16 weight | uint16 sign (0, or 0x4000: negative)
                 | int16 dscale = 8 | ndigits digits, each uint16 0..9999
                 value = sum of digit[i] * 10000 ** (weight - i); no leading or trailing zero digit

Since 10^8 = 10000^2, the base-10000 digits of a scaled integer are those of its decimal: only the
weight moves by two.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from tradecore.schema import KLINE_DTYPE, TICKER_DTYPE, TRADE_DTYPE

from tradecore._arrays cimport bytes_of, flags_of
from tradecore._rows cimport (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    FLAG_VOID,
    SYMBOL_MAX_BYTES,
    decimal128_t,
    kline_row_t,
    ticker_row_t,
    trade_row_t,
)

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    typedef unsigned __int128 tc_uint128;

    static inline char *tc_put2(char *out, uint16_t value) {
        value = __builtin_bswap16(value); memcpy(out, &value, 2); return out + 2;
    }
    static inline char *tc_put4(char *out, uint32_t value) {
        value = __builtin_bswap32(value); memcpy(out, &value, 4); return out + 4;
    }
    static inline char *tc_put8(char *out, uint64_t value) {
        value = __builtin_bswap64(value); memcpy(out, &value, 8); return out + 8;
    }
    static inline int tc_leading(uint64_t digits) { return __builtin_clzll(digits) >> 4; }
    static inline int tc_trailing(uint64_t digits) { return __builtin_ctzll(digits) >> 4; }
    """
    ctypedef unsigned long long uint128_t "tc_uint128"
    char *put2 "tc_put2"(char *out, uint16_t value) noexcept nogil
    char *put4 "tc_put4"(char *out, uint32_t value) noexcept nogil
    char *put8 "tc_put8"(char *out, uint64_t value) noexcept nogil
    int leading_zero_digits "tc_leading"(uint64_t digits) noexcept nogil
    int trailing_zero_digits "tc_trailing"(uint64_t digits) noexcept nogil


cdef enum:
    SLICE_BYTES = 131072
    # Longest row (a ticker, 930 bytes) and what the copies of fixed size below write past it.
    ROW_ROOM = 1280
    PREFIX_BYTES = 48
    # A 128-bit magnitude has at most 39 decimal digits.
    MAX_DIGITS = 10
    NUMERIC_NEGATIVE = 0x4000
    NUMERIC_SCALE = 8
    ROW_DONE = 0
    ROW_SKIPPED = 1
    ROW_SYMBOL_UNKNOWN = 2

cdef uint64_t POSTGRES_EPOCH_US = <uint64_t>946684800000000LL
cdef uint64_t FOUR_DIGITS_LIMIT = <uint64_t>10000000000000000LL
cdef bytes HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
cdef bytes TRAILER = b"\xff\xff"

# The `side` field and the length of `trade_id` after it, by FLAG_BUYER_IS_MAKER.
cdef char[2][16] SIDES
memcpy(&SIDES[0][0], b"\0\0\0\3BUY\0\0\0\x08", 11)
memcpy(&SIDES[1][0], b"\0\0\0\4SELL\0\0\0\x08", 12)

# The text field of a symbol as it goes out, padded so that a copy needs no length.
cdef struct prefix_t:
    char field[PREFIX_BYTES]
    int64_t size


# ---- one value -------------------------------------------------------------------------------


cdef inline char *put_time(char *out, int64_t unix_us) noexcept nogil:
    """`out` is after the length; unsigned, because the subtraction may wrap on absurd input."""
    return put8(out, <uint64_t>unix_us - POSTGRES_EPOCH_US)


cdef inline char *put_received_at(char *out, int64_t recv_ns) noexcept nogil:
    cdef int64_t unix_us
    if recv_ns == 0:
        return put4(out, <uint32_t>-1)
    unix_us = recv_ns // 1000
    if recv_ns < unix_us * 1000:
        unix_us -= 1
    return put_time(put4(out, 8), unix_us)


cdef inline uint32_t split8(uint32_t value) noexcept nogil:
    """Two base-10000 digits of a number below 10^8, the higher one in the upper half."""
    cdef uint32_t high = value // 10000
    return high << 16 | (value - high * 10000)


cdef char *put_long_numeric(char *out, uint128_t magnitude, uint32_t sign) noexcept nogil:
    """Any magnitude, digit by digit; needed from 10^8 units (10^16 scaled) on."""
    cdef uint16_t digits[MAX_DIGITS]
    cdef int count = 0, lowest = 0, i
    while magnitude:
        digits[count] = <uint16_t>(magnitude % 10000)
        magnitude = magnitude // 10000
        count += 1
    while lowest < count and digits[lowest] == 0:
        lowest += 1
    out = put4(out, 8 + 2 * <uint32_t>(count - lowest))
    out = put2(out, <uint16_t>(count - lowest))
    out = put2(out, <uint16_t>(count - 3 if count else 0))
    out = put4(out, sign << 16 | NUMERIC_SCALE)
    for i in range(count - 1, lowest - 1, -1):
        out = put2(out, digits[i])
    return out


cdef inline char *put_numeric(char *out, uint64_t magnitude, uint32_t sign) noexcept nogil:
    """A scaled integer below 10^16 as four digits in one word: no loop, no branch on digits."""
    cdef uint32_t units
    cdef uint64_t digits
    cdef int leading, count
    if magnitude >= FOUR_DIGITS_LIMIT or magnitude == 0:
        return put_long_numeric(out, magnitude, sign)
    units = <uint32_t>(magnitude // 100000000)
    digits = <uint64_t>split8(units) << 32
    digits |= split8(<uint32_t>(magnitude - <uint64_t>units * 100000000))
    leading = leading_zero_digits(digits)
    count = 4 - leading - trailing_zero_digits(digits)
    out = put4(out, <uint32_t>(8 + 2 * count))
    out = put4(out, <uint32_t>count << 16 | <uint16_t>(1 - leading))
    out = put4(out, sign << 16 | NUMERIC_SCALE)
    put8(out, digits << 16 * leading)
    return out + 2 * count


cdef inline char *put_e8(char *out, int64_t value) noexcept nogil:
    if value < 0:
        return put_numeric(out, 0 - <uint64_t>value, NUMERIC_NEGATIVE)
    return put_numeric(out, <uint64_t>value, 0)


cdef inline char *put_decimal(char *out, const decimal128_t *value) noexcept nogil:
    cdef uint128_t magnitude = <uint128_t><uint64_t>value.hi << 64 | value.lo
    cdef uint32_t sign = 0
    if value.hi < 0:
        magnitude = 0 - magnitude
        sign = NUMERIC_NEGATIVE
    if magnitude >> 64:
        return put_long_numeric(out, magnitude, sign)
    return put_numeric(out, <uint64_t>magnitude, sign)


cdef inline char *put_prefix(char *out, const prefix_t *prefix) noexcept nogil:
    memcpy(out, prefix.field, PREFIX_BYTES)
    return out + prefix.size


# ---- one row ---------------------------------------------------------------------------------


cdef inline char *put_trade(
    char *out, const trade_row_t *row, const prefix_t *prefix
) noexcept nogil:
    cdef int sell = row.flags & FLAG_BUYER_IS_MAKER
    out = put_time(put4(put2(out, 7), 8), row.trade_us)
    out = put_prefix(out, prefix)
    out = put_e8(out, row.price_e8)
    out = put_e8(out, row.quantity_e8)
    memcpy(out, SIDES[sell], 16)
    out = put8(out + 11 + sell, <uint64_t>row.trade_id)
    return put_received_at(out, row.recv_ns)


cdef char *put_ticker(char *out, const ticker_row_t *row, const prefix_t *prefix) noexcept nogil:
    cdef int i
    cdef int64_t part = row.event_us % 1000000
    cdef uint64_t second = <uint64_t>row.event_us - <uint64_t>part - (1000000 if part < 0 else 0)
    out = put_time(put4(put2(out, 24), 8), <int64_t>second)
    out = put_prefix(out, prefix)
    out = put_time(put4(out, 8), row.event_us)
    for i in range(15):
        out = put_decimal(out, &row.decimals[i])
    out = put_time(put4(out, 8), row.open_us)
    out = put_time(put4(out, 8), row.close_us)
    out = put8(put4(out, 8), <uint64_t>row.first_id)
    out = put8(put4(out, 8), <uint64_t>row.last_id)
    out = put8(put4(out, 8), <uint64_t>row.trade_count)
    return put_received_at(out, row.recv_ns)


cdef char *put_kline(char *out, const kline_row_t *row, const prefix_t *prefix) noexcept nogil:
    cdef int i
    out = put_time(put4(put2(out, 17), 8), row.open_us)
    out = put_prefix(out, prefix)
    out = put_time(put4(out, 8), row.event_us)
    out = put_time(put4(out, 8), row.close_us)
    for i in range(8):
        out = put_decimal(out, &row.decimals[i])
    out = put8(put4(out, 8), <uint64_t>row.trade_count)
    out = put8(put4(out, 8), <uint64_t>row.first_id)
    out = put8(put4(out, 8), <uint64_t>row.last_id)
    out = put4(out, 1)
    out[0] = 1 if row.flags & FLAG_CLOSED else 0
    return put_received_at(out + 1, row.recv_ns)


# ---- the stream ------------------------------------------------------------------------------


cdef class _Prefixes:
    """The text fields of all symbols of one table, by symbol id."""

    cdef object symbols
    cdef bytearray fields
    cdef prefix_t *first
    cdef uint32_t count

    def __cinit__(self, symbols not None):
        cdef prefix_t *prefix
        cdef bytes name
        cdef uint32_t i
        self.symbols = symbols
        self.count = len(symbols)
        self.fields = bytearray(self.count * sizeof(prefix_t))
        self.first = <prefix_t *>PyByteArray_AS_STRING(self.fields)
        for i in range(self.count):
            name = symbols.utf8(i)
            if len(name) > SYMBOL_MAX_BYTES:
                raise ValueError(f"symbol {i} is longer than {SYMBOL_MAX_BYTES} bytes: {name!r}")
            prefix = &self.first[i]
            memcpy(put4(prefix.field, <uint32_t>len(name)), <const char *>name, len(name))
            prefix.size = 4 + len(name)


# A process has one symbol table; it only grows.
cdef _Prefixes _prefixes = None


cdef _Prefixes _prefixes_of(symbols):
    global _prefixes
    if _prefixes is None or _prefixes.symbols is not symbols or _prefixes.count != len(symbols):
        _prefixes = _Prefixes(symbols)
    return _prefixes


cdef enum:
    KIND_TRADE
    KIND_TICKER
    KIND_KLINE


# The buffer of the stream that ended last: a fresh one would have to be mapped for each batch.
cdef bytearray _spare = None


cdef bytearray take_buffer():
    global _spare
    cdef bytearray buffer = _spare
    _spare = None
    return buffer or PyByteArray_FromStringAndSize(NULL, SLICE_BYTES + ROW_ROOM)


cdef class CopySlices:
    """Iterator over the slices of one COPY stream.

    Every slice lies in the same buffer: it holds until the next one is asked for, or the end of
    the stream. asyncpg copies a slice before it asks for more. (It takes `bytes` for a path: hand
    it an async iterator.)
    """

    cdef int kind
    cdef Py_ssize_t count, position, encoded
    cdef const uint8_t[::1] raw, keep
    cdef const char *rows
    cdef _Prefixes prefixes
    cdef bytearray buffer
    cdef object view
    cdef bint started, finished

    def __cinit__(self, int kind, rows, dtype, symbols, keep):
        self.kind = kind
        self.raw = bytes_of(rows, dtype)
        self.count = len(rows)
        self.rows = <const char *>&self.raw[0] if self.count else NULL
        self.keep = flags_of(keep, self.count)
        self.prefixes = _prefixes_of(symbols)
        self.buffer = take_buffer()
        self.view = memoryview(self.buffer)

    @property
    def encoded(self):
        """Rows in the slices so far."""
        return self.encoded

    def __iter__(self):
        return self

    def __next__(self):
        global _spare
        cdef char *start
        cdef char *out
        cdef int status = ROW_DONE
        if self.finished:
            if self.buffer is not None:
                _spare, self.buffer, self.view = self.buffer, None, None
            raise StopIteration
        out = start = PyByteArray_AS_STRING(self.buffer)
        if not self.started:
            self.started = True
            memcpy(out, <const char *>HEADER, 19)
            out += 19
        while self.position < self.count and out - start < SLICE_BYTES:
            status = self.put_row(&out)
            if status == ROW_SYMBOL_UNKNOWN:
                self.finished = True
                raise ValueError(
                    f"row {self.position} names a symbol id that the table of"
                    f" {self.prefixes.count} symbols does not have"
                )
            self.encoded += status == ROW_DONE
            self.position += 1
        if self.position == self.count:
            self.finished = True
            memcpy(out, <const char *>TRAILER, 2)
            out += 2
        return self.view[: out - start]

    cdef inline int put_row(self, char **out) noexcept nogil:
        cdef const trade_row_t *trade
        cdef const ticker_row_t *ticker
        cdef const kline_row_t *kline
        if self.keep is not None and not self.keep[self.position]:
            return ROW_SKIPPED
        if self.kind == KIND_TRADE:
            trade = <const trade_row_t *>self.rows + self.position
            if trade.flags & FLAG_VOID:
                return ROW_SKIPPED
            if trade.symbol_id >= self.prefixes.count:
                return ROW_SYMBOL_UNKNOWN
            out[0] = put_trade(out[0], trade, &self.prefixes.first[trade.symbol_id])
        elif self.kind == KIND_TICKER:
            ticker = <const ticker_row_t *>self.rows + self.position
            if ticker.symbol_id >= self.prefixes.count:
                return ROW_SYMBOL_UNKNOWN
            out[0] = put_ticker(out[0], ticker, &self.prefixes.first[ticker.symbol_id])
        else:
            kline = <const kline_row_t *>self.rows + self.position
            if kline.symbol_id >= self.prefixes.count:
                return ROW_SYMBOL_UNKNOWN
            out[0] = put_kline(out[0], kline, &self.prefixes.first[kline.symbol_id])
        return ROW_DONE


def encode_trades(rows, symbols, keep=None):
    """COPY stream of TRADE_COLUMNS; void rows and rows whose `keep` is 0 are left out."""
    return CopySlices(KIND_TRADE, rows, TRADE_DTYPE, symbols, keep)


def encode_tickers(rows, symbols, keep=None):
    """COPY stream of TICKER_COLUMNS."""
    return CopySlices(KIND_TICKER, rows, TICKER_DTYPE, symbols, keep)


def encode_klines(rows, symbols, keep=None):
    """COPY stream of KLINE_COLUMNS."""
    return CopySlices(KIND_KLINE, rows, KLINE_DTYPE, symbols, keep)
