"""One track for each symbol, by symbol id: what capture knows of it."""

from collections import namedtuple

from libc.stdlib cimport free, realloc
from libc.string cimport memset

from tradecore.sequence cimport has_hole, start_sequence


Track = namedtuple(
    "Track", ("received", "first_id", "last_id", "last_trade_us", "last_recv_ns", "hole")
)
Told = namedtuple("Told", ("last_id", "event_us", "recv_ns", "since_ns", "heard_ns"))


cdef class Tracks:
    """Grows with the table of symbols, when told to."""

    def __cinit__(self, SymbolTable symbols not None):
        self.symbols = symbols

    def __dealloc__(self):
        free(self.rows)

    cdef int grow(self, uint32_t slots) except -1:
        """Hold `slots` symbols; what is known of the present ones stays."""
        cdef track_t *rows
        cdef track_t *row
        cdef uint32_t i
        if slots <= self.slots:
            return 0
        rows = <track_t *>realloc(self.rows, slots * sizeof(track_t))
        if rows == NULL:
            raise MemoryError
        for i in range(self.slots, slots):
            row = &rows[i]
            memset(row, 0, sizeof(track_t))
            start_sequence(&row.ids)
            row.line_last[:] = [-1, -1]
            row.seeded_id = row.told_id = -1
        self.rows = rows
        self.slots = slots
        return 0

    cdef void restart(self) noexcept nogil:
        """Forget all ids."""
        cdef uint32_t i
        for i in range(self.slots):
            start_sequence(&self.rows[i].ids)
            self.rows[i].line_last[:] = [-1, -1]

    cdef track_t *of(self, str symbol) except NULL:
        """Return the track of a symbol; KeyError when it has none."""
        symbol_id = self.symbols.get(symbol)
        if symbol_id is None or symbol_id >= self.slots:
            raise KeyError(f"{symbol} has no track: intern it in the ring, then call grow()")
        return &self.rows[<uint32_t>symbol_id]

    cdef void note_told(
        self, uint32_t symbol_id, int64_t told_id, int64_t event_us, int64_t recv_ns
    ) noexcept nogil:
        """Note the last trade id that a ticker or kline told; the symbol has a track."""
        cdef track_t *row = &self.rows[symbol_id]
        row.heard_ns = recv_ns
        if told_id > row.told_id:
            row.told_id = told_id
            row.told_since_ns = recv_ns
        elif told_id < row.told_id or event_us < row.told_event_us:
            return
        row.told_event_us = event_us
        row.told_recv_ns = recv_ns

    cdef object track(self, str symbol):
        cdef track_t *row = self.of(symbol)
        came = row.received > 0
        return Track(
            row.received,
            row.ids.first if came else None,
            row.ids.last if came else None,
            row.last_trade_us,
            row.last_recv_ns,
            (row.ids.before_last + 1, row.ids.first - 1) if has_hole(&row.ids) else None,
        )

    cdef object told(self, str symbol):
        cdef track_t *row = self.of(symbol)
        return Told(
            row.told_id, row.told_event_us, row.told_recv_ns, row.told_since_ns, row.heard_ns
        )

    cdef dict received(self):
        return {
            self.symbols.name(i): (
                self.rows[i].received,
                self.rows[i].ids.last if self.rows[i].received else None,
                self.rows[i].last_trade_us,
            )
            for i in range(min(self.slots, <uint32_t>len(self.symbols)))
        }
