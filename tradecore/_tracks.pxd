# What is known of each symbol: its ids, what was told of it, what noted on its rows.
from libc.stdint cimport int64_t, uint16_t, uint32_t

from tradecore._symbols cimport SymbolTable
from tradecore.sequence cimport sequence_t

cdef enum:
    LINE_COUNT = 2

ctypedef struct track_t:
    sequence_t ids
    int64_t received
    # Of the trade with the greatest id received.
    int64_t last_recv_ns
    int64_t last_trade_us
    # The greatest id that each line brought, -1 before the first, and its newest connection that
    # brought one, 0 before.
    int64_t[LINE_COUNT] line_last
    uint32_t[LINE_COUNT] line_epoch
    # Refused for a full ring since the last one that found room.
    int64_t refused
    # What was noted on the row that began the present run: why ids before it are missing.
    uint16_t notes
    # The greatest id that the ledger told, -1 when it told none.
    int64_t seeded_id
    # The greatest last id that a ticker or kline told, -1 before any; when it was told first; the
    # newest that told it.
    int64_t told_id
    int64_t told_since_ns
    int64_t told_event_us
    int64_t told_recv_ns
    # When any ticker or kline came, whatever it told.
    int64_t heard_ns
    int64_t far_below
    int64_t far_reported_ns


cdef class Tracks:
    cdef SymbolTable symbols
    cdef track_t *rows
    cdef uint32_t slots

    cdef int grow(self, uint32_t slots) except -1
    cdef track_t *of(self, str symbol) except NULL
    cdef void note_told(
        self, uint32_t symbol_id, int64_t told_id, int64_t event_us, int64_t recv_ns
    ) noexcept nogil
    cdef void restart(self) noexcept nogil
    cdef object track(self, str symbol)
    cdef object told(self, str symbol)
    cdef dict received(self)
