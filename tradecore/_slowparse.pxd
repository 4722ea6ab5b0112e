# The slow path: frames of any form that is good JSON, and why a frame is refused.
from tradecore._event cimport event_t
from tradecore._symbols cimport symbol_table_t

cdef int parse_slow(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil
