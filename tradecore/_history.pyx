"""Rows of trades and klines from what the venue keeps: REST pages and lines of its daily dumps.

Everything is exact or refused with a ValueError that names the trade or tells what is wrong.
"""

from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t
from libc.string cimport memchr, memset

from tradecore._event cimport BAD_NUMBER, NEGATIVE, OUT_OF_RANGE
from tradecore._numbers cimport (
    MICROSECONDS_FROM,
    decimal128,
    fast_e8,
    fast_time,
    fast_uint,
    to_us,
)
from tradecore._rows cimport (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    decimal128_t,
    kline_row_t,
    trade_row_t,
)
from tradecore._words cimport likely

import numpy as np

from tradecore.schema import KLINE_DTYPE, TRADE_DTYPE

cdef enum:
    # Why a line is refused; `_LINE_FAULTS` says it.
    BAD_ID = -101
    BAD_PRICE = -102
    BAD_QUANTITY = -103
    BAD_QUOTE = -104
    BAD_LINE_TIME = -105
    BAD_FLAG = -106
    BAD_END = -107
    NOT_ASCENDING = -108
    OTHER_UNIT = -109

    # Readers look at up to 24 bytes at once, past the last line too.
    PADDING_BYTES = 32
    MINUTE_US = 60000000
    QUOTE_MAX = 64

PADDING = PADDING_BYTES
"""Bytes that have to stand behind the last line."""

_LINE_FAULTS = {
    BAD_ID: "the first column is no trade id",
    BAD_PRICE: "the price is no decimal that fits 1e-8 steps exactly",
    BAD_QUANTITY: "the quantity is no decimal that fits 1e-8 steps exactly",
    BAD_QUOTE: "the fourth column is no decimal",
    BAD_LINE_TIME: "the time is none in ms or us from 2000 to 2099",
    BAD_FLAG: "the columns isBuyerMaker and isBestMatch have to be True or False",
    BAD_END: "there are more than seven columns",
    NOT_ASCENDING: "its id is not greater than that of the line before",
    OTHER_UNIT: "its time is in another unit (ms, us) than those before",
}
_DECIMAL_FAULTS = {
    BAD_NUMBER: "is no plain decimal",
    OUT_OF_RANGE: "does not fit 1e-8 steps exactly",
    NEGATIVE: "is negative",
}


cdef inline int trade_e8(const char *p, const char *end, int64_t *out) noexcept nogil:
    """Read the whole of p..end as an int64 at scale 1e-8."""
    cdef decimal128_t value
    cdef int status = decimal128(p, end, False, &value)
    if status < 0:
        return status
    if value.hi != 0 or <int64_t>value.lo < 0:
        return OUT_OF_RANGE
    out[0] = <int64_t>value.lo
    return 1


# -- REST -----------------------------------------------------------------------------------------


def trade_rows(list page not None):
    """Return the objects of a page of trades as TRADE_DTYPE; ids have to ascend strictly."""
    cdef Py_ssize_t count = len(page)
    cdef Py_ssize_t i
    cdef int64_t last_id = -1
    cdef unsigned char[::1] view
    cdef trade_row_t *row
    rows = np.zeros(count, TRADE_DTYPE)
    if count == 0:
        return rows
    view = rows.view(np.uint8)
    for i in range(count):
        row = <trade_row_t *>&view[i * sizeof(trade_row_t)]
        one = page[i]
        if type(one) is not dict:
            raise ValueError(f"row {i} of the page is no trade: {one!r:.80}")
        row.trade_id = whole(one.get("id"), "id of a trade")
        if row.trade_id <= last_id:
            raise ValueError(f"id {row.trade_id} follows {last_id}: ids have to ascend")
        last_id = row.trade_id
        try:
            row.price_e8 = money_e8(one.get("price"), "price")
            row.quantity_e8 = money_e8(one.get("qty"), "quantity")
            row.trade_us = time_us(one.get("time"))
        except ValueError as error:
            raise ValueError(f"trade {last_id}: {error}") from None
        maker = one.get("isBuyerMaker")
        if maker is True:
            row.flags = FLAG_BUYER_IS_MAKER
        elif maker is not False:
            raise ValueError(f"trade {last_id}: isBuyerMaker is {maker!r:.80}")
    return rows


