"""Bring frames into the ring and the conflator, and count everything that happens on the way.

One object for the whole process: every connection's listener calls `ingest` for each frame and
`end_of_read` after the last frame of a socket read. No Python object is made per trade. What
happens rarely (a refused frame to log, the flusher to wake, the high-water mark) calls back.
"""

import logging
from bisect import bisect_left

from libc.stdint cimport INT64_MAX
from libc.stdlib cimport calloc, free

from tradecore._fastparse import CAUSES

from tradecore._event cimport (
    EVENT_CONTROL,
    EVENT_KLINE,
    EVENT_SHUTDOWN,
    EVENT_TICKER,
    EVENT_TRADE,
    UNKNOWN_SYMBOL,
)
from tradecore._fastparse cimport parse_event_c
from tradecore._rows cimport (
    FLAG_AFTER_REFUSED,
    FLAG_FIRST_OF_EPOCH,
    FLAG_FIRST_OF_RUN,
    trade_row_t,
)


cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <time.h>
    static inline int64_t tc_clock_ns(clockid_t id) {
        struct timespec t;
        clock_gettime(id, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    #define TC_BIT_LENGTH(x) ((x) ? 64 - __builtin_clzll((unsigned long long)(x)) : 0)
    #define tc_wall_ns() tc_clock_ns(CLOCK_REALTIME)
    #define tc_mono_ns() tc_clock_ns(CLOCK_MONOTONIC)
    """
    int64_t tc_wall_ns()
    int64_t tc_mono_ns()
    int bit_length "TC_BIT_LENGTH"(int64_t x)


log = logging.getLogger(__name__)

LATENCY_BOUNDS_US = (
    100, 250, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000, 2_000_000, 5_000_000, 10_000_000, 60_000_000, 600_000_000,
)
"""Upper bounds of the exchange -> receive histogram; the bucket behind the last is +Inf."""

cdef int64_t[LATENCY_BUCKETS - 1] BOUNDS_US
BOUNDS_US[:] = LATENCY_BOUNDS_US
# By the bits of a latency: the bucket of the least latency of so many bits.
cdef int[64] FIRST_BUCKET
FIRST_BUCKET[:] = [bisect_left(LATENCY_BOUNDS_US, 1 << bits >> 1) for bits in range(64)]

# Before the first id of a symbol; one below it must not be mistaken for the id before 0.
cdef int64_t NO_ID = -2
cdef int64_t REPORT_INTERVAL_NS = <int64_t>60_000_000_000
cdef Py_ssize_t HEAD_BYTES = 120


cdef int64_t wall_clock_ns() noexcept nogil:
    return tc_wall_ns()


cdef int64_t mono_clock_ns() noexcept nogil:
    return tc_mono_ns()


cdef class Capture:
    """Frames in; rows, last values and counters out."""

    def __cinit__(self):
        self._wake_rows = INT64_MAX
        self._high_water = INT64_MAX

    def __init__(self, RingBuffer ring not None, SymbolTable symbols not None,
                 Conflator conflator not None):
        """Track the symbols that are in the table now; a later one is refused as unknown."""
        cdef uint32_t i
        self.ring = ring
        self.symbols = symbols
        self.conflator = conflator
        self._track_slots = len(symbols)
        if len(symbols) > conflator.symbol_slots:
            raise ValueError("the conflator has fewer slots than there are symbols")
        self._tracks = <track_t *>calloc(max(1, self._track_slots), sizeof(track_t))
        if self._tracks == NULL:
            raise MemoryError
        for i in range(self._track_slots):
            # An empty run: every id is a new one and none is a duplicate.
            self._tracks[i].run_first = INT64_MAX
            self._tracks[i].run_last = NO_ID

    def __dealloc__(self):
        free(self._tracks)

    cdef int ingest(
        self, const char *data, Py_ssize_t size, int64_t recv_ns, uint16_t line, uint32_t epoch
    ) except 0:
        """Parse one frame and keep what it holds; return its status (EVENT_* or a refusal)."""
        cdef int status
        self._count.frames += 1
        status = parse_event_c(data, size, &self.symbols.table, &self._event)
        if status == EVENT_TRADE and self._event.trade.symbol_id < self._track_slots:
            self._take_trade(recv_ns, line, epoch)
        elif status == EVENT_TICKER and self._event.ticker.symbol_id < self._track_slots:
            self._event.ticker.recv_ns = recv_ns
            self.conflator.put_ticker(&self._event.ticker)
            self._count.tickers += 1
        elif status == EVENT_KLINE and self._event.kline.symbol_id < self._track_slots:
            self._event.kline.recv_ns = recv_ns
            self.conflator.put_kline(&self._event.kline)
            self._count.klines += 1
        elif status == EVENT_CONTROL:
            self._count.controls += 1
        elif status != EVENT_SHUTDOWN:
            if status > 0:
                # The symbol came into the table later: there is no track and no slot for it.
                status = UNKNOWN_SYMBOL
            self.refuse(status, data, size)
        return status

    cdef void _take_trade(self, int64_t recv_ns, uint16_t line, uint32_t epoch) noexcept:
        cdef trade_row_t *trade = &self._event.trade
        cdef track_t *track = &self._tracks[trade.symbol_id]
        cdef int64_t trade_id = trade.trade_id
        cdef trade_row_t *slot
        cdef int64_t latency_us
        cdef int bucket
        self._count.trades += 1
        if track.run_first <= trade_id <= track.run_last:
            self._count.duplicate += 1
            return
        slot = self.ring.claim()
        if slot == NULL:
            # Refused, never overwritten: the next trade that finds room shows the hole.
            self._count.ring_full += 1
            track.refused += 1
            return
        slot.trade_id = trade_id
        slot.price_e8 = trade.price_e8
        slot.quantity_e8 = trade.quantity_e8
        slot.trade_us = trade.trade_us
        slot.recv_ns = recv_ns
        slot.symbol_id = trade.symbol_id
        slot.flags = trade.flags
        if track.refused:
            slot.flags |= FLAG_AFTER_REFUSED
            track.refused = 0
        if track.epoch != epoch:
            slot.flags |= FLAG_FIRST_OF_EPOCH if track.epoch else FLAG_FIRST_OF_RUN
            track.epoch = epoch
        slot.line = line
        slot.epoch = epoch
        self.ring.publish(slot)
        track.received += 1
        if trade_id == track.run_last + 1:
            track.run_last = trade_id
        elif trade_id > track.run_last:
            if track.run_last >= 0:
                self._count.gaps += 1
                self._count.missing += trade_id - track.run_last - 1
            track.run_first = trade_id
            track.run_last = trade_id
        else:
            # Before the run: late, or seen long ago. The ledger knows which.
            self._count.out_of_order += 1
            if trade_id == track.run_first - 1:
                track.run_first = trade_id
        track.last_trade_us = trade.trade_us
        latency_us = recv_ns // 1000 - self._event.event_us
        if latency_us < 0:
            # The venue's clock is ahead of ours: counted apart, never shown as zero.
            self._count.early += 1
            return
        bucket = FIRST_BUCKET[bit_length(latency_us)]
        while bucket < LATENCY_BUCKETS - 1 and latency_us > BOUNDS_US[bucket]:
            bucket += 1
        self._latency[bucket] += 1
        self._count.latency_sum_us += latency_us
        self._count.latency_count += 1

    cdef int refuse(self, int status, const char *data, Py_ssize_t size) except 0:
        """Count a frame that is not stored; log its head at most once per cause and minute."""
        cdef int cause = -status
        cdef int64_t now = tc_mono_ns()
        self._refused[cause] += 1
        if self._reported_ns[cause] and now - self._reported_ns[cause] < REPORT_INTERVAL_NS:
            self._suppressed[cause] += 1
            return status
        self._reported_ns[cause] = now
        log.warning(
            "frame refused and not stored; if the venue changed its format, tradecore needs an "
            "update",
            extra={
                "cause": CAUSES[cause],
                "head": data[:min(size, HEAD_BYTES)].decode("utf-8", "backslashreplace"),
                "bytes": size,
                "suppressed": self._suppressed[cause],
            },
        )
        self._suppressed[cause] = 0
        return status

    cdef int end_of_read(self) except -1:
        """Wake the flusher and report the high-water mark, once per socket read."""
        cdef int64_t pending = self.ring.published_seq - self.ring._durable_seq[0]
        self.ring.trim_backlog()
        if pending >= self._wake_rows:
            self._wake_rows = INT64_MAX
            self._wake()
        if pending >= self._high_water and not self._above_high_water:
            self._above_high_water = True
            self._on_high_water()
        return 0

    def wake_when(self, int64_t rows, wake):
        """Call `wake()` once, as soon as `rows` rows are pending at the end of a socket read."""
        self._wake = wake
        self._wake_rows = rows

    def watch_high_water(self, int64_t rows, on_high_water):
        """Call `on_high_water()` when `rows` rows are pending; again only after
        `below_high_water()`."""
        self._high_water = rows
        self._on_high_water = on_high_water
        self._above_high_water = False

    def below_high_water(self):
        """Say that the ring has drained: the next rise over the mark is reported again."""
        self._above_high_water = False

    @property
    def above_high_water(self):
        """Whether the ring went over the high-water mark and has not drained since."""
        return self._above_high_water

    def feed(self, bytes frame not None, int64_t recv_ns=0, int line=0, int epoch=0):
        """Take one frame as if a socket read had brought it alone (tests, replays).

        `recv_ns` 0 means now. Returns the status: positive for an event, negative when refused.
        """
        cdef const char *data = frame
        status = self.ingest(data, len(frame), recv_ns or tc_wall_ns(), line, epoch)
        self.end_of_read()
        return status

    def counters(self):
        """Return all counters, read at this moment, as a dict of ints."""
        return {
            "frames": self._count.frames,
            "trades": self._count.trades,
            "tickers": self._count.tickers,
            "klines": self._count.klines,
            "controls": self._count.controls,
            "duplicate": self._count.duplicate,
            "out_of_order": self._count.out_of_order,
            "gaps": self._count.gaps,
            "missing": self._count.missing,
            "ring_full": self._count.ring_full,
            "early": self._count.early,
        }

    def refused(self):
        """Return the refused frames by cause."""
        return {name: self._refused[cause] for cause, name in CAUSES.items()}

    def latency(self):
        """Return (counts per bucket of LATENCY_BOUNDS_US and +Inf, sum in us)."""
        return [self._latency[i] for i in range(LATENCY_BUCKETS)], self._count.latency_sum_us

    def received(self):
        """Return {symbol: (trades taken in, last trade id or None, time of the last in us)}."""
        return {
            self.symbols.name(i): (
                self._tracks[i].received,
                self._tracks[i].run_last if self._tracks[i].run_last >= 0 else None,
                self._tracks[i].last_trade_us,
            )
            for i in range(self._track_slots)
        }


def bench_ingest(Capture capture not None, list frames not None, int rounds):
    """Run the daemon's own path over `frames` from C; return (nanoseconds, trades in the ring).

    The ring is emptied between rounds and the ids start anew, so every frame is published.
    """
    cdef int64_t elapsed = 0
    cdef int64_t start
    cdef int64_t recv_ns = tc_wall_ns()
    cdef Py_ssize_t count = len(frames)
    cdef Py_ssize_t i
    cdef uint32_t k
    cdef bytes frame
    cdef const char **data = <const char **>calloc(count, sizeof(char *))
    cdef Py_ssize_t *sizes = <Py_ssize_t *>calloc(count, sizeof(Py_ssize_t))
    if data == NULL or sizes == NULL:
        raise MemoryError
    try:
        for i in range(count):
            frame = frames[i]
            data[i] = frame
            sizes[i] = len(frame)
        for _ in range(rounds):
            capture.ring.release(capture.ring.pending)
            for k in range(capture._track_slots):
                capture._tracks[k].run_first = INT64_MAX
                capture._tracks[k].run_last = NO_ID
            start = tc_mono_ns()
            for i in range(count):
                capture.ingest(data[i], sizes[i], recv_ns, 0, 0)
            elapsed += tc_mono_ns() - start
    finally:
        free(data)
        free(sizes)
    return elapsed, capture.ring.pending
