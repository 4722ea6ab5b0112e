"""Walks over a batch of trades without an object per row: what is in it, its runs of ids, cuts,
latencies.
"""

from collections import namedtuple

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport INT64_MAX, INT64_MIN, int32_t, int64_t, uint8_t, uint16_t, uint32_t

import numpy as np

from tradecore.schema import TRADE_DTYPE

from tradecore._arrays cimport bytes_of, flags_of
from tradecore._rows cimport FLAG_VOID, trade_row_t

RUN_DTYPE = np.dtype(
    [
        ("first_id", "<i8"),
        ("last_id", "<i8"),
        ("first_us", "<i8"),
        ("last_us", "<i8"),
        ("first_row", "<i8"),
        ("symbol_id", "<u4"),
        ("unused", "<u4"),
    ]
)

Survey = namedtuple("Survey", ("first_us", "last_us", "flags", "symbols"))

# C twin of RUN_DTYPE.
cdef struct run_t:
    int64_t first_id
    int64_t last_id
    int64_t first_us
    int64_t last_us
    int64_t first_row
    uint32_t symbol_id
    uint32_t unused


# Where runs are laid down before it is known how many there are: kept, since fresh memory would
# have to be mapped for each batch. As large as the longest batch needs.
cdef bytearray _scratch = bytearray()


def survey(rows):
    """What bounds the rows have: (least trade time, greatest one, all of their flags, number of
    symbol ids up to the greatest one). Void rows count as well; (0, 0, 0, 0) when there are none.
    """
    cdef const uint8_t[::1] raw = bytes_of(rows, TRADE_DTYPE)
    cdef Py_ssize_t count = len(rows), i
    cdef const trade_row_t *row
    cdef int64_t first_us = INT64_MAX, last_us = INT64_MIN
    cdef uint16_t flags = 0
    cdef uint32_t last_symbol = 0
    if count == 0:
        return Survey(0, 0, 0, 0)
    for i in range(count):
        row = <const trade_row_t *>&raw[0] + i
        first_us = min(first_us, row.trade_us)
        last_us = max(last_us, row.trade_us)
        last_symbol = max(last_symbol, row.symbol_id)
        flags |= row.flags
    return Survey(first_us, last_us, flags, <int64_t>last_symbol + 1)


cdef Py_ssize_t walk_runs(
    const trade_row_t *rows,
    Py_ssize_t count,
    const uint8_t *keep,
    int32_t *open_runs,
    uint32_t symbol_count,
    run_t *runs,
) noexcept nogil:
    """Fill `runs`; `open_runs[symbol_id]` is the run that the symbol's next row may extend."""
    cdef const trade_row_t *row
    cdef run_t *run
    cdef Py_ssize_t i, found = 0
    cdef bint known
    for i in range(count):
        row = rows + i
        if row.flags & FLAG_VOID or (keep != NULL and not keep[i]):
            continue
        known = row.symbol_id < symbol_count
        if known and open_runs[row.symbol_id] >= 0:
            run = runs + open_runs[row.symbol_id]
            if run.last_id != INT64_MAX and row.trade_id == run.last_id + 1:
                run.last_id = row.trade_id
                if row.trade_us < run.first_us:
                    run.first_us = row.trade_us
                if row.trade_us > run.last_us:
                    run.last_us = row.trade_us
                continue
        if known:
            open_runs[row.symbol_id] = <int32_t>found
        run = runs + found
        run.first_id = run.last_id = row.trade_id
        run.first_us = run.last_us = row.trade_us
        run.first_row = i
        run.symbol_id = row.symbol_id
        run.unused = 0
        found += 1
    return found


