"""Bring frames into the ring and the conflator, and count everything that happens on the way.

One object for the whole process: every connection's listener calls `ingest` for each frame and
`end_of_read` after the last frame of a socket read. No Python object is made per trade. What
happens rarely (a refused frame to log, the flusher to wake, the high-water mark) calls back.
"""

import logging
from bisect import bisect_left
from collections import namedtuple
from weakref import WeakSet

from libc.stdint cimport INT64_MAX

from tradecore import _tracks
from tradecore._fastparse import CAUSES

from tradecore._arrivals cimport (
    Arrivals,
    find_behind,
    find_left_out,
    find_unconfirmed,
    last_told,
)
from tradecore._event cimport (
    EVENT_CONTROL,
    EVENT_KLINE,
    EVENT_SHUTDOWN,
    EVENT_TICKER,
    EVENT_TRADE,
    UNKNOWN_SYMBOL,
)
from tradecore._fastparse cimport parse_event_c
from tradecore._ring cimport put_tag
from tradecore._rows cimport (
    FLAG_AFTER_REFUSED,
    FLAG_FAR_BELOW,
    FLAG_FIRST_OF_EPOCH,
    FLAG_FIRST_OF_RUN,
    trade_row_t,
)
from tradecore._tracks cimport LINE_COUNT, Tracks, track_t
from tradecore._words cimport likely
from tradecore.sequence cimport (
    DUPLICATE,
    FAR_BELOW,
    GAP,
    LATE,
    is_in_hole,
    judge,
    seed_sequence,
    take_id,
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

Track = _tracks.Track
Told = _tracks.Told
LineUse = namedtuple("LineUse", ("first", "late", "missing", "lag_s_sum", "lag_count"))

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
        self._tap_keeps = []

    def __init__(self, RingBuffer ring not None, SymbolTable symbols not None,
                 Conflator conflator not None):
        """Track the symbols that are in the table now; later ones after `grow()` only."""
        self.ring = ring
        self.symbols = symbols
        self.conflator = conflator
        self._tracks = Tracks(symbols)
        self._arrivals = WeakSet()
        if len(symbols) > conflator.symbol_slots:
            raise ValueError("the conflator has fewer slots than there are symbols")
        self.grow()

    cdef int ingest(
        self, const char *data, Py_ssize_t size, int64_t recv_ns, uint16_t line, uint32_t epoch
    ) except 0:
        """Parse one frame and keep what it holds; return its status (EVENT_* or a refusal)."""
        cdef int status
        self._count.frames += 1
        status = parse_event_c(data, size, &self.symbols.table, &self._event)
        if status == EVENT_TRADE and self._event.trade.symbol_id < self._tracks.slots:
            self._take_trade(recv_ns, line, epoch)
            if self._verdict == FAR_BELOW:
                self._report_far_below(self._event.trade.symbol_id, self._event.trade.trade_id)
        elif status == EVENT_TICKER and self._event.ticker.symbol_id < self._tracks.slots:
            self._event.ticker.recv_ns = recv_ns
            self.conflator.put_ticker(&self._event.ticker)
            self._tracks.note_told(
                self._event.ticker.symbol_id,
                last_told(self._event.ticker.last_id, self._event.ticker.trade_count),
                self._event.ticker.event_us,
                recv_ns,
            )
            self._count.tickers += 1
        elif status == EVENT_KLINE and self._event.kline.symbol_id < self._tracks.slots:
            self._event.kline.recv_ns = recv_ns
            self.conflator.put_kline(&self._event.kline)
            self._tracks.note_told(
                self._event.kline.symbol_id,
                last_told(self._event.kline.last_id, self._event.kline.trade_count),
                self._event.kline.event_us,
                recv_ns,
            )
            self._count.klines += 1
        elif status == EVENT_CONTROL:
            self._count.controls += 1
        elif status != EVENT_SHUTDOWN:
            if status > 0:
                # The symbol came into the table later: there is no track and no slot for it.
                status = UNKNOWN_SYMBOL
            self.refuse(status, data, size)
        if not likely(self._tap_count == 0):
            self._hand_on(status, data, size)
        return status

    cdef void _hand_on(self, int status, const char *data, Py_ssize_t size) noexcept:
        """Give an event to those who tap the capture, if it is new."""
        cdef bint published
        cdef int i
        if status == EVENT_TRADE:
            # Else it was a duplicate, or found no room.
            published = self.ring.published_seq != self._tapped_seq
            self._tapped_seq = self.ring.published_seq
            if (
                not published
                or self._verdict == FAR_BELOW
                or (self._verdict == LATE and not self._was_missing)
            ):
                return
        elif status != EVENT_TICKER and status != EVENT_KLINE:
            return
        for i in range(self._tap_count):
            self._taps[i].take(self._taps[i].tapped, status, &self._event, data, size)

    cdef void _take_trade(self, int64_t recv_ns, uint16_t line, uint32_t epoch) noexcept:
        cdef trade_row_t *trade = &self._event.trade
        cdef track_t *track = &self._tracks.rows[trade.symbol_id]
        cdef int64_t trade_id = trade.trade_id
        cdef int verdict = judge(&track.ids, trade_id, trade.trade_us)
        cdef int side = line % LINE_COUNT
        cdef line_t *use = &self._lines[side]
        cdef int64_t line_last = track.line_last[side]
        cdef bint new_connection = epoch > track.line_epoch[side]
        cdef trade_row_t *slot
        cdef uint16_t flags = trade.flags
        cdef uint16_t notes
        cdef int64_t latency_us
        cdef int bucket
        self._verdict = verdict
        self._count.trades += 1
        if verdict != FAR_BELOW:
            if new_connection:
                track.line_epoch[side] = epoch
            if trade_id > line_last:
                track.line_last[side] = trade_id
                if line_last >= 0:
                    use.missing += trade_id - line_last - 1
        if verdict == DUPLICATE:
            self._count.duplicate += 1
            if trade_id > line_last:
                # Else this line brought it before: two connections of it overlap.
                use.late += 1
                if trade_id == track.ids.last and recv_ns >= track.last_recv_ns:
                    use.lag_ns += recv_ns - track.last_recv_ns
                    use.lag_count += 1
            return
        slot = self.ring.claim()
        if slot == NULL:
            # Refused, never overwritten: the next trade that finds room shows the hole.
            self._count.ring_full += 1
            if verdict != FAR_BELOW and verdict != LATE:
                track.refused += 1
            return
        slot.trade_id = trade_id
        slot.price_e8 = trade.price_e8
        slot.quantity_e8 = trade.quantity_e8
        slot.trade_us = trade.trade_us
        slot.recv_ns = recv_ns
        slot.epoch = epoch
        if verdict == FAR_BELOW:
            # For the sink to park; it says nothing about the rows around it.
            put_tag(&slot.symbol_id, flags | FLAG_FAR_BELOW, line, trade.symbol_id)
            self.ring.publish(slot)
            self._count.far_below += 1
            track.far_below += 1
            take_id(&track.ids, trade_id, trade.trade_us, verdict)
            return
        if verdict == LATE:
            # Late, or seen long ago: the ledger knows which.
            self._count.out_of_order += 1
            self._was_missing = is_in_hole(&track.ids, trade_id)
            if self._was_missing:
                # What stays missing right before it has the cause of the whole hole.
                flags |= track.notes
        else:
            # What came before is noted on the trades that a hole may precede.
            notes = 0
            if track.refused:
                notes = FLAG_AFTER_REFUSED
                track.refused = 0
            if new_connection:
                notes |= FLAG_FIRST_OF_EPOCH if track.received else FLAG_FIRST_OF_RUN
            flags |= notes
            if verdict == GAP:
                track.notes = notes
                self._count.gaps += 1
                self._count.missing += trade_id - track.ids.last - 1
            track.last_trade_us = trade.trade_us
            track.last_recv_ns = recv_ns
        put_tag(&slot.symbol_id, flags, line, trade.symbol_id)
        self.ring.publish(slot)
        track.received += 1
        self._count.missing_arrived += take_id(&track.ids, trade_id, trade.trade_us, verdict)
        use.first += 1
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

    cdef int _report_far_below(self, uint32_t symbol_id, int64_t trade_id) except -1:
        """Log the question, at most once a minute and symbol."""
        cdef track_t *track = &self._tracks.rows[symbol_id]
        cdef int64_t now = tc_mono_ns()
        if track.far_reported_ns and now - track.far_reported_ns < REPORT_INTERVAL_NS:
            return 0
        track.far_reported_ns = now
        log.error(
            "trade id far below the greatest one known: parked in dead_letters, not stored; if the "
            "venue lists the symbol anew, move the rows of its former life to another name",
            extra={
                "symbol": self.symbols.name(symbol_id),
                "trade_id": trade_id,
                "greatest_id": track.ids.high_id,
                "trades": track.far_below,
            },
        )
        return 0

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

    cdef int tap(self, tap_t take, void *tapped, keep) except -1:
        """Call `take(tapped, ...)` for each event that is new, in the middle of a socket read;
        `keep` keeps `tapped` alive. Raises RuntimeError when there are TAPS_MAX already."""
        if self._tap_count == TAPS_MAX:
            raise RuntimeError("the capture has no room for another tap")
        if self._tap_count == 0:
            self._tapped_seq = self.ring.published_seq
        self._taps[self._tap_count].take = take
        self._taps[self._tap_count].tapped = tapped
        self._tap_keeps.append(keep)
        self._tap_count += 1
        return 0

    cdef int untap(self, void *tapped) except -1:
        """Call it for `tapped` no more; nothing happens if it is not called."""
        cdef int i
        for i in range(self._tap_count):
            if self._taps[i].tapped == tapped:
                self._tap_count -= 1
                self._taps[i] = self._taps[self._tap_count]
                self._tap_keeps[i] = self._tap_keeps[self._tap_count]
                self._tap_keeps.pop()
                break
        return 0

    def grow(self):
        """Make room for the symbols that the table has by now; nothing known is lost."""
        cdef uint32_t slots = max(1, len(self.symbols))
        cdef Arrivals arrivals
        self.conflator.grow(slots)
        for arrivals in self._arrivals:
            arrivals.grow(slots)
        # Last: from now on frames of the new symbols are taken in.
        self._tracks.grow(slots)

    def seed(self, str symbol not None, int64_t last_id, int64_t last_us):
        """Tell the greatest id of a symbol in the ledger and its trade's time (0: not known).

        It serves the far-below question, and tells what no connection owes. Raises KeyError for a
        symbol without a track.
        """
        cdef track_t *track = self._tracks.of(symbol)
        seed_sequence(&track.ids, last_id, last_us)
        track.seeded_id = max(track.seeded_id, last_id)

    cdef Arrivals open_arrivals(self):
        """Return what a new connection notes its trades in; it grows with the tracks."""
        cdef Arrivals arrivals = Arrivals()
        arrivals.grow(self._tracks.slots)
        self._arrivals.add(arrivals)
        return arrivals

    cdef int close_arrivals(self, Arrivals arrivals) except -1:
        """Say that the connection is gone: nothing is owed by it any more."""
        self._arrivals.discard(arrivals)
        return 0

    cdef list unconfirmed(self, Arrivals mine, symbol_ids):
        """Return those of `symbol_ids` that a connection does not yet continue."""
        others = [arrivals for arrivals in self._arrivals if arrivals is not mine]
        return find_unconfirmed(self._tracks, others, mine, symbol_ids)

    cdef int mark(self, Arrivals mine) except -1:
        """Note how far all symbols are: a connection owes what comes from now on."""
        mine.mark(self._tracks)
        return 0

    cdef list left_out(self, Arrivals mine, symbol_ids):
        """Return those of `symbol_ids` that moved since the mark while none of their trades came
        over this connection."""
        return find_left_out(self._tracks, mine, symbol_ids)

    cdef list behind(self, Arrivals mine, symbol_ids):
        """Return (symbol id, last id of this connection, newest known) where that is more than this
        connection has brought since the mark."""
        return find_behind(self._tracks, mine, symbol_ids)

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
            "missing_arrived": self._count.missing_arrived,
            "far_below": self._count.far_below,
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
        return self._tracks.received()

    def track(self, str symbol not None):
        """Return what is known of a symbol: the present unbroken run, and the ids missing between
        it and the run before. Raises KeyError for a symbol without a track."""
        return self._tracks.track(symbol)

    def told(self, str symbol not None):
        """Return the greatest last trade id that a ticker or kline told (-1: none), the event time
        and receive time of the newest that told it, when the first came, and when any came at last.

        Receive times of 0: nothing came. Raises KeyError for a symbol without a track.
        """
        return self._tracks.told(symbol)

    def lines(self):
        """Return the use of both feed lines: arrivals that won, arrivals that came second, ids
        jumped over, and how many seconds behind the winner (a sum, and of how many arrivals)."""
        return tuple(
            LineUse(
                self._lines[i].first,
                self._lines[i].late,
                self._lines[i].missing,
                self._lines[i].lag_ns / 1e9,
                self._lines[i].lag_count,
            )
            for i in range(LINE_COUNT)
        )
