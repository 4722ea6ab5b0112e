# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The listener of the bare prototype: our parser, rows in a plain array, and nothing else."""

from libc.stdint cimport int64_t
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

import numpy as np

from tradecore.schema import TRADE_DTYPE

from picows.picows cimport WSFrame, WSListener, WSMsgType, WSTransport

from tradecore._event cimport EVENT_TRADE, event_t
from tradecore._fastparse cimport parse_event_c
from tradecore._rows cimport trade_row_t
from tradecore._symbols cimport SymbolTable

cdef enum:
    CAPACITY = 1 << 18
    # The socket is not read beyond this; what one read brought has room above it.
    HIGH_WATER = 1 << 16


cdef class Listener(WSListener):
    """Parses each frame into the next row; stops reading while the writer is far behind."""

    cdef SymbolTable _symbols
    cdef object _wake
    cdef object _reading
    cdef object _array
    cdef trade_row_t *_rows
    cdef event_t _event
    cdef int64_t _recv_ns
    cdef int64_t _wake_rows
    cdef int64_t _head
    cdef int64_t _tail

    def __init__(self, SymbolTable symbols not None, wake, int64_t wake_rows):
        """Call `wake` after each socket read while at least `wake_rows` rows wait."""
        cdef trade_row_t[::1] rows
        self._symbols = symbols
        self._wake = wake
        self._wake_rows = wake_rows
        self._array = np.zeros(CAPACITY, TRADE_DTYPE)
        rows = self._array
        self._rows = &rows[0]

    cpdef on_ws_frame(self, WSTransport transport, WSFrame frame):
        cdef timespec now
        cdef trade_row_t *row
        if frame.msg_type == WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())
        elif frame.msg_type == WSMsgType.TEXT:
            if self._recv_ns == 0:
                clock_gettime(CLOCK_REALTIME, &now)
                self._recv_ns = now.tv_sec * 1_000_000_000 + now.tv_nsec
            if EVENT_TRADE != parse_event_c(
                frame.payload_ptr, frame.payload_size, &self._symbols.table, &self._event
            ):
                raise ValueError(f"no trade: {frame.get_payload_as_bytes()}")
            if self._head - self._tail == CAPACITY:
                raise OverflowError("one read brought more than there is room for")
            row = self._rows + self._head % CAPACITY
            row[0] = self._event.trade
            row.recv_ns = self._recv_ns
            self._head += 1
        if frame.last_in_buffer:
            self._recv_ns = 0
            if self._head - self._tail >= self._wake_rows:
                self._wake()
            if self._reading is None and self._head - self._tail > HIGH_WATER:
                self._reading = transport.underlying_transport
                self._reading.pause_reading()

    def peek(self, int64_t most):
        """Return the oldest rows, `most` at most, as one run."""
        cdef int64_t first = self._tail % CAPACITY
        return self._array[first : min(first + most, first + self._head - self._tail, CAPACITY)]

    def release(self, int64_t count):
        """Give up the oldest `count` rows."""
        self._tail += count
        if self._reading is not None and self._head - self._tail < HIGH_WATER:
            self._reading.resume_reading()
            self._reading = None
