"""A private PostgreSQL for the tests: one server a session, one empty database a test.

TRADECORE_TEST_DSN names a server to use instead; its role must be allowed to create databases.
"""

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from store_desk import Database

from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import detect_level, migrate
from tradecore.store.pool import open_pool

FAST = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off", "max_connections": "60"}
"""Server settings for tests that kill no server."""

_counter = itertools.count()


def replace_database(dsn: str, database: str) -> str:
    """Return `dsn` with another database name."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{database}"))


async def _administer(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
def terminal() -> tuple[int, int]:
    """File descriptors of a new pseudo-terminal: ours and the program's; the test closes both."""
    try:
        return os.openpty()
    except OSError as exc:
        pytest.skip(f"no pseudo-terminal to be had here: {exc}")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder with a short path (a unix socket fits) that every OS user can cross."""
    folder = Path(tempfile.mkdtemp(prefix="tc-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """DSN of the administrative database of the session's server."""
    if given := os.environ.get("TRADECORE_TEST_DSN"):
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="tc-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder, settings=FAST)
    try:
        yield asyncio.run(server.start())
    finally:
        asyncio.run(server.stop())
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def template(server_dsn: str) -> Iterator[str]:
    """Name of a migrated database, to be copied."""
    name = f"tc_template_{os.getpid()}"

    async def build() -> None:
        await _administer(server_dsn, f"CREATE DATABASE {name} TEMPLATE template0")
        connection = await asyncpg.connect(replace_database(server_dsn, name))
        try:
            await migrate(connection)
        finally:
            await connection.close()
        # The scheduler of TimescaleDB would connect, and a database in use cannot be copied.
        await _administer(
            server_dsn,
            f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            f" WHERE datname = '{name}'",
        )

    asyncio.run(build())
    yield name
    asyncio.run(_administer(server_dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def plain_level(connection: asyncpg.Connection) -> None:
    """Skip on a server with TimescaleDB: the test is about native partitions."""
    if await detect_level(connection) != "plain":
        pytest.skip("is about native partitions, and this server has TimescaleDB")


async def _fresh_database(server_dsn: str, template: str) -> AsyncIterator[str]:
    name = f"tc_test_{os.getpid()}_{next(_counter)}"
    await _administer(server_dsn, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    yield replace_database(server_dsn, name)
    await _administer(server_dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database(server_dsn: str) -> AsyncIterator[str]:
    """DSN of a fresh and empty database."""
    async for dsn in _fresh_database(server_dsn, "template0"):
        yield dsn


@pytest.fixture
async def migrated_database(server_dsn: str, template: str) -> AsyncIterator[str]:
    """DSN of a fresh database with all tables."""
    async for dsn in _fresh_database(server_dsn, template):
        yield dsn


@pytest.fixture
async def connection(migrated_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a fresh database with all tables."""
    connection = await asyncpg.connect(migrated_database)
    yield connection
    await connection.close()


@pytest.fixture
async def pg_server(short_dir: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A server of the test's own, running, for outages: `await pg_server.stop()` and `.start()`.

    Its database (`pg_server.dsn`, the same after every start) has no tables yet.
    """
    server = EmbeddedPostgres(short_dir, settings={"autovacuum": "off"})
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def db(migrated_database: str) -> AsyncIterator[Database]:
    """A fresh database with its sink; see `store_desk`."""
    pool = await open_pool(migrated_database, 4)
    conn = await asyncpg.connect(migrated_database)
    yield Database(migrated_database, pool, conn)
    await conn.close()
    await asyncio.wait_for(pool.close(), 10)
