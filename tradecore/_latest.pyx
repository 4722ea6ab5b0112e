"""The newest trade and ticker of each symbol as the venue printed them, and which of them are news.

While Redis takes one batch, the next one grows: a newer event takes the place of one that was not
taken yet. On request every trade is kept beside that until it is taken, in a buffer of fixed size.

The hot side copies the bytes of a frame; what is to be found in them is found when they are taken.
Nothing here raises into the capture.
"""

import logging

from tradecore.log import once_per

from libc.stdint cimport int64_t, uint32_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

from tradecore._event cimport EVENT_TICKER, EVENT_TRADE, event_t
from tradecore._reframe cimport (
    KIND_TICKER,
    KIND_TRADE,
    find_times,
    payload_t,
    respell,
)
from tradecore.capture cimport Capture


log = logging.getLogger(__name__)

cdef enum:
    # Trades and tickers: one slot a symbol and kind.
    SLOT_KINDS = 2
    # A ticker whose time is farther ahead of our clock does not hold back those that are not.
    AHEAD_MOST_US = 60000000
    # A bulk string is longer than its text by so much at most.
    BULK_SLACK = 32


ctypedef struct buffer_t:
    char *data
    Py_ssize_t size
    Py_ssize_t capacity

ctypedef struct slot_t:
    # The newest frame, and its trade id or event time.
    buffer_t frame
    int64_t order
    bint dirty


