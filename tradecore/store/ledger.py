"""The ledger's arithmetic: what is stored, what a batch adds, which holes that opens or fills.

Pure functions, no I/O; `sink` runs what they decide inside the transaction of the rows. All lists
of ranges are sorted by id and disjoint.

    stored    1───────100         201──────300          ranges of trade_coverage
    piece               101──150                        what the batch brings
    after     1──────────────150  201──────300          adjacent ranges are merged
    hole                 151──200                       was 101──200; what lies between two ranges
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tradecore.schema import FLAG_VOID

MAX_ID = 2**63 - 1


class Range(NamedTuple):
    """Ids that are stored or about to be: all of first_id..last_id, with their time span."""

    first_id: int
    last_id: int
    first_us: int
    """Least trade time of the rows, microseconds since 1970; not always that of first_id."""
    last_us: int

    @property
    def rows(self) -> int:
        return self.last_id - self.first_id + 1


class Span(NamedTuple):
    """Ids, nothing said of their rows."""

    first_id: int
    last_id: int

    @property
    def rows(self) -> int:
        return self.last_id - self.first_id + 1


class HoleId(NamedTuple):
    """Which hole: trade ids of a symbol, all missing."""

    symbol: str
    first_id: int
    last_id: int


@dataclass(slots=True)
class Change:
    """What storing some pieces does to one symbol's ranges and holes."""

    removed: list[int] = field(default_factory=list)
    """first_id of ranges that became part of another."""
    extended: list[Range] = field(default_factory=list)
    """Ranges that keep their first_id."""
    added: list[Range] = field(default_factory=list)
    opened: list[Span] = field(default_factory=list)
    """New holes: between the pieces and the newest or oldest range so far."""
    filled: list[Span] = field(default_factory=list)
    """Pieces that lie inside a hole: it gets smaller, falls in two, or goes."""


def join_runs(runs: npt.NDArray[Any]) -> tuple[dict[int, list[Range]], bool]:
    """Return the pieces by symbol id of runs as `find_runs` gives them.

    The second value tells whether an id came twice; the time spans are exact only if none did.
    """
    pieces: dict[int, list[Range]] = {}
    for first_id, last_id, first_us, last_us, _, symbol_id, _ in runs.tolist():
        pieces.setdefault(symbol_id, []).append(Range(first_id, last_id, first_us, last_us))
    repeated = False
    for symbol_id, found in pieces.items():
        if len(found) > 1:
            found.sort()
            repeated = repeated or any(b.first_id <= a.last_id for a, b in pairwise(found))
            pieces[symbol_id] = join(found)
    return pieces, repeated


def join(ranges: Iterable[Range]) -> list[Range]:
    """Merge what overlaps or adjoins."""
    joined: list[Range] = []
    for item in sorted(ranges):
        if joined and item.first_id <= joined[-1].last_id + 1:
            joined[-1] = _union(joined[-1], item)
        else:
            joined.append(item)
    return joined


def _union(a: Range, b: Range) -> Range:
    return Range(
        min(a.first_id, b.first_id),
        max(a.last_id, b.last_id),
        min(a.first_us, b.first_us),
        max(a.last_us, b.last_us),
    )


def mask_repeats(rows: npt.NDArray[Any], keep: npt.NDArray[np.uint8]) -> int:
    """Clear `keep` of all but the first arrival of each id; return how many were cleared."""
    live = np.flatnonzero((keep != 0) & ((rows["flags"] & FLAG_VOID) == 0))
    ids, owners = rows["trade_id"][live], rows["symbol_id"][live]
    # Stable: of equal ids the first arrival comes first.
    order = np.lexsort((ids, owners))
    ids, owners = ids[order], owners[order]
    repeats = live[order[1:][(ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1])]]
    keep[repeats] = 0
    return len(repeats)


