"""How late the event loop comes to what is due: so long a frame waits before it is read."""

import asyncio
from bisect import bisect_left

from tradecore import clock

INTERVAL_S = 0.25
"""Between two looks: each costs 50 us. A loop that is held for 50 ms each second is caught every
five seconds or so."""

BOUNDS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Timers of the loop count in whole milliseconds: what is below two is noise."""


class LoopLag:
    """Counts in plain numbers; `run` it in the loop that is watched."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            due_ns = clock.mono_ns() + int(INTERVAL_S * 1e9)
            await asyncio.sleep(INTERVAL_S)
            late_s = max(0, clock.mono_ns() - due_ns) / 1e9
            self.counts[bisect_left(BOUNDS_S, late_s)] += 1
            self.sum_s += late_s
