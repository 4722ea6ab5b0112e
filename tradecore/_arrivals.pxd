# What one connection delivered of each symbol; the listener notes it frame by frame.
from cython cimport final
from libc.stdint cimport int64_t, uint32_t

from tradecore._tracks cimport Tracks

cdef enum:
    NOTHING = -1
    # What tickers and klines say of a symbol without a trade in their time.
    TOLD_QUIET = -1
    TOLD_NOTHING = -2

ctypedef struct arrival_t:
    int64_t first_id
    int64_t last_id
    int64_t told_id
    # At the mark: the greatest id that any connection had brought, and told_id. What is above has
    # moved since; INT64_MAX before the mark.
    int64_t marked_id
    int64_t marked_told_id


cdef inline int64_t last_told(int64_t last_id, int64_t trade_count) noexcept nogil:
    """Return what a ticker or kline tells of the last trade id."""
    return last_id if trade_count > 0 else TOLD_QUIET


cdef class Arrivals:
    cdef object __weakref__
    cdef arrival_t *rows
    cdef uint32_t slots

    cdef int grow(self, uint32_t slots) except -1
    cdef void mark(self, Tracks tracks) noexcept nogil

    @final
    cdef inline void trade(self, uint32_t symbol_id, int64_t trade_id) noexcept nogil:
        """Note a trade; the symbol has a slot."""
        cdef arrival_t *row = &self.rows[symbol_id]
        if row.first_id == NOTHING:
            row.first_id = trade_id
        if trade_id > row.last_id:
            row.last_id = trade_id

    @final
    cdef inline void told(self, uint32_t symbol_id, int64_t last_id) noexcept nogil:
        """Note the last trade id that a ticker or kline told; the symbol has a slot."""
        cdef arrival_t *row = &self.rows[symbol_id]
        if last_id > row.told_id:
            if row.told_id < 0:
                # The first that tells anything: it may have been printed before the mark.
                row.marked_told_id = last_id
            row.told_id = last_id


cdef list find_unconfirmed(Tracks tracks, list others, Arrivals mine, symbol_ids)
cdef list find_left_out(Tracks tracks, Arrivals mine, symbol_ids)
cdef list find_behind(Tracks tracks, Arrivals mine, symbol_ids)