cdef class Latest:
    """Taps `capture` until it is closed."""

    cdef Capture _capture
    cdef slot_t *_slots
    cdef Py_ssize_t _slot_count
    # Slots with news, in the order of their first one.
    cdef uint32_t *_dirty
    cdef Py_ssize_t _dirty_count
    cdef dict _fields
    cdef buffer_t _trades
    cdef Py_ssize_t _trades_max_bytes
    cdef int64_t _trade_count
    cdef readonly int64_t conflated
    cdef readonly int64_t trades_dropped

    def __init__(self, Capture capture not None, Py_ssize_t trades_max_bytes=0):
        """`trades_max_bytes`: keep trades until they are taken, so many bytes at most; 0 = none."""
        self._capture = capture
        self._fields = {}
        self._trades_max_bytes = trades_max_bytes
        capture.tap(&_on_event, <void *>self, self)

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self._slot_count):
            free(self._slots[i].frame.data)
        free(self._slots)
        free(self._dirty)
        free(self._trades.data)

    def close(self):
        """Let go of the capture; what is not taken yet can still be."""
        self._capture.untap(<void *>self)

    @property
    def waiting(self):
        """How many values are news."""
        return self._dirty_count

    # ---- events in ---------------------------------------------------------------------------

    cdef void put(self, int status, const event_t *event, const char *data, Py_ssize_t size
                  ) noexcept nogil:
        cdef Py_ssize_t place
        cdef int64_t order
        cdef slot_t *slot
        if status == EVENT_TRADE:
            place = <Py_ssize_t>event.trade.symbol_id * SLOT_KINDS + KIND_TRADE
            order = event.trade.trade_id
            if self._trades_max_bytes:
                self._keep_trade(data, size)
        elif status == EVENT_TICKER:
            place = <Py_ssize_t>event.ticker.symbol_id * SLOT_KINDS + KIND_TICKER
            order = event.ticker.event_us
        else:
            return
        if place >= self._slot_count and not self._grow(place + 1):
            return  # no memory: the next event tries again
        slot = &self._slots[place]
        if order <= slot.order and not (
            status == EVENT_TICKER
            and slot.order > event.ticker.recv_ns // 1000 + AHEAD_MOST_US
        ):
            return
        if not _reserve(&slot.frame, size):
            return
        memcpy(slot.frame.data, data, size)
        slot.frame.size = size
        slot.order = order
        if slot.dirty:
            self.conflated += 1
        else:
            slot.dirty = True
            self._dirty[self._dirty_count] = <uint32_t>place
            self._dirty_count += 1

    cdef bint _grow(self, Py_ssize_t least) noexcept nogil:
        cdef Py_ssize_t count = max(least + SLOT_KINDS, 2 * self._slot_count)
        cdef Py_ssize_t i
        cdef slot_t *slots = <slot_t *>realloc(self._slots, count * sizeof(slot_t))
        if slots == NULL:
            return False
        self._slots = slots
        dirty = <uint32_t *>realloc(self._dirty, count * sizeof(uint32_t))
        if dirty == NULL:
            return False
        self._dirty = dirty
        memset(slots + self._slot_count, 0, (count - self._slot_count) * sizeof(slot_t))
        for i in range(self._slot_count, count):
            slots[i].order = -1
        self._slot_count = count
        return True

    cdef void _keep_trade(self, const char *data, Py_ssize_t size) noexcept nogil:
        # Of another form than the documented one: no trade of the venue is, and it is counted.
        cdef payload_t payload
        if (
            self._trades.size + size + 1 > self._trades_max_bytes
            or not find_times(KIND_TRADE, data, size, &payload)
            or not _reserve(&self._trades, self._trades.size + payload.size + 1)
        ):
            self.trades_dropped += 1
            return
        self._trades.data[self._trades.size] = b"," if self._trades.size else b"["
        memcpy(self._trades.data + self._trades.size + 1, payload.data, payload.size)
        self._trades.size += payload.size + 1
        self._trade_count += 1

    # ---- values out --------------------------------------------------------------------------

    def mark(self, symbol_ids):
        """Count all that is known of these symbols as news."""
        cdef Py_ssize_t place
        cdef slot_t *slot
        for symbol_id in symbol_ids:
            for place in range(SLOT_KINDS * symbol_id, SLOT_KINDS * (symbol_id + 1)):
                if place >= self._slot_count:
                    break
                slot = &self._slots[place]
                if slot.frame.size and not slot.dirty:
                    slot.dirty = True
                    self._dirty[self._dirty_count] = <uint32_t>place
                    self._dirty_count += 1

    def take(self, Py_ssize_t limit):
        """Return (number of values, RESP bulk strings: stream name and event of each), those that
        have waited longest first, `limit` of them at most."""
        cdef Py_ssize_t count = min(limit, self._dirty_count)
        cdef Py_ssize_t taken = 0
        cdef Py_ssize_t i
        cdef buffer_t out
        memset(&out, 0, sizeof(out))
        try:
            for i in range(count):
                self._slots[self._dirty[i]].dirty = False
            for i in range(count):
                taken += self._append(&out, self._dirty[i])
            result = out.data[:out.size] if out.size else b""
        finally:
            free(out.data)
            self._dirty_count -= count
            memmove(self._dirty, self._dirty + count, self._dirty_count * sizeof(uint32_t))
        return taken, result

    cdef int _append(self, buffer_t *out, uint32_t place) except -1:
        """Write stream name and event of a slot; return how many events that were, one or none."""
        cdef const slot_t *slot = &self._slots[place]
        cdef int kind = <int>(place % SLOT_KINDS)
        cdef bytes field = self._fields.get(place)
        cdef bytes spelt
        cdef payload_t payload
        if field is None:
            name = self._capture.symbols.utf8(<int>(place // SLOT_KINDS)).lower()
            name += b"@ticker" if kind == KIND_TICKER else b"@trade"
            field = self._fields[place] = b"$%d\r\n%b\r\n" % (len(name), name)
        if not find_times(kind, slot.frame.data, slot.frame.size, &payload):
            try:
                spelt = respell(kind, slot.frame.data[:slot.frame.size], True)
            except Exception as error:
                once_per(log, "event").error(
                    "an event was not published, a bug", extra={"error": repr(error)}
                )
                return 0
            payload.data = spelt
            payload.size = len(spelt)
        if not _reserve(out, out.size + len(field) + payload.size + BULK_SLACK):
            raise MemoryError
        memcpy(out.data + out.size, <const char *>field, len(field))
        out.size += len(field)
        out.size += snprintf(out.data + out.size, BULK_SLACK, b"$%zd\r\n", payload.size)
        memcpy(out.data + out.size, payload.data, payload.size)
        out.size += payload.size
        memcpy(out.data + out.size, b"\r\n", 2)
        out.size += 2
        return 1

    def take_trades(self):
        """Return (number of trades, their events as a JSON array)."""
        cdef int64_t count = self._trade_count
        events = self._trades.data[:self._trades.size] + b"]" if count else b"[]"
        self._trades.size = 0
        self._trade_count = 0
        return count, events


cdef inline bint _reserve(buffer_t *buffer, Py_ssize_t size) noexcept nogil:
    """Make room for `size` bytes in all; False: there is no memory."""
    cdef Py_ssize_t capacity
    cdef char *data
    if size <= buffer.capacity:
        return True
    capacity = max(size, buffer.capacity + buffer.capacity // 2, 256)
    data = <char *>realloc(buffer.data, capacity)
    if data == NULL:
        return False
    buffer.data = data
    buffer.capacity = capacity
    return True


cdef void _on_event(
    void *latest, int status, const event_t *event, const char *data, Py_ssize_t size
) noexcept:
    (<Latest>latest).put(status, event, data, size)
