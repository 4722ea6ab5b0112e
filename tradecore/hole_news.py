"""Tells whoever wants to know that holes were opened, filled, or closed as absent.

The ledger is read, not those who write it: several of them fill holes, also in other processes,
and only what is committed is true. Nothing is read while nobody wants to know.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Protocol

from tradecore.backfill.plan import missing
from tradecore.errors import TransientStoreError
from tradecore.store.holes import HoleFate
from tradecore.store.ledger import Span

LOOK_S = 2.0
"""Between two looks that nobody asked for."""
SPACING_S = 0.1
"""Between two looks at least."""

MAX_OPEN = 10_000
_MAX_TOLD = 1000


class Ledger(Protocol):
    """Where holes are read; raises TransientStoreError when that has to wait."""

    async def newest_open(self, limit: int) -> list[HoleFate]: ...
    async def hole_fates(self, symbol: str, first_id: int, last_id: int) -> list[HoleFate]: ...


class HoleNews:
    """`run` it; `opened` and `changed` make it look at once."""

    def __init__(
        self,
        ledger: Ledger,
        wanted: asyncio.Event,
        tell: Callable[[HoleFate], None],
    ) -> None:
        """`wanted` is set while anybody wants to know; `tell` is called with each piece of news."""
        self._ledger = ledger
        self._wanted = wanted
        self._tell = tell
        self._told: list[tuple[str, int, int]] = []
        self._woken = asyncio.Event()
        self._known: dict[str, list[Span]] | None = None

    def opened(self, holes: Iterable[tuple[str, int, int]]) -> None:
        """Take holes that a commit has just opened; they may be filled by the time of the look."""
        if self._wanted.is_set():
            room = _MAX_TOLD - len(self._told)
            self._told += islice(holes, room)
            self._woken.set()

    def changed(self, _what: object = None) -> None:
        """Take note that some hole may have been filled or closed."""
        if self._wanted.is_set():
            self._woken.set()

    async def run(self) -> None:
        """Look and tell until cancelled."""
        while True:
            await self._wanted.wait()
            self._known = None
            while self._wanted.is_set():
                with suppress(TransientStoreError):  # the flusher meets it too, and reports it
                    await self.look()
                await asyncio.sleep(SPACING_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._woken.wait()

    async def look(self) -> None:
        """Tell what has changed since the last look; before the first only what was told of.

        Raises TransientStoreError; nothing was told then, and the next look tells it.
        """
        self._woken.clear()
        told = list(self._told)
        known = {symbol: list(spans) for symbol, spans in (self._known or {}).items()}
        news: list[HoleFate] = []
        for symbol, first_id, last_id in told:
            span = Span(first_id, last_id)
            if missing(span, known.get(symbol, ())):
                fates = await self._ledger.hole_fates(symbol, *span)
                cause = fates[0].cause if fates else "unknown"
                news.append(HoleFate(symbol, *span, cause, "open"))
                known.setdefault(symbol, []).append(span)
        holes = await self._ledger.newest_open(MAX_OPEN)
        now: dict[str, list[Span]] = {}
        for hole in holes:
            now.setdefault(hole.symbol, []).append(Span(hole.first_id, hole.last_id))
        # With more of them, old ones come into view when new ones are filled: they are no news.
        if self._known is not None and len(holes) < MAX_OPEN:
            for hole in reversed(holes):
                for piece in missing(Span(hole.first_id, hole.last_id), known.get(hole.symbol, ())):
                    news.append(hole._replace(first_id=piece.first_id, last_id=piece.last_id))
        for symbol, spans in known.items():
            for span in spans:
                for piece in missing(span, now.get(symbol, ())):
                    news += await self._fates(symbol, piece)
        del self._told[: len(told)]
        self._known = now
        for one in news:
            self._tell(one)

    async def _fates(self, symbol: str, gone: Span) -> list[HoleFate]:
        """Return what has become of ids that are not open any more."""
        found = []
        for fate in await self._ledger.hole_fates(symbol, *gone):
            first_id = max(fate.first_id, gone.first_id)
            last_id = min(fate.last_id, gone.last_id)
            if fate.state != "open" and first_id <= last_id:
                found.append(fate._replace(first_id=first_id, last_id=last_id))
        return found
