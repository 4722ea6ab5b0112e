"""One transaction on a connection of the pool: it ends with COMMIT or leaves nothing behind."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg
from asyncpg.protocol import NO_TIMEOUT

from tradecore._copyenc import CopySlices
from tradecore.errors import TransientStoreError
from tradecore.store.statements import BEGIN, affected

_ROLLBACK_LIMIT_S = 5.0


@asynccontextmanager
async def transaction(pool: asyncpg.Pool, limit_s: float) -> AsyncIterator[asyncpg.Connection]:
    """Run the body in a transaction; `limit_s` is how long to wait for a connection.

    Raises TransientStoreError when the connection ended, whatever the body met because of that:
    after the body's end it is not known then whether the COMMIT was done.
    """
    conn = await pool.acquire(timeout=limit_s)
    try:
        await conn.execute(BEGIN)
        yield conn
        await conn.execute("COMMIT")
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
