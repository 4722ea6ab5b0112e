"""The ledger's arithmetic against an oracle that keeps every single id."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tradecore._copyenc import find_runs
from tradecore.schema import FLAG_VOID, TRADE_DTYPE
from tradecore.store.ledger import (
    Change,
    Gap,
    GapChange,
    Range,
    Span,
    add_pieces,
    fill_gaps,
    join_runs,
    mask_repeats,
    overlaps,
)

IDS = st.sets(st.integers(0, 40))


def time_of(trade_id: int) -> int:
    """A time that does not rise with the id."""
    return trade_id * 7919 % 101


def ranges_of(ids: Iterable[int]) -> list[Range]:
    """Maximal runs of consecutive ids, with the least and greatest time of their members."""
    found: list[list[int]] = []
    for trade_id in sorted(ids):
        if found and found[-1][-1] + 1 == trade_id:
            found[-1].append(trade_id)
        else:
            found.append([trade_id])
    return [Range(run[0], run[-1], min(map(time_of, run)), max(map(time_of, run))) for run in found]


def neighbours(pieces: list[Range], stored: list[Range]) -> list[Range]:
    """What the sink's query brings: all that meets a piece, and the nearest below and above."""
    found = set()
    for piece in pieces:
        below = [item for item in stored if item.first_id < piece.first_id]
        above = [item for item in stored if item.first_id > piece.last_id + 1]
        meets = [i for i in stored if piece.first_id <= i.first_id <= piece.last_id + 1]
        found.update(below[-1:], meets, above[:1])
    return sorted(found)


def apply(stored: list[Range], change: Change) -> list[Range]:
    """Do what the sink's statements do."""
    rows = {item.first_id: item for item in stored}
    for first_id in change.removed:
        del rows[first_id]
    for item in change.extended:
        assert item.first_id in rows
        rows[item.first_id] = item
    for item in change.added:
        assert item.first_id not in rows
        rows[item.first_id] = item
    return sorted(rows.values())


def holes_of(ids: set[int]) -> set[int]:
    return set(range(min(ids), max(ids))) - ids if ids else set()


def ids_of(spans: Iterable[Any]) -> list[int]:
    return [i for span in spans for i in range(span.first_id, span.last_id + 1)]


@settings(max_examples=400)
@given(IDS, IDS)
def test_ranges_after_a_batch_are_those_of_all_ids(before: set[int], batch: set[int]) -> None:
    stored, new = ranges_of(before), batch - before
    pieces = ranges_of(batch)
    seen = neighbours(pieces, stored)
    assert sorted(ids_of(overlaps(pieces, seen))) == sorted(batch & before)
    if not new:
        return
    change = add_pieces(ranges_of(new), seen)
    assert apply(stored, change) == ranges_of(before | new)
    opened, filled = ids_of(change.opened), ids_of(change.filled)
    assert len(set(opened)) == len(opened)
    assert set(opened) == holes_of(before | new) - holes_of(before)
    assert set(filled) == holes_of(before) - holes_of(before | new)


class History:
    """A trade_gaps in memory, written as the sink writes it."""

    def __init__(self) -> None:
        self.rows: dict[int, Gap] = {}

    def open(self, spans: list[Span], origin: object) -> None:
        for span in spans:
            self._insert(Gap(0, span.first_id, span.last_id, origin, None))

    def around(self, spans: list[Span]) -> list[Gap]:
        """What the sink's query brings."""
        rows = sorted(self.rows.values(), key=lambda gap: gap.first_id)
        found: dict[int, Gap] = {}
        for span in spans:
            below = [gap for gap in rows if gap.first_id < span.first_id]
            meets = [g for g in rows if span.first_id <= g.first_id <= span.last_id + 1]
            found.update({gap.id: gap for gap in [*below[-1:], *meets]})
        return list(found.values())

    def apply(self, change: GapChange, filled_by: str) -> None:
        for write in change.copied:
            by = filled_by if write.filled else None
            source = self.rows[write.id]
            self._insert(Gap(0, write.first_id, write.last_id, source.origin, by))
        for write in change.altered:
            old = self.rows[write.id]
            by = (old.filled_by or filled_by) if write.filled else None
            self.rows[write.id] = Gap(old.id, write.first_id, write.last_id, old.origin, by)
        for gap_id in change.removed:
            del self.rows[gap_id]

    def _insert(self, gap: Gap) -> None:
        new_id = max(self.rows, default=0) + 1
        self.rows[new_id] = gap._replace(id=new_id)


