import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from conftest import replace_database

from tradecore.errors import StoreError
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.pool import (
    classify_connect_error,
    connect,
    describe_server,
    open_pool,
    read_timescale,
)
from tradecore.store.rights import of_another_role
from tradecore.store.transaction import session


async def failure(dsn: str) -> tuple[str, str]:
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)) as caught:
        await open_pool(dsn, 1, connect_limit_s=5)
    return classify_connect_error(caught.value)


def with_role(dsn: str, role: str) -> str:
    return dsn.replace("tradecore@", f"{role}@")


@pytest.fixture
async def guarded_server(pg_server: EmbeddedPostgres) -> AsyncIterator[str]:
    """DSN of a server where alice needs a password, bob is let in and carol is not."""
    connection = await asyncpg.connect(pg_server.dsn)
    await connection.execute(
        "CREATE ROLE alice LOGIN PASSWORD 'right'; CREATE ROLE bob LOGIN; CREATE ROLE carol LOGIN"
    )
    await connection.execute("CREATE DATABASE closed")
    await connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    rules = (
        "local all tradecore trust",
        "local all alice scram-sha-256",
        "local all bob trust",
        "local all nobody_here trust",
        "local all carol reject",
    )
    hba = Path(await connection.fetchval("SHOW hba_file"))
    await asyncio.to_thread(hba.write_text, "\n".join(rules) + "\n")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.execute("REVOKE CONNECT ON DATABASE closed FROM public")
    await connection.close()
    yield pg_server.dsn


async def test_the_sessions_of_a_pool(database: str) -> None:
    async with await open_pool(f"{database}&lock_timeout=7s&timezone=Asia/Tokyo", 3) as pool:
        assert pool.get_size() == 1
        assert pool.get_max_size() == 3
        settings = {
            row["name"]: row["setting"]
            for row in await pool.fetch(
                "SELECT name, current_setting(name) AS setting FROM pg_settings"
            )
        }
    assert settings["application_name"] == "tradecore"
    assert settings["statement_timeout"] == "50s"
    assert settings["idle_in_transaction_session_timeout"] == "1min"
    assert settings["jit"] == "off"
    assert settings["lock_timeout"] == "7s"  # what the DSN says wins
    assert settings["TimeZone"] == "UTC"  # but for this


async def test_a_session_leaves_nothing_behind(database: str) -> None:
    state = """
        SELECT current_setting('lock_timeout'),
               (SELECT count(*) FROM pg_locks
                WHERE locktype = 'advisory' AND pid = pg_backend_pid())
    """
    async with await open_pool(database, 1) as pool:
        before = await pool.fetchrow(state)
        with contextlib.suppress(ZeroDivisionError):
            async with session(pool, 5) as conn:
                await conn.execute("SET lock_timeout = '1s'; SELECT pg_advisory_lock(1)")
                changed = await conn.fetchrow(state)
                raise ZeroDivisionError
        assert tuple(changed) == ("1s", before[1] + 1)
        assert await pool.fetchrow(state) == before

        # A session that is cancelled in the middle of a statement.
        async def wait() -> None:
            async with session(pool, 5) as conn:
                await conn.execute("SET lock_timeout = '1s'; SELECT pg_advisory_lock(1)")
                locked.set()
                await conn.execute("SELECT pg_sleep(60)")

        locked = asyncio.Event()
        task = asyncio.create_task(wait())
        await asyncio.wait_for(locked.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            while await pool.fetchrow(state) != before:
                await asyncio.sleep(0.02)


async def test_a_statement_has_a_time_limit(database: str) -> None:
    async with await open_pool(database, 1, command_limit_s=0.2) as pool:
        with pytest.raises(TimeoutError):
            await pool.execute("SELECT pg_sleep(30)")
        assert await pool.fetchval("SELECT 1") == 1


async def test_wrong_settings_are_fatal(guarded_server: str) -> None:
    async def fatal(dsn: str) -> str:
        kind, sentence = await failure(dsn)
        assert kind == "fatal", sentence
        return sentence

    assert "password in DATABASE_URL" in await fatal(with_role(guarded_server, "alice:wrong"))
    assert "pg_hba.conf" in await fatal(with_role(guarded_server, "carol"))
    assert "role must exist" in await fatal(with_role(guarded_server, "nobody_here"))
    assert "CREATE DATABASE" in await fatal(replace_database(guarded_server, "nothing"))
    closed = replace_database(with_role(guarded_server, "bob"), "closed")
    assert "GRANT CONNECT" in await fatal(closed)
    assert "does not exist" in await fatal(f"{guarded_server}&nonsense=1")
    assert "wrong value" in await fatal(f"{guarded_server}&work_mem=lots")
    with pytest.raises(StoreError, match="password in DATABASE_URL"):
        await connect(with_role(guarded_server, "alice:wrong"))
    right = await connect(with_role(guarded_server, "alice:right"))
    await right.close()


async def test_bad_moments_are_not_fatal(pg_server: EmbeddedPostgres) -> None:
    connection = await asyncpg.connect(pg_server.dsn)
    await connection.execute("CREATE ROLE alice LOGIN; ALTER DATABASE tradecore CONNECTION LIMIT 0")
    await connection.close()
    kind, sentence = await failure(with_role(pg_server.dsn, "alice"))
    assert kind == "down"
    assert "53300" in sentence
    await pg_server.stop()
    assert (await failure(pg_server.dsn))[0] == "down"
    with pytest.raises(StoreError, match="cannot be reached"):
        await connect(pg_server.dsn)


async def test_a_host_that_is_not_there(unused_tcp_port: int) -> None:
    assert (await failure(f"postgresql://u@127.0.0.1:{unused_tcp_port}/d"))[0] == "down"

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError) as caught:
            await open_pool(f"postgresql://u@127.0.0.1:{port}/d", 1, connect_limit_s=0.2)
    assert classify_connect_error(caught.value).kind == "down"


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (asyncpg.CannotConnectNowError("the database system is starting up"), "down"),
        (asyncpg.AdminShutdownError("terminating"), "down"),
        (asyncpg.DiskFullError("no space left"), "down"),
        (asyncpg.ConnectionDoesNotExistError("closed in the middle"), "down"),
        (asyncpg.TargetServerAttributeNotMatched("no primary"), "down"),
        (asyncpg.ProtocolViolationError("unsupported startup parameter"), "fatal"),
        (asyncpg.ObjectNotInPrerequisiteStateError("not accepting connections"), "fatal"),
        (asyncpg.ClientConfigurationError("no certificate"), "fatal"),
        (asyncpg.InterfaceError("authentication method not supported"), "fatal"),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), "down"),
        (socket.gaierror(socket.EAI_NONAME, "not known"), "fatal"),
        (PermissionError(13, "Permission denied"), "fatal"),
        (ConnectionResetError(104, "reset"), "down"),
        (ssl.SSLError(1, "unexpected eof"), "down"),
        (OSError("Multiple exceptions: refused, refused"), "down"),
        (ConnectionError('PostgreSQL server at "h:1" rejected SSL upgrade'), "fatal"),
        (ConnectionError("unexpected connection_lost() call"), "down"),
    ],
)
def test_each_kind_of_failure(exc: Exception, kind: str) -> None:
    found = classify_connect_error(exc)
    assert found.kind == kind
    assert found.sentence.startswith("the database cannot be reached: ") is (kind == "down")


