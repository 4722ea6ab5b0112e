"""A PostgreSQL of the bench's own, with durable defaults, and fresh databases in it."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import migrate

SETTINGS = {"track_commit_timestamp": "on"}
"""Lets the end-to-end bench read each row's commit time from the server."""


def open_folder() -> Path:
    """Make a folder with a short path that other users can cross: as root, PostgreSQL is one."""
    folder = Path(tempfile.mkdtemp(prefix="tc-bench-"))
    folder.chmod(0o711)
    return folder


@asynccontextmanager
async def server() -> AsyncIterator[str]:
    """Yield the DSN of a server that is gone afterwards; fsync is on, as in production."""
    async with postgres_in(open_folder()) as postgres:
        yield postgres.dsn


@asynccontextmanager
async def postgres_in(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Yield a started server, which may be stopped and started again; `folder` goes with it."""
    postgres = EmbeddedPostgres(folder, settings=SETTINGS)
    try:
        await postgres.start()
        yield postgres
    finally:
        await postgres.stop()
        shutil.rmtree(folder)


@asynccontextmanager
async def database(server_dsn: str, name: str) -> AsyncIterator[str]:
    """Yield the DSN of a new database with all tables; drop it afterwards."""
    dsn = server_dsn.replace("/tradecore?", f"/{name}?")
    admin = await asyncpg.connect(server_dsn)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        connection = await asyncpg.connect(dsn)
        try:
            await migrate(connection)
        finally:
            await connection.close()
        yield dsn
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.execute("CHECKPOINT")  # so that the next bench does not pay for this one
    finally:
        await admin.close()
