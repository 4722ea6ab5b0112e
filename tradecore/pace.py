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

TICKER_LIMIT_S = 5.0
"""The limit of a symbol whose tickers, which came every second, have stopped as well."""

_REGULAR_TICKS = 10
_TICKER_GAP_S = 3.0

_SURPRISE = 20.0
"""So many mean intervals without a trade: at a steady pace a chance of e^-20."""


class Pace:
    """Counts the looks (about one a second) at which the symbol had traded since the last one.

    Looks and not trades: a hundred trades of one millisecond say little about the next lull.
    """

    __slots__ = (
        "_active", "_asked_s", "_at_s", "_base_s", "_patience", "_received", "_ticks", "_told_ns",
        "_told_s", "_weight", "last_s",
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
        self._ticks = 0  # looks in a row that found a newer ticker or kline
        self._told_ns = 0
        self._told_s = now_s

    def look(self, now_s: float, received: int, told_ns: int = 0) -> None:
        """Take a look: `received` is the number of trades of the symbol so far, `told_ns` when
        the newest ticker or kline came, by any clock."""
        elapsed_s = now_s - self._at_s
        if elapsed_s <= 0:
            return
        if told_ns != self._told_ns:
            self._ticks = self._ticks + 1 if now_s - self._told_s <= _TICKER_GAP_S else 1
            self._told_ns, self._told_s = told_ns, now_s
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

    def has_fallen_silent(self, now_s: float) -> bool:
        """Tell whether tickers and klines came regularly and have stopped, and trades as well, so
        that a check is due early."""
        return (
            self._ticks >= _REGULAR_TICKS
            and now_s - self._told_s > _TICKER_GAP_S
            and now_s - self._asked_s > TICKER_LIMIT_S * self._patience
        )

    def forgive(self, now_s: float) -> None:
        """The check has shown that the market is quiet: be more patient until the next trade."""
        self._patience = min(self._patience * 2, 64)
        self._asked_s = now_s
