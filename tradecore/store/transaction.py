"""A connection of the pool for one transaction, which ends with COMMIT or leaves nothing behind,
or as a session, which leaves no setting and no lock behind.
"""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress

import asyncpg
from asyncpg.protocol import NO_TIMEOUT

from tradecore._copyenc import CopySlices
from tradecore.errors import StoreError, TransientStoreError
from tradecore.store.statements import affected, begin

_ROLLBACK_LIMIT_S = 5.0


@asynccontextmanager
async def session(pool: asyncpg.Pool, limit_s: float) -> AsyncIterator[asyncpg.Connection]:
    """Lend a connection whose settings and session locks the body may change.

    They are undone at its end. The pool does not do that by itself: it would cost every batch of
    trades a trip to the server. `limit_s` is how long to wait for a connection.
    """
    conn = await pool.acquire(timeout=limit_s)
    try:
        yield conn
    finally:
        try:
            if _is_open(conn):
                await conn.reset(timeout=_ROLLBACK_LIMIT_S)
        except BaseException:
            conn.terminate()
            raise
        finally:
            await pool.release(conn)


@asynccontextmanager
async def transaction(
    pool: asyncpg.Pool, limit_s: float, symbols: Collection[str] = ()
) -> AsyncIterator[asyncpg.Connection]:
    """Run the body in a transaction; `limit_s` is how long to wait for a connection.

    It begins by locking the lock rows of `symbols`: TransientStoreError ("symbols") when one has
    none. Raises TransientStoreError when the connection ended, whatever the body met because of
    that: after the body's end it is not known then whether the COMMIT was done.
    """
    # As a time limit of acquire's own, without the task that asyncpg makes for it.
    async with asyncio.timeout(limit_s):
        conn = await pool.acquire()
    try:
        check_locked(await conn.execute(begin(symbols)), symbols)
        yield conn
        if (status := await conn.execute("COMMIT")) != "COMMIT":
            raise StoreError(f"the transaction ended with {status}: nothing of it is stored")
    except Exception as exc:
        if not _is_open(conn):
            raise TransientStoreError("connection", f"the connection ended: {exc}") from exc
        await _roll_back(conn)
        raise
    except BaseException:
        # Cancelled: nothing may be awaited now, and the session must not outlive us.
        if _is_open(conn):
            conn.terminate()
        raise
    finally:
        await pool.release(conn)


def check_locked(status: str, symbols: Collection[str]) -> None:
    """Raise TransientStoreError when the LOCK that ended with `status` found too few rows."""
    if symbols and affected(status) < len(symbols):
        raise TransientStoreError(
            "symbols", "rows of trade_symbols are missing: they are made anew"
        )


async def copy_slices(
    conn: asyncpg.Connection, table: str, columns: tuple[str, ...], slices: CopySlices
) -> int:
    """COPY the slices into `table`; return how many rows the server took."""

    async def one_by_one() -> AsyncIterator[memoryview]:
        for piece in slices:
            yield piece

    # Without a limit of its own: asyncpg would make a task for each slice. The caller has one.
    status = await conn.copy_to_table(
        table, source=one_by_one(), columns=columns, format="binary", timeout=NO_TIMEOUT
    )
    return affected(status)


async def _roll_back(conn: asyncpg.Connection) -> None:
    """End the transaction; a connection that cannot even do that is dropped."""
    done = False
    try:
        with suppress(
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            OSError,
            TimeoutError,
        ):
            await conn.execute("ROLLBACK", timeout=_ROLLBACK_LIMIT_S)
            done = True
    finally:
        if not done and _is_open(conn):
            conn.terminate()


def _is_open(conn: asyncpg.Connection) -> bool:
    try:
        return not conn.is_closed()
    except asyncpg.InterfaceError:  # the pool has taken the dead connection back already
        return False
