# The hot side of capture: one frame in, one row published.
from libc.stdint cimport int64_t, uint16_t, uint32_t

from tradecore._arrivals cimport Arrivals
from tradecore._event cimport CAUSE_COUNT, event_t
from tradecore._ring cimport RingBuffer
from tradecore._symbols cimport SymbolTable
from tradecore._tracks cimport LINE_COUNT, Tracks
from tradecore.conflator cimport Conflator

cdef enum:
    LATENCY_BUCKETS = 20
    # Who taps: the fan-out to clients, and Redis.
    TAPS_MAX = 2

ctypedef struct line_t:
    int64_t first
    int64_t late
    int64_t missing
    int64_t lag_ns
    int64_t lag_count

ctypedef struct counters_t:
    int64_t frames
    int64_t trades
    int64_t tickers
    int64_t klines
    int64_t controls
    int64_t duplicate
    int64_t out_of_order
    int64_t gaps
    int64_t missing
    int64_t missing_arrived
    int64_t far_below
    int64_t ring_full
    int64_t early
    int64_t latency_sum_us
    int64_t latency_count

# Takes an event that the capture took as new: no duplicate, no trade that is parked or found no
# room, and of late trades those only that are known to have been missing.
ctypedef void (*tap_t)(
    void *tapped, int status, const event_t *event, const char *data, Py_ssize_t size
) noexcept

ctypedef struct tapper_t:
    tap_t take
    void *tapped

cdef class Capture:
    cdef readonly RingBuffer ring
    cdef readonly Conflator conflator
    cdef readonly SymbolTable symbols
    cdef Tracks _tracks
    cdef object _arrivals
    cdef line_t[LINE_COUNT] _lines
    cdef counters_t _count
    cdef int64_t[CAUSE_COUNT] _refused
    cdef int64_t[CAUSE_COUNT] _reported_ns
    cdef int64_t[CAUSE_COUNT] _suppressed
    cdef int64_t[LATENCY_BUCKETS] _latency
    cdef event_t _event
    # Of the trade in `_event`.
    cdef int _verdict
    # Of the latest late trade.
    cdef bint _was_missing
    # Nobody most of the time.
    cdef int _tap_count
    cdef tapper_t[TAPS_MAX] _taps
    cdef list _tap_keeps
    # How far the ring was when they were called last, or might have been.
    cdef int64_t _tapped_seq
    cdef int64_t _wake_rows
    cdef object _wake
    cdef int64_t _high_water
    cdef object _on_high_water
    cdef bint _above_high_water

    cdef int ingest(
        self, const char *data, Py_ssize_t size, int64_t recv_ns, uint16_t line, uint32_t epoch
    ) except 0
    cdef void _hand_on(self, int status, const char *data, Py_ssize_t size) noexcept
    cdef void _take_trade(self, int64_t recv_ns, uint16_t line, uint32_t epoch) noexcept
    cdef int _report_far_below(self, uint32_t symbol_id, int64_t trade_id) except -1
    cdef int refuse(self, int status, const char *data, Py_ssize_t size) except 0
    cdef int end_of_read(self) except -1
    cdef int tap(self, tap_t take, void *tapped, keep) except -1
    cdef int untap(self, void *tapped) except -1
    cdef Arrivals open_arrivals(self)
    cdef int close_arrivals(self, Arrivals arrivals) except -1
    cdef list unconfirmed(self, Arrivals mine, symbol_ids)
    cdef int mark(self, Arrivals mine) except -1
    cdef list left_out(self, Arrivals mine, symbol_ids)
    cdef list behind(self, Arrivals mine, symbol_ids)

cdef int64_t wall_clock_ns() noexcept nogil
cdef int64_t mono_clock_ns() noexcept nogil
