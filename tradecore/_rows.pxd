# C twins of the dtypes in schema.py (tests/test_schema.py compares them field by field).
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef enum:
    FLAG_BUYER_IS_MAKER = 1
    FLAG_VOID = 2
    FLAG_AFTER_REFUSED = 4
    FLAG_FIRST_OF_RUN = 8
    FLAG_FIRST_OF_EPOCH = 16
    FLAG_FAR_BELOW = 32
    FLAG_CLOSED = 1
    SYMBOL_MAX_BYTES = 40

ctypedef struct trade_row_t:
    int64_t sequence
    int64_t trade_id
    int64_t price_e8
    int64_t quantity_e8
    int64_t trade_us
    int64_t recv_ns
    uint32_t symbol_id
    uint16_t flags
    uint16_t line
    uint32_t epoch
    uint32_t checksum

# 128-bit two's complement at scale 1e-8.
ctypedef struct decimal128_t:
    uint64_t lo
    int64_t hi

ctypedef struct ticker_row_t:
    int64_t event_us
    int64_t recv_ns
    int64_t open_us
    int64_t close_us
    int64_t first_id
    int64_t last_id
    int64_t trade_count
    decimal128_t decimals[15]
    uint32_t symbol_id
    uint32_t flags

ctypedef struct kline_row_t:
    int64_t event_us
    int64_t recv_ns
    int64_t open_us
    int64_t close_us
    int64_t first_id
    int64_t last_id
    int64_t trade_count
    decimal128_t decimals[8]
    uint32_t symbol_id
    uint32_t flags