def find_runs(rows, uint32_t symbol_count, keep=None):
    """Maximal runs of ascending consecutive ids per symbol, in order of arrival (RUN_DTYPE).

    A duplicate or an id out of order starts a new run. `first_us` and `last_us` are the least and
    the greatest trade time of the run's rows, `first_row` the index of its first one. Rows of a
    symbol id >= `symbol_count` form a run each.
    """
    cdef const uint8_t[::1] raw = bytes_of(rows, TRADE_DTYPE)
    cdef Py_ssize_t count = len(rows)
    cdef const uint8_t[::1] flags = flags_of(keep, count)
    cdef const uint8_t *first_flag = NULL
    cdef int32_t[::1] open_runs
    cdef Py_ssize_t found
    global _scratch
    if count == 0:
        return np.empty(0, RUN_DTYPE)
    if count > 0x7FFFFFFF:
        raise ValueError(f"a batch of {count} rows is too large")
    if flags is not None:
        first_flag = &flags[0]
    if len(_scratch) < count * <Py_ssize_t>sizeof(run_t):
        _scratch = bytearray(count * sizeof(run_t))
    open_runs = np.full(max(symbol_count, 1), -1, np.int32)
    found = walk_runs(
        <const trade_row_t *>&raw[0],
        count,
        first_flag,
        &open_runs[0],
        symbol_count,
        <run_t *>PyByteArray_AS_STRING(_scratch),
    )
    return np.frombuffer(_scratch, RUN_DTYPE, found).copy()


cdef inline bint is_cut(
    const run_t *cuts, Py_ssize_t count, uint32_t symbol_id, int64_t trade_id
) noexcept nogil:
    """Binary search for the last cut that starts at or before the id."""
    cdef Py_ssize_t low = 0, high = count, middle
    while low < high:
        middle = (low + high) // 2
        if cuts[middle].symbol_id < symbol_id or (
            cuts[middle].symbol_id == symbol_id and cuts[middle].first_id <= trade_id
        ):
            low = middle + 1
        else:
            high = middle
    return low > 0 and cuts[low - 1].symbol_id == symbol_id and trade_id <= cuts[low - 1].last_id


def mask_rows(rows, cuts, keep):
    """Clear `keep` (uint8) of every row that lies in one of `cuts`; return how many were cleared.

    `cuts` (RUN_DTYPE, only ids count): disjoint, sorted by symbol id and first id.
    """
    cdef const uint8_t[::1] raw = bytes_of(rows, TRADE_DTYPE)
    cdef const uint8_t[::1] ranges = bytes_of(cuts, RUN_DTYPE)
    cdef Py_ssize_t count = len(rows), cut_count = len(cuts), i, cleared = 0
    cdef uint8_t[::1] flags = keep
    cdef const trade_row_t *row
    if flags.shape[0] != count:
        raise ValueError(f"{flags.shape[0]} flags for {count} rows")
    if count == 0 or cut_count == 0:
        return 0
    for i in range(count):
        row = <const trade_row_t *>&raw[0] + i
        if flags[i] and not row.flags & FLAG_VOID and is_cut(
            <const run_t *>&ranges[0], cut_count, row.symbol_id, row.trade_id
        ):
            flags[i] = 0
            cleared += 1
    return cleared


def observe_latency(rows, int64_t commit_ns, const int64_t[::1] bounds_ns, int64_t[::1] counts):
    """Add receive-to-commit times of a committed batch to a histogram.

    `counts` has one place per upper bound (ascending, inclusive, not cumulative) and one for all
    above. Void rows and rows without receive time do not count. A negative time (the clock was
    set back) is added to no place. Returns (rows added, their sum in ns, negative ones).
    """
    cdef const uint8_t[::1] raw = bytes_of(rows, TRADE_DTYPE)
    cdef Py_ssize_t count = len(rows), places = bounds_ns.shape[0], i, place = 0
    cdef const trade_row_t *row
    cdef int64_t added = 0, total_ns = 0, negative = 0, latency_ns, last_ns = INT64_MAX
    if counts.shape[0] != places + 1:
        raise ValueError(f"{counts.shape[0]} counts for {places} bounds")
    for i in range(count):
        row = <const trade_row_t *>&raw[0] + i
        if row.recv_ns == 0 or row.flags & FLAG_VOID:
            continue
        latency_ns = commit_ns - row.recv_ns
        if latency_ns < 0:
            negative += 1
            continue
        # All trades of one socket read share their place.
        if latency_ns != last_ns:
            last_ns = latency_ns
            place = 0
            while place < places and latency_ns > bounds_ns[place]:
                place += 1
        counts[place] += 1
        added += 1
        total_ns += latency_ns
    return added, total_ns, negative
