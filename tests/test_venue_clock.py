"""How the daemon knows that its own clock is wrong."""

from collections.abc import Callable
from itertools import count

import pytest

from tradecore import clock, venue_clock
from tradecore.rest.budget import RestError
from tradecore.venue_clock import FORGET_S, SAMPLES, VenueClock


def asking(ahead_us: int) -> Callable[[], object]:
    """A venue whose clock is that much ahead of ours."""

    async def ask() -> int:
        return clock.wall_ns() // 1000 + ahead_us

    return ask


async def test_a_clock_that_is_behind_shows_a_negative_offset() -> None:
    ours = VenueClock(asking(5_000_000))
    assert ours.stats.fresh() is None
    await ours.measure()
    offset = ours.stats.fresh()
    assert offset is not None
    assert abs(offset.offset_s + 5.0) <= offset.bound_s + 1e-6
    assert offset.bound_s < 0.5


async def test_the_fastest_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question takes a second but the second one, which takes 10 ms."""
    now_ns = 0
    monkeypatch.setattr(clock, "wall_ns", lambda: now_ns)
    monkeypatch.setattr(clock, "mono_ns", lambda: now_ns)
    answers = iter([(10**9, 0), (10**7, 5_000), (10**9, 0)])

    async def ask() -> int:
        nonlocal now_ns
        trip_ns, theirs_us = next(answers)
        now_ns += trip_ns
        return theirs_us

    ours = VenueClock(ask)
    await ours.measure()
    offset = ours.stats.offset
    assert offset is not None
    assert offset.offset_s == pytest.approx(1.0 - 0.0005)
    assert offset.bound_s == pytest.approx(0.005 + 0.0005)


async def test_a_clock_that_is_set_back_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trip has its length, whatever the wall clock says: none is faster than nothing."""
    steps_ns = iter([0, -(10**12), 0])
    ahead_ns = 10**12
    monkeypatch.setattr(clock, "wall_ns", lambda: clock.mono_ns() + ahead_ns)

    async def ask() -> int:
        nonlocal ahead_ns
        ahead_ns += next(steps_ns)
        return clock.mono_ns() // 1000

    ours = VenueClock(ask)
    await ours.measure()
    offset = ours.stats.offset
    assert offset is not None
    assert 0 < offset.bound_s < 0.5
    assert min(abs(offset.offset_s - true_s) for true_s in (0, 1000)) <= offset.bound_s + 1e-6


async def test_an_old_measurement_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = VenueClock(asking(0))
    await ours.measure()
    assert ours.stats.fresh() is not None
    ours.stats.measured_ns -= int(FORGET_S * 1e9)
    assert ours.stats.fresh() is None


async def test_a_venue_in_trouble_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    asked, slept = count(), []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        if len(slept) == 4:
            raise Enough

    async def ask() -> int:
        if next(asked) == 0:
            raise RestError("banned", "the venue has banned this address")
        return clock.wall_ns() // 1000

    monkeypatch.setattr(venue_clock.asyncio, "sleep", sleep)
    ours = VenueClock(ask)
    with pytest.raises(Enough):
        await ours.run()
    assert next(asked) == 1 + 2 * SAMPLES, "one refusal, then two measurements"
    assert ours.stats.fresh() is not None
    assert slept[0] < 10 and all(200 < one < 400 for one in slept[1:])
