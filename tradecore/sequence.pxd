# Which trade ids of one symbol came: pure state in C, every step O(1).
#
#          before_first..before_last      first..last
#     ...--[ the run before ]---- hole ----[ the present run ]---> ids
#
# A run is a stretch of ids that came without a gap; an empty one has its first above its last.
# What lies below the run before is forgotten here: the ledger knows it. Ids far below form a run of
# their own: where a symbol was listed anew they go on, through holes and past all that was known.
from libc.stdint cimport INT64_MAX, int64_t

# For Python too.
cpdef enum:
    ACCEPTED = 1
    GAP = 2
    DUPLICATE = 3
    LATE = 4
    FAR_BELOW = 5

    FAR_BELOW_IDS = 1000000
    FAR_BELOW_US = 60000000

cdef enum:
    # Before any id; the id after it is below 0, which no trade has.
    NO_ID = -2

ctypedef struct sequence_t:
    int64_t first
    int64_t last
    int64_t before_first
    int64_t before_last
    # The latest run of ids far below.
    int64_t asked_first
    int64_t asked_last
    # The greatest id known, received or told by the ledger, and the time of its trade.
    int64_t high_id
    int64_t high_us


cdef inline void start_sequence(sequence_t *ids) noexcept nogil:
    """Forget everything."""
    ids.first = ids.before_first = ids.asked_first = INT64_MAX
    ids.last = ids.before_last = ids.asked_last = ids.high_id = NO_ID
    ids.high_us = 0


cdef inline void seed_sequence(
    sequence_t *ids, int64_t trade_id, int64_t trade_us
) noexcept nogil:
    """Raise the high-water mark to a trade that the ledger holds; 0 us: its time is not known."""
    if trade_id > ids.high_id:
        ids.high_id = trade_id
        ids.high_us = trade_us if trade_us > 0 else INT64_MAX


cdef inline bint holds(const sequence_t *ids, int64_t trade_id) noexcept nogil:
    """Return whether the id is in the present run or in the one before."""
    return (
        ids.first <= trade_id <= ids.last or ids.before_first <= trade_id <= ids.before_last
    )


cdef inline bint has_hole(const sequence_t *ids) noexcept nogil:
    """Return whether there is a run before the present one; ids between the two are missing."""
    return ids.before_first <= ids.before_last


cdef inline bint is_in_hole(const sequence_t *ids, int64_t trade_id) noexcept nogil:
    """Return whether the id is one of those missing between the two runs."""
    return has_hole(ids) and ids.before_last < trade_id < ids.first


cdef inline int judge(
    const sequence_t *ids, int64_t trade_id, int64_t trade_us
) noexcept nogil:
    """Say what a trade (id >= 0) is; nothing changes until `take_id`."""
    if (
        trade_id - 1 == ids.asked_last
        and ids.asked_first < ids.asked_last
        and trade_us - ids.high_us > FAR_BELOW_US
    ):
        # Two such ids in a row are a listing that goes on; one may be a frame gone wrong.
        return FAR_BELOW
    if trade_id - 1 == ids.last and trade_id > ids.high_id:
        return ACCEPTED
    if has_hole(ids) and trade_id - 1 == ids.before_last:
        # However wide the hole: it goes on where it broke off, and was perhaps no hole at all but
        # one stray id above.
        return LATE
    if trade_id <= ids.high_id and (
        ids.high_id - trade_id > FAR_BELOW_IDS or trade_us - ids.high_us > FAR_BELOW_US
    ):
        return FAR_BELOW
    if trade_id > ids.last:
        return ACCEPTED if trade_id - 1 == ids.last or ids.last == NO_ID else GAP
    return DUPLICATE if holds(ids, trade_id) else LATE


cdef inline bint take_id(
    sequence_t *ids, int64_t trade_id, int64_t trade_us, int verdict
) noexcept nogil:
    """Take a judged trade in; return whether it was one of the ids that the latest hole lacked.

    A late id is remembered when it touches a run. One in the middle of the hole is not: ids of one
    connection ascend, so a hole is closed from an end.
    """
    cdef bint arrived = False
    if verdict == ACCEPTED:
        if ids.last == NO_ID:
            ids.first = trade_id
        ids.last = trade_id
    elif verdict == GAP:
        ids.before_first = ids.first
        ids.before_last = ids.last
        ids.first = ids.last = trade_id
    elif verdict == LATE:
        if trade_id == ids.first - 1:
            arrived = has_hole(ids)
            ids.first = trade_id
        elif has_hole(ids) and trade_id == ids.before_last + 1:
            arrived = True
            ids.before_last = trade_id
        elif has_hole(ids) and trade_id == ids.before_first - 1:
            ids.before_first = trade_id
        if has_hole(ids) and ids.before_last + 1 == ids.first:
            ids.first = ids.before_first
            ids.before_first = INT64_MAX
            ids.before_last = NO_ID
        return arrived
    elif verdict == FAR_BELOW:
        if trade_id - 1 != ids.asked_last:
            ids.asked_first = trade_id
        ids.asked_last = trade_id
    if (verdict == ACCEPTED or verdict == GAP) and trade_id > ids.high_id:
        ids.high_id = trade_id
        ids.high_us = trade_us
    return arrived
