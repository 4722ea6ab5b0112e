"""Lets what is asked for too often be answered again as it was a moment ago."""

import asyncio
from collections import defaultdict
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
    given out that was begun more than AGE_LIMIT_S ago, unless its making ended after it was asked
    for: who waits for an answer that is being made takes that one, however long it takes. What
    `make` raises is not kept.
    """

    def __init__(self, now_ns: Callable[[], int] = mono_ns) -> None:
        self._now_ns = now_ns
        self._kept: dict[Hashable, tuple[Any, int, int]] = {}  # with begin and end of its making
        self._free_ns = 0
        # One for each key: what is made in many slices must not hold up what takes one.
        self._making: defaultdict[Hashable, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, key: Hashable, make: Callable[[], Making[_T]]) -> _T:
        """Return the answer of `key`, which comes from a few known ones."""
        asked_ns = self._now_ns()
        if not self._is_good(key, asked_ns):
            async with self._making[key]:
                if not self._is_good(key, asked_ns):  # else somebody else has just had it made
                    await self._renew(key, make())
        answer: _T = self._kept[key][0]
        return answer

    def _is_good(self, key: Hashable, asked_ns: int) -> bool:
        if key not in self._kept:
            return False
        _, begun_ns, made_ns = self._kept[key]
        limit_ns = min(self._free_ns, begun_ns + int(AGE_LIMIT_S * 1e9))
        return made_ns > asked_ns or self._now_ns() < limit_ns

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
        made_ns = self._now_ns()
        self._kept[key] = answer, begun_ns, made_ns
        self._free_ns = made_ns + int(took_ns * (1 / SHARE - 1))
