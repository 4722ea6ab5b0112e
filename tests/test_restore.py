"""A backup is taken, more is captured, the backup comes back: the ledger knows what is missing.

As docs/upgrade.md tells it, with the programs of PostgreSQL.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import scene
from scene import assert_exact, assert_readable, gaps, until_whole

from tests.daemon import daemon
from tests.fakes import SimulatedExchange, simulated_exchange
from tests.levels import Server
from tradecore.store.binaries import find_binaries
from tradecore.store.embedded import EmbeddedPostgres

SYMBOLS = ("BTCUSDT", "ETHUSDT", "PEPEUSDT")
LIMIT_S = 60

pytestmark = [
    pytest.mark.every_level,
    pytest.mark.only_levels("plain", "apache"),
    pytest.mark.timeout(240),
]


def venue(exchange: SimulatedExchange, dsn: str) -> dict[str, Any]:
    return {
        "DATABASE_URL": dsn,
        "BINANCE_WEBSOCKET_URL": exchange.ws,
        "BINANCE_REST_URL": exchange.rest,
        "BINANCE_DUMP_URL": exchange.rest,
        "SUPPORTED_SYMBOLS": ",".join(SYMBOLS),
    }


async def run(program: str, *arguments: str | Path) -> None:
    """Run a program of PostgreSQL; fail with its words."""
    process = await asyncio.create_subprocess_exec(
        *(find_binaries().folder / program, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0, output.decode()


async def restore(dump: Path, dsn: str) -> None:
    """Bring a dump back into an empty database, as TimescaleDB wants it where it is."""
    conn = await asyncpg.connect(dsn)
    try:
        timescale = await conn.fetchval(
            "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')"
        )
        if timescale:
            await conn.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
            await conn.execute("SELECT timescaledb_pre_restore()")
        await run("pg_restore", "--no-owner", "--exit-on-error", "--dbname", dsn, dump)
        if timescale:
            await conn.execute("SELECT timescaledb_post_restore()")
    finally:
        await conn.close()


@pytest.fixture
async def empty_database(server: Server) -> AsyncIterator[str]:
    """DSN of another fresh and empty database of the same server."""
    async with server.database(migrated=False) as dsn:
        yield dsn


async def test_what_came_after_a_backup_is_a_hole_and_is_filled(
    tmp_path: Path, migrated_database: str, empty_database: str
) -> None:
    """Also of a symbol that never trades again, though the ring says that all is stored."""
    dump = tmp_path / "tradecore.dump"
    async with simulated_exchange(symbols=",".join(SYMBOLS), rate=400, epoch=-120) as exchange:
        async with daemon(tmp_path, **venue(exchange, migrated_database)) as one:
            await one.until_stored(400)
            await run("pg_dump", "--format=custom", "--file", dump, migrated_database)
            await one.until_stored(1600)
            assert await one.terminate() == 0
        before = await scene.coverage(migrated_database)
        await exchange.fault("quiet", symbol="PEPEUSDT", seconds=600)

        await restore(dump, empty_database)
        after = await scene.coverage(empty_database)
        assert all(after[symbol][-1][1] < before[symbol][-1][1] - 50 for symbol in SYMBOLS)
        code, words = await scene.command("verify", DATABASE_URL=empty_database)
        assert code == 0, words
        code, words = await scene.command("migrate", "--check", DATABASE_URL=empty_database)
        assert code == 0, words

        async with daemon(tmp_path, **venue(exchange, empty_database)) as one:
            await until_whole(empty_database, exchange, SYMBOLS)
            await one.until(lambda health: health["completeness"]["holes"] == 0)
            assert await one.terminate() == 0
            assert_readable(one)
        await assert_exact(empty_database, exchange)
        fates = {hole[4] for hole in await gaps(empty_database)}
        assert fates == {"filled"}


async def test_a_server_goes_back_to_a_point_in_time(short_dir: Path, tmp_path: Path) -> None:
    """By a base backup and archived WAL, to a moment between two trades that are both stored."""
    archive = short_dir / "archive"
    archive.mkdir()
    archive.chmod(0o777)  # the server has an OS user of its own where we are root
    settings = {"archive_mode": "on", "archive_command": f"cp %p {archive}/%f", "fsync": "off"}
    lost = EmbeddedPostgres(short_dir / "lost", settings=settings)
    backup = short_dir / "back" / "postgres" / "cluster"
    backup.parent.mkdir(parents=True)
    try:
        dsn = await lost.start()
        async with simulated_exchange(symbols=",".join(SYMBOLS), rate=400, epoch=-120) as exchange:
            async with daemon(tmp_path, **venue(exchange, dsn)) as one:
                await one.until_stored(400)
                await run("pg_basebackup", "--checkpoint=fast", "--pgdata", backup, "--dbname", dsn)
                await one.until_stored(1200)
                async with scene.connected(dsn) as conn:
                    moment = await conn.fetchval("SELECT clock_timestamp()")
                await one.until_stored(2400)
                assert await one.terminate() == 0
            before = await scene.coverage(dsn)
            async with scene.connected(dsn) as conn:
                await conn.execute("SELECT pg_switch_wal()")
            await lost.stop()

            (backup / "recovery.signal").touch()
            owner = (short_dir / "lost" / "postgres" / "cluster").stat()
            for path in (backup.parent, backup, *backup.rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid)
            recovery = {
                "restore_command": f"cp {archive}/%f %p",
                "recovery_target_time": str(moment),
                "recovery_target_action": "promote",
            }
            back = EmbeddedPostgres(backup.parents[1], settings=settings | recovery)
            try:
                dsn = await back.start()
                async with scene.connected(dsn) as conn, asyncio.timeout(LIMIT_S):
                    while await conn.fetchval("SELECT pg_is_in_recovery()"):
                        await asyncio.sleep(0.05)
                after = await scene.coverage(dsn)
                fewer = [before[s][-1][1] - after[s][-1][1] for s in SYMBOLS]
                assert min(fewer) > 0
                assert sum(fewer) > 500
                async with daemon(tmp_path, **venue(exchange, dsn)) as one:
                    await until_whole(dsn, exchange, SYMBOLS)
                    assert await one.terminate() == 0
                    assert_readable(one)
                await assert_exact(dsn, exchange)
            finally:
                await back.stop()
    finally:
        await lost.stop()