@settings(max_examples=300)
@given(st.lists(st.tuples(IDS, st.sampled_from(["feed", "rest"])), max_size=8))
def test_history_tells_every_hole_and_who_filled_it(batches: list[tuple[set[int], str]]) -> None:
    ids: set[int] = set()
    stored: list[Range] = []
    filler: dict[int, str] = {}
    history = History()
    for number, (batch, filled_by) in enumerate(batches):
        new = batch - ids
        if not new:
            continue
        pieces = ranges_of(new)
        change = add_pieces(pieces, neighbours(pieces, stored))
        history.open(change.opened, number)
        filler |= dict.fromkeys(holes_of(ids) & new, filled_by)
        history.apply(fill_gaps(change.filled, history.around(change.filled), filled_by), filled_by)
        stored = apply(stored, change)
        ids |= new
        rows = history.rows.values()
        unfilled = [gap for gap in rows if gap.filled_by is None]
        assert sorted(ids_of(unfilled)) == sorted(holes_of(ids))
        told = {i: gap.filled_by for gap in rows if gap.filled_by for i in ids_of([gap])}
        assert told == filler
        assert len(ids_of(rows)) == len(set(ids_of(rows)))


def test_a_hole_filled_page_by_page_ends_as_one_row() -> None:
    history = History()
    history.open([Span(10, 99)], "hole")
    for first_id in [*range(10, 50, 10), *range(90, 40, -10)]:
        spans = [Span(first_id, first_id + 9)]
        history.apply(fill_gaps(spans, history.around(spans), "rest"), "rest")
    assert sorted(ids_of(history.rows.values())) == list(range(10, 100))
    assert len(history.rows) <= 2
    assert {gap.filled_by for gap in history.rows.values()} == {"rest"}


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 12), st.sampled_from([0, 0, 0, FLAG_VOID])),
        max_size=40,
    )
)
def test_pieces_of_a_batch(values: list[tuple[int, int, int]]) -> None:
    rows = np.zeros(len(values), TRADE_DTYPE)
    for row, (symbol_id, trade_id, flags) in zip(rows, values, strict=True):
        row["symbol_id"], row["trade_id"], row["flags"] = symbol_id, trade_id, flags
        row["trade_us"] = time_of(trade_id)
    live = [(symbol_id, trade_id) for symbol_id, trade_id, flags in values if not flags]
    keep = np.ones(len(rows), np.uint8)
    pieces, repeated = join_runs(find_runs(rows, 3, keep))
    assert repeated == (len(set(live)) < len(live))
    assert mask_repeats(rows, keep) == len(live) - len(set(live))
    chosen = [i for i, row in enumerate(rows) if keep[i] and not row["flags"]]
    assert chosen == sorted(
        next(i for i, v in enumerate(values) if v == (*key, 0)) for key in set(live)
    )
    for found in (pieces, join_runs(find_runs(rows, 3, keep))[0]):
        assert found == {
            symbol_id: ranges_of({trade_id for owner, trade_id in live if owner == symbol_id})
            for symbol_id in {owner for owner, _ in live}
        }


def test_largest_id_has_no_successor() -> None:
    top = Range(2**63 - 1, 2**63 - 1, 0, 0)
    change = add_pieces([top], [Range(5, 9, 0, 0)])
    assert change.added == [top]
    assert change.opened == [Span(10, 2**63 - 2)]
