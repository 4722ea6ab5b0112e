"""TLS with a real PostgreSQL: who is believed, who is not, and what the operator is told."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from tls_server import Authority, make_cluster, openssl, plain_dsn, server_with_tls, tls_server

from tradecore.errors import StoreError, TransientStoreError
from tradecore.store.dsn import parse_dsn
from tradecore.store.pool import connect, open_reading_pool
from tradecore.store.reader import Reader

SERVER = server_with_tls()

pytestmark = [
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is absent"),
    pytest.mark.skipif(SERVER is None, reason="a PostgreSQL with TLS (apt: postgresql) is absent"),
]

TLS = """
    SELECT ssl AND version IN ('TLSv1.2', 'TLSv1.3')
    FROM pg_stat_ssl WHERE pid = pg_backend_pid()
"""


@pytest.fixture(scope="module")
def ours() -> Iterator[Authority]:
    folder = Path(tempfile.mkdtemp(prefix="tc-"))
    yield Authority(folder, "ours")
    shutil.rmtree(folder)


@pytest.fixture
async def cluster(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRADECORE_PG_BIN", str(SERVER))
    await make_cluster(short_dir)
    return short_dir


async def is_encrypted(dsn: str) -> bool:
    connection = await connect(dsn)
    try:
        return bool(await connection.fetchval(TLS))
    finally:
        await connection.close()


async def refused(dsn: str) -> str:
    with pytest.raises(StoreError) as caught:
        await connect(dsn)
    return str(caught.value)


async def test_who_is_believed(
    ours: Authority, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Authority(ours.folder, "others")
    pair = ours.sign("db", host="DNS:localhost")
    async with tls_server(cluster, pair) as port:
        named, numbered = plain_dsn(port, "localhost"), plain_dsn(port)
        full = f"?sslmode=verify-full&sslrootcert={ours.file}"
        assert await is_encrypted(named + full)
        assert await is_encrypted(numbered + f"?sslmode=verify-ca&sslrootcert={ours.file}")
        assert await is_encrypted(numbered + "?sslmode=require")
        assert await is_encrypted(numbered)  # without a word: encrypted, and nobody is verified

        wrong = await refused(named + f"?sslmode=verify-full&sslrootcert={others.file}")
        assert "is not to be trusted" in wrong
        assert "name the authority that signed it in sslrootcert=" in wrong
        assert "name the host in DATABASE_URL as the certificate does" in await refused(
            numbered + full
        )

        # The machine's store, with and without our authority in it.
        for asks in ("?sslmode=verify-full&sslrootcert=system", "?sslmode=verify-full"):
            assert "name the authority that signed it" in await refused(named + asks)
            with monkeypatch.context() as changed:
                changed.setenv("SSL_CERT_FILE", str(ours.file))
                assert await is_encrypted(named + asks)
                assert "name the host" in await refused(numbered + asks)

        # What clients of the API read with is the same.
        for dsn in (named + full, parse_dsn(named + full)):
            pool = await open_reading_pool(dsn, 1, 5.0)
            async with pool.acquire() as connection:
                assert await connection.fetchval(TLS)
            await pool.close()
        reader = Reader(lambda: parse_dsn(numbered + full))
        with pytest.raises(TransientStoreError, match="certificate"):
            async with reader.session():
                pass
        await reader.close()


async def test_a_certificate_that_has_ended(ours: Authority, cluster: Path) -> None:
    async with tls_server(cluster, ours.sign("db", host="DNS:localhost", days=-1)) as port:
        dsn = plain_dsn(port, "localhost") + f"?sslmode=verify-full&sslrootcert={ours.file}"
        text = await refused(dsn)
    assert "certificate has expired" in text
    assert "renew it at the server, or set the clock of this host" in text


async def test_a_server_without_tls(ours: Authority, cluster: Path) -> None:
    async with tls_server(cluster, None) as port:
        dsn = plain_dsn(port, "localhost")
        for asks in (
            "sslmode=require",
            f"sslmode=verify-full&sslrootcert={ours.file}",
            "sslmode=verify-full&sslrootcert=system",
        ):
            text = await refused(f"{dsn}?{asks}")
            assert "asks for TLS (sslmode) and the server has none; switch ssl on" in text
        connection = await connect(dsn)
        assert not await connection.fetchval(TLS)
        await connection.close()


async def test_a_client_may_show_a_certificate(ours: Authority, cluster: Path) -> None:
    certificate, key = ours.sign("certified")
    locked = ours.folder / "locked.key"
    openssl(
        ours.folder,
        *("pkey", "-in", str(key), "-aes256", "-passout", "pass:geheim", "-out", str(locked)),
    )
    pair = ours.sign("db", host="DNS:localhost")
    async with tls_server(cluster, pair, ours) as port:
        admin = await asyncpg.connect(plain_dsn(port), ssl=False)
        await admin.execute("CREATE ROLE certified LOGIN")
        await admin.close()
        dsn = plain_dsn(port, "localhost", "certified")
        dsn += f"?sslmode=verify-full&sslrootcert={ours.file}"
        assert await is_encrypted(f"{dsn}&sslcert={certificate}&sslkey={key}")
        assert await is_encrypted(f"{dsn}&sslcert={certificate}&sslkey={locked}&sslpassword=geheim")
        without = await refused(dsn)
        assert "valid client certificate" in without
        assert "geheim" not in await refused(
            f"{dsn}&sslcert={certificate}&sslkey={locked}&sslpassword=geheimer"
        )
