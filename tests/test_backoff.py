from bisect import bisect_right
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.backoff import AttemptBudget, Backoff, Repeats

seconds = st.floats(1e-3, 1e5)


def highest(low: float, high: float) -> float:
    return high


def test_first_at_once_then_doubled_to_the_cap() -> None:
    backoff = Backoff(1.0, 30.0, uniform=highest)
    assert [backoff.next_delay_s() for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.attempts == 8
    backoff.reset()
    assert backoff.attempts == 0
    assert [backoff.next_delay_s() for _ in range(3)] == [0, 1, 2]


@given(base=seconds, factor=st.floats(1, 1e4), count=st.integers(1, 200), shares=st.randoms())
def test_delays_stay_under_the_doubled_ceiling(
    base: float, factor: float, count: int, shares: Random
) -> None:
    cap = base * factor
    backoff = Backoff(base, cap, uniform=shares.uniform)
    delays = [backoff.next_delay_s() for _ in range(count)]
    assert delays[0] == 0
    for exponent, delay in enumerate(delays[1:]):
        assert 0 <= delay <= min(cap, base * 2.0 ** min(exponent, 64))


def test_jitter_is_full() -> None:
    """The whole range down to zero is used, so that many clients do not come back together."""
    backoff = Backoff(1.0, 1.0)
    backoff.next_delay_s()
    delays = [backoff.next_delay_s() for _ in range(2000)]
    assert min(delays) < 0.05
    assert max(delays) > 0.95
    assert abs(sum(delays) / len(delays) - 0.5) < 0.05


def test_never_overflows() -> None:
    backoff = Backoff(1e-3, 1e5, uniform=highest)
    assert max(backoff.next_delay_s() for _ in range(5000)) == 1e5


@pytest.mark.parametrize(("base", "cap"), [(0, 1), (-1, 1), (2, 1)])
def test_refuses_senseless_bounds(base: float, cap: float) -> None:
    with pytest.raises(ValueError, match="base_s"):
        Backoff(base, cap)


class Clock:
    def __init__(self) -> None:
        self.ns = 7

    def __call__(self) -> int:
        return self.ns


def test_budget_keeps_a_margin_below_the_venues_limit() -> None:
    clock = Clock()
    budget = AttemptBudget(clock_ns=clock)
    assert (budget.allowed, budget.burst) == (270, 135)
    assert [budget.take_s() for _ in range(135)] == [0] * 135
    made = 135
    for _ in range(299):
        clock.ns += 10**9
        made += budget.take_s() == 0
    assert 268 <= made <= 270


def test_a_burst_does_not_shut_out_what_comes_after_it() -> None:
    clock = Clock()
    budget = AttemptBudget(clock_ns=clock)
    while budget.take_s() == 0:
        pass
    assert 2 < budget.take_s() < 2.3
    clock.ns += 10 * 10**9
    assert [budget.take_s() == 0 for _ in range(5)] == [True] * 4 + [False]


def test_planned_attempts_leave_some_for_the_others() -> None:
    clock = Clock()
    budget = AttemptBudget(clock_ns=clock)
    planned = 0
    while budget.take_s(planned=True) == 0:
        planned += 1
    assert planned == 90
    assert [budget.take_s() for _ in range(45)] == [0] * 45
    assert budget.take_s(planned=True) > 90


@given(
    limit=st.integers(1, 12),
    margin=st.floats(0, 0.9),
    window_ms=st.integers(1, 5000),
    steps_ms=st.lists(st.integers(0, 3000), min_size=1, max_size=120),
    patient=st.booleans(),
    planned=st.booleans(),
)
def test_no_window_ever_holds_more_than_allowed(
    limit: int,
    margin: float,
    window_ms: int,
    steps_ms: list[int],
    patient: bool,
    planned: bool,
) -> None:
    """Whether callers wait as long as they are told or ask whenever they like."""
    clock = Clock()
    budget = AttemptBudget(limit, window_ms / 1000, margin=margin, clock_ns=clock)
    made: list[int] = []
    for step_ms in steps_ms:
        clock.ns += step_ms * 10**6
        wait_s = budget.take_s(planned=planned)
        if wait_s and patient:
            clock.ns += round(wait_s * 1e9) + 1
            assert budget.take_s(planned=planned) == 0
            wait_s = 0
        if not wait_s:
            made.append(clock.ns)
    assert budget.allowed <= limit
    for index, first in enumerate(made):
        inside = bisect_right(made, first + window_ms * 10**6 - 1) - index
        assert inside <= budget.allowed


@given(limit=st.integers(1, 50))
def test_an_idle_budget_is_full_again(limit: int) -> None:
    clock = Clock()
    budget = AttemptBudget(limit, 10, margin=0, clock_ns=clock)
    for _ in range(2):
        assert [budget.take_s() for _ in range(budget.burst)] == [0] * budget.burst
        assert budget.take_s() > 0
        clock.ns += 20 * 10**9


def test_what_a_former_run_used_counts() -> None:
    clock = Clock()
    former, budget = (AttemptBudget(clock_ns=clock) for _ in range(2))
    for _ in range(100):
        former.take_s()
    budget.recall(former.full_ns)
    assert [budget.take_s() == 0 for _ in range(36)] == [True] * 35 + [False]
    budget.recall(0)  # never to forget
    assert budget.take_s() > 0
    budget.recall(10**18)  # an absurd word costs no more than an empty bucket
    assert budget.take_s() < 2.3


@pytest.mark.parametrize(("limit", "window", "margin"), [(0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_budget_refuses_senseless_bounds(limit: int, window: float, margin: float) -> None:
    with pytest.raises(ValueError, match="no budget"):
        AttemptBudget(limit, window, margin=margin)


def test_the_same_cause_counts_less_and_less_often() -> None:
    repeats = Repeats(60.0, 200.0)
    done = [second for second in range(1000) if repeats.due(float(second), ["a"])]
    assert done == [0, 60, 180, 380, 580, 780, 980]


def test_another_cause_counts_at_once_and_all_are_done_with_it() -> None:
    repeats = Repeats(60.0, 200.0)
    assert repeats.due(0.0, ["a"]) == ["a"]
    assert repeats.due(1.0, ["a", "b"]) == ["b"]
    assert repeats.due(62.0, ["a", "b"]) == ["b"], "what was done for b was done for a"
    assert repeats.due(63.0, []) == []


def test_a_cause_that_has_gone_for_long_is_new_again() -> None:
    repeats = Repeats(60.0, 200.0)
    assert repeats.due(0.0, ["a"]) and repeats.due(60.0, ["a"])
    assert repeats.due(400.0, ["b"]) == ["b"]
    assert repeats.due(401.0, ["a"]) == ["a"] and not repeats.due(460.0, ["a"])
    assert repeats.due(461.0, ["a"]) == ["a"]
