"""The ledger's arithmetic against an oracle that keeps every single id."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradecore._walks import find_runs
from tradecore.schema import FLAG_VOID, TRADE_DTYPE
from tradecore.store.ledger import (
    Change,
    Gap,
    GapChange,
    Range,
    Span,
    add_pieces,
    close_gaps,
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
            self._insert(Gap(0, span.first_id, span.last_id, origin, "open"))

    def around(self, spans: list[Span]) -> list[Gap]:
        """What the sink's query brings."""
        rows = sorted(self.rows.values(), key=lambda gap: gap.first_id)
        found: dict[int, Gap] = {}
        for span in spans:
            below = [gap for gap in rows if gap.first_id < span.first_id]
            meets = [g for g in rows if span.first_id <= g.first_id <= span.last_id + 1]
            above = [gap for gap in rows if gap.first_id > span.last_id + 1]
            found.update({gap.id: gap for gap in [*below[-1:], *meets, *above[:1]]})
        return list(found.values())

    def apply(self, change: GapChange) -> None:
        for gap in change.copied:
            assert gap.origin == self.rows[gap.id].origin
            self._insert(gap._replace(turned=False))
        for gap in change.altered:
            assert gap.origin == self.rows[gap.id].origin
            self.rows[gap.id] = gap._replace(turned=False)
        for gap_id in change.removed:
            del self.rows[gap_id]

    def told(self) -> dict[int, tuple[object, ...]]:
        """Origin, state, filler and evidence of every id; none is told twice."""
        ids = ids_of(self.rows.values())
        assert len(ids) == len(set(ids))
        return {i: gap.fate for gap in self.rows.values() for i in ids_of([gap])}

    def _insert(self, gap: Gap) -> None:
        new_id = max(self.rows, default=0) + 1
        self.rows[new_id] = gap._replace(id=new_id)


STEPS = st.one_of(
    st.tuples(IDS, st.sampled_from(["feed", "rest"])),
    st.tuples(
        st.builds(range, st.integers(0, 40), st.integers(0, 41)).map(set),
        st.sampled_from(["proof 1", "proof 2"]),
    ),
)


@settings(max_examples=500)
@given(st.lists(STEPS, max_size=10))
def test_history_tells_every_hole_and_its_fate(steps: list[tuple[set[int], str]]) -> None:
    ids: set[int] = set()
    stored: list[Range] = []
    fates: dict[int, tuple[object, ...]] = {}
    history = History()
    for number, (chosen, word) in enumerate(steps):
        if word.startswith("proof"):
            if not chosen:
                continue
            span = Span(min(chosen), max(chosen))
            history.apply(close_gaps([span], history.around([span]), word))
            fates |= {
                i: (fate[0], "absent", None, word)
                for i, fate in fates.items()
                if i in chosen and fate[1] == "open"
            }
        elif new := chosen - ids:
            pieces = ranges_of(new)
            change = add_pieces(pieces, neighbours(pieces, stored))
            history.open(change.opened, number)
            fates |= dict.fromkeys(
                holes_of(ids | new) - holes_of(ids), (number, "open", None, None)
            )
            fates |= {i: (fates[i][0], "filled", word, fates[i][3]) for i in holes_of(ids) & new}
            history.apply(fill_gaps(change.filled, history.around(change.filled), word))
            stored = apply(stored, change)
            ids |= new
        assert history.told() == fates
        unfilled = {i for i, fate in fates.items() if fate[1] != "filled"}
        assert unfilled == holes_of(ids)


@pytest.mark.parametrize("absent", [False, True])
def test_a_hole_settled_page_by_page_ends_as_one_row(absent: bool) -> None:
    history = History()
    history.open([Span(10, 99)], "hole")
    for first_id in [*range(10, 50, 10), *range(90, 40, -10)]:
        spans = [Span(first_id, first_id + 9)]
        gaps = history.around(spans)
        history.apply(close_gaps(spans, gaps, "{}") if absent else fill_gaps(spans, gaps, "rest"))
    (gap,) = history.rows.values()
    assert (gap.first_id, gap.last_id) == (10, 99)
    assert gap.state == ("absent" if absent else "filled")


def test_many_holes_cost_little() -> None:
    """Every second id of 100,000 is missing and comes in one batch: no time that grows squared."""
    gaps = [Gap(i, 2 * i, 2 * i, "hole", "open") for i in range(50_000)]
    change = fill_gaps([Span(2 * i, 2 * i) for i in range(50_000)], gaps, "dump")
    assert (len(change.altered), change.copied, change.removed) == (50_000, [], [])
    stored = [Range(2 * i + 1, 2 * i + 1, 0, 0) for i in range(50_000)]
    whole = add_pieces([Range(2 * i, 2 * i, 0, 0) for i in range(1, 50_000)], stored)
    assert whole.extended == [Range(1, 99_999, 0, 0)]
    assert len(whole.removed) == 49_999


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
