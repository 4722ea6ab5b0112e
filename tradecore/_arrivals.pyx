"""What one connection delivered of each symbol: first and last trade id, greatest id told."""

from libc.stdint cimport INT64_MAX
from libc.stdlib cimport free, realloc

from tradecore._tracks cimport Tracks, track_t
from tradecore.sequence cimport NO_ID, holds

cdef enum:
    # A trade that a ticker or kline tells comes within so long, or was printed before we listened.
    TOLD_SETTLES_NS = 1000000000


cdef class Arrivals:
    """A slot for each symbol; made by `Capture.open_arrivals`, which lets it grow with itself."""

    def __dealloc__(self):
        free(self.rows)

    cdef int grow(self, uint32_t slots) except -1:
        """Hold `slots` symbols; what the present slots hold stays."""
        cdef arrival_t *rows
        cdef uint32_t i
        if slots <= self.slots:
            return 0
        rows = <arrival_t *>realloc(self.rows, slots * sizeof(arrival_t))
        if rows == NULL:
            raise MemoryError
        for i in range(self.slots, slots):
            rows[i].first_id = rows[i].last_id = NOTHING
            rows[i].told_id = TOLD_NOTHING
            rows[i].marked_id = rows[i].marked_told_id = INT64_MAX
        self.rows = rows
        self.slots = slots
        return 0

    cdef void mark(self, Tracks tracks) noexcept nogil:
        """From now on this connection owes what moves."""
        cdef uint32_t i
        for i in range(min(self.slots, tracks.slots)):
            self.rows[i].marked_id = tracks.rows[i].ids.last
            self.rows[i].marked_told_id = self.rows[i].told_id


cdef list find_unconfirmed(Tracks tracks, list others, Arrivals mine, symbol_ids):
    """Return the ids of those symbols for which closing the `others` may cost trades.

    Once this connection has delivered a trade F it delivers all behind it, so only ids below F can
    be lost: F-1 must have come, or the ledger must know as much; where it came from nobody (the
    venue left it out, or it was lost), all others that deliver the symbol must be past it. Before
    F, nothing may have moved since the mark, and the greatest id told must have come, or none may
    have been told but silence, or nothing is known of the symbol and the same id has been told for
    a while: it was printed before the first connection was there, and no trade has come since.
    Raises IndexError for a symbol without a track.
    """
    cdef list found = []
    cdef uint32_t symbol_id
    cdef int64_t before
    cdef arrival_t *row
    cdef bint confirmed
    for number in symbol_ids:
        if not 0 <= number < tracks.slots:
            raise IndexError(f"no track for the symbol id {number}: call grow() first")
        symbol_id = number
        row = &mine.rows[symbol_id]
        before = row.first_id - 1
        if row.first_id == 0:
            confirmed = True
        elif row.first_id != NOTHING:
            confirmed = (
                _is_covered(&tracks.rows[symbol_id], before) or _all_past(others, symbol_id, before)
            )
        elif row.told_id == TOLD_NOTHING:
            confirmed = False
        elif _moved_to(row, &tracks.rows[symbol_id]) != NOTHING:
            confirmed = False
        else:
            confirmed = (
                row.told_id == TOLD_QUIET
                or _is_covered(&tracks.rows[symbol_id], row.told_id)
                or _was_before_all(&tracks.rows[symbol_id], row.told_id)
            )
        if not confirmed:
            found.append(number)
    return found


cdef list find_left_out(Tracks tracks, Arrivals mine, symbol_ids):
    """Return the ids of those symbols that have moved since the mark without a trade from here."""
    cdef uint32_t symbol_id
    return [
        symbol_id
        for symbol_id in symbol_ids
        if symbol_id < tracks.slots
        and mine.rows[symbol_id].first_id == NOTHING
        and _moved_to(&mine.rows[symbol_id], &tracks.rows[symbol_id]) != NOTHING
    ]


cdef list find_behind(Tracks tracks, Arrivals mine, symbol_ids):
    """Return (symbol id, last trade id from here, newest known) where others brought newer trades,
    or newer ones were told here."""
    cdef uint32_t symbol_id
    cdef int64_t last_id, newest_id
    cdef list found = []
    for symbol_id in symbol_ids:
        if symbol_id < tracks.slots:
            last_id = mine.rows[symbol_id].last_id
            newest_id = _moved_to(&mine.rows[symbol_id], &tracks.rows[symbol_id])
            if newest_id > last_id:
                found.append((symbol_id, last_id, newest_id))
    return found


cdef int64_t _moved_to(const arrival_t *row, const track_t *track) noexcept nogil:
    """Return the newest id that others brought or that was told here since the mark."""
    return max(
        track.ids.last if track.ids.last > row.marked_id else NOTHING,
        row.told_id if row.told_id > row.marked_told_id else NOTHING,
    )


cdef bint _is_covered(const track_t *track, int64_t trade_id) noexcept nogil:
    """Return whether an id came, or the ledger knows up to there and further."""
    return holds(&track.ids, trade_id) or trade_id <= track.seeded_id


cdef bint _was_before_all(const track_t *track, int64_t told_id) noexcept nogil:
    """Return whether the id is older than all that was ever received or stored."""
    return (
        track.ids.high_id == NO_ID
        and track.seeded_id < 0
        and told_id == track.told_id
        and track.told_recv_ns - track.told_since_ns > TOLD_SETTLES_NS
    )


cdef bint _all_past(list others, uint32_t symbol_id, int64_t trade_id):
    """Return whether connections deliver the symbol and each is at the id or behind it."""
    cdef Arrivals arrivals
    cdef bint found = False
    for arrivals in others:
        if arrivals.rows[symbol_id].last_id == NOTHING:
            continue
        if arrivals.rows[symbol_id].last_id < trade_id:
            return False
        found = True
    return found
