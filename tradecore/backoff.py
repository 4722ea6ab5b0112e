"""When to try again: delays after failures, and the venue's limit on connection attempts.

Pure state: nothing here sleeps. Callers wait for the seconds that they are given.
"""

import random
from collections.abc import Callable, Collection, Hashable
from math import ceil
from typing import TypeVar

from tradecore import clock

T = TypeVar("T", bound=Hashable)


class Backoff:
    """Delays in seconds: 0 at first, then `base_s` doubled with full jitter up to `cap_s`."""

    def __init__(
        self,
        base_s: float,
        cap_s: float,
        *,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if not 0 < base_s <= cap_s:
            raise ValueError(f"need 0 < base_s <= cap_s, got {base_s} and {cap_s}")
        self._base_s = base_s
        self._cap_s = cap_s
        self._uniform = uniform
        self._ceiling_s = 0.0
        self.attempts = 0

    def next_delay_s(self) -> float:
        """Count one more attempt and return the seconds to wait before it."""
        delay_s = self._uniform(0.0, self._ceiling_s) if self.attempts else 0.0
        self.attempts += 1
        self._ceiling_s = min(self._ceiling_s * 2 or self._base_s, self._cap_s)
        return delay_s

    def reset(self) -> None:
        """Start anew; call it when the thing has worked for a while, not when it has only opened.

        A peer that accepts and drops at once would otherwise be asked again without any delay.
        """
        self._ceiling_s = 0.0
        self.attempts = 0


class Repeats:
    """Lets something be done for the same cause less and less often: at once, then `first_s` later,
    then twice as long, up to `cap_s`. A cause that has not shown for that long is new again.
    """

    def __init__(self, first_s: float, cap_s: float) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._notes: dict[Hashable, tuple[float, float]] = {}  # due, and the delay before

    def due(self, now_s: float, causes: Collection[T]) -> list[T]:
        """Return those whose time has come. If there is one, all of them count as done now."""
        for cause, (due_s, delay_s) in list(self._notes.items()):
            if now_s - due_s > delay_s and cause not in causes:
                del self._notes[cause]
        due = [one for one in causes if now_s >= self._notes.get(one, (now_s, 0.0))[0]]
        for one in causes if due else ():
            delay_s = min(2 * self._notes.get(one, (0.0, self._first_s / 2))[1], self._cap_s)
            self._notes[one] = (now_s + delay_s, delay_s)
        return due


class AttemptBudget:
    """Keep attempts below `limit` in any `window_s` seconds, with a margin.

    The venue allows 300 connection attempts per 5 minutes and address and bans those who pass it;
    `margin` is the share left to other programs on the address. A bucket of tokens: half of what
    is allowed may be made at once, the other half spread evenly over the window, so that no burst
    is followed by minutes without any attempt.
    """

    def __init__(
        self,
        limit: int = 300,
        window_s: float = 300.0,
        *,
        margin: float = 0.1,
        clock_ns: Callable[[], int] | None = None,
    ) -> None:
        if limit < 1 or window_s <= 0 or not 0 <= margin < 1:
            raise ValueError(f"no budget in {limit=} {window_s=} {margin=}")
        self.allowed = max(1, int(limit * (1 - margin)))
        self.burst = (self.allowed + 1) // 2
        self._spare = self.burst // 3
        self._every_ns = ceil(window_s * 1e9 / (self.allowed - self.burst + 1))
        self._clock_ns = clock_ns or clock.mono_ns
        self.full_ns = 0
        """When the bucket is full again, of the monotonic clock."""

    def take_s(self, *, planned: bool = False) -> float:
        """Take an attempt and return 0.0, or take none and return the seconds until there is one.

        A planned attempt, one that can wait, leaves the last third of a burst to the others.
        """
        now_ns = self._clock_ns()
        full_ns = max(self.full_ns, now_ns) + self._every_ns
        tokens = self.burst - (self._spare if planned else 0)
        wait_ns = full_ns - now_ns - tokens * self._every_ns
        if wait_ns > 0:
            return wait_ns / 1e9
        self.full_ns = full_ns
        return 0.0

    def recall(self, full_ns: int) -> None:
        """Take over what others have used, or a former run: when their bucket is full again."""
        empty_ns = self._clock_ns() + self.burst * self._every_ns
        self.full_ns = max(self.full_ns, min(full_ns, empty_ns))
