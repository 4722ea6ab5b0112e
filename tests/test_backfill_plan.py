"""What to ask for a hole and what a reply tells, held against sets of ids."""

from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.backfill import plan
from tradecore.backfill.plan import Asked, Hole, Jump, judge
from tradecore.schema import TRADE_DTYPE
from tradecore.store.ledger import Span


def reply(venue: set[int], asked: Asked) -> np.ndarray:
    """What a venue with these trades answers: `limit` rows from the first at or above."""
    return np.array(sorted(i for i in venue if i >= asked.from_id)[: asked.limit], np.int64)


IDS = st.integers(min_value=1, max_value=60)


@given(st.sets(IDS), IDS, st.integers(0, 30))
def test_a_page_tells_what_the_venue_has(venue: set[int], first: int, more: int) -> None:
    hole = Span(first, first + more)
    for asked in (plan.page_from_above(hole), plan.probe_from_below(hole)):
        ids = reply(venue, asked)
        told = judge(ids, hole, asked)
        inside = {i for i in venue if hole.first_id <= i <= hole.last_id}
        assert set(ids[told.low : told.high].tolist()) <= inside
        if not told.ends_early and asked.from_id <= hole.first_id:
            assert set(ids[told.low : told.high].tolist()) == inside
        for jump in told.jumps:
            between = set(range(jump.first_id, jump.last_id + 1))
            assert not between & venue
            assert {jump.id_below, jump.id_above} <= venue
            assert hole.first_id <= jump.first_id <= jump.last_id <= hole.last_id
        assert told.has_below == bool(len(ids) and ids[0] < hole.first_id)
        assert told.ends_early == (not len(ids) or (max(venue) < hole.last_id))


@given(st.sets(IDS), IDS, st.integers(0, 30))
def test_a_probe_and_the_rows_above_prove_absence(venue: set[int], first: int, more: int) -> None:
    """With the neighbours at the venue the jumps of a probe are all that the venue lacks."""
    hole = Span(first + 1, first + 1 + more)
    venue |= {hole.first_id - 1, hole.last_id + 1}
    asked = plan.probe_from_below(hole)
    told = judge(reply(venue, asked), hole, asked)
    assert told.has_below
    lacking = {i for j in told.jumps for i in range(j.first_id, j.last_id + 1)}
    assert lacking == set(range(hole.first_id, hole.last_id + 1)) - venue


def test_pages_go_from_above() -> None:
    assert plan.page_from_above(Span(1, 2500)) == Asked(1501, 1000)
    assert plan.page_from_above(Span(1, 500)) == Asked(1, 500)
    assert plan.page_from_above(Span(7, 7)) == Asked(7, 1)
    others = [Span(1, 3), Span(2, 6), Span(9, 9), Span(2000, 2001)]
    assert plan.page_from_above(Span(12, 14), others) == Asked(1, 14)
    assert plan.page_from_above(Span(1005, 1005), others) == Asked(6, 1000)
    assert plan.page_from_above(Span(1010, 1010), others[2:]) == Asked(1010, 1)
    assert plan.probe_from_below(Span(10, 12)) == Asked(9, 5)
    assert plan.probe_from_below(Span(10, 9_999)) == Asked(9, 1000)
    assert plan.probe_from_below(Span(10, 12), wide=True) == Asked(0, 1000)
    assert plan.probe_from_below(Span(9_000, 9_001), wide=True) == Asked(8_500, 1000)


def test_a_jump_is_cut_to_the_hole() -> None:
    told = judge(np.array([10, 14, 20]), Span(12, 18), Asked(10, 3))
    assert told.jumps == (Jump(12, 13, 10, 14), Jump(15, 18, 14, 20))
    assert (told.low, told.high) == (1, 2)


