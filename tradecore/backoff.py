"""When to try again: delays after failures, and the venue's limit on connection attempts.

Pure state: nothing here sleeps. Callers wait for the seconds that they are given.
"""

import random
from collections import deque
from collections.abc import Callable

from tradecore import clock


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


class AttemptBudget:
    """Keep attempts below `limit` in any `window_s` seconds, with a margin.

    The venue allows 300 connection attempts per 5 minutes and address and bans those who pass it;
    `margin` is the share left to other programs on the same address and to what a former run of
    ours has used up.
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
        self._window_ns = int(window_s * 1e9)
        self._clock_ns = clock_ns or clock.mono_ns
        self._slots_ns: deque[int] = deque(maxlen=self.allowed)

    def reserve_s(self) -> float:
        """Take the next free attempt and return the seconds to wait before making it.

        Every call takes its own place, so several connections may wait at the same time.
        """
        slot_ns = now_ns = self._clock_ns()
        if len(self._slots_ns) == self.allowed:
            slot_ns = max(now_ns, self._slots_ns[0] + self._window_ns)
        self._slots_ns.append(slot_ns)
        return (slot_ns - now_ns) / 1e9