def kline_rows(list page not None, int64_t now_us):
    """Return the arrays of a page of 1m klines as KLINE_DTYPE; those that are over are closed.

    [open time, o, h, l, c, v, close time, quote volume, n, taker base, taker quote, ...]
    """
    cdef Py_ssize_t count = len(page)
    cdef Py_ssize_t i
    cdef Py_ssize_t j
    cdef int64_t last_us = -1
    cdef unsigned char[::1] view
    cdef kline_row_t *row
    cdef tuple places = (1, 2, 3, 4, 5, 7, 9, 10)
    rows = np.zeros(count, KLINE_DTYPE)
    if count == 0:
        return rows
    view = rows.view(np.uint8)
    for i in range(count):
        row = <kline_row_t *>&view[i * sizeof(kline_row_t)]
        one = page[i]
        if type(one) is not list or len(one) < 11:
            raise ValueError(f"row {i} of the page is no kline: {one!r:.80}")
        row.open_us = time_us(one[0])
        if row.open_us <= last_us:
            raise ValueError(f"minute {row.open_us} follows {last_us}: minutes have to ascend")
        last_us = row.open_us
        row.close_us = time_us(one[6])
        row.event_us = now_us
        row.first_id = row.last_id = -1
        row.trade_count = whole(one[8], "count of a kline")
        for j in range(8):
            money128(one[places[j]], f"a value of minute {last_us}", &row.decimals[j])
        row.flags = FLAG_CLOSED if row.open_us + MINUTE_US <= now_us else 0
    return rows


cdef int64_t whole(value, str what) except -1:
    if type(value) is not int or not 0 <= value < 2 ** 63:
        raise ValueError(f"the {what} is {value!r:.80}")
    return value


cpdef int64_t time_us(value) except -1:
    """Return a time in ms or us as us; ValueError when it is none from 2000 to 2099."""
    cdef int64_t out = 0
    if to_us(whole(value, "time"), &out) < 0:
        raise ValueError(f"the time {value} is none in ms or us from 2000 to 2099")
    return out


cdef int64_t money_e8(value, str what) except -1:
    cdef int64_t out = 0
    cdef Py_ssize_t size = 0
    cdef const char *text
    if type(value) is not str:
        raise ValueError(f"the {what} {value!r:.80} is no text with a decimal")
    text = PyUnicode_AsUTF8AndSize(value, &size)
    cdef int status = trade_e8(text, text + size, &out)
    if status < 0:
        raise ValueError(f"the {what} {value!r:.80} {_DECIMAL_FAULTS[status]}")
    return out


cdef int money128(value, str what, decimal128_t *out) except -1:
    cdef Py_ssize_t size = 0
    cdef const char *text
    if type(value) is not str:
        raise ValueError(f"{what}, {value!r:.80}, is no text with a decimal")
    text = PyUnicode_AsUTF8AndSize(value, &size)
    cdef int status = decimal128(text, text + size, False, out)
    if status < 0:
        raise ValueError(f"{what}, {value!r:.80}, {_DECIMAL_FAULTS[status]}")
    return 0


# -- dumps ----------------------------------------------------------------------------------------


