"""Fan-out of live events: each is encoded once and sent to every client that wants it.

Clients with the same streams and the same mode form a group. During a socket read the frames of a
group are put behind each other in one buffer, in C; then each client gets that buffer by one
write. The fan-out takes a bounded share of the loop: the longer a round of writes took, the longer
the next one waits, and grows, so that many clients cost the capture latency by no more than that.

A client that does not read is not waited for. Past `conflate_bytes` of unsent data its tickers and
open klines are held back, the latest of each stream; past `backlog_max_bytes` it is given up.

Nothing here is called while nobody is subscribed, and nothing raises into the capture.
"""

import asyncio
import logging
from collections import namedtuple

from tradecore.log import once_per

from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from tradecore._event cimport EVENT_KLINE, EVENT_TICKER, EVENT_TRADE, event_t
from tradecore._groups cimport Group, Stream
from tradecore._reframe cimport (
    FRAME_SLACK,
    KIND_COUNT,
    KIND_HOLE,
    KIND_KLINE,
    KIND_TICKER,
    KIND_TRADE,
    MODE_MICRO,
    find_times,
    frame_of,
    payload_t,
    respell,
    write_frame,
)
from tradecore._rows cimport FLAG_CLOSED
from tradecore.capture cimport Capture, mono_clock_ns, wall_clock_ns


log = logging.getLogger(__name__)

CONFLATE_BYTES = 64 << 10
BACKLOG_MAX_BYTES = 1 << 20

Key = namedtuple("Key", ("name", "kind", "symbol_id"))

cdef enum:
    # The kinds that frames bring come in slots; one a symbol and kind.
    FRAME_KINDS = 3
    # After a round that took so long, the next waits so many times that.
    PAUSE_TIMES = 3
    PAUSE_LEAST_NS = 500000
    PAUSE_MOST_NS = 10000000
    # A state whose time is farther ahead of our clock does not hold back those that are not.
    AHEAD_MOST_US = 60000000

_DRAIN_LOOK_S = 0.02


ctypedef struct slot_t:
    # A borrowed Stream, NULL while nobody wants it; `_streams` holds the reference.
    void *stream
    # The newest state that was sent.
    int64_t event_us
    int64_t open_us
    bint closed


cdef class Client:
    """One client; made by `Broadcast.join`."""

    cdef Broadcast _broadcast
    cdef object _wire
    cdef object _on_slow
    cdef Group _group
    # Of a client that does not keep up: the latest frame of each stream that was held back.
    cdef dict _held
    cdef bint _gone

    def choose(self, keys, int mode):
        """Get these streams from now on, in place of those before."""
        # What waits or was held back is of the streams and the mode that were.
        self._broadcast.flush()
        if self._gone:
            return
        if self._held is not None and not self._wire.is_closing():
            self._wire.write(b"".join(self._held.values()))
        self._held = None
        self._broadcast._regroup(self, {key.name: key for key in keys}, mode)

    def leave(self):
        """Get nothing any more, for good."""
        self._gone = True
        self._broadcast._regroup(self, {}, 0)
        self._held = None
        self._broadcast._slow.discard(self)

    @property
    def conflating(self):
        """Whether events of this client are held back at this moment."""
        return self._held is not None

    cdef int send(self, Group group) except -1:
        cdef Py_ssize_t backlog
        if self._wire.is_closing():
            return 0
        backlog = self._wire.get_write_buffer_size()
        if self._held is None and backlog <= self._broadcast._conflate_bytes:
            self._wire.write(group.whole())
            return 0
        group.split()
        if group.final:
            if backlog > self._broadcast._backlog_max_bytes:
                self.leave()
                self._on_slow()
                return 0
            self._wire.write(group.final)
        if group.ended:
            self._end(group.ended)
        if group.states:
            self._hold(group.states)
        return 0

    cdef int _end(self, dict ended) except -1:
        """Drop what was held back of streams of which a final frame was sent."""
        cdef Stream stream
        for stream, count in ended.items():
            if self._held is not None and self._held.pop(stream, None) is not None:
                count += 1
            self._broadcast._conflated[stream.kind] += count
        if not self._held:
            self._held = None
        return 0

    cdef int _hold(self, dict states) except -1:
        cdef Stream stream
        if self._held is None:
            self._held = {}
        for stream, (count, frame) in states.items():
            self._broadcast._conflated[stream.kind] += count - (stream not in self._held)
            self._held[stream] = frame
        self._broadcast._watch(self)
        return 0

    cdef bint send_held(self) except -1:
        """Send what was held back if there is room by now; tell whether that is done."""
        if self._held is None or self._wire.is_closing():
            self._held = None
            return True
        if self._wire.get_write_buffer_size() > self._broadcast._conflate_bytes // 4:
            return False
        held, self._held = self._held, None
        self._wire.write(b"".join(held.values()))
        return True


