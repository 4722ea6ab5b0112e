"""The last ticker and kline of each symbol, waiting to be written; closed klines wait in a queue.

Tickers and open klines are states, not events: a newer one takes the place of one that was not
written yet. Closed klines are final, so each is queued; when the queue is full (the database has
been away for long) the oldest is dropped and counted, for a kline can be rebuilt from its trades.
"""

import numpy as np

from tradecore.schema import KLINE_DTYPE, TICKER_DTYPE

from tradecore._rows cimport FLAG_CLOSED


cdef enum:
    # Closed klines that wait at most: ten minutes of 1,600 symbols, a day and a half of 7.
    CLOSED_CAPACITY = 16384


CLOSED_KLINES_MAX = CLOSED_CAPACITY


cdef class Conflator:
    """Holds rows of `symbol_slots` symbols (ids below that number)."""

    def __init__(self, int symbol_slots):
        cdef unsigned char[::1] closed
        if symbol_slots <= 0:
            raise ValueError("symbol_slots must be positive")
        self._allocate(symbol_slots)
        self._closed_array = np.zeros(CLOSED_CAPACITY, KLINE_DTYPE)
        closed = self._closed_array.view(np.uint8)
        self._closed = <kline_row_t *>&closed[0]

    cdef int _allocate(self, int symbol_slots) except -1:
        """Make room for so many symbols; what the present slots hold stays."""
        cdef unsigned char[::1] data
        tickers = np.zeros(symbol_slots, TICKER_DTYPE)
        klines = np.zeros(symbol_slots, KLINE_DTYPE)
        ticker_dirty = np.zeros(symbol_slots, np.uint8)
        kline_dirty = np.zeros(symbol_slots, np.uint8)
        if self.symbol_slots:
            tickers[:self.symbol_slots] = self._ticker_array
            klines[:self.symbol_slots] = self._kline_array
            ticker_dirty[:self.symbol_slots] = self._ticker_dirty
            kline_dirty[:self.symbol_slots] = self._kline_dirty
        self._ticker_array = tickers
        self._kline_array = klines
        self._ticker_dirty = ticker_dirty
        self._kline_dirty = kline_dirty
        data = tickers.view(np.uint8)
        self._tickers = <ticker_row_t *>&data[0]
        data = klines.view(np.uint8)
        self._klines = <kline_row_t *>&data[0]
        self.symbol_slots = symbol_slots
        return 0

    def grow(self, int symbol_slots):
        """Hold rows of more symbols; fewer than now changes nothing."""
        if symbol_slots > self.symbol_slots:
            self._allocate(symbol_slots)

    cdef void put_ticker(self, const ticker_row_t *row) noexcept nogil:
        """Keep `row` unless a newer one of its symbol is here already (order is not promised)."""
        cdef ticker_row_t *last = &self._tickers[row.symbol_id]
        if row.event_us >= last.event_us:
            last[0] = row[0]
            self._ticker_dirty[row.symbol_id] = 1

    cdef void put_kline(self, const kline_row_t *row) noexcept nogil:
        """Queue a closed kline; keep an open one unless a newer state of it is here already."""
        cdef kline_row_t *last = &self._klines[row.symbol_id]
        if row.open_us < last.open_us:
            # A candle older than the one under way: only its final state is news.
            if row.flags & FLAG_CLOSED:
                self._queue(row)
            return
        if row.open_us > last.open_us:
            if self._kline_dirty[row.symbol_id]:
                # Its closing frame never came: what we know of it must not be overwritten.
                self._queue(last)
        elif last.flags & FLAG_CLOSED or row.event_us < last.event_us:
            return
        last[0] = row[0]
        if row.flags & FLAG_CLOSED:
            self._queue(row)
            self._kline_dirty[row.symbol_id] = 0
        else:
            self._kline_dirty[row.symbol_id] = 1

    cdef void _queue(self, const kline_row_t *row) noexcept nogil:
        if self._closed_next - self._closed_first == CLOSED_CAPACITY:
            self._closed_first += 1
            self.closed_dropped += 1
        self._closed[self._closed_next % CLOSED_CAPACITY] = row[0]
        self._closed_next += 1

    def take_tickers(self):
        """Return a copy of the tickers that changed since the last call, at most one a symbol."""
        return self._take(self._ticker_array, self._ticker_dirty)

    def take_klines(self):
        """Return a copy of the closed klines in order of arrival, then the open ones that changed.
        """
        cdef Py_ssize_t waiting = self._closed_next - self._closed_first
        slots = np.arange(self._closed_first, self._closed_next) % CLOSED_CAPACITY
        closed = self._closed_array[slots] if waiting else self._closed_array[:0]
        self._closed_first = self._closed_next
        return np.concatenate([closed, self._take(self._kline_array, self._kline_dirty)])

    def put_back_tickers(self, rows):
        """Take tickers back whose write failed; a newer one that came meanwhile wins."""
        cdef const unsigned char[::1] data = self._bytes_of(rows, TICKER_DTYPE)
        cdef Py_ssize_t i
        for i in range(len(rows)):
            self.put_ticker(&(<const ticker_row_t *>&data[0])[i])

    def put_back_klines(self, rows):
        """Take klines back whose write failed; a newer state that came meanwhile wins."""
        cdef const unsigned char[::1] data = self._bytes_of(rows, KLINE_DTYPE)
        cdef const kline_row_t *row
        cdef Py_ssize_t i
        for i in range(len(rows)):
            row = &(<const kline_row_t *>&data[0])[i]
            if row.flags & FLAG_CLOSED or row.open_us < self._klines[row.symbol_id].open_us:
                # Final, or the last that is known of a minute that is over.
                self._queue(row)
            else:
                self.put_kline(row)

    cdef object _bytes_of(self, rows, dtype):
        """Return the bytes of rows from Python: in C, what is in them is trusted."""
        if rows.dtype != dtype:
            raise ValueError(f"rows of another kind: {rows.dtype}")
        last = int(rows["symbol_id"].max(initial=0))
        if last >= self.symbol_slots:
            raise ValueError(f"no slot for the symbol id {last}")
        return rows.view(np.uint8)

    cdef object _take(self, rows, uint8_t[::1] dirty):
        flags = np.asarray(dirty)
        taken = rows[flags.nonzero()[0]]
        flags[:] = 0
        return taken
