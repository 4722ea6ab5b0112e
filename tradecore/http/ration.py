"""Lets what is asked for too often be answered again as it was a moment ago."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from tradecore.clock import mono_ns

SHARE = 0.1
"""So much of the loop goes into making answers at most; the rest is the capture's."""

AGE_LIMIT_S = 1.0

_T = TypeVar("_T")


class Ration:
    """Keeps the latest of each answer; `get` makes a new one when it is time.

    After one was made that took 2 ms the loop is left alone for 18 ms, whoever asks; but nothing is
    given out that is older than AGE_LIMIT_S. What `make` raises is not kept.
    """

    def __init__(self, now_ns: Callable[[], int] = mono_ns) -> None:
        self._now_ns = now_ns
        self._kept: dict[Hashable, tuple[Any, int]] = {}
        self._free_ns = 0

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Return the answer of `key`, of which there must be few: they are kept for good."""
        begin_ns = self._now_ns()
        answer, made_ns = self._kept.get(key, (None, 0))
        if made_ns and begin_ns < min(self._free_ns, made_ns + int(AGE_LIMIT_S * 1e9)):
            return answer  # type: ignore[no-any-return]
        answer = make()
        end_ns = self._now_ns()
        self._kept[key] = answer, end_ns
        self._free_ns = end_ns + int((end_ns - begin_ns) * (1 / SHARE - 1))
        return answer
