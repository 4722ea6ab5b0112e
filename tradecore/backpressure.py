"""What happens when the ring fills: sockets are paused, and when that has to end, trades refused.

Past the high-water mark the kernel and the venue hold what comes, for PAUSE_LIMIT_S at most (the
venue cuts who does not answer its pings). Then reading goes on, and what finds no room in the ring
is refused: a known hole. Below the low-water mark everything is as before.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from tradecore.capture import Capture
from tradecore.ring import Ring

log = logging.getLogger(__name__)

PAUSE_LIMIT_S = 10.0
"""How long full sockets stay paused."""

ROWS_PER_SOCKET = 16384
"""Frames that a paused socket can still deliver: what a receive buffer of 2 MiB holds."""


class Pausable(Protocol):
    """The feed as seen from here."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Backpressure:
    """Watches the fill of the ring for a feed; `sockets()` tells how many can deliver at once."""

    def __init__(
        self, ring: Ring, capture: Capture, feed: Pausable, sockets: Callable[[], int]
    ) -> None:
        self._ring = ring
        self._capture = capture
        self._feed = feed
        self._sockets = sockets
        self._resume_timer: asyncio.TimerHandle | None = None
        self.watch()

    def watch(self) -> None:
        """Set the marks; to be called again when the number of sockets has changed."""
        if self._capture.above_high_water:
            return  # the marks in force end what they began; `after_release` comes here again
        headroom = min(self._ring.capacity // 2, ROWS_PER_SOCKET * max(1, self._sockets()))
        high = self._ring.capacity - headroom
        self._low_water = high // 2
        self._capture.watch_high_water(high, self._pause)

    def after_release(self) -> None:
        """Lift the pressure if the ring has drained; rows have just left it."""
        if self._capture.above_high_water and self._ring.pending <= self._low_water:
            self._capture.below_high_water()
            if self._resume_timer is not None:
                self._resume_timer.cancel()
            self._feed.resume_reading()
            self.watch()
            log.info(
                "ring is below its low-water mark again", extra={"pending": self._ring.pending}
            )

    def _pause(self) -> None:
        log.warning(
            "ring is past its high-water mark; sockets are paused",
            extra={"pending": self._ring.pending, "capacity": self._ring.capacity},
        )
        self._feed.pause_reading()
        self._resume_timer = asyncio.get_running_loop().call_later(PAUSE_LIMIT_S, self._overflow)

    def _overflow(self) -> None:
        log.error(
            "the database is away for longer than the ring can hold; new trades are refused as a "
            "known hole until it drains",
            extra={"pending": self._ring.pending, "capacity": self._ring.capacity},
        )
        self._feed.resume_reading()
