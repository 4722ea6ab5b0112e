"""How often a symbol trades, learnt from itself, and how long a silence is no surprise.

Pure state, one object a symbol; times are seconds of any clock that only goes forward.
"""

from math import exp

MEMORY_S = 600.0
"""The learnt pace forgets with this time constant."""

MIN_LIMIT_S = 10.0
MAX_LIMIT_S = 600.0
UNKNOWN_LIMIT_S = 60.0
"""The limit of a symbol that has not traded since the start."""

_SURPRISE = 20.0
"""So many mean intervals without a trade: at a steady pace a chance of e^-20."""


class Pace:
    """Counts the looks (about one a second) at which the symbol had traded since the last one.

    Looks and not trades: a hundred trades of one millisecond say little about the next lull.
    """

    __slots__ = (
        "_active", "_asked_s", "_at_s", "_base_s", "_patience", "_received", "_weight", "last_s",
    )  # fmt: skip

    def __init__(self, now_s: float, received: int) -> None:
        self.last_s = now_s
        """Of the last look that found a trade, or of the start."""
        self._at_s = now_s
        self._received = received
        self._active = 0.0  # looks with a trade per second, times _weight
        self._weight = 0.0  # how much of the past it stands for, 0 to 1
        self._base_s = UNKNOWN_LIMIT_S
        self._patience = 1
        self._asked_s = now_s

    def look(self, now_s: float, received: int) -> None:
        """Take a look: `received` is the number of trades of the symbol so far."""
        elapsed_s = now_s - self._at_s
        if elapsed_s <= 0:
            return
        kept = exp(-elapsed_s / MEMORY_S)
        traded = received != self._received
        self._active = self._active * kept + (traded / elapsed_s) * (1 - kept)
        self._weight = self._weight * kept + (1 - kept)
        self._at_s = now_s
        self._received = received
        if traded:
            self.last_s = self._asked_s = now_s
            self._patience = 1
            self._base_s = max(MIN_LIMIT_S, _SURPRISE * self._weight / self._active)

    @property
    def limit_s(self) -> float:
        """A silence of this length since the last trade or check wants a check."""
        return min(self._base_s * self._patience, MAX_LIMIT_S)

    def is_late(self, now_s: float) -> bool:
        """Tell whether a check is due."""
        return now_s - self._asked_s > self.limit_s

    def forgive(self, now_s: float) -> None:
        """The check has shown that the market is quiet: be more patient until the next trade."""
        self._patience = min(self._patience * 2, 64)
        self._asked_s = now_s
