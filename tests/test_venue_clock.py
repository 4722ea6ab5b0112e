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
    times_ns = iter([0, 10**9, 2 * 10**9, 2_010_000_000, 3 * 10**9, 4 * 10**9])
    monkeypatch.setattr(clock, "wall_ns", lambda: next(times_ns))
    theirs_us = iter([0, 1_005_000, 0])

    async def ask() -> int:
        return next(theirs_us)

    ours = VenueClock(ask)
    await ours.measure()
    offset = ours.stats.offset
    assert offset is not None
    assert offset.offset_s == pytest.approx(1.0 - 0.0005)
    assert offset.bound_s == pytest.approx(0.005 + 0.0005)


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