def overlaps(
    pieces: Sequence[Range] | Sequence[Span], stored: Sequence[Range] | Sequence[Span]
) -> list[Span]:
    """Return what of `pieces` is stored already."""
    if not pieces or not stored or stored[-1].last_id < pieces[0].first_id:
        return []  # trades of a live feed, as good as always
    found: list[Span] = []
    i = j = 0
    while i < len(pieces) and j < len(stored):
        first_id = max(pieces[i].first_id, stored[j].first_id)
        last_id = min(pieces[i].last_id, stored[j].last_id)
        if first_id <= last_id:
            found.append(Span(first_id, last_id))
        if pieces[i].last_id < stored[j].last_id:
            i += 1
        else:
            j += 1
    return found


def add_pieces(pieces: Sequence[Range], stored: Sequence[Range]) -> Change:
    """Return what storing `pieces` changes.

    No piece overlaps a stored range. `stored` holds at least, for every piece, the nearest range
    below and above it.
    """
    if len(pieces) == 1 and stored and stored[-1].last_id + 1 == pieces[0].first_id:
        # Trades of a live feed, as good as always: the newest range goes on.
        return Change(extended=[_union(stored[-1], pieces[0])])
    change = Change()
    marked = sorted([*((item, True) for item in pieces), *((item, False) for item in stored)])
    for merged, group in _groups(marked):
        old = [item.first_id for item, is_piece in group if not is_piece]
        if len(old) == len(group):
            continue
        if old and old[0] == merged.first_id:
            change.extended.append(merged)
            change.removed += old[1:]
        else:
            change.added.append(merged)
            change.removed += old
    if not stored:
        change.opened = _holes(pieces)
        return change
    oldest, newest = stored[0], stored[-1]
    below = [item for item in pieces if item.last_id < oldest.first_id]
    above = [item for item in pieces if item.first_id > newest.last_id]
    change.opened = _holes([*below, oldest]) + _holes([newest, *above])
    inside = pieces[len(below) : len(pieces) - len(above)]
    change.filled = [Span(item.first_id, item.last_id) for item in inside]
    return change


def _groups(
    marked: Sequence[tuple[Range, bool]],
) -> list[tuple[Range, list[tuple[Range, bool]]]]:
    """Put ranges that adjoin together, each group with its union."""
    groups: list[tuple[Range, list[tuple[Range, bool]]]] = []
    for item in marked:
        if groups and item[0].first_id == groups[-1][0].last_id + 1:
            merged, group = groups[-1]
            group.append(item)
            groups[-1] = (_union(merged, item[0]), group)
        else:
            groups.append((item[0], [item]))
    return groups


def _holes(ranges: Sequence[Range]) -> list[Span]:
    """Return what lies between consecutive ranges."""
    return [
        Span(a.last_id + 1, b.first_id - 1)
        for a, b in pairwise(ranges)
        if a.last_id + 1 < b.first_id
    ]


# ---- the history of holes --------------------------------------------------------------------


class Gap(NamedTuple):
    """A row of trade_gaps. Rows are disjoint; those that are not filled are the holes of today."""

    id: int
    first_id: int
    last_id: int
    origin: Any
    """Equal for parts of what was one hole: its cause and time of detection."""
    state: str
    """open, filled or absent."""
    filled_by: str | None = None
    evidence: str | None = None
    """JSON text. A row that was absent and is filled after all keeps it."""
    turned: bool = False
    """Whether its state is new: time of filling or closing is that of this transaction."""

    @property
    def fate(self) -> tuple[Any, ...]:
        """Rows that adjoin and share this are one row."""
        return self[3:7]


@dataclass(slots=True)
class GapChange:
    """Rows of trade_gaps to copy (first), to alter and to delete.

    The id of a copy is that of the row whose origin it takes.
    """

    copied: list[Gap] = field(default_factory=list)
    altered: list[Gap] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)


