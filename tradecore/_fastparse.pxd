# C face of the codec: a frame's bytes in, one fixed-size row out, a status back.
from tradecore._event cimport event_t
from tradecore._symbols cimport symbol_table_t

cdef int parse_event_c(
    const char *data, Py_ssize_t size, const symbol_table_t *symbols, event_t *event
) noexcept nogil
