"""Cursors of the memory-mapped ring, and the checksum that tells a written row from a torn one.

          durable_seq                published_seq
    --- free ---|--- published, to flush ---|--- free ---      0 <= published - durable <= capacity

Sequences start at 1, never wrap and are never reused; slot = (seq - base_seq) & (capacity - 1).
When the ring is empty `base_seq` moves up to `published_seq`, so the next row lands in the first
slot again and the hot part of the file stays in the processor's cache. `base_seq` and
`durable_seq` live in the file's header and each moves by one aligned 8-byte store, so a process
killed at any instruction leaves a state that recovery reads right. `published_seq` is not stored:
recovery finds it from the rows, each of which carries its sequence under a checksum.
"""

from libc.string cimport memset

from tradecore._rows cimport FLAG_VOID


cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <sys/mman.h>

    static inline int tc_drop_pages(char *start, char *end) {
        uintptr_t from = ((uintptr_t)start + 4095) & ~(uintptr_t)4095;
        uintptr_t to = (uintptr_t)end & ~(uintptr_t)4095;
        return to > from ? madvise((void *)from, to - from, MADV_DONTNEED) : 0;
    }
    """
    int drop_pages "tc_drop_pages"(char *start, char *end)


cdef enum:
    # Released rows whose pages are given back at once: 1 MiB.
    TRIM_ROWS = 16384


cdef class RingBuffer:
    """Rows and cursors over a mapped file; `ring.Ring` opens the file and builds one of these."""

    def __init__(self, buffer, Py_ssize_t rows_at, Py_ssize_t base_at, Py_ssize_t durable_at,
                 int64_t capacity):
        """Lay rows and cursors over `buffer` (writable, kept alive).

        `rows_at`, `base_at` and `durable_at` are byte offsets; `capacity` is a power of two.
        """
        cdef unsigned char[::1] view = buffer
        if capacity <= 0 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, not {capacity}")
        if rows_at % 4096 or rows_at + capacity * <Py_ssize_t>sizeof(trade_row_t) > view.shape[0]:
            raise ValueError("the rows do not fit into the buffer on a page border")
        self._owner = buffer
        self._start = <char *>&view[0]
        self._rows = <trade_row_t *>&view[rows_at]
        self._base_seq = <int64_t *>&view[base_at]
        self._durable_seq = <int64_t *>&view[durable_at]
        self.capacity = capacity
        self._mask = capacity - 1
        self.published_seq = self._durable_seq[0]
        self._trimmed_seq = self._durable_seq[0]
        self._backlog_seq = self._durable_seq[0]

    @property
    def durable_seq(self):
        """Sequence of the oldest row that is not committed."""
        return self._durable_seq[0]

    @property
    def base_seq(self):
        """Sequence that lies in the first slot of the file."""
        return self._base_seq[0]

    @property
    def pending(self):
        """Rows that are published and not durable."""
        return self.published_seq - self._durable_seq[0]

    @property
    def oldest_recv_ns(self):
        """Receive time of the oldest pending row; 0 when the ring is empty."""
        if self.published_seq == self._durable_seq[0]:
            return 0
        return self.row(self._durable_seq[0]).recv_ns

    def span(self, Py_ssize_t max_rows):
        """Return (first slot, rows) of the oldest pending rows that lie side by side."""
        cdef int64_t slot = (self._durable_seq[0] - self._base_seq[0]) & self._mask
        return slot, min(self.published_seq - self._durable_seq[0], self.capacity - slot, max_rows)

    def release(self, Py_ssize_t count):
        """Free the `count` oldest rows: they are committed. ValueError if there are fewer."""
        cdef int64_t durable
        if not 0 <= count <= self.published_seq - self._durable_seq[0]:
            raise ValueError(f"cannot release {count} of {self.pending} rows")
        durable = self._durable_seq[0] + count
        self._durable_seq[0] = durable
        if durable == self.published_seq:
            if durable - self._base_seq[0] > TRIM_ROWS:
                self._drop(TRIM_ROWS, self.capacity)
            self._base_seq[0] = durable
            self._trimmed_seq = durable
            self._backlog_seq = durable
        elif durable - self._trimmed_seq >= TRIM_ROWS:
            self._drop_rows(self._trimmed_seq, durable)
            self._trimmed_seq = durable

    cdef void trim_backlog(self) noexcept:
        """Take rows that will wait for long out of our resident memory; cheap when there are none.

        A backlog is the whole file in the worst case; the flusher faults its pages in again.
        """
        cdef int64_t near = self._durable_seq[0] + 2 * TRIM_ROWS
        if self.published_seq - self._backlog_seq < TRIM_ROWS:
            return
        if self._backlog_seq < near:
            self._backlog_seq = min(near, self.published_seq)
        self._drop_rows(self._backlog_seq, self.published_seq)
        self._backlog_seq = self.published_seq

    cdef void _drop_rows(self, int64_t first_seq, int64_t last_seq) noexcept:
        cdef int64_t first = (first_seq - self._base_seq[0]) & self._mask
        cdef int64_t last = (last_seq - self._base_seq[0]) & self._mask
        if first_seq >= last_seq:
            return
        if first < last:
            self._drop(first, last)
        else:
            self._drop(first, self.capacity)
            self._drop(0, last)

    cdef void _drop(self, int64_t first, int64_t last) noexcept:
        """Unmap the pages of slots first..last; the file, and so the page cache, keeps them."""
        if first < last:
            drop_pages(<char *>&self._rows[first], <char *>&self._rows[last])

    def recover(self):
        """Find the rows that a former process published and did not commit.

        Return the number of torn slots among them. After it `pending` counts all of them, the
        torn ones as void rows that hold no trade. Only a crash of the host can tear a row in the
        middle; a killed process leaves at most one unfinished row behind the last.
        """
        cdef int64_t durable = self._durable_seq[0]
        cdef int64_t seq
        cdef int64_t last = durable - 1
        cdef int64_t torn = 0
        cdef trade_row_t *row
        for seq in range(durable, durable + self.capacity):
            row = self.row(seq)
            if row.sequence == seq and row.checksum == tc_row_checksum(row):
                last = seq
            if (seq - durable) % TRIM_ROWS == TRIM_ROWS - 1:
                # The look at the whole file must not make it all resident.
                self._drop_rows(seq - TRIM_ROWS + 1, seq + 1)
        for seq in range(durable, last):
            row = self.row(seq)
            if row.sequence != seq or row.checksum != tc_row_checksum(row):
                memset(row, 0, sizeof(trade_row_t))
                row.sequence = seq
                row.flags = FLAG_VOID
                row.checksum = tc_row_checksum(row)
                torn += 1
        self.published_seq = last + 1
        self._backlog_seq = last + 1
        self._drop(0, self.capacity)
        return torn

    def append(self, rows):
        """Publish the rows of a TRADE_DTYPE array; return how many found room (tests, tools)."""
        cdef const unsigned char[::1] data = rows.view("u1")
        cdef const trade_row_t *source = <const trade_row_t *>&data[0] if len(rows) else NULL
        cdef trade_row_t *slot
        cdef Py_ssize_t i
        for i in range(data.shape[0] // <Py_ssize_t>sizeof(trade_row_t)):
            slot = self.claim()
            if slot == NULL:
                return i
            slot[0] = source[i]
            self.publish(slot)
        self.trim_backlog()
        return len(rows)
