"""Answers questions of others from connections of its own, so that they never take the capture's.

Few of them, opened when somebody asks, and a short queue before them: whoever comes when it is
full is told so at once, and nobody waits longer than WAIT_LIMIT_S.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg

from tradecore.errors import TransientStoreError
from tradecore.store.dsn import Dsn
from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.pool import open_reading_pool
from tradecore.store.queries import CandleTables, candle_tables

READERS = 3
"""Questions that are answered at once; more would take the cores from whoever stores."""

WAITING_MAX = 64
WAIT_LIMIT_S = 2.0
STATEMENT_LIMIT_S = 4.0
"""How long the server works on one statement."""
_CLOSE_LIMIT_S = 2.0


class BusyError(TransientStoreError):
    """Too many questions at once: ask again later."""

    def __init__(self) -> None:
        super().__init__("busy", "too many questions wait for the database")


class Reader:
    """Lends connections for reading; costs nothing while nobody asks."""

    def __init__(self, dsn: Callable[[], str | Dsn]) -> None:
        """`dsn` names the database of this moment, or raises TransientStoreError."""
        self._dsn = dsn
        self._slots = asyncio.Semaphore(READERS)
        self._waiting = 0
        self._opening = asyncio.Lock()
        self._pool: asyncpg.Pool | None = None
        self._opened: str | Dsn | None = None
        self._tables: CandleTables | None = None

    @property
    def tables(self) -> CandleTables:
        """What to read candles from; known within a session."""
        assert self._tables is not None
        return self._tables

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """Lend a connection for a few statements, outside of a transaction.

        Raises BusyError when too many wait or it takes too long to come to one, and
        TransientStoreError for whatever the database has against a statement.
        """
        await self._enter()
        try:
            pool = await self._open()
            async with pool.acquire(timeout=WAIT_LIMIT_S) as conn:
                if self._tables is None:
                    self._tables = await candle_tables(conn)
                yield conn
        except TROUBLE as exc:
            raise as_transient(exc, "answer a question") from exc
        finally:
            self._slots.release()

    async def _enter(self) -> None:
        if self._waiting >= WAITING_MAX:
            raise BusyError
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_LIMIT_S):
                await self._slots.acquire()
        except TimeoutError:
            raise BusyError from None
        finally:
            self._waiting -= 1

    async def _open(self) -> asyncpg.Pool:
        dsn = self._dsn()
        async with self._opening:
            if self._pool is None or self._opened != dsn:
                await self.close()
                self._pool = await open_reading_pool(dsn, READERS, STATEMENT_LIMIT_S)
                self._opened = dsn
            return self._pool

    async def close(self) -> None:
        """Hang up; who asks later opens it again."""
        pool, self._pool = self._pool, None
        self._tables = None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), _CLOSE_LIMIT_S)
        except TROUBLE:
            pool.terminate()
