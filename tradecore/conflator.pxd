# The hot side of the conflator: the last ticker and kline per symbol, closed klines queued.
from libc.stdint cimport int64_t, uint8_t

from tradecore._rows cimport kline_row_t, ticker_row_t

cdef class Conflator:
    cdef object _ticker_array
    cdef object _kline_array
    cdef object _closed_array
    cdef ticker_row_t *_tickers
    cdef kline_row_t *_klines
    cdef kline_row_t *_closed
    cdef uint8_t[::1] _ticker_dirty
    cdef uint8_t[::1] _kline_dirty
    cdef int64_t _closed_first
    cdef int64_t _closed_next
    cdef readonly int64_t closed_dropped
    cdef readonly int symbol_slots

    cdef int _allocate(self, int symbol_slots) except -1
    cdef void put_ticker(self, const ticker_row_t *row) noexcept nogil
    cdef void put_kline(self, const kline_row_t *row) noexcept nogil
    cdef void _queue(self, const kline_row_t *row) noexcept nogil
    cdef object _bytes_of(self, rows, dtype)
    cdef object _take(self, rows, uint8_t[::1] dirty)
