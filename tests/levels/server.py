"""Servers that give each test a database of its own."""

import asyncio
import fcntl
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import migrate

FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_connections": "60",
    "max_wal_size": "256MB",
}
"""Server settings for tests that kill no server."""

CACHE = Path(__file__).parents[2] / ".venv" / "levels"
"""What `make levels` downloads; `make clean` removes it."""

_MEMORY_BYTES = 4 << 30


class UnavailableError(Exception):
    """This machine cannot have the server; the text says why and what would help."""


class Server(Protocol):
    """A running server."""

    dsn: str
    """Of its administrative database."""

    def database(self, *, migrated: bool) -> AbstractAsyncContextManager[str]:
        """Give the DSN of a fresh database, empty or with all tables, that ends with the body."""

    def stop(self) -> None: ...


class PostgresServer:
    """A real server, one database a test: copies of a migrated one, which is fast."""

    def __init__(self, dsn: str, stop: Callable[[], None] = lambda: None) -> None:
        self.dsn = dsn
        self._stop = stop
        self._template: str | None = None
        self._tag = secrets.token_hex(4)  # the server may have other users
        self._numbers = itertools.count()

    @asynccontextmanager
    async def database(self, *, migrated: bool) -> AsyncIterator[str]:
        if migrated and self._template is None:
            self._template = await self._make_template()
        name = f"tc_test_{self._tag}_{next(self._numbers)}"
        template = self._template if migrated else "template0"
        await administer(self.dsn, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        try:
            yield replace_database(self.dsn, name)
        finally:
            await administer(self.dsn, f"DROP DATABASE {name} WITH (FORCE)")

    async def _make_template(self) -> str:
        name = f"tc_template_{self._tag}"
        await administer(self.dsn, f"CREATE DATABASE {name} TEMPLATE template0")
        connection = await asyncpg.connect(replace_database(self.dsn, name))
        try:
            await migrate(connection)
        finally:
            await connection.close()
        # The scheduler of TimescaleDB would connect, and a database in use cannot be copied.
        await administer(
            self.dsn,
            f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            f" WHERE datname = '{name}'",
        )
        return name

    def stop(self) -> None:
        if self._template is not None:
            drop = f"DROP DATABASE {self._template} WITH (FORCE)"
            asyncio.run(administer(self.dsn, drop))
        self._stop()


def embedded_server() -> PostgresServer:
    """Start a server of our own, without TimescaleDB."""
    folder = make_folder()
    server = EmbeddedPostgres(folder, settings=FAST)

    def stop() -> None:
        asyncio.run(server.stop())
        shutil.rmtree(folder)

    try:
        return PostgresServer(asyncio.run(server.start()), stop)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time make the part `name` of the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_folder() -> Path:
    """Make a folder with a short path for a server that is thrown away.

    In memory where there is room: the hundreds of files of a database are copied for each test.
    """
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _MEMORY_BYTES
    folder = Path(tempfile.mkdtemp(prefix="tc-", dir=memory if roomy else None))
    folder.chmod(0o711)
    return folder


def replace_database(dsn: str, database: str) -> str:
    """Return `dsn` with another database name."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{database}"))


async def administer(dsn: str, *statements: str) -> None:
    """Run the statements, each in a transaction of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()
