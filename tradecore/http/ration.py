"""Lets what is asked for too often be answered again as it was a moment ago."""

import asyncio
from collections.abc import Callable, Generator, Hashable
from typing import Any, TypeVar

from tradecore.clock import mono_ns

SHARE = 0.1
"""So much of the loop goes into making answers at most; the rest is the capture's."""

AGE_LIMIT_S = 1.0

KEPT_MAX = 32
"""Answers; what was made longest ago is forgotten first."""

_T = TypeVar("_T")

Making = Generator[None, None, _T]
"""Makes an answer; wherever it yields the loop may do other things first."""


class Ration:
    """Keeps the latest of each answer; `get` makes a new one when it is time.

    After one was made that took 2 ms the loop is left alone for 18 ms, whoever asks; but nothing is
    given out that was begun more than AGE_LIMIT_S ago. What `make` raises is not kept.
    """

    def __init__(self, now_ns: Callable[[], int] = mono_ns) -> None:
        self._now_ns = now_ns
        self._kept: dict[Hashable, tuple[Any, int]] = {}
        self._free_ns = 0
        self._making = asyncio.Lock()

    async def get(self, key: Hashable, make: Callable[[], Making[_T]]) -> _T:
        """Return the answer of `key`, which comes from a few known ones."""
        if not self._is_good(key):
            async with self._making:
                if not self._is_good(key):  # else somebody else has just had it made
                    await self._renew(key, make())
        answer: _T = self._kept[key][0]
        return answer

    def _is_good(self, key: Hashable) -> bool:
        _, begun_ns = self._kept.get(key, (None, 0))
        limit_ns = min(self._free_ns, begun_ns + int(AGE_LIMIT_S * 1e9))
        return bool(begun_ns) and self._now_ns() < limit_ns

    async def _renew(self, key: Hashable, making: Making[Any]) -> None:
        begun_ns, took_ns = self._now_ns(), 0
        while True:
            slice_ns = self._now_ns()
            try:
                next(making)
            except StopIteration as made:
                answer = made.value
                break
            finally:
                took_ns += self._now_ns() - slice_ns
            await asyncio.sleep(0)
        self._kept.pop(key, None)
        if len(self._kept) >= KEPT_MAX:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = answer, begun_ns
        self._free_ns = self._now_ns() + int(took_ns * (1 / SHARE - 1))
