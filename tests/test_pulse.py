"""The learnt limit of silence, against the probability that it stands for."""

import random
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.feed.pulse import MEMORY_S, Pulse

TICK_S = 0.25


def test_a_session_that_follows_knows_the_pace_and_not_the_silence() -> None:
    before = fed(10.0, 60.0)
    before.beat(30.0, 0)
    after = before.handed_on()
    assert after.silence_s == 0.0
    assert after.limit_s(0.0, 60.0) == before.limit_s(0.0, 60.0) < 5.0
    after.beat(0.5, 5)
    assert before.silence_s > 29.0, "it is another's"


def fed(rate: float, seconds: float, seed: int = 1) -> Pulse:
    """A pulse after data at this mean rate, with the waiting times of a Poisson process."""
    pulse, rng = Pulse(), random.Random(seed)
    due = rng.expovariate(rate)
    for tick in range(int(seconds / TICK_S)):
        events = 0
        while due < (tick + 1) * TICK_S:
            events += 1
            due += rng.expovariate(rate)
        pulse.beat(TICK_S, events)
    return pulse


def test_nothing_known_is_the_cap() -> None:
    pulse = Pulse()
    assert pulse.limit_s(2, 30) == 30
    pulse.beat(0.25, 3)
    assert pulse.limit_s(2, 30) == 30


@pytest.mark.parametrize("rate", [1.0, 2.0, 5.0])
def test_a_known_rate_gives_a_silence_of_that_probability(rate: float) -> None:
    limit_s = fed(rate, 600).limit_s(0, 1000)
    assert exp(-rate * limit_s) < 1e-8
    assert limit_s < 20 / rate * 1.5


def test_a_busy_connection_is_looked_into_after_seconds() -> None:
    assert fed(500, 30).limit_s(2, 30) == 2


def test_a_burst_does_not_make_a_thin_symbol_busy() -> None:
    pulse = Pulse()
    for _ in range(20):
        pulse.beat(20.0, 0)
        pulse.beat(0.25, 735)
    assert pulse.limit_s(2, 120) == 120


def test_a_silence_does_not_excuse_itself() -> None:
    pulse = fed(4, 300)
    before = pulse.limit_s(2, 30)
    for _ in range(100):
        pulse.beat(TICK_S, 0)
        assert pulse.limit_s(2, 30) == before
    assert pulse.silence_s >= 25
    pulse.forgive()
    assert pulse.silence_s == 0 and pulse.limit_s(2, 30) == before


def test_a_market_that_calms_down_is_learnt() -> None:
    pulse = fed(50, 300)
    assert pulse.limit_s(2, 30) == 2
    for _ in range(int(10 * MEMORY_S)):
        pulse.beat(2.0, 1)
    assert pulse.limit_s(2, 200) > 20


def test_patience_doubles_has_an_end_and_wears_off() -> None:
    pulse = Pulse()
    limits = []
    for _ in range(8):
        limits.append(pulse.limit_s(2, 30))
        pulse.be_patient()
    assert limits[:4] == [30, 60, 120, 240] and limits[-1] == 600
    for _ in range(int(5 * 10 * MEMORY_S)):
        pulse.beat(1.0, 1)
    assert pulse.limit_s(2, 30) < 35


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 10**6)), max_size=50))
def test_always_between_floor_and_cap(beats: list[tuple[float, int]]) -> None:
    pulse = Pulse()
    for passed_s, events in beats:
        pulse.beat(passed_s, events)
        assert 2 <= pulse.limit_s(2, 30) <= 30
        assert pulse.limit_s(2, 1) == 2