def fill_gaps(filled: Sequence[Span], gaps: Sequence[Gap], filled_by: str) -> GapChange:
    """Return how the history tells that the ids in `filled` arrived through `filled_by`.

    Open holes are filled, and absent ones too: what was held to be absent has come after all.
    A hole that is filled in part is split. Parts that adjoin become one row again, so that a
    hole which is filled page by page ends as one row. `gaps` holds the rows that overlap or adjoin
    one of `filled`; all of `filled` is sorted and disjoint.
    """
    return _turn_parts(
        filled,
        gaps,
        ("open", "absent"),
        lambda part: part._replace(state="filled", filled_by=filled_by, turned=True),
    )


def close_gaps(absent: Sequence[Span], gaps: Sequence[Gap], evidence: str) -> GapChange:
    """Return how the history tells that the venue has no trades with the ids in `absent`.

    What is still open of them is closed. Parts that adjoin and have equal `evidence` (JSON text as
    the server prints it) become one row. `gaps` as in `fill_gaps`.
    """
    return _turn_parts(
        absent,
        gaps,
        ("open",),
        lambda part: part._replace(state="absent", evidence=evidence, turned=True),
    )


def reopen_gaps(wanted: Sequence[Span], gaps: Sequence[Gap]) -> GapChange:
    """Return how the history tells that what of `wanted` was held absent is open again.

    It keeps the evidence, which was wrong. `gaps` as in `fill_gaps`.
    """
    return _turn_parts(
        wanted, gaps, ("absent",), lambda part: part._replace(state="open", turned=True)
    )


def _turn_parts(
    spans: Sequence[Span],
    gaps: Sequence[Gap],
    states: Collection[str],
    turn: Callable[[Gap], Gap],
) -> GapChange:
    """Turn what of `gaps` is in one of `states` and in `spans`; one pass over both."""
    merged: list[tuple[Gap, list[int]]] = []  # each with the ids of the rows it comes from
    at = 0
    for gap in sorted(gaps, key=lambda gap: gap.first_id):
        while at < len(spans) and spans[at].last_id < gap.first_id:
            at += 1
        parts, at = _cut(gap, spans, at, turn) if gap.state in states else ([gap], at)
        for part in parts:
            last, sources = merged[-1] if merged else (part, [])
            if (
                last.last_id + 1 == part.first_id
                and last.fate == part.fate
                and (last.turned or part.turned)
            ):
                sources.append(gap.id)
                merged[-1] = (last._replace(last_id=part.last_id, turned=True), sources)
            else:
                merged.append((part, [gap.id]))
    return _assign_rows(merged, {gap.id: gap for gap in gaps})


def _cut(
    gap: Gap, spans: Sequence[Span], at: int, turn: Callable[[Gap], Gap]
) -> tuple[list[Gap], int]:
    """Return the parts of `gap` in order, and the first of `spans` that may go on behind it."""
    parts: list[Gap] = []
    begin = gap.first_id
    while at < len(spans) and spans[at].first_id <= gap.last_id:
        first_id, last_id = max(spans[at].first_id, begin), min(spans[at].last_id, gap.last_id)
        if begin < first_id:
            parts.append(gap._replace(first_id=begin, last_id=first_id - 1))
        parts.append(turn(gap._replace(first_id=first_id, last_id=last_id)))
        begin = last_id + 1
        if spans[at].last_id > gap.last_id:
            break
        at += 1
    if begin <= gap.last_id:
        parts.append(gap._replace(first_id=begin))
    return parts, at


def _assign_rows(merged: Sequence[tuple[Gap, list[int]]], before: dict[int, Gap]) -> GapChange:
    """Give each part a row that it comes from; what finds none left becomes a copy of one."""
    change = GapChange()
    used: set[int] = set()
    for part, sources in merged:
        gap_id = next((source for source in sources if source not in used), None)
        if gap_id is None:
            change.copied.append(part._replace(id=sources[0]))
            continue
        used.add(gap_id)
        if part._replace(id=gap_id) != before[gap_id]:
            change.altered.append(part._replace(id=gap_id))
    change.removed = [gap_id for gap_id in before if gap_id not in used]
    return change
