"""Which trade ids of a symbol came: next, a gap, seen before, late, or a re-listing question.

The rules are in `sequence.pxd`, where the hot path takes them from; this face is for Python. They
rest on the venue's habit: per symbol, ids are contiguous and ascend with time; within a connection
they come in order, across connections they do not.

ACCEPTED   the id after the last one, or the first of all
GAP        above that: the ids between are missing
DUPLICATE  it is in the present run or in the run before
LATE       below the present run and not known here: the ledger decides what it is
FAR_BELOW  more than FAR_BELOW_IDS below the greatest id known, or not above that while its trade
           is more than FAR_BELOW_US newer. Both contradict what is known, as when the venue lists
           a symbol anew. Where two such ids came in a row, those that go on from them at times so
           much newer are the same, also inside a hole and above the greatest id. None is ever taken
           in: a guess would cost trades.
"""


cdef class Sequence:
    """The ids of one symbol."""

    cdef sequence_t _ids

    def __cinit__(self):
        start_sequence(&self._ids)

    def seed(self, long long trade_id, long long trade_us=0):
        """Raise the high-water mark; it serves the far-below question only."""
        seed_sequence(&self._ids, trade_id, trade_us)

    def judge(self, long long trade_id, long long trade_us=0):
        """Return the verdict on a trade and change nothing."""
        return judge(&self._ids, trade_id, trade_us)

    def take(self, long long trade_id, long long trade_us=0):
        """Judge a trade, take it in, and return (verdict, whether the latest hole lacked it)."""
        verdict = judge(&self._ids, trade_id, trade_us)
        return verdict, bool(take_id(&self._ids, trade_id, trade_us, verdict))

    def __contains__(self, long long trade_id):
        return bool(holds(&self._ids, trade_id))

    @property
    def run(self):
        """(first, last) id of the present run, None before the first trade."""
        return (self._ids.first, self._ids.last) if self._ids.first <= self._ids.last else None

    @property
    def before(self):
        """(first, last) id of the run before the present one, if there is one."""
        return (self._ids.before_first, self._ids.before_last) if has_hole(&self._ids) else None

    @property
    def hole(self):
        """(first, last) id missing between the two runs, if there are two."""
        if not has_hole(&self._ids):
            return None
        return self._ids.before_last + 1, self._ids.first - 1

    @property
    def high(self):
        """The greatest id known, None before any."""
        return self._ids.high_id if self._ids.high_id >= 0 else None
