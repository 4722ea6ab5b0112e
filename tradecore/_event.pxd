# What a frame turns out to be: its status and the row that it fills.
from libc.stdint cimport int64_t

from tradecore._rows cimport kline_row_t, ticker_row_t, trade_row_t

# What a frame was: events are positive, refusals negative. `_fastparse.CAUSES` names the
# latter.
cdef enum:
    NOT_FAST = 0
    EVENT_TRADE = 1
    EVENT_TICKER = 2
    EVENT_KLINE = 3
    EVENT_SHUTDOWN = 4
    EVENT_CONTROL = 5

    MALFORMED = -1
    INVALID_UTF8 = -2
    UNKNOWN_EVENT = -3
    MISSING_KEY = -4
    DUPLICATE_KEY = -5
    WRONG_TYPE = -6
    BAD_NUMBER = -7
    OUT_OF_RANGE = -8
    NEGATIVE = -9
    BAD_TIME = -10
    UNKNOWN_SYMBOL = -11
    # The listener's own: the codec never sees such a frame.
    OVERSIZED = -12
    BINARY = -13

    CAUSE_COUNT = 14

# Room for whatever a frame turns out to be. `event_us` is the venue's `E`.
ctypedef struct event_t:
    trade_row_t trade
    ticker_row_t ticker
    kline_row_t kline
    int64_t event_us
