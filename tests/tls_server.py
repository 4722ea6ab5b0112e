"""A real PostgreSQL on loopback with a certificate, and the authorities that sign such."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
from daemon import free_port

from tradecore.store.binaries import as_user, find_binaries, server_environment
from tradecore.store.embedded import DATABASE, USER, EmbeddedPostgres
from tradecore.store.osuser import server_user

START_LIMIT_S = 30.0

HBA = """\
hostssl all certified 127.0.0.1/32 cert
hostssl all all 127.0.0.1/32 trust
hostnossl all all 127.0.0.1/32 trust
"""


def openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


class Authority:
    """Signs certificates; `file` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.file = folder / f"{name}.crt"
        openssl(
            folder,
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}"),
            *("-days", "2"),
        )

    def sign(self, subject: str, *, host: str = "", days: int = 2) -> tuple[Path, Path]:
        """Return certificate and key; `days` below 0 is a certificate that has ended."""
        stem = f"{self.name}-{subject}{days}"
        extensions = self.folder / f"{stem}.cnf"
        extensions.write_text(f"subjectAltName={host}\n" if host else "")
        openssl(
            self.folder,
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", f"/CN={subject}"),
        )
        openssl(
            self.folder,
            *("x509", "-req", "-in", f"{stem}.csr", "-out", f"{stem}.crt"),
            *("-CA", f"{self.name}.crt", "-CAkey", f"{self.name}.key", "-CAcreateserial"),
            *("-days", str(days), "-extfile", extensions.name),
        )
        return self.folder / f"{stem}.crt", self.folder / f"{stem}.key"


def server_with_tls() -> Path | None:
    """Return the programs of a PostgreSQL of Debian; that of the package is built without TLS."""
    folders = [one.parent for one in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    return max(folders, key=lambda one: int(one.parent.name), default=None)


async def make_cluster(folder: Path) -> None:
    """Make a cluster that lets TCP in, and leave it stopped."""
    embedded = EmbeddedPostgres(folder)
    await embedded.start()
    await embedded.stop()
    hba = folder / "postgres" / "cluster" / "pg_hba.conf"
    hba.write_text(HBA + hba.read_text())


@asynccontextmanager
async def tls_server(
    folder: Path, pair: tuple[Path, Path] | None, authority: Authority | None = None
) -> AsyncIterator[int]:
    """Run the cluster of `folder`, with TLS if there is a pair; yield its port on 127.0.0.1."""
    cluster = folder / "postgres" / "cluster"
    user = server_user(cluster)
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "autovacuum": "off",
        "fsync": "off",
    }
    if pair is not None:
        for name, source in zip(("server.crt", "server.key"), pair, strict=True):
            shutil.copy(source, cluster / name)
            (cluster / name).chmod(0o600)
            if user is not None:
                os.chown(cluster / name, user.uid, user.gid)
        settings["ssl"] = "on"
    if authority is not None:
        shutil.copy(authority.file, cluster / "root.crt")
        (cluster / "root.crt").chmod(0o644)
        settings["ssl_ca_file"] = "root.crt"
    command: list[str | Path] = [find_binaries().folder / "postgres", "-D", cluster]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    log = (folder / "tls_server.log").open("ab")
    process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond, and a user
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env=server_environment(),
        start_new_session=True,
        **as_user(user),
    )
    try:
        async with asyncio.timeout(START_LIMIT_S):
            while not await _answers(port):
                assert process.poll() is None, (folder / "tls_server.log").read_text()[-2000:]
                await asyncio.sleep(0.02)
        yield port
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(2)
        await asyncio.to_thread(process.wait, 30)
        log.close()


async def _answers(port: int) -> bool:
    try:
        connection = await asyncpg.connect(plain_dsn(port), ssl=False)
    except (OSError, asyncpg.PostgresError):
        return False
    await connection.close()
    return True


def plain_dsn(port: int, host: str = "127.0.0.1", user: str = USER) -> str:
    """The DSN without a word of TLS."""
    return f"postgresql://{user}@{host}:{port}/{DATABASE}"
