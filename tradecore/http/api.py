"""Opens what is below /api/ with the first request: a daemon that nobody asks pays nothing."""

import asyncio
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from tradecore.snapshot import Snapshot
from tradecore.store.dsn import Dsn

if TYPE_CHECKING:
    from tradecore.http.answers import Answers
    from tradecore.store.reader import Reader


class Api:
    """The handler of all paths below /api/; call `close` in the end."""

    def __init__(
        self,
        dsn: Callable[[], str | Dsn],
        captured: Callable[[], Sequence[str]],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        """`dsn` is the open database's, or raises TransientStoreError."""
        self._dsn = dsn
        self._captured = captured
        self._snapshot = snapshot
        self._answers: Answers | None = None
        self._reader: Reader | None = None
        self._loading = asyncio.Lock()

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        if self._answers is None:
            async with self._loading:
                await self._load()
        assert self._answers is not None
        return await self._answers.answer(request)

    async def _load(self) -> None:
        if self._answers is not None:
            return
        # In a thread: reading the modules takes longer than the loop may stand still.
        await asyncio.to_thread(importlib.import_module, "tradecore.http.answers")
        from tradecore.http.answers import Answers
        from tradecore.store.reader import Reader

        self._reader = Reader(self._dsn)
        self._answers = Answers(self._reader, self._captured, self._snapshot)

    async def close(self) -> None:
        """Hang up on the database."""
        if self._reader is not None:
            await self._reader.close()
