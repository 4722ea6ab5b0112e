"""The sink when connection, server, schema or rights fail in the middle of its work."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import asyncpg
import numpy as np
import pytest
from store_desk import (
    NAMES,
    Database,
    batch,
    parked,
)

from tradecore.errors import TransientStoreError
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import HoleId, Sink, WriteResult

pytestmark = pytest.mark.every_level


async def write(sink: Sink, rows: Any) -> tuple[WriteResult, list[TransientStoreError]]:
    """Do what the flusher does: offer the rows until they are taken."""
    errors = []
    while len(errors) < 100:
        try:
            return await sink.write_trades(rows), errors
        except TransientStoreError as error:
            errors.append(error)
            await asyncio.sleep(0.01)
    raise AssertionError(errors)


class Proxy:
    """Stands before the server's unix socket and cuts, or stops, the talk at a chosen point."""

    def __init__(self, dsn: str, folder: Path) -> None:
        parts = urlsplit(dsn)
        query = parse_qs(parts.query)
        self.server = f"{query['host'][0]}/.s.PGSQL.{query.get('port', ['5432'])[0]}"
        self.path = folder / ".s.PGSQL.5432"
        self.dsn = urlunsplit(
            parts._replace(query=urlencode({"host": str(folder), "port": "5432"}))
        )
        self.marker: bytes | None = None
        self.reply_first = False
        self.bytes_left: int | None = None
        self.talking = asyncio.Event()
        self.talking.set()
        self.hits = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Proxy":
        self._listener = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_at(self, marker: bytes, *, reply_first: bool) -> None:
        """Cut when the client sends `marker`; with `reply_first` after the server has answered."""
        self.marker, self.reply_first = marker, reply_first

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(asyncio.CancelledError):
            await self._join(reader, writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_unix_connection(self.server)
            try:
                down = asyncio.create_task(self._down(server_reader, writer))
                self._tasks.add(down)
                with contextlib.suppress(OSError):
                    await self._up(reader, server_writer, server_reader, down)
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)
            finally:
                server_writer.close()
        finally:
            writer.close()

    async def _up(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        down: "asyncio.Task[None]",
    ) -> None:
        while data := await reader.read(4096):
            await self.talking.wait()
            if self.bytes_left is not None:
                cut, self.bytes_left = len(data) > self.bytes_left, self.bytes_left - len(data)
                if cut:
                    self.bytes_left = None
                    self.hits += 1
                    return
            hit = self.marker is not None and self.marker in data
            if hit:
                self.marker = None
                self.hits += 1
                if not self.reply_first:
                    return
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)
            writer.write(data)
            await writer.drain()
            if hit:
                await answers.read(1)
                return

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.talking.wait()
                writer.write(data)
                await writer.drain()
            writer.close()


@pytest.fixture
async def proxied(db: Database, short_dir: Path) -> AsyncIterator[tuple[Proxy, Sink]]:
    if "host=" not in db.dsn:
        pytest.skip("the server of TRADECORE_TEST_DSN has no unix socket for the proxy")
    async with Proxy(db.dsn, short_dir) as proxy:
        pool = await open_pool(proxy.dsn, 2)
        yield proxy, Sink(pool, db.symbols, Partitions())
        pool.terminate()


async def ever_opened(db: Database) -> list[tuple[Any, ...]]:
    """All holes that there ever were; one that was filled in part is told in parts."""
    return [
        tuple(row)
        for row in await db.conn.fetch(
            "SELECT symbol, first_id, last_id, cause FROM trade_gaps ORDER BY 1, 2"
        )
    ]


POINTS = (
    b"BEGIN ISOLATION",
    b"FOR UPDATE",
    b"FROM trade_coverage",
    b"COPY ",
    b"INSERT INTO trade_coverage",
    b"INSERT INTO trade_gaps",
    b"COMMIT\0",
)


@pytest.mark.parametrize("reply_first", [False, True])
async def test_cut_at_each_step(
    db: Database, proxied: tuple[Proxy, Sink], reply_first: bool
) -> None:
    proxy, sink = proxied
    batches = []
    for number, point in enumerate(POINTS):
        rows = batch((0, 100 * number, 100 * number + 50), (1, 50 * number, 50 * number + 49))
        batches.append(rows)
        await sink._pool.expire_connections()  # a new connection shows the text of each statement
        proxy.cut_at(point, reply_first=reply_first)
        result, errors = await write(sink, rows)
        assert [error.reason for error in errors] == ["connection"], point
        assert not errors[0].fatal_looking
        # The lost acknowledgement too: stored is what the table gained, not a duplicate.
        # And its hole is told, once.
        hole = HoleId("BTCUSDT", 100 * number - 49, 100 * number - 1)
        assert result == WriteResult(101, 0, 0, (hole,) if number else ()), point
        await db.check(*batches)
    assert proxy.hits == len(POINTS)


