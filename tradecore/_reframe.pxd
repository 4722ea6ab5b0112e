# An event of the venue as clients of ours get it: the wrapper and the unit of its times changed.
from libc.stdint cimport int64_t

cdef enum:
    KIND_TRADE = 0
    KIND_TICKER = 1
    KIND_KLINE = 2
    # Events of our own; no frame of the venue brings them.
    KIND_HOLE = 3
    KIND_COUNT = 4

    # Bits of a mode.
    MODE_COMBINED = 1
    MODE_MICRO = 2

    MAX_TIMES = 4

    # A frame is longer than its payload and stream name by so much at most.
    FRAME_SLACK = 96

# A time in a payload: where its digits begin and how many there are.
ctypedef struct time_t:
    Py_ssize_t at
    int digits
    # The last instant of a span: what a finer unit adds are nines.
    bint is_end

ctypedef struct payload_t:
    const char *data
    Py_ssize_t size
    int count
    time_t[MAX_TIMES] times

cdef bint find_times(
    int kind, const char *data, Py_ssize_t size, payload_t *payload
) noexcept nogil
cdef Py_ssize_t write_frame(
    char *out, const payload_t *payload, const char *name, Py_ssize_t name_size, int mode
) noexcept nogil
cdef bytes respell(int kind, bytes message, bint micro)
cdef bytes frame_of(bytes payload, bytes name, int mode)
