"""Finds the symbols whose trades are printed and do not come: their stream is dead here.

Pure state, one object a session. Which symbols are behind at all, the listener tells.
"""

from collections.abc import Iterable
from typing import NamedTuple


class _Lag(NamedTuple):
    mine: int
    """The last trade id of this connection when it was noticed."""
    theirs: int
    """The newest known then."""
    waited_s: float


class Behind:
    """One trade may be lost; that more and more are printed and none comes is a dead stream.

    `limit_s`: how long that may go on, in seconds during which data could have been read.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lags: dict[int, _Lag] = {}

    def look(self, passed_s: float, found: Iterable[tuple[int, int, int]]) -> list[int]:
        """Take (symbol id, last id here, newest id known) of all that are behind, `passed_s` after
        the last look; return the symbols whose stream is dead."""
        lags: dict[int, _Lag] = {}
        dead: list[int] = []
        for symbol_id, mine, theirs in found:
            lag = self._lags.get(symbol_id)
            if lag is None or lag.mine != mine:
                lags[symbol_id] = _Lag(mine, theirs, 0.0)
                continue
            waited_s = lag.waited_s + passed_s
            lags[symbol_id] = lag._replace(waited_s=waited_s)
            if theirs > lag.theirs and waited_s > self._limit_s:
                dead.append(symbol_id)
        self._lags = lags
        return dead