@pytest.mark.parametrize("reply_first", [False, True])
@pytest.mark.parametrize(
    "point", [b"FOR UPDATE", b"FROM trade_gaps", b"UPDATE trade_gaps", b"COMMIT\0"]
)
async def test_closing_a_hole_is_cut(
    db: Database, proxied: tuple[Proxy, Sink], point: bytes, reply_first: bool
) -> None:
    proxy, sink = proxied
    rows = batch((0, 1, 1), (0, 20, 20))
    await sink.write_trades(rows)
    await sink._pool.expire_connections()
    proxy.cut_at(point, reply_first=reply_first)
    with pytest.raises(TransientStoreError):
        await sink.close_absent("BTCUSDT", 5, 9, {"asked": 5})
    was_closed = point == b"COMMIT\0" and reply_first
    assert await sink.close_absent("BTCUSDT", 5, 9, {"asked": 5}) == (0 if was_closed else 5)
    assert await db.gaps() == [
        (2, 4, "unknown", "open", None),
        (5, 9, "unknown", "absent", None),
        (10, 19, "unknown", "open", None),
    ]
    await db.check(rows)


async def test_cut_at_random_bytes(db: Database, proxied: tuple[Proxy, Sink]) -> None:
    proxy, sink = proxied
    random = np.random.default_rng(23)
    batches = []
    holes: list[HoleId] = []
    for number in range(25):
        rows = batch((number % 3, 300 * number, 300 * number + 299))
        batches.append(rows)
        proxy.bytes_left = int(random.integers(1, 32_000))
        result, _ = await write(sink, rows)
        assert result[:3] == (300, 0, 0)
        holes += result.opened
    assert sorted((*hole, "unknown") for hole in holes) == await ever_opened(db)
    assert proxy.hits > 10
    await db.check(*batches)


@pytest.mark.only_levels("plain")
async def test_killed_backends(db: Database) -> None:
    random = np.random.default_rng(29)
    batches = [batch((n % 4, 200 * n, 200 * n + 199), (3, 9000 + n, 9000 + n)) for n in range(40)]
    failures = 0
    holes: list[HoleId] = []

    async def kill() -> None:
        while True:
            await asyncio.sleep(float(random.uniform(0, 0.06)))
            await db.conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    killer = asyncio.create_task(kill())
    for rows in batches:
        result, errors = await write(db.sink, rows)
        failures += len(errors)
        assert result[:3] == (201, 0, 0)
        holes += result.opened
    killer.cancel()
    await asyncio.gather(killer, return_exceptions=True)
    assert failures
    told = sum(hole.last_id - hole.first_id + 1 for hole in holes)
    assert told == sum(last - first + 1 for _, first, last, _ in await ever_opened(db))
    await db.check(*batches)


async def test_a_silent_server_costs_limited_time(
    db: Database, proxied: tuple[Proxy, Sink]
) -> None:
    proxy, sink = proxied
    rows = [batch((0, 1, 10)), batch((0, 11, 3000))]
    await sink.write_trades(rows[0])
    sink._limit_s = 0.3
    proxy.talking.clear()
    with pytest.raises(TransientStoreError) as caught:
        await sink.write_trades(rows[1])
    assert caught.value.reason == "timeout"
    proxy.talking.set()
    sink._limit_s = 10
    await write(sink, rows[1])
    await db.check(*rows)


async def someone_waits(db: Database) -> None:
    """Wait until a session waits for a row lock."""
    conn = await asyncpg.connect(db.dsn)
    while not await conn.fetchval(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
    ):
        await asyncio.sleep(0.01)
    await conn.close()


