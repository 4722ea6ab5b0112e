"""Ids of one symbol against a slow oracle: sets of ids, cut into runs anew at every step."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.sequence import (
    ACCEPTED,
    DUPLICATE,
    FAR_BELOW,
    FAR_BELOW_IDS,
    FAR_BELOW_US,
    GAP,
    LATE,
    Sequence,
)

MAX_ID = 2**63 - 1
NOW_US = 1_700_000_000_000_000


def runs(ids: set[int]) -> list[tuple[int, int]]:
    """Cut a set into its runs, greatest first."""
    found: list[tuple[int, int]] = []
    for trade_id in sorted(ids, reverse=True):
        if found and found[-1][0] == trade_id + 1:
            found[-1] = (trade_id, found[-1][1])
        else:
            found.append((trade_id, trade_id))
    return found


@dataclass
class Oracle:
    """Remembers ids that are the greatest or touch what is remembered; the two top runs of them.

    Of ids far below it remembers the latest that were consecutive.
    """

    known: set[int] = field(default_factory=set)
    asked: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    high: tuple[int, int] = (-1, 0)

    def take(self, trade_id: int, trade_us: int) -> tuple[int, bool]:
        high_id, high_us = self.high
        # What goes on where the latest hole begins is no question.
        below = trade_id <= high_id and trade_id != self.hole_range()[0]
        newer = trade_us > high_us + FAR_BELOW_US
        goes_on = self.asked[-1:] == [trade_id - 1]
        if (below and (trade_id < high_id - FAR_BELOW_IDS or newer)) or (
            goes_on and len(self.asked) > 1 and newer
        ):
            self.asked = [*self.asked, trade_id] if goes_on else [trade_id]
            return FAR_BELOW, False
        self.seen.add(trade_id)
        if trade_id in self.known:
            return DUPLICATE, False
        top = max(self.known, default=None)
        missing = {i for i in range(*self.hole_range())}
        if top is None or trade_id > top:
            verdict = ACCEPTED if top is None or trade_id == top + 1 else GAP
        else:
            verdict = LATE
        touches = {trade_id - 1, trade_id + 1} & self.known
        if verdict != LATE or touches:
            self.known.add(trade_id)
            kept = runs(self.known)[:2]
            self.known = {i for first, last in kept for i in range(first, last + 1)}
        if trade_id > high_id:
            self.high = (trade_id, trade_us)
        return verdict, verdict == LATE and bool(touches) and trade_id in missing

    def hole_range(self) -> tuple[int, int]:
        found = runs(self.known)
        return (found[1][1] + 1, found[0][0]) if len(found) == 2 else (-1, -1)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(0, 30), st.integers(0, 5)),
            st.tuples(st.just("take"), st.integers(0, 30), st.just(100)),
            st.tuples(st.just("seed"), st.integers(0, 30), st.integers(1, 5)),
        ),
        max_size=60,
    )
)
def test_every_verdict_and_both_runs_are_the_oracles(steps: list[tuple[str, int, int]]) -> None:
    ids, oracle = Sequence(), Oracle()
    for what, trade_id, second in steps:
        trade_us = NOW_US + second * 1_000_000
        if what == "seed":
            ids.seed(trade_id, trade_us)
            if trade_id > oracle.high[0]:
                oracle.high = (trade_id, trade_us)
            continue
        expected = oracle.take(trade_id, trade_us)
        assert ids.judge(trade_id, trade_us) == expected[0], "judging changes nothing"
        assert ids.take(trade_id, trade_us) == expected
        found = runs(oracle.known)
        assert ids.run == (found[0] if found else None)
        assert ids.before == (found[1] if len(found) == 2 else None)
        first, end = oracle.hole_range()
        assert ids.hole == ((first, end - 1) if end >= 0 else None)
        assert ids.high == (oracle.high[0] if oracle.high[0] >= 0 else None)
        assert {i for i in range(32) if i in ids} == oracle.known <= oracle.seen


@given(st.lists(st.integers(0, 12)))
def test_only_what_came_is_a_duplicate(order: list[int]) -> None:
    """Whatever the order, nothing that did not come is ever taken for known."""
    ids = Sequence()
    came: set[int] = set()
    for trade_id in order:
        verdict, _ = ids.take(trade_id, NOW_US)
        assert verdict != DUPLICATE or trade_id in came
        came.add(trade_id)


def verdicts(ids: Sequence, *trade_ids: int) -> list[int]:
    return [ids.take(trade_id, NOW_US)[0] for trade_id in trade_ids]


def test_a_listing_that_goes_on_is_not_mixed_with_the_former_one() -> None:
    ids = Sequence()
    assert verdicts(ids, 1, 2, 3, 7, 8) == [ACCEPTED] * 3 + [GAP, ACCEPTED]
    later_us = NOW_US + 30 * 86_400_000_000
    anew = [ids.take(trade_id, later_us + trade_id) for trade_id in range(1, 20)]
    assert anew == [(FAR_BELOW, False)] * 19, "neither in the hole nor above the greatest id"
    assert (ids.run, ids.hole, ids.high) == ((7, 8), (4, 6), 8)
    assert verdicts(ids, 4, 9) == [LATE, ACCEPTED], "the former one may still go on"


def test_one_frame_with_an_absurd_time_does_not_stop_a_quiet_symbol() -> None:
    ids = Sequence()
    assert verdicts(ids, 1, 2, 3) == [ACCEPTED] * 3
    assert ids.take(3, NOW_US + 86_400_000_000) == (FAR_BELOW, False)
    assert ids.take(4, NOW_US + 120_000_000) == (ACCEPTED, False)


def test_a_hole_that_another_connection_fills_is_closed() -> None:
    ids = Sequence()
    assert verdicts(ids, 8, 9, 10, 15, 16) == [ACCEPTED, ACCEPTED, ACCEPTED, GAP, ACCEPTED]
    assert (ids.run, ids.before, ids.hole) == ((15, 16), (8, 10), (11, 14))
    assert ids.take(9, NOW_US) == (DUPLICATE, False), "the run before is known"
    assert [ids.take(i, NOW_US) for i in (11, 12, 17, 13)] == [
        (LATE, True), (LATE, True), (ACCEPTED, False), (LATE, True),
    ]  # fmt: skip
    assert ids.hole == (14, 14)
    assert ids.take(14, NOW_US) == (LATE, True)
    assert (ids.run, ids.before, ids.hole) == ((8, 17), None, None)
    assert verdicts(ids, *range(8, 18)) == [DUPLICATE] * 10


def test_a_second_gap_forgets_the_older_run() -> None:
    ids = Sequence()
    assert verdicts(ids, 1, 5, 9, 1, 5, 9) == [ACCEPTED, GAP, GAP, LATE, DUPLICATE, DUPLICATE]
    assert ids.take(4, NOW_US) == (LATE, False), "it is of an older hole"
    assert ids.before == (4, 5)


def test_an_id_in_the_middle_of_the_hole_is_late_each_time() -> None:
    ids = Sequence()
    assert verdicts(ids, 1, 9, 5, 5) == [ACCEPTED, GAP, LATE, LATE]
    assert ids.hole == (2, 8)


def test_ids_at_both_ends_of_int64() -> None:
    ids = Sequence()
    assert verdicts(ids, 0, 0, 1, MAX_ID, MAX_ID) == [
        ACCEPTED, DUPLICATE, ACCEPTED, GAP, DUPLICATE,
    ]  # fmt: skip
    assert ids.hole == (2, MAX_ID - 1)
    assert verdicts(ids, 0, 3, MAX_ID - 1) == [FAR_BELOW, FAR_BELOW, LATE]
    fresh = Sequence()
    assert verdicts(fresh, MAX_ID, MAX_ID - 1, 0) == [ACCEPTED, LATE, FAR_BELOW]
    assert fresh.run == (MAX_ID - 1, MAX_ID)


@pytest.mark.parametrize("seeded", [False, True])
def test_far_below_begins_past_a_million_ids(seeded: bool) -> None:
    ids = Sequence()
    if seeded:
        ids.seed(5_000_000, NOW_US)
    else:
        ids.take(5_000_000, NOW_US)
    before = ids.run
    assert ids.judge(5_000_000 - FAR_BELOW_IDS, NOW_US) == (ACCEPTED if seeded else LATE)
    assert ids.take(5_000_000 - FAR_BELOW_IDS - 1, NOW_US) == (FAR_BELOW, False)
    assert ids.run == before, "it never moves the run"


def test_a_known_id_with_a_much_newer_trade_is_a_question() -> None:
    ids = Sequence()
    ids.take(10, NOW_US)
    ids.take(11, NOW_US + 1)
    limit_us = NOW_US + 1 + FAR_BELOW_US
    assert ids.judge(11, limit_us) == DUPLICATE
    assert ids.judge(9, limit_us) == LATE
    assert ids.judge(11, limit_us + 1) == ids.judge(9, limit_us + 1) == FAR_BELOW
    assert ids.judge(12, limit_us + 1) == ACCEPTED, "a quiet hour is no question"


def test_after_one_stray_id_far_above_the_ids_go_on() -> None:
    ids = Sequence()
    stray = 10**15
    assert verdicts(ids, 7, 8, stray) == [ACCEPTED, ACCEPTED, GAP]
    for trade_id in range(9, 20):
        assert ids.take(trade_id, NOW_US + trade_id * FAR_BELOW_US) == (LATE, True)
    assert verdicts(ids, 19, 21) == [FAR_BELOW, FAR_BELOW]
    assert ids.before == (7, 19)


def test_a_seed_makes_no_duplicates_and_no_gaps() -> None:
    ids = Sequence()
    ids.seed(100, NOW_US)
    assert verdicts(ids, 98, 99, 100, 101, 99) == [ACCEPTED] * 4 + [DUPLICATE]
    late = Sequence()
    assert verdicts(late, 95, 96) == [ACCEPTED, ACCEPTED]
    late.seed(100, NOW_US)
    assert verdicts(late, 97, 99, 102) == [ACCEPTED, GAP, GAP]


def test_a_seed_after_the_first_trades_asks_the_question_too() -> None:
    ids = Sequence()
    verdicts(ids, 1, 2)
    ids.seed(9_000_000, NOW_US - 1)
    assert verdicts(ids, 3, 2) == [FAR_BELOW, FAR_BELOW]
    assert ids.run == (1, 2)
    ids.seed(1, NOW_US + 1)
    assert ids.high == 9_000_000, "a mark never falls"


def test_a_seed_without_a_time_asks_by_id_only() -> None:
    ids = Sequence()
    ids.seed(2_000_000)
    assert ids.judge(1_999_999, NOW_US) == ACCEPTED
    assert ids.judge(999_999, NOW_US) == FAR_BELOW