@pytest.mark.parametrize(
    ("ids", "word"),
    [([4, 5], "below"), ([5, 6, 7, 8], "rows"), ([5, 5], "ascend"), ([7, 6], "ascend")],
)
def test_a_reply_to_another_question_is_refused(ids: list[int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        judge(np.array(ids), Span(5, 7), Asked(5, 3))


@given(st.sets(IDS), IDS, st.integers(0, 60))
def test_missing_is_the_complement(stored: set[int], first: int, more: int) -> None:
    hole = Span(first, first + more)
    pieces = plan.missing(hole, [(i, i) for i in stored])
    found = [i for piece in pieces for i in range(piece.first_id, piece.last_id + 1)]
    assert found == sorted(set(range(hole.first_id, hole.last_id + 1)) - stored)


@given(st.sets(IDS), st.lists(st.tuples(IDS, st.integers(0, 9)), max_size=5))
def test_select(ids: set[int], pairs: list[tuple[int, int]]) -> None:
    spans = [Span(first, first + more) for first, more in pairs]
    array = np.array(sorted(ids), np.int64)
    want = [any(s.first_id <= i <= s.last_id for s in spans) for i in sorted(ids)]
    assert plan.select(array, spans).tolist() == want


def rows_of(*pairs: tuple[int, int]) -> np.ndarray:
    """Rows of (id, minute)."""
    rows = np.zeros(len(pairs), TRADE_DTYPE)
    for row, (trade_id, minute) in zip(rows, pairs, strict=True):
        row["trade_id"], row["trade_us"] = trade_id, minute * 60_000_000
    return rows


def test_times_tell_another_venue() -> None:
    """The hole 10..19 lies between minutes 100 and 120; ten minutes more or less are allowed."""
    hole = Hole(10, 19, 100 * 60_000_000, 120 * 60_000_000)
    for pairs in (
        [],
        [(9, 100), (10, 100), (19, 120), (20, 120)],
        [(9, 130), (10, 90), (11, 130), (20, 90)],
        [(1, 10**6), (9, 100), (20, 120), (21, 0)],  # the next ones tell enough
        [(20, 10**6)],
        [(9, 0)],
    ):
        plan.hold_against_times(rows_of(*pairs), hole)
    for pairs, wrong in (
        ([(9, 131)], 9),
        ([(20, 89)], 20),
        ([(9, 100), (10, 89), (11, 131)], 10),
        ([(9, 100), (10, 100), (11, 131)], 11),
    ):
        with pytest.raises(ValueError, match=f"trade {wrong} .*01:40:00Z and 1970-01-01 02:00:00Z"):
            plan.hold_against_times(rows_of(*pairs), hole)


def test_overlapping() -> None:
    holes = [Hole(10, 19, 0, 0), Hole(25, 25, 0, 0), Hole(30, 40, 0, 0)]
    for first, last, found in (
        (0, 9, []),
        (0, 10, holes[:1]),
        (19, 25, holes[:2]),
        (20, 24, []),
        (40, 99, holes[2:]),
        (0, 99, holes),
        (41, 99, []),
    ):
        assert plan.overlapping(holes, first, last) == found


def test_a_long_day() -> None:
    """Two days and a half, two million ids: 800 pages a day."""
    day_us = plan.DAY_US
    hole = Hole(1, 2_000_000, day_us // 2, 3 * day_us)
    now_us = 3 * day_us
    assert plan.long_day(hole, now_us) == date(1970, 1, 3)
    assert plan.long_day(hole, now_us - 1) is None, "it is not over"
    assert plan.long_day(hole._replace(above_us=3 * day_us + 10**7), now_us) is None
    assert plan.long_day(hole._replace(last_id=124_000), now_us) is None
    assert plan.long_day(hole._replace(last_id=126_000), now_us) == date(1970, 1, 3)
    assert plan.long_day(hole._replace(above_us=day_us // 2), now_us) is None


def test_days() -> None:
    day_us = plan.DAY_US
    newest_first = [date(1970, 1, 3), date(1970, 1, 2)]
    assert plan.days_between(day_us + 5_000_000, 2 * day_us + 5_000_000) == newest_first
    assert plan.days_between(day_us * 2, day_us * 2 + 5_000_000) == newest_first
    assert plan.day_start_us(date(1970, 1, 3)) == 2 * day_us
    assert plan.day_of(2 * day_us + 1) == date(1970, 1, 3)
    assert not plan.is_over(date(1970, 1, 1), day_us - 1)
    assert plan.is_over(date(1970, 1, 1), day_us)
