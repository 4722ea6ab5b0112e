"""Watches how far this host's clock is from the venue's: latencies and `received_at` rest on it.

NTP state is out of reach in a sandbox (ProtectClock forbids adjtimex), and says nothing of the
venue. So the venue is asked for its time (weight 1) three times every few minutes.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tradecore import clock
from tradecore.errors import VenueError

log = logging.getLogger(__name__)

FIRST_S = 5.0
INTERVAL_S = 300.0
FORGET_S = 3 * INTERVAL_S
"""An older measurement says nothing of now."""

SAMPLES = 3
RESOLUTION_S = 1e-3
"""The venue tells whole milliseconds, cut off."""


class Sample(NamedTuple):
    """One question: our clock and theirs at the answer, in nanoseconds since 1970."""

    trip_ns: int
    """How long the answer took; never from the difference of two wall times, which may step."""
    theirs_ns: int
    received_ns: int


class Offset(NamedTuple):
    """How far our clock is ahead, give or take `bound_s`."""

    offset_s: float
    bound_s: float


async def sample(ask: Callable[[], Awaitable[int]]) -> Sample:
    """Ask once; `ask` returns their time in microseconds since 1970. Raises what it raises."""
    sent_ns = clock.mono_ns()
    theirs_us = await ask()
    return Sample(clock.mono_ns() - sent_ns, theirs_us * 1000, clock.wall_ns())


def offset_of(samples: Sequence[Sample], resolution_s: float) -> Offset:
    """Halve the round trip of the fastest sample; `resolution_s` is what their clock cuts off."""
    trip_ns, theirs_ns, received_ns = min(samples, key=lambda one: one.trip_ns)
    return Offset(
        (received_ns - trip_ns / 2 - theirs_ns) / 1e9 - resolution_s / 2,
        trip_ns / 2e9 + resolution_s / 2,
    )


@dataclass(slots=True)
class ClockStats:
    """The latest measurement."""

    offset: Offset | None = None
    measured_ns: int = 0
    """Monotonic clock."""

    def fresh(self) -> Offset | None:
        """Return the offset, None where none was measured of late."""
        old = clock.mono_ns() - self.measured_ns > FORGET_S * 1e9
        return None if old else self.offset


class VenueClock:
    """`run` it until it is cancelled."""

    def __init__(self, ask: Callable[[], Awaitable[int]]) -> None:
        """`ask` returns the venue's time in microseconds since 1970, or raises VenueError."""
        self.stats = ClockStats()
        self._ask = ask

    async def run(self) -> None:
        """Measure every five minutes or so; what fails is tried again then, REST is in trouble."""
        await asyncio.sleep(FIRST_S * random.uniform(0.5, 1.5))
        while True:
            try:
                await self.measure()
            except VenueError as error:
                log.debug("the venue's clock was not to be had", extra={"error": str(error)})
            await asyncio.sleep(INTERVAL_S * random.uniform(0.8, 1.2))

    async def measure(self) -> None:
        """Ask now. Raises VenueError."""
        samples = [await sample(self._ask) for _ in range(SAMPLES)]
        self.stats.offset = offset_of(samples, RESOLUTION_S)
        self.stats.measured_ns = clock.mono_ns()
