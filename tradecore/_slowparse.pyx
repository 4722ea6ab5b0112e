"""Events from any good JSON: any key order, white space, escapes and extra keys.

This path alone decides why a frame is refused. It takes one only when every needed key is there
once, with a value of its type.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t

from tradecore._event cimport (
    BAD_NUMBER,
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
    OUT_OF_RANGE,
    UNKNOWN_EVENT,
    UNKNOWN_SYMBOL,
    WRONG_TYPE,
)
from tradecore._json cimport (
    KEY_COUNT,
    KEY_DATA,
    KEY_RESULT,
    KEY_STREAM,
    KIND_BOOL,
    KIND_NONE,
    KIND_NUMBER,
    KIND_OBJECT,
    KIND_STRING,
    TEXT_MAX,
    object_t,
    read_object,
    text_equals,
    text_of,
    valid_utf8,
    value_t,
)
from tradecore._numbers cimport decimal128, to_us
from tradecore._rows cimport (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    decimal128_t,
    kline_row_t,
    ticker_row_t,
    trade_row_t,
)
from tradecore._symbols cimport find_symbol, symbol_entry_t


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
    return status if status < 0 else to_us(number, out)


cdef int _read_decimal(const value_t *value, bint signed_, decimal128_t *out) noexcept nogil:
    cdef char scratch[TEXT_MAX]
    cdef Py_ssize_t size
    cdef const char *text
    cdef int status = _need(value, KIND_STRING)
    if status < 0:
        return status
    text = text_of(value, scratch, &size)
    if text == NULL:
        return BAD_NUMBER
    return decimal128(text, text + size, signed_, out)


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
    text = text_of(value, scratch, &size)
    if text != NULL:
        entry = find_symbol(symbols, text, size)
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
    read_object(v[<int>b"k"].start, v[<int>b"k"].end, &kline)
    if _letter_doubled(k):
        return DUPLICATE_KEY
    status = _need(&k[<int>b"i"], KIND_STRING)
    if status > 0 and not text_equals(&k[<int>b"i"], b"1m", 2):
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


cdef int parse_slow(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil:
    cdef object_t found
    cdef const value_t *v = &found.values[0]
    cdef int i
    cdef int status
    if not valid_utf8(data, size):
        return INVALID_UTF8
    if not read_object(data, data + size, &found):
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
        read_object(v[KEY_DATA].start, v[KEY_DATA].end, &found)
    status = _need(&v[<int>b"e"], KIND_STRING)
    if status < 0:
        return status
    if _letter_doubled(v):
        return DUPLICATE_KEY
    if text_equals(&v[<int>b"e"], b"trade", 5):
        return _slow_trade(v, symbols, event)
    if text_equals(&v[<int>b"e"], b"24hrTicker", 10):
        return _slow_ticker(v, symbols, event)
    if text_equals(&v[<int>b"e"], b"kline", 5):
        return _slow_kline(v, symbols, event)
    if text_equals(&v[<int>b"e"], b"serverShutdown", 14):
        status = _read_time(&v[<int>b"E"], &event.event_us)
        return EVENT_SHUTDOWN if status > 0 else status
    return UNKNOWN_EVENT
