"""Loops in C over frames, along the daemon's own path: for bench/, no daemon uses them."""

from libc.stdint cimport int64_t
from libc.string cimport memchr

import numpy as np

from tradecore._event cimport EVENT_TRADE, event_t
from tradecore._fastparse cimport parse_event_c
from tradecore._symbols cimport SymbolTable
from tradecore.capture cimport Capture, wall_clock_ns


cdef class Frames:
    """Frames one behind the other, as a socket read leaves them, a line feed behind each."""

    cdef bytes _data
    cdef int64_t[::1] _ends

    def __init__(self, list frames not None):
        self._data = b"".join([frame + b"\n" for frame in frames])
        self._ends = np.cumsum([len(frame) + 1 for frame in frames], dtype=np.int64)

    def __len__(self):
        return self._ends.shape[0]


def scan(Frames frames not None):
    """Find the end of each frame by memchr and nothing else: what touching its bytes costs."""
    cdef const char *p = frames._data
    cdef const char *end = p + len(frames._data)
    cdef Py_ssize_t found = 0
    while p < end:
        p = <const char *>memchr(p, b"\n", end - p) + 1
        found += 1
    return found


def parse(Frames frames not None, SymbolTable symbols not None):
    """Parse frames and store nothing; return how many are trades."""
    cdef event_t event
    cdef const char *data = frames._data
    cdef int64_t at = 0
    cdef Py_ssize_t i, trades = 0
    for i in range(frames._ends.shape[0]):
        trades += parse_event_c(
            data + at, frames._ends[i] - 1 - at, &symbols.table, &event
        ) == EVENT_TRADE
        at = frames._ends[i]
    return trades


def ingest(Capture capture not None, Frames frames not None):
    """Bring frames into an emptied ring, all with the same receive time; return how many trades
    are in it. The ids start anew, so that no frame is a duplicate of an earlier call's.
    """
    cdef const char *data = frames._data
    cdef int64_t recv_ns = wall_clock_ns()
    cdef int64_t at = 0
    cdef Py_ssize_t i
    capture.ring.release(capture.ring.pending)
    capture._tracks.restart()
    for i in range(frames._ends.shape[0]):
        capture.ingest(data + at, frames._ends[i] - 1 - at, recv_ns, 0, 0)
        at = frames._ends[i]
    return capture.ring.pending
