"""Trades that the database refuses: when the next page of them is fetched."""

import random

from tradecore import clock


class Refusals:
    """Lets each symbol have a page of refused trades now and then, and all once one is taken.

    Their rows are in dead_letters already. So while the database refuses them the venue is asked
    for one page of a symbol after a pause, which doubles up to `cap_s`, however many holes it has.
    """

    def __init__(self, base_s: float, cap_s: float) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._pauses: dict[str, tuple[float, float]] = {}  # its end, its length

    def wait_s(self, symbol: str) -> float:
        """Return the seconds until the next page; 0.0: now."""
        end_s, _ = self._pauses.get(symbol, (0.0, 0.0))
        return max(end_s - _now_s(), 0.0)

    def refused(self, symbol: str) -> None:
        """Note that nothing of a page was taken."""
        _, before_s = self._pauses.get(symbol, (0.0, 0.0))
        pause_s = min(2 * before_s or self._base_s, self._cap_s)
        self._pauses[symbol] = (_now_s() + pause_s * random.uniform(0.75, 1.0), pause_s)

    def taken(self, symbol: str) -> None:
        """Note that the database has taken trades that it refused before."""
        self._pauses.pop(symbol, None)


def _now_s() -> float:
    return clock.mono_ns() / 1e9