cdef class LineReader:
    """Reads lines id,price,qty,quoteQty,time,isBuyerMaker,isBestMatch of one file.

    `line` counts the lines read; `last_id` is the last trade's, -1 before the first. The times of
    a file are all in ms or all in us. One header line is passed over.
    """

    cdef readonly int64_t line
    cdef readonly int64_t last_id
    cdef bint _seen_ms
    cdef bint _seen_us

    def __init__(self):
        self.line = 0
        self.last_id = -1

    def read(self, const unsigned char[::1] text not None, Py_ssize_t start, rows not None):
        """Fill `rows` (TRADE_DTYPE) from text[start:], return (rows filled, where it stopped).

        `text` ends with a line's end and PADDING bytes behind it. ValueError says what is wrong
        with line `line`.
        """
        cdef unsigned char[::1] view = rows.view(np.uint8)
        cdef Py_ssize_t room = len(rows)
        cdef Py_ssize_t size = text.shape[0] - PADDING_BYTES
        cdef Py_ssize_t count = 0
        cdef const char *begin
        cdef const char *p
        cdef const char *end
        cdef trade_row_t *out
        cdef int status = 1
        if rows.dtype != TRADE_DTYPE or room == 0:
            raise TypeError("rows has to be an array of TRADE_DTYPE with room")
        if size < start or start < 0:
            raise ValueError("there is no padding behind the lines")
        if size == start:
            return 0, start
        if text[size - 1] != 10:
            raise ValueError("the text does not end with a line's end")
        begin = <const char *>&text[0]
        p = begin + start
        end = begin + size
        out = <trade_row_t *>&view[0]
        if self.line == 0 and is_letter(p[0]):
            self.line = 1
            p = <const char *>memchr(p, 10, end - p) + 1
        with nogil:
            while p < end and count < room:
                self.line += 1
                status = self._line(&p, out + count)
                if status < 0:
                    break
                count += status
        if status < 0:
            raise ValueError(_LINE_FAULTS[status])
        return count, p - begin

    cdef int _line(self, const char **at, trade_row_t *row) noexcept nogil:
        """Read the line at `at` and move behind it; 1 = a row, 0 = an empty line, or a fault."""
        cdef const char *p = at[0]
        cdef const char *q
        cdef int64_t value = 0
        cdef int status
        if p[0] == 10 or (p[0] == 13 and p[1] == 10):
            at[0] = p + (1 if p[0] == 10 else 2)
            return 0
        memset(row, 0, sizeof(trade_row_t))
        q = fast_uint(p, &row.trade_id)
        if q == NULL or q[0] != b",":
            return BAD_ID
        if row.trade_id <= self.last_id:
            return NOT_ASCENDING
        p = read_money(q + 1, &row.price_e8)
        if p == NULL:
            return BAD_PRICE
        p = read_money(p, &row.quantity_e8)
        if p == NULL:
            return BAD_QUANTITY
        p = pass_decimal(p)
        if p == NULL:
            return BAD_QUOTE
        q = fast_time(p, &row.trade_us)
        if likely(q != NULL and q[0] == b","):
            value = MICROSECONDS_FROM + (1 if q - p == 16 else -1)
        else:
            q = fast_uint(p, &value)
            if q == NULL or q[0] != b"," or to_us(value, &row.trade_us) < 0:
                return BAD_LINE_TIME
        if value > MICROSECONDS_FROM:
            self._seen_us = True
        else:
            self._seen_ms = True
        if self._seen_us and self._seen_ms:
            return OTHER_UNIT
        p = q + 1
        status = read_flag(&p)
        if status < 0 or p[0] != b",":
            return BAD_FLAG
        row.flags = FLAG_BUYER_IS_MAKER if status else 0
        p += 1
        if read_flag(&p) < 0:
            return BAD_FLAG
        if p[0] == 13:
            p += 1
        if p[0] != 10:
            return BAD_END
        self.last_id = row.trade_id
        at[0] = p + 1
        return 1


cdef inline bint is_letter(char c) noexcept nogil:
    return b"a" <= (c | 32) <= b"z"


cdef inline const char *read_money(const char *p, int64_t *out) noexcept nogil:
    """Read a decimal and the comma behind it; NULL if either is missing."""
    cdef const char *q = fast_e8(p, out)
    if likely(q != NULL and q[0] == b","):
        return q + 1
    q = pass_decimal(p)
    if q == NULL or trade_e8(p, q - 1, out) < 0:
        return NULL
    return q


cdef inline const char *pass_decimal(const char *p) noexcept nogil:
    """Return what stands behind a decimal of up to 64 bytes and its comma, or NULL."""
    cdef const char *start = p
    while b"0" <= p[0] <= b"9":
        p += 1
    if p == start:
        return NULL
    if p[0] == b".":
        p += 1
        while b"0" <= p[0] <= b"9":
            p += 1
    if p[0] != b"," or p - start > QUOTE_MAX:
        return NULL
    return p + 1


cdef inline int read_flag(const char **at) noexcept nogil:
    """Read True or False in any case; 1, 0 or BAD_FLAG. Stops before a line's end."""
    cdef const char *p = at[0]
    if (p[0] | 32) == b"t" and (p[1] | 32) == b"r" and (p[2] | 32) == b"u" and (p[3] | 32) == b"e":
        at[0] = p + 4
        return 1
    if (
        (p[0] | 32) == b"f" and (p[1] | 32) == b"a" and (p[2] | 32) == b"l"
        and (p[3] | 32) == b"s" and (p[4] | 32) == b"e"
    ):
        at[0] = p + 5
        return 0
    return BAD_FLAG