def test_a_bug_is_not_a_failed_connect() -> None:
    with pytest.raises(KeyError):
        classify_connect_error(KeyError("x"))


@pytest.fixture
def untrusted(tmp_path: Path) -> ssl.SSLContext:
    """A server's context with a certificate that it signed itself."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    request = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run(
        [*request, "-keyout", "key", "-out", "crt"], cwd=tmp_path, check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    return context


async def test_an_untrusted_certificate_is_fatal(untrusted: ssl.SSLContext) -> None:
    hung_up = asyncio.Event()

    async def speak_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(b"S")
        with contextlib.suppress(OSError):
            await writer.start_tls(untrusted)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        hung_up.set()

    async with await asyncio.start_server(speak_tls, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        kind, sentence = await failure(f"postgresql://u@localhost:{port}/d?sslrootcert=system")
        await hung_up.wait()
    assert kind == "fatal"
    assert "certificate" in sentence


async def test_describe_a_server(migrated_database: str) -> None:
    connection = await connect(migrated_database)
    info = await describe_server(connection)
    assert info.problems == ()
    assert int(info.version.split(".")[0]) == connection.get_server_version().major
    assert (info.schema, info.encoding, info.time_zone) == ("public", "UTF8", "UTC")
    assert not info.standby
    timescale = await read_timescale(connection)
    assert timescale.version == info.timescale_version
    assert (info.edition == "plain") is (timescale.version is None)
    assert timescale.preloaded or not timescale.version
    await connection.close()


async def test_describe_what_is_missing(guarded_server: str) -> None:
    owner = await connect(guarded_server)
    await owner.execute(
        "CREATE TABLE tickers (a int); CREATE TABLE candles_5m (a int);"
        " CREATE TABLE raw_trades (a int) PARTITION BY RANGE (a);"
        " CREATE TABLE raw_trades_1 PARTITION OF raw_trades FOR VALUES FROM (1) TO (2);"
        " REVOKE TEMP ON DATABASE tradecore FROM public;"
        " ALTER ROLE bob SET default_transaction_read_only = on"
    )
    await owner.close()
    connection = await connect(with_role(guarded_server, "bob"))
    problems = "\n".join((await describe_server(connection)).problems)
    await connection.close()
    assert "GRANT CREATE ON SCHEMA public TO bob" in problems
    assert "GRANT TEMP ON DATABASE tradecore TO bob" in problems
    for table in ("tickers", "candles_5m", "raw_trades", "raw_trades_1"):
        assert f"ALTER TABLE {table} OWNER TO bob" in problems
    assert "default_transaction_read_only" in problems
    connection = await connect(f"{with_role(guarded_server, 'bob')}&search_path=nothing")
    assert "search_path" in "\n".join((await describe_server(connection)).problems)
    await connection.close()
    connection = await asyncpg.connect(replace_database(guarded_server, "latin"))
    assert "UTF8" in "\n".join((await describe_server(connection)).problems)
    await connection.close()


async def test_many_tables_of_another_role_are_given_over_at_once(guarded_server: str) -> None:
    """As after a restore by a superuser: what is said, psql can run."""
    owner = await connect(guarded_server)
    await owner.execute(
        "CREATE TABLE tickers (a int) PARTITION BY RANGE (a);"
        + "".join(
            f"CREATE TABLE tickers_{i} PARTITION OF tickers FOR VALUES FROM ({i}) TO ({i + 1});"
            for i in range(9)
        )
    )
    connection = await connect(with_role(guarded_server, "bob"))
    (problem,) = await of_another_role(connection, "bob")
    assert problem.startswith("10 tables belong to another role (tickers, ")
    query = problem[problem.index("SELECT") :].removesuffix(" \\gexec")
    for row in await owner.fetch(query):
        await owner.execute(row[0])
    assert await of_another_role(connection, "bob") == []
    await owner.close()
    await connection.close()
