"""What a retention horizon leaves of one symbol's ranges. Pure functions, no I/O.

    ranges    1───────────100     120──────300          begin before the horizon
    rows      all before it       120..250 before it, 251..300 not
    left                                251───300
    cut       1───────────100     120──250

Times ascend with the ids, practically always. That they do here is proven by counting: as many
rows below the horizon as there are ids up to the greatest of them.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tradecore.store.ledger import Range, Span

SLACK_US = 600_000_000
"""How far the times of trades may be from the order of their ids."""


class Gone(NamedTuple):
    """The rows of a symbol below the horizon, as far as they are still there."""

    rows: int
    last_id: int
    """The greatest of their ids; -1 without rows."""


class Low(NamedTuple):
    """The first rows of a range that are not below the horizon."""

    first_id: int
    """The least id of the first hour that has any."""
    first_us: int
    """The least time."""
    range: Range
    """As it was then."""


class Trimmed(NamedTuple):
    """What becomes of ranges that begin before the horizon."""

    ranges: Sequence[Range]
    """As they were, ascending."""
    left: Sequence[Range]
    """What is left of them, ascending."""

    def cut_below(self, first_id: int) -> Range:
        """Return the ids that are cut right below `first_id`, with the times of their range."""
        one = next(one for one in reversed(self.ranges) if one.first_id < first_id)
        return one._replace(last_id=min(one.last_id, first_id - 1))


def trim_symbol(
    ranges: Sequence[Range], horizon_us: int, stub_us: int | None, gone: Gone, low: Low | None
) -> Trimmed | None:
    """Return what is left of `ranges`; None when only a look at the rows can tell.

    A range that begins before `stub_us` has no row for its first id. `low` is about the last range.
    """
    across = [one for one in ranges if one.last_us >= horizon_us]
    if not across:
        return Trimmed(ranges, [])
    (one, *more) = across
    if more or low is None:
        return None
    if (one.first_id, one.last_id) != low.range[:2] and is_short(low):
        return None  # what came since may be older than what was the first
    # Without rows below: they were dropped already, or there was none but a stub.
    first_id = max(gone.last_id + 1, low.first_id)
    if gone.rows and first_id - one.first_id - is_stub(one, stub_us) != rows_across(
        ranges, horizon_us, stub_us, gone
    ):
        return None
    if first_id > one.last_id:
        return None
    return Trimmed(ranges, [Range(first_id, one.last_id, low.first_us, one.last_us)])


def rows_across(ranges: Sequence[Range], horizon_us: int, stub_us: int | None, gone: Gone) -> int:
    """Return how many of the rows below the horizon are in ranges that go on above it."""
    whole = (one for one in ranges if one.last_us < horizon_us)
    return gone.rows - sum(one.rows - is_stub(one, stub_us) for one in whole)


def is_stub(one: Range, stub_us: int | None) -> bool:
    """Tell whether the first id of a range has no row any more."""
    return stub_us is not None and one.first_us < stub_us


def is_short(low: Low) -> bool:
    """Tell whether times after it may still come before those that were the first."""
    return low.range.last_us - low.first_us < SLACK_US


def lost_spans(trimmed: Trimmed, lowest_id: int, stubs: Collection[int] = ()) -> list[Span]:
    """Return the ids above `lowest_id` that are cut, while some below them are not.

    Without those of `stubs`, each the last id of its range or right below one that is left.
    """
    lost: list[Span] = []
    for one in trimmed.ranges:
        first_id = max(one.first_id, lowest_id)
        for kept in trimmed.left:
            if kept.first_id > one.last_id:
                break
            if kept.last_id < first_id:
                continue
            lost.append(Span(first_id, kept.first_id - 1))
            first_id = kept.last_id + 1
        lost.append(Span(first_id, one.last_id))
    spans = (Span(one.first_id, one.last_id - (one.last_id in stubs)) for one in lost)
    return [one for one in spans if one.first_id <= one.last_id]