cdef class Broadcast:
    """Hands what `capture` takes as new to clients; one for the whole process."""

    cdef Capture _capture
    cdef slot_t *_slots
    cdef Py_ssize_t _slot_count
    # By name; how many of them frames bring.
    cdef dict _streams
    cdef Py_ssize_t _tapped
    cdef dict _groups
    cdef list _dirty
    cdef set _slow
    cdef char *_frame
    cdef Py_ssize_t _frame_capacity
    cdef object _loop
    cdef bint _scheduled
    cdef bint _looking
    cdef int64_t _began_ns
    cdef int64_t _next_ns
    cdef Py_ssize_t _conflate_bytes
    cdef Py_ssize_t _backlog_max_bytes
    cdef int64_t[KIND_COUNT] _events
    cdef int64_t[KIND_COUNT] _conflated

    def __init__(self, Capture capture not None, Py_ssize_t conflate_bytes=CONFLATE_BYTES,
                 Py_ssize_t backlog_max_bytes=BACKLOG_MAX_BYTES):
        """`conflate_bytes`, `backlog_max_bytes`: unsent data of a client, see above."""
        self._capture = capture
        self._conflate_bytes = conflate_bytes
        self._backlog_max_bytes = backlog_max_bytes
        self._streams = {}
        self._groups = {}
        self._dirty = []
        self._slow = set()

    def __dealloc__(self):
        free(self._slots)
        free(self._frame)

    def join(self, wire, on_slow):
        """Return a new client, without streams.

        `on_slow()` is called when it was given up for not reading; it gets nothing then.
        """
        cdef Client client = Client()
        self._loop = asyncio.get_running_loop()
        client._broadcast = self
        client._wire = wire
        client._on_slow = on_slow
        return client

    def close(self):
        """Let go of the capture; clients get nothing any more."""
        self._capture.untap(<void *>self)

    @property
    def events(self):
        """Events sent to any client, by kind."""
        return [self._events[kind] for kind in range(KIND_COUNT)]

    @property
    def conflated(self):
        """Events for whose place with a slow client a newer one came, by kind."""
        return [self._conflated[kind] for kind in range(KIND_COUNT)]

    @property
    def groups(self):
        """How many groups there are."""
        return len(self._groups)

    def is_wanted(self, int kind):
        """Tell whether any client has a stream of this kind."""
        cdef Stream stream
        for stream in self._streams.values():
            if stream.kind == kind:
                return True
        return False

    # ---- who gets what -----------------------------------------------------------------------

    cdef int _regroup(self, Client client, dict keys, int mode) except -1:
        cdef Group group
        # What waits belongs to those who are in the group now. It may end a client, this one too.
        self.flush()
        group = client._group
        key = (frozenset(keys), mode)
        if group is not None:
            if group.key == key:
                return 0
            client._group = None
            group.clients.remove(client)
            if not group.clients:
                self._drop(group)
        if keys:
            group = self._groups.get(key)
            if group is None:
                group = self._make(key, keys.values(), mode)
            group.clients.append(client)
            client._group = group
        return 0

    cdef Group _make(self, key, keys, int mode):
        cdef Group group = Group()
        cdef Stream stream
        group.key = key
        group.mode = mode
        group.clients = []
        group.streams = []
        for name, kind, symbol_id in keys:
            stream = self._streams.get(name)
            if stream is None:
                stream = self._open(name, kind, symbol_id)
            group.streams.append(stream)
            stream.add(group)
        self._groups[key] = group
        return group

    cdef int _drop(self, Group group) except -1:
        cdef Stream stream
        del self._groups[group.key]
        for stream in group.streams:
            stream.groups.remove(group)
            if not stream.groups:
                self._close(stream)
        return 0

    cdef Stream _open(self, str name, int kind, uint32_t symbol_id):
        cdef Stream stream = Stream()
        cdef Py_ssize_t place = <Py_ssize_t>symbol_id * FRAME_KINDS + kind
        cdef Py_ssize_t count
        cdef slot_t *slots
        stream.name = name
        stream.wire_name = name.encode()
        stream.kind = kind
        stream.symbol_id = symbol_id
        stream.groups = []
        stream.last_id = -1
        stream.late = []
        if kind != KIND_HOLE:
            if place >= self._slot_count:
                count = max(place + 1, 2 * self._slot_count)
                slots = <slot_t *>realloc(self._slots, count * sizeof(slot_t))
                if slots == NULL:
                    raise MemoryError
                memset(slots + self._slot_count, 0, (count - self._slot_count) * sizeof(slot_t))
                self._slots = slots
                self._slot_count = count
            self._slots[place].stream = <void *>stream
            self._tapped += 1
            if self._tapped == 1:
                self._capture.tap(&_on_event, <void *>self, self)
        self._streams[name] = stream
        return stream

    cdef int _close(self, Stream stream) except -1:
        cdef Py_ssize_t place = <Py_ssize_t>stream.symbol_id * FRAME_KINDS + stream.kind
        del self._streams[stream.name]
        if stream.kind != KIND_HOLE:
            self._slots[place].stream = NULL
            self._tapped -= 1
            if self._tapped == 0:
                self._capture.untap(<void *>self)
        return 0

    # ---- events in ---------------------------------------------------------------------------

    cdef void take(self, int status, const event_t *event, const char *data, Py_ssize_t size
                   ) noexcept:
        """Put an event that the capture took as new into the buffers of those who want it."""
        cdef Py_ssize_t place
        cdef slot_t *slot
        cdef bint final = False
        if status == EVENT_TRADE:
            place = <Py_ssize_t>event.trade.symbol_id * FRAME_KINDS + KIND_TRADE
        elif status == EVENT_TICKER:
            place = <Py_ssize_t>event.ticker.symbol_id * FRAME_KINDS + KIND_TICKER
        else:
            place = <Py_ssize_t>event.kline.symbol_id * FRAME_KINDS + KIND_KLINE
        if place >= self._slot_count:
            return
        slot = &self._slots[place]
        if slot.stream == NULL:
            return
        if status == EVENT_TICKER:
            if not _is_newer_ticker(slot, event):
                return
            slot.event_us = event.ticker.event_us
        elif status == EVENT_KLINE:
            if not _is_newer_kline(slot, event):
                return
            slot.event_us = event.kline.event_us
            slot.open_us = event.kline.open_us
            slot.closed = (event.kline.flags & FLAG_CLOSED) != 0
            # A closed kline is final: the next one does not stand for it.
            final = slot.closed
        try:
            if status == EVENT_TRADE and not (<Stream>slot.stream).is_first(event.trade.trade_id):
                return
            self._encode(<Stream>slot.stream, data, size, status != EVENT_TRADE, final)
        except Exception as error:
            once_per(log, "event").error(
                "an event was not sent to clients, a bug", extra={"error": repr(error)}
            )

    cdef int _encode(
        self, Stream stream, const char *data, Py_ssize_t size, bint state, bint final
    ) except -1:
        cdef payload_t payload
        cdef Group group
        cdef int mode = -1
        cdef Py_ssize_t room, frame_size = 0
        cdef char *frame
        cdef bytes payload_bytes
        cdef bint usual = find_times(stream.kind, data, size, &payload)
        self._events[stream.kind] += 1
        for group in stream.groups:
            if group.mode != mode:
                mode = group.mode
                if not usual:
                    payload_bytes = respell(
                        stream.kind, data[:size], (mode & MODE_MICRO) != 0
                    )
                    payload.data = payload_bytes
                    payload.size = len(payload_bytes)
                    payload.count = 0
                room = payload.size + len(stream.wire_name) + FRAME_SLACK
                if room > self._frame_capacity:
                    frame = <char *>realloc(self._frame, room)
                    if frame == NULL:
                        raise MemoryError
                    self._frame = frame
                    self._frame_capacity = room
                frame_size = write_frame(
                    self._frame, &payload, stream.wire_name, len(stream.wire_name), mode
                )
            self._append(group, self._frame, frame_size, stream if state else None, final)
        return 0

    def announce(self, names, bytes payload_ms not None, bytes payload_us not None):
        """Send an event of our own to those who have one of the streams `names`."""
        cdef Stream stream
        cdef Group group
        cdef bytes frame
        for name in names:
            stream = self._streams.get(name)
            if stream is None:
                continue
            self._events[stream.kind] += 1
            for group in stream.groups:
                frame = frame_of(
                    payload_us if group.mode & MODE_MICRO else payload_ms,
                    stream.wire_name,
                    group.mode,
                )
                self._append(group, frame, len(frame), None, False)

    cdef inline int _append(
        self, Group group, const char *frame, Py_ssize_t size, Stream state, bint final
    ) except -1:
        cdef bint first = group.size == 0
        group.append(frame, size, state, final)
        if first:
            self._dirty.append(group)
            if not self._scheduled:
                self._schedule()
        return 0

    # ---- buffers out -------------------------------------------------------------------------

    cdef int _schedule(self) except -1:
        """Let a round of writes come at the end of this tick, or after the pause."""
        cdef int64_t wait_ns
        self._scheduled = True
        if self._began_ns:
            return 0  # the last round is not over: its end begins the next
        wait_ns = self._next_ns - mono_clock_ns()
        if wait_ns < PAUSE_LEAST_NS:
            self._loop.call_soon(self._on_due)
        else:
            self._loop.call_later(wait_ns / 1e9, self._on_due)
        return 0

    def _on_due(self):
        self._scheduled = False
        if self._dirty:
            self._began_ns = mono_clock_ns()
            self.flush()
            # The loop sends what was written before it gets to this.
            self._loop.call_soon(self._on_written)

    def _on_written(self):
        cdef int64_t now = mono_clock_ns()
        self._next_ns = now + min(PAUSE_TIMES * (now - self._began_ns), PAUSE_MOST_NS)
        self._began_ns = 0
        if self._scheduled:
            self._schedule()

    def flush(self):
        """Write at once what waits."""
        cdef Group group
        cdef Client client
        dirty, self._dirty = self._dirty, []
        for group in dirty:
            for client in group.clients[:]:
                try:
                    client.send(group)
                except Exception as error:
                    once_per(log, "client").error(
                        "a client was not written to, a bug", extra={"error": repr(error)}
                    )
            group.clear()

    cdef int _watch(self, Client client) except -1:
        """Look now and then whether a slow client has room again."""
        self._slow.add(client)
        if not self._looking:
            self._looking = True
            self._loop.call_later(_DRAIN_LOOK_S, self._look)
        return 0

    def _look(self):
        cdef Client client
        self._looking = False
        for client in list(self._slow):
            if client.send_held():
                self._slow.discard(client)
            else:
                self._watch(client)


cdef bint _is_newer_ticker(const slot_t *slot, const event_t *event) noexcept:
    if event.ticker.event_us > slot.event_us:
        return True
    return _is_out_of_time(slot.event_us, event.ticker.event_us)


cdef bint _is_newer_kline(const slot_t *slot, const event_t *event) noexcept:
    if event.kline.open_us > slot.open_us:
        return True
    if event.kline.open_us == slot.open_us and not slot.closed and (
        event.kline.event_us > slot.event_us or event.kline.flags & FLAG_CLOSED
    ):
        return True
    return _is_out_of_time(
        max(slot.event_us, slot.open_us), max(event.kline.event_us, event.kline.open_us)
    )


cdef bint _is_out_of_time(int64_t sent_us, int64_t event_us) noexcept:
    """Tell whether what was sent came with an absurd time, and this event does not."""
    cdef int64_t limit_us = wall_clock_ns() // 1000 + AHEAD_MOST_US
    return sent_us > limit_us >= event_us


cdef void _on_event(
    void *broadcast, int status, const event_t *event, const char *data, Py_ssize_t size
) noexcept:
    (<Broadcast>broadcast).take(status, event, data, size)
