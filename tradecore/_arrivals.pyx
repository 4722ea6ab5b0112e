"""What one connection delivered of each symbol: first and last trade id, greatest id told."""

from libc.stdlib cimport free, realloc


cdef class Arrivals:
    """A slot for each symbol; made by `Capture.open_arrivals`, which lets it grow with itself."""

    def __dealloc__(self):
        free(self.rows)

    cdef int grow(self, uint32_t slots) except -1:
        """Hold `slots` symbols; what the present slots hold stays."""
        cdef arrival_t *rows
        cdef uint32_t i
        if slots <= self.slots:
            return 0
        rows = <arrival_t *>realloc(self.rows, slots * sizeof(arrival_t))
        if rows == NULL:
            raise MemoryError
        for i in range(self.slots, slots):
            rows[i].first_id = rows[i].last_id = NOTHING
            rows[i].told_id = TOLD_NOTHING
        self.rows = rows
        self.slots = slots
        return 0
