"""Storage: bytes of a trade in heap and index, and what compression leaves of them.

The trades are recorded ones (see `FRAMES`), one after the other until they are a million; those of
the feed have the time at which they came, to the microsecond, which compresses badly; those that
were fetched have none. Compression needs a server of full TimescaleDB: TEST_TIMESCALE_URL, or
--wasm for the one in WebAssembly that the tests use (slow, and its sizes are the same).
"""

import asyncio
import gzip
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import numpy as np
import orjson
from _database import database, server
from _harness import ROOT, Figure, arguments, figure, report
from numpy.typing import NDArray

from tradecore._symbols import SymbolTable
from tradecore.schema import FLAG_BUYER_IS_MAKER, TRADE_DTYPE
from tradecore.store import chunks, jobs
from tradecore.store.migrate import detect_level, migrate
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import Sink

FRAMES = ROOT.parent / "shared" / "frames" / "btcusdt_trade_20240809.jsonl.gz"
TILES = 50
"""How often the recorded trades are repeated, with other ids and times."""

LEFT_LIMIT = 10.0  # percent of heap and index
_BATCH = 16_384
_DAY_US = 86_400_000_000
_BEGIN_US = 1_723_161_600_000_000  # a midnight: all of it is one chunk

Rows = NDArray[np.void]


def recorded() -> Rows:
    """Return the recorded trades, from midnight on, as the feed would have put them into rows."""
    with gzip.open(FRAMES) as lines:
        events = [orjson.loads(line)["data"] for line in lines]
    rows = np.zeros(len(events), TRADE_DTYPE)
    rows["trade_id"] = [one["t"] for one in events]
    rows["trade_us"] = [one["T"] * 1000 for one in events]
    for name, key in (("price_e8", "p"), ("quantity_e8", "q")):
        rows[name] = [int(one[key].replace(".", "")) for one in events]
    rows["flags"] = [FLAG_BUYER_IS_MAKER if one["m"] else 0 for one in events]
    transit_us = np.random.default_rng(1).lognormal(8.5, 0.4, len(rows)).astype(np.int64)
    rows["recv_ns"] = (np.array([one["E"] for one in events]) * 1000 + transit_us) * 1000
    shift_us = _BEGIN_US - int(rows["trade_us"][0])
    rows["trade_us"] += shift_us
    rows["recv_ns"] += shift_us * 1000
    return rows


def tiled(rows: Rows) -> Rows:
    """Return the trades TILES times, one after the other."""
    span_us = int(rows["trade_us"][-1] - rows["trade_us"][0]) + 1000
    tiles = []
    for n in range(TILES):
        tile = rows.copy()
        tile["trade_id"] += n * len(rows)
        tile["trade_us"] += n * span_us
        tile["recv_ns"] += n * span_us * 1000
        tiles.append(tile)
    found = np.concatenate(tiles)
    assert int(found["trade_us"][-1]) < _BEGIN_US + _DAY_US
    return found


async def _store(dsn: str, rows: Rows) -> None:
    symbols = SymbolTable()
    symbols.add("BTCUSDT")
    pool = await open_pool(dsn, 2)
    try:
        sink = Sink(pool, symbols, Partitions())
        for at in range(0, len(rows), _BATCH):
            await sink.write_trades(rows[at : at + _BATCH])
    finally:
        await pool.close()


async def _sizes(connection: asyncpg.Connection) -> tuple[int, int]:
    """Return the bytes of the heap (with its maps) and of the indexes of all days."""
    level = await detect_level(connection)
    days = await chunks.chunks(connection, await chunks.read_server(connection, level))
    heap = index = 0
    for one in days:
        if one.table == "raw_trades":
            name = one.name
            heap += await connection.fetchval(f"SELECT pg_table_size('{name}'::regclass)")
            index += await connection.fetchval(f"SELECT pg_indexes_size('{name}'::regclass)")
    return heap, index


def _bytes(subject: str, size: float, rows: Rows, **rest: str) -> Figure:
    return figure("storage", subject, [size / len(rows)], "B a trade", **rest)


async def _plain(dsn: str, rows: Rows) -> list[Figure]:
    await _store(dsn, rows)
    connection = await asyncpg.connect(dsn)
    try:
        heap, index = await _sizes(connection)
    finally:
        await connection.close()
    return [_bytes("heap, PostgreSQL", heap, rows), _bytes("index, PostgreSQL", index, rows)]


async def _compressed(dsn: str, rows: Rows, whose: str) -> list[Figure]:
    await _store(dsn, rows)
    connection = await asyncpg.connect(dsn)
    try:
        before = sum(await _sizes(connection))
        database_server = await chunks.read_server(connection, "community")
        await jobs.enable_compression(connection, database_server)
        for one in await chunks.chunks(connection, database_server):
            await chunks.compress(connection, database_server, one, 600)
        told, after = (await chunks.saved(connection, database_server))["raw_trades"]
        assert abs(told - before) < before / 100, (told, before)
    finally:
        await connection.close()
    whole = f"heap and index, TimescaleDB, {whose}"
    return [
        _bytes(whole, before, rows),
        _bytes(f"compressed, {whose}", after, rows, baseline=whole),
        figure(
            "storage",
            f"left of heap and index, {whose}",
            [100 * after / before],
            "%",
            limit=LEFT_LIMIT,
        ),
    ]


@asynccontextmanager
async def _timescale(url: str, name: str) -> AsyncIterator[str]:
    """Yield the DSN of a new database of a server of full TimescaleDB; drop it afterwards."""
    dsn = urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        connection = await asyncpg.connect(dsn)
        try:
            await migrate(connection)
        finally:
            await connection.close()
        yield dsn
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@asynccontextmanager
async def _wasm() -> AsyncIterator[str]:
    """Yield the DSN of a new database of the tests' TimescaleDB; `make levels` installs it."""
    sys.path.append(str(ROOT))
    from tests.levels import community

    server = community.start()
    try:
        async with server.database(migrated=True) as dsn:
            yield dsn
    finally:
        server.stop()


async def measure(server_dsn: str, *, wasm: bool = False) -> list[Figure]:
    """Return the figures; without recorded trades none, without TimescaleDB only the first."""
    if not FRAMES.exists():
        print(f"storage: there are no recorded trades at {FRAMES}", file=sys.stderr)
        return []
    live = tiled(recorded())
    async with database(server_dsn, "bench_storage") as dsn:
        figures = await _plain(dsn, live)
    url = os.environ.get("TEST_TIMESCALE_URL")
    if not url and not wasm:
        print(
            "storage: compression needs a server of full TimescaleDB, TEST_TIMESCALE_URL",
            file=sys.stderr,
        )
        return figures
    fetched = live.copy()
    fetched["recv_ns"] = 0
    for rows, whose in ((live, "from the feed"), (fetched, "fetched")):
        async with _timescale(url, "tc_bench_storage") if url else _wasm() as dsn:
            figures += await _compressed(dsn, rows, whose)
    return figures


async def _main(wasm: bool) -> list[Figure]:
    async with server() as dsn:
        return await measure(dsn, wasm=wasm)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--wasm", action="store_true", help="compress in WebAssembly")
    options = parser.parse_args()
    raise SystemExit(report(asyncio.run(_main(options.wasm)), options.json))