@pytest.mark.two_sessions
async def test_a_deadlock_is_tried_again(db: Database) -> None:
    await db.conn.execute("SET deadlock_timeout = '1min'")
    await db.sink.write_trades(batch((0, 1, 1), (1, 1, 1)))
    first, second = sorted(NAMES[:2])
    lock = "SELECT FROM trade_symbols WHERE symbol = $1 FOR UPDATE"
    async with db.conn.transaction():
        await db.conn.execute(lock, second)
        writing = asyncio.create_task(db.sink.write_trades(batch((0, 2, 9), (1, 2, 9))))
        await someone_waits(db)
        blocked = asyncio.create_task(db.conn.execute(lock, first))
        with pytest.raises(TransientStoreError) as caught:
            await writing
        assert (caught.value.reason, caught.value.fatal_looking) == ("40P01", False)
        await blocked
    await write(db.sink, batch((0, 2, 9), (1, 2, 9)))
    await db.check(batch((0, 1, 9), (1, 1, 9)))


@pytest.mark.two_sessions
async def test_a_cancelled_write_leaves_nothing_behind(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 1)))
    async with db.conn.transaction():
        await db.conn.execute("SELECT FROM trade_symbols FOR UPDATE")
        writing = asyncio.create_task(db.sink.write_trades(batch((0, 2, 9))))
        await someone_waits(db)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    await write(db.sink, batch((0, 2, 9)))
    await db.check(batch((0, 1, 9)))


@pytest.mark.parametrize(
    ("harm", "heal", "reason", "remedy"),
    [
        (
            "ALTER TABLE raw_trades RENAME TO elsewhere",
            "ALTER TABLE elsewhere RENAME TO raw_trades",
            "42P01",
            "tradecore migrate",
        ),
        (
            "ALTER TABLE trade_coverage RENAME COLUMN last_time TO t",
            "ALTER TABLE trade_coverage RENAME COLUMN t TO last_time",
            "42703",
            "tradecore migrate",
        ),
        pytest.param(
            "ALTER TABLE raw_trades ALTER price TYPE float8",
            "ALTER TABLE raw_trades ALTER price TYPE numeric(20, 8)",
            "22P03",
            "tradecore check",
            # Elsewhere the aggregates of candles forbid it.
            marks=pytest.mark.only_levels("plain", "apache"),
        ),
    ],
)
async def test_harm_to_the_schema_is_named(
    db: Database, harm: str, heal: str, reason: str, remedy: str
) -> None:
    await db.sink.write_trades(batch((0, 1, 4)))
    await db.conn.execute(harm)
    with pytest.raises(TransientStoreError, match=remedy) as caught:
        await db.sink.write_trades(batch((0, 5, 9)))
    assert (caught.value.reason, caught.value.fatal_looking) == (reason, True)
    await db.conn.execute(heal)
    await write(db.sink, batch((0, 5, 9)))
    await db.check(batch((0, 1, 9)))
    assert not await parked(db)


async def test_a_revoked_right_is_named(db: Database) -> None:
    await db.conn.execute(
        "CREATE ROLE tradecore_weak LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public"
        " TO tradecore_weak; REVOKE INSERT ON raw_trades FROM tradecore_weak"
    )
    try:
        await db.sink.write_trades(batch((0, 1, 1)))
        pool = await open_pool(db.dsn, 1)
        await pool.execute("SELECT 1")
        weak = await asyncpg.create_pool(
            db.dsn, min_size=1, max_size=1, server_settings={"role": "tradecore_weak"}
        )
        with pytest.raises(TransientStoreError, match="rights") as caught:
            await Sink(weak, db.symbols, Partitions()).write_trades(batch((0, 2, 9)))
        assert (caught.value.reason, caught.value.fatal_looking) == ("42501", True)
        await asyncio.wait_for(weak.close(), 10)
        await asyncio.wait_for(pool.close(), 10)
    finally:
        await db.conn.execute("DROP OWNED BY tradecore_weak; DROP ROLE tradecore_weak")
    await db.check(batch((0, 1, 1)))


async def test_a_server_that_is_away_is_transient(
    db: Database, proxied: tuple[Proxy, Sink]
) -> None:
    proxy, sink = proxied
    await sink.write_trades(batch((0, 1, 1)))
    await proxy.__aexit__()
    await sink._pool.expire_connections()
    for _ in range(3):
        with pytest.raises(TransientStoreError) as caught:
            await sink.write_trades(batch((0, 2, 9)))
        assert (caught.value.reason, caught.value.fatal_looking) == ("connection", False)
    proxy.path.unlink(missing_ok=True)
    await proxy.__aenter__()
    await write(sink, batch((0, 2, 9)))
    await db.check(batch((0, 1, 9)))
