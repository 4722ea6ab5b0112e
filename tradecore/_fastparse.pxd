# C face of the codec: a frame's bytes in, one fixed-size row out, a status back.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from tradecore._rows cimport (
    SYMBOL_MAX_BYTES,
    decimal128_t,
    kline_row_t,
    ticker_row_t,
    trade_row_t,
)

# What a frame was: events are positive, refusals negative. `CAUSES` in the .pyx names the latter.
cdef enum:
    NOT_FAST = 0
    EVENT_TRADE = 1
    EVENT_TICKER = 2
    EVENT_KLINE = 3
    EVENT_SHUTDOWN = 4
    EVENT_CONTROL = 5

    MALFORMED = -1
    INVALID_UTF8 = -2
    UNKNOWN_EVENT = -3
    MISSING_KEY = -4
    DUPLICATE_KEY = -5
    WRONG_TYPE = -6
    BAD_NUMBER = -7
    OUT_OF_RANGE = -8
    NEGATIVE = -9
    BAD_TIME = -10
    UNKNOWN_SYMBOL = -11
    # The listener's own: the codec never sees such a frame.
    OVERSIZED = -12
    BINARY = -13

    CAUSE_COUNT = 14

# One symbol of the hash table: the venue's spelling and the one of its stream names.
ctypedef struct symbol_entry_t:
    char name[SYMBOL_MAX_BYTES]
    char lower[SYMBOL_MAX_BYTES]
    uint16_t size
    int32_t symbol_id

ctypedef struct symbol_table_t:
    symbol_entry_t *slots
    uint32_t mask

# Room for whatever a frame turns out to be. `event_us` is the venue's `E`.
ctypedef struct event_t:
    trade_row_t trade
    ticker_row_t ticker
    kline_row_t kline
    int64_t event_us

cdef class SymbolTable:
    cdef symbol_table_t table
    cdef list _names
    cdef list _utf8
    cdef int _grow(self) except -1
    cdef void _insert(self, const char *name, Py_ssize_t size, int symbol_id) noexcept

cdef int parse_event_c(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil
