"""When the market, or one symbol of it, stands still.

A pause shifts the trades that would have come later, ids unchanged: nothing is printed with a time
inside it, and what follows is the same trades as without it. So a paused market is a quiet one to
whoever looks: empty candles, tickers that stand, and no burst afterwards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ALL = "*"
"""Stands for every symbol."""
FAR_US = 4 * 10**18
"""The end of a pause that has none yet."""

Span = tuple[int, int]
"""From (inclusive) and to (exclusive), in microseconds since 1970."""


class Pauses:
    """The pauses of each symbol; `given` maps symbols (or `*`) to [from, to or None] pairs."""

    def __init__(self, given: Mapping[str, Sequence[Sequence[int | None]]] | None = None) -> None:
        self._given: dict[str, list[Span]] = {
            symbol: [(int(a or 0), FAR_US if b is None else b) for a, b in spans]
            for symbol, spans in (given or {}).items()
        }
        self._merged: dict[str, tuple[Span, ...]] = {}

    def arguments(self) -> dict[str, list[list[int | None]]]:
        """Return what rebuilds this, fit for JSON."""
        return {
            symbol: [[a, None if b == FAR_US else b] for a, b in spans]
            for symbol, spans in self._given.items()
        }

    def add(self, symbol: str, from_us: int, to_us: int | None = None) -> None:
        """Pause a symbol, or `*`, from a moment on; without `to_us` until `end` is called."""
        self._given.setdefault(symbol, []).append((from_us, FAR_US if to_us is None else to_us))
        self._merged.clear()

    def end(self, symbol: str, at_us: int) -> None:
        """End what is paused without an end: `symbol`, or with `*` everything."""
        for name, spans in self._given.items():
            if symbol in (ALL, name):
                spans[:] = [(a, max(a, at_us) if b == FAR_US else b) for a, b in spans]
        self._merged.clear()

    def of(self, symbol: str) -> tuple[Span, ...]:
        """Return the pauses that hold for a symbol, in order and disjoint."""
        if symbol not in self._merged:
            spans: list[Span] = []
            for a, b in sorted(self._given.get(ALL, []) + self._given.get(symbol, [])):
                if spans and a <= spans[-1][1]:
                    spans[-1] = (spans[-1][0], max(b, spans[-1][1]))
                else:
                    spans.append((a, b))
            self._merged[symbol] = tuple(spans)
        return self._merged[symbol]

    def inner_us(self, symbol: str, at_us: int) -> int:
        """Return the latest time, in a market without pauses, of what is printed by `at_us`."""
        shift = 0
        for a, b in self.of(symbol):
            if at_us < a:
                break
            if at_us < b:
                return a - 1 - shift
            shift += b - a
        return at_us - shift

    def outer_us(self, symbol: str, times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return when trades are printed whose times in a market without pauses are these."""
        for a, b in self.of(symbol):
            times = np.where(times >= a, times + (b - a), times)
        return times


def described(pauses: Pauses) -> dict[str, Any]:
    """Return the pauses for `Market.arguments`: nothing when there are none."""
    given = pauses.arguments()
    return {"pauses": given} if given else {}
