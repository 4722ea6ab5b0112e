# The hot side of the ring: claim a slot, fill it, publish it.
from libc.stdint cimport int64_t, uint32_t

from tradecore._rows cimport trade_row_t

cdef class RingBuffer:
    cdef object _owner
    cdef char *_start
    cdef trade_row_t *_rows
    # In the file's header, so that they outlive the process.
    cdef int64_t *_base_seq
    cdef int64_t *_durable_seq
    cdef readonly int64_t capacity
    cdef readonly int64_t published_seq
    cdef int64_t _mask
    cdef int64_t _trimmed_seq

    cdef trade_row_t *claim(self) noexcept nogil
    cdef void publish(self, trade_row_t *row) noexcept nogil
    cdef void _drop(self, int64_t first, int64_t last) noexcept
    cdef trade_row_t *row(self, int64_t seq) noexcept nogil

cdef uint32_t row_checksum(const trade_row_t *row) noexcept nogil
