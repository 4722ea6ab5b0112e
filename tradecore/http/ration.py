"""Lets what is asked for too often be answered again as it was a moment ago."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from tradecore.clock import mono_ns

SHARE = 0.1
"""So much of the loop goes into making answers at most; the rest is the capture's."""

AGE_LIMIT_S = 1.0

KEPT_MAX = 32
"""Answers; what was made longest ago is forgotten first."""

_T = TypeVar("_T")


class Ration:
    """Keeps the latest of each answer; `get` makes a new one when it is time.

    After one was made that took 2 ms the loop is left alone for 18 ms, whoever asks; but nothing is
    given out that was begun more than AGE_LIMIT_S ago. What `make` raises is not kept.
    """

    def __init__(self, now_ns: Callable[[], int] = mono_ns) -> None:
        self._now_ns = now_ns
        self._kept: dict[Hashable, tuple[Any, int]] = {}
        self._free_ns = 0

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Return the answer of `key`, which comes from a few known ones."""
        now_ns = self._now_ns()
        answer, begun_ns = self._kept.get(key, (None, 0))
        if begun_ns and now_ns < min(self._free_ns, begun_ns + int(AGE_LIMIT_S * 1e9)):
            return answer  # type: ignore[no-any-return]
        answer = make()
        end_ns = self._now_ns()
        self._kept.pop(key, None)
        if len(self._kept) >= KEPT_MAX:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = answer, now_ns
        self._free_ns = end_ns + int((end_ns - now_ns) * (1 / SHARE - 1))
        return answer
