"""The sink against real PostgreSQL; after each test the table, the ledger and the holes add up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import asyncpg
import numpy as np
import pytest

from tradecore._symbols import SymbolTable
from tradecore.errors import TransientStoreError
from tradecore.schema import (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    FLAG_VOID,
    KLINE_DECIMALS,
    KLINE_DTYPE,
    TICKER_DECIMALS,
    TICKER_DTYPE,
    TRADE_DTYPE,
)
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import Sink, WriteResult

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NAMES = ("BTCUSDT", "ETHUSDT", "币安人生USDT", "1000SATSUSDT")
NOW_US = 1_790_000_000_000_000
EXTREME = 2**63 - 1


def at(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=us)


def decimal(scaled: int) -> Decimal:
    return Decimal(scaled).scaleb(-8)


def trade(symbol_id: int, trade_id: int) -> dict[str, int]:
    """A trade that is a pure function of symbol and id; its time does not rise with the id."""
    seed = (symbol_id * 7919 + trade_id) % 10**9
    time_us = NOW_US + trade_id % 10**9 * 1000
    return {
        "symbol_id": symbol_id,
        "trade_id": trade_id,
        "price_e8": seed * 2654435761 % 10**13 + 1,
        "quantity_e8": seed * 40503 % 10**11,
        "trade_us": time_us - trade_id % 7 * 2500,
        "recv_ns": 0 if trade_id % 5 == 0 else time_us * 1000 + 999,
        "flags": FLAG_BUYER_IS_MAKER if seed % 3 else 0,
    }


def trades(*rows: dict[str, int]) -> Any:
    array = np.zeros(len(rows), TRADE_DTYPE)
    for i, row in enumerate(rows):
        for key, value in row.items():
            array[i][key] = value
    return array


def batch(*spans: tuple[int, int, int]) -> Any:
    """Trades of (symbol id, first id, last id), in that order."""
    return trades(*(trade(s, i) for s, first, last in spans for i in range(first, last + 1)))


def record(row: Any) -> tuple[Any, ...]:
    """A ring row as the database shall hold it."""
    recv_ns = int(row["recv_ns"])
    return (
        at(int(row["trade_us"])),
        NAMES[int(row["symbol_id"])],
        decimal(int(row["price_e8"])),
        decimal(int(row["quantity_e8"])),
        "SELL" if int(row["flags"]) & FLAG_BUYER_IS_MAKER else "BUY",
        int(row["trade_id"]),
        at(recv_ns // 1000) if recv_ns else None,
    )


class Database:
    """A migrated database with a sink, and the means to look at it from outside."""

    def __init__(self, dsn: str, pool: Any, conn: Any) -> None:
        self.dsn = dsn
        self.pool = pool
        self.conn = conn
        self.symbols = SymbolTable()
        for name in NAMES:
            self.symbols.add(name)
        self.sink = Sink(pool, self.symbols, Partitions())

    async def check(self, *batches: Any) -> None:
        """Compare everything with what these batches say; the first arrival of an id counts."""
        expected: dict[tuple[str, int], tuple[Any, ...]] = {}
        for rows in batches:
            for row in rows:
                if not int(row["flags"]) & FLAG_VOID:
                    found = record(row)
                    expected.setdefault((found[1], found[5]), found)
        stored = [tuple(row) for row in await self.conn.fetch("SELECT * FROM raw_trades")]
        key = lambda row: (row[1], row[5])  # noqa: E731
        assert sorted(stored, key=key) == sorted(expected.values(), key=key)
        await self.check_ledger()

    async def check_ledger(self) -> None:
        """The ledger is what the table says, and the open gaps are what lies between its ranges."""
        assert await self.conn.fetch(
            "SELECT symbol, first_id, last_id, first_time, last_time FROM trade_coverage"
            " ORDER BY symbol, first_id"
        ) == await self.conn.fetch(
            """
            SELECT symbol, min(trade_id), max(trade_id), min(timestamp), max(timestamp)
            FROM (SELECT *, trade_id - row_number() OVER (PARTITION BY symbol ORDER BY trade_id)
                         AS island FROM raw_trades) AS numbered
            GROUP BY symbol, island ORDER BY symbol, 2
            """
        )
        assert await self.conn.fetch(
            "SELECT symbol, first_id, last_id FROM trade_gaps WHERE state <> 'filled' ORDER BY 1, 2"
        ) == await self.conn.fetch(
            """
            SELECT symbol, last_id + 1, next_id - 1
            FROM (SELECT symbol, last_id, lead(first_id) OVER (PARTITION BY symbol
                         ORDER BY first_id) AS next_id FROM trade_coverage) AS pairs
            WHERE next_id IS NOT NULL ORDER BY 1, 2
            """
        )

    async def gaps(self) -> list[tuple[Any, ...]]:
        rows = await self.conn.fetch(
            "SELECT first_id, last_id, cause, state, filled_by FROM trade_gaps ORDER BY first_id"
        )
        return [tuple(row) for row in rows]


@pytest.fixture
async def db(migrated_database: str) -> AsyncIterator[Database]:
    pool = await open_pool(migrated_database, 4)
    conn = await asyncpg.connect(migrated_database)
    yield Database(migrated_database, pool, conn)
    await conn.close()
    await asyncio.wait_for(pool.close(), 10)


# ---- what is written -------------------------------------------------------------------------


async def test_trades_are_stored_as_they_are(db: Database) -> None:
    rows = batch((0, 1, 300), (2, 2**32, 2**32 + 50), (1, 0, 0))
    assert await db.sink.write_trades(rows) == WriteResult(352, 0, 0)
    await db.check(rows)


async def test_extremes(db: Database) -> None:
    rows = trades(
        trade(0, 7) | {"price_e8": EXTREME, "quantity_e8": EXTREME},
        trade(0, 8) | {"price_e8": 0, "quantity_e8": 0},
        trade(0, 9) | {"price_e8": 1, "quantity_e8": 10**16},
        trade(1, EXTREME) | {"trade_us": 0, "recv_ns": 1},
        trade(1, EXTREME - 2) | {"recv_ns": EXTREME},
        trade(3, 0) | {"trade_us": 7_258_118_399_999_999},
    )
    assert await db.sink.write_trades(rows) == WriteResult(6, 0, 0)
    await db.check(rows)
    text = await db.conn.fetchval("SELECT quantity::text FROM raw_trades WHERE trade_id = 7")
    assert text == "92233720368.54775807"


async def test_days_get_their_partitions(db: Database) -> None:
    midnight = 20_000 * 86_400_000_000
    rows = trades(
        trade(0, 1) | {"trade_us": midnight - 1},
        trade(0, 2) | {"trade_us": midnight},
        trade(0, 3) | {"trade_us": midnight + 86_400_000_000 * 40},
        trade(0, 4) | {"trade_us": 0, "flags": FLAG_VOID},
    )
    assert await db.sink.write_trades(rows) == WriteResult(3, 0, 0)
    await db.check(rows)
    days = await db.conn.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits"
        " WHERE inhparent = 'raw_trades'::regclass ORDER BY 1"
    )
    assert [day[0][-8:] for day in days] == ["20241003", "20241004", "20241113"]


async def test_a_partition_that_was_dropped_comes_back(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 5)))
    for (name,) in await db.conn.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'raw_trades'::regclass"
    ):
        await db.conn.execute(f"DROP TABLE {name}")
    await db.conn.execute("TRUNCATE trade_coverage")
    with pytest.raises(TransientStoreError) as caught:
        await db.sink.write_trades(batch((0, 6, 9)))
    assert (caught.value.reason, caught.value.fatal_looking) == ("23514", False)
    await db.sink.write_trades(batch((0, 6, 9)))
    await db.check(batch((0, 6, 9)))


async def test_nothing_to_store(db: Database) -> None:
    void = trades(trade(0, 1) | {"flags": FLAG_VOID})
    assert await db.sink.write_trades(void[:0]) == WriteResult(0, 0, 0)
    assert await db.sink.write_trades(void) == WriteResult(0, 0, 0)
    await db.check()


async def test_duplicates_are_cut(db: Database) -> None:
    first = batch((0, 10, 20), (1, 5, 6))
    again = trades(*(trade(0, i) | {"price_e8": 1} for i in (15, 21, 20, 22, 21)), trade(1, 4))
    assert await db.sink.write_trades(first) == WriteResult(13, 0, 0)
    assert await db.sink.write_trades(again) == WriteResult(3, 3, 0)
    assert await db.sink.write_trades(first) == WriteResult(0, 13, 0)
    await db.check(first, again)


async def test_order_does_not_matter(db: Database) -> None:
    rows = batch((0, 1, 500), (1, 1, 300), (2, 40, 90))
    random = np.random.default_rng(5)
    shuffled = random.permutation(rows)
    for at_row in range(0, len(rows), 97):
        await db.sink.write_trades(shuffled[at_row : at_row + 97])
    await db.check(rows)
    assert not await db.conn.fetchval("SELECT count(*) FROM trade_gaps WHERE state = 'open'")


async def test_holes_open_and_fill(db: Database) -> None:
    stored = [batch((0, 1, 10)), batch((0, 21, 30))]
    await db.sink.write_trades(stored[0])
    await db.sink.write_trades(stored[1], hole_cause="disconnect")
    await db.check(*stored)
    assert await db.gaps() == [(11, 20, "disconnect", "open", None)]

    stored.append(batch((0, 14, 15)))
    await db.sink.write_trades(stored[-1], filled_by="rest")
    await db.check(*stored)
    assert await db.gaps() == [
        (11, 13, "disconnect", "open", None),
        (14, 15, "disconnect", "filled", "rest"),
        (16, 20, "disconnect", "open", None),
    ]
    for first_id, last_id in ((16, 18), (11, 13), (19, 20)):
        stored.append(batch((0, first_id, last_id)))
        await db.sink.write_trades(stored[-1], filled_by="rest")
        await db.check(*stored)
    ranges = await db.gaps()
    assert {row[2:] for row in ranges} == {("disconnect", "filled", "rest")}
    assert sum(row[1] - row[0] + 1 for row in ranges) == 10
    filled_at = await db.conn.fetch("SELECT filled_at FROM trade_gaps")
    assert all(row[0] is not None for row in filled_at)


async def test_random_batches_equal_the_oracle(db: Database) -> None:
    random = np.random.default_rng(11)
    batches = []
    for _ in range(40):
        rows = []
        for _ in range(int(random.integers(1, 6))):
            first = int(random.integers(0, 120))
            rows += [
                trade(int(random.integers(0, 4)), first + i)
                for i in range(int(random.integers(1, 25)))
            ]
        array = trades(*rows)
        batches.append(random.permutation(array) if random.random() < 0.3 else array)
    for rows in batches:
        result = await db.sink.write_trades(rows)
        assert sum(result) == len(rows)
        await db.check_ledger()
    await db.check(*batches)


async def test_two_hosts_store_each_trade_once(db: Database) -> None:
    other_pool = await open_pool(db.dsn, 4)
    sinks = [db.sink, Sink(other_pool, db.symbols, Partitions())]
    random = np.random.default_rng(3)
    whole = {symbol_id: batch((symbol_id, 1, 400)) for symbol_id in range(4)}

    async def host(sink: Sink, seed: int) -> WriteResult:
        own = np.random.default_rng(seed)
        total = WriteResult()
        position = 0
        while position < 400:
            size = int(own.integers(1, 60))
            chosen = own.permutation(4)[: int(own.integers(1, 5))]
            parts = [whole[int(s)][max(0, position - 30) : position + size] for s in chosen]
            total = total.plus(await sink.write_trades(np.concatenate(parts)))
            position += size // 2
        return total

    seeds = random.integers(0, 1000, 4).tolist()
    results = await asyncio.gather(*(host(sink, seed) for sink in sinks for seed in seeds[:2]))
    for rows in whole.values():
        await sinks[0].write_trades(rows)
    await db.check(*whole.values())
    assert sum(result.stored for result in results) <= 1600
    await asyncio.wait_for(other_pool.close(), 10)


# ---- rows that the server has or does not take -----------------------------------------------


async def parked(db: Database) -> list[tuple[Any, ...]]:
    rows = await db.conn.fetch(
        "SELECT kind, symbol, trade_id, sqlstate FROM dead_letters ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def test_refused_rows_are_parked_and_the_rest_goes_in(db: Database) -> None:
    await db.conn.execute("ALTER TABLE raw_trades ADD CONSTRAINT odd CHECK (quantity <> 13)")
    rows = batch((0, 1, 900), (1, 1, 900))
    bad = [0, 77, 78, 1300, 1799]
    rows["quantity_e8"][bad] = 13 * 10**8
    assert await db.sink.write_trades(rows) == WriteResult(1795, 0, 5)
    await db.check(np.delete(rows, bad))
    assert await parked(db) == [
        ("trade", NAMES[int(row["symbol_id"])], int(row["trade_id"]), "23514") for row in rows[bad]
    ]
    assert (78, 79, "refused", "open", None) in await db.gaps()
    payload = await db.conn.fetchval("SELECT payload FROM dead_letters ORDER BY id LIMIT 1")
    assert '"quantity": "13.00000000"' in payload
    # Offered again: still refused, told once; the others are duplicates.
    assert await db.sink.write_trades(rows) == WriteResult(0, 1795, 5)
    assert len(await parked(db)) == 5
    # Mended: they go in and the holes close.
    await db.conn.execute("ALTER TABLE raw_trades DROP CONSTRAINT odd")
    assert await db.sink.write_trades(rows) == WriteResult(5, 1795, 0)
    await db.check(rows)


async def test_a_batch_of_refused_rows_only(db: Database) -> None:
    await db.conn.execute("ALTER TABLE raw_trades ADD CONSTRAINT none CHECK (false)")
    assert await db.sink.write_trades(batch((0, 1, 60))) == WriteResult(0, 0, 60)
    await db.check()


async def test_rows_that_no_server_can_store(db: Database) -> None:
    rows = batch((0, 1, 6))
    rows["trade_us"][1] = 2**62
    rows["trade_us"][2] = -1
    rows["symbol_id"][4] = 99
    assert await db.sink.write_trades(rows) == WriteResult(3, 0, 3)
    await db.check(rows[[0, 3, 5]])
    assert await parked(db) == [
        ("trade", "BTCUSDT", 2, None),
        ("trade", "BTCUSDT", 3, None),
        ("trade", "#99", 5, None),
    ]


async def test_rows_that_the_ledger_does_not_know(db: Database) -> None:
    rows = batch((0, 1, 50), (1, 1, 50))
    await db.sink.write_trades(rows[20:40])
    await db.conn.execute("TRUNCATE trade_coverage, trade_gaps, trade_symbols")
    assert await db.sink.write_trades(rows) == WriteResult(80, 20, 0)
    await db.check(rows)
    assert not await parked(db)


async def test_lock_rows_that_vanished_are_made_anew(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 5)))
    await db.conn.execute("TRUNCATE trade_symbols")
    with pytest.raises(TransientStoreError) as caught:
        await db.sink.write_trades(batch((0, 6, 9)))
    assert (caught.value.reason, caught.value.fatal_looking) == ("symbols", False)
    await db.sink.write_trades(batch((0, 6, 9)))
    await db.check(batch((0, 1, 9)))


async def test_another_unique_key_parks_instead_of_losing(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 3)))
    (name,) = await db.conn.fetchrow(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'raw_trades'::regclass"
    )
    await db.conn.execute(f"CREATE UNIQUE INDEX ON {name} (trade_id)")
    assert await db.sink.write_trades(batch((1, 2, 5))) == WriteResult(2, 0, 2)
    await db.check(batch((0, 1, 3)), batch((1, 4, 5)))
    assert [row[3] for row in await parked(db)] == ["23505", "23505"]


async def test_a_trigger_that_leaves_rows_out_is_no_silent_loss(db: Database) -> None:
    await db.conn.execute(
        """
        CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN IF NEW.trade_id = 3 THEN RETURN NULL; END IF; RETURN NEW; END';
        CREATE TRIGGER skip BEFORE INSERT ON raw_trades FOR EACH ROW EXECUTE FUNCTION skip()
        """
    )
    with pytest.raises(TransientStoreError, match="stored 4 of 5") as caught:
        await db.sink.write_trades(batch((0, 1, 5)))
    assert caught.value.fatal_looking
    await db.check()


# ---- the server in trouble -------------------------------------------------------------------


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


POINTS = (
    b"BEGIN ISOLATION",
    b"FOR UPDATE",
    b"FROM trade_coverage",
    b"COPY ",
    b"INSERT INTO trade_coverage",
    b"INSERT INTO trade_gaps",
    b"COMMIT",
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
        assert result == WriteResult(101, 0, 0), point
        await db.check(*batches)
    assert proxy.hits == len(POINTS)


async def test_cut_at_random_bytes(db: Database, proxied: tuple[Proxy, Sink]) -> None:
    proxy, sink = proxied
    random = np.random.default_rng(23)
    batches = []
    for number in range(25):
        rows = batch((number % 3, 300 * number, 300 * number + 299))
        batches.append(rows)
        proxy.bytes_left = int(random.integers(1, 32_000))
        result, _ = await write(sink, rows)
        assert result == WriteResult(300, 0, 0)
    assert proxy.hits > 10
    await db.check(*batches)


async def test_killed_backends(db: Database) -> None:
    random = np.random.default_rng(29)
    batches = [batch((n % 4, 200 * n, 200 * n + 199), (3, 9000 + n, 9000 + n)) for n in range(40)]
    failures = 0

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
        assert result == WriteResult(201, 0, 0)
    killer.cancel()
    await asyncio.gather(killer, return_exceptions=True)
    assert failures
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
        (
            "ALTER TABLE raw_trades ALTER price TYPE float8",
            "ALTER TABLE raw_trades ALTER price TYPE numeric(20, 8)",
            "22P03",
            "tradecore check",
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


# ---- tickers and klines ----------------------------------------------------------------------


def states(dtype: Any, decimals: tuple[str, ...], *rows: dict[str, int]) -> Any:
    """Rows whose decimals all hold `value`."""
    array = np.zeros(len(rows), dtype)
    for row, values in zip(array, rows, strict=True):
        for key, number in values.items():
            for name in decimals if key == "value" else ():
                row[name]["lo"], row[name]["hi"] = number % 2**64, number >> 64
            if key != "value":
                row[key] = number
    return array


def ticker(event_us: int, value: int, symbol_id: int = 0) -> dict[str, int]:
    common = {"open_us": 1, "close_us": 2, "first_id": -1, "last_id": 2**40, "trade_count": 5}
    return {"event_us": event_us, "value": value, "symbol_id": symbol_id, **common}


async def test_tickers_keep_the_newest_of_a_second(db: Database) -> None:
    big = 123456789012345678901234567890123456
    rows = states(
        TICKER_DTYPE,
        TICKER_DECIMALS,
        ticker(NOW_US + 900_000, big),
        ticker(NOW_US + 200_000, -5),
        ticker(NOW_US + 1_000_000, 7),
        ticker(NOW_US, 0, 2),
    )
    assert await db.sink.write_tickers(rows) == WriteResult(3, 1, 0)
    older = states(TICKER_DTYPE, TICKER_DECIMALS, ticker(NOW_US + 899_999, 1))
    assert await db.sink.write_tickers(older) == WriteResult(0, 1, 0)
    newer = states(TICKER_DTYPE, TICKER_DECIMALS, ticker(NOW_US + 999_999, 2))
    assert await db.sink.write_tickers(newer) == WriteResult(1, 0, 0)
    stored = await db.conn.fetch(
        f"SELECT timestamp, symbol, event_time, {', '.join(TICKER_DECIMALS)}, open_time,"
        " close_time, first_id, last_id, trade_count, received_at FROM tickers ORDER BY 2, 1"
    )
    tail = (at(1), at(2), -1, 2**40, 5, None)
    assert [tuple(row) for row in stored] == [
        (at(NOW_US), NAMES[0], at(NOW_US + 999_999), *[decimal(2)] * 15, *tail),
        (at(NOW_US + 1_000_000), NAMES[0], at(NOW_US + 1_000_000), *[decimal(7)] * 15, *tail),
        (at(NOW_US), NAMES[2], at(NOW_US), *[decimal(0)] * 15, *tail),
    ]


def kline(open_us: int, event_us: int, value: int, flags: int = 0) -> dict[str, int]:
    return {"open_us": open_us, "event_us": event_us, "value": value, "flags": flags}


async def stored_klines(db: Database) -> list[tuple[Any, ...]]:
    rows = await db.conn.fetch(
        "SELECT timestamp, event_time, volume, is_closed FROM klines ORDER BY timestamp"
    )
    return [tuple(row) for row in rows]


async def test_a_closed_kline_is_final(db: Database) -> None:
    def klines(*rows: dict[str, int]) -> Any:
        return states(KLINE_DTYPE, KLINE_DECIMALS, *rows)

    first, second = NOW_US, NOW_US + 60_000_000
    big = 123456789012345678901234567890123456
    assert await db.sink.write_klines(
        klines(
            kline(first, first + 5, 1),
            kline(first, first + 9, big, FLAG_CLOSED),
            kline(first, first + 10, 3),
            kline(second, second + 5, 4),
        )
    ) == WriteResult(2, 2, 0)
    assert await db.sink.write_klines(
        klines(
            kline(first, first + 99, 5),
            kline(first, first + 99, 6, FLAG_CLOSED),
            kline(second, second + 4, 7),
        )
    ) == WriteResult(0, 3, 0)
    assert await db.sink.write_klines(klines(kline(second, second + 6, 8))) == WriteResult(1, 0, 0)
    assert await stored_klines(db) == [
        (at(first), at(first + 9), Decimal("1234567890123456789012345678.90123456"), True),
        (at(second), at(second + 6), decimal(8), False),
    ]
    # Closed late, by an event that is older than what is stored: still the final word.
    assert await db.sink.write_klines(
        klines(kline(second, second + 5, 9, FLAG_CLOSED))
    ) == WriteResult(1, 0, 0)
    assert (await stored_klines(db))[1] == (at(second), at(second + 5), decimal(9), True)


async def test_refused_states_are_parked(db: Database) -> None:
    too_big = 2**127 - 1
    rows = states(
        KLINE_DTYPE,
        KLINE_DECIMALS,
        *(kline(NOW_US + n * 60_000_000, NOW_US, too_big if n == 3 else n) for n in range(9)),
    )
    assert await db.sink.write_klines(rows) == WriteResult(8, 0, 1)
    assert [row[2] for row in await stored_klines(db)] == [decimal(n) for n in range(9) if n != 3]
    assert await parked(db) == [("kline", NAMES[0], None, "22003")]
    letter = await db.conn.fetchval("SELECT payload FROM dead_letters")
    assert '"volume": "1701411834604692317316873037158.84105727"' in letter
    stranger = states(TICKER_DTYPE, TICKER_DECIMALS, ticker(NOW_US, 1, 77), ticker(NOW_US, 1))
    assert await db.sink.write_tickers(stranger) == WriteResult(1, 0, 1)


async def test_states_of_two_hosts_meet(db: Database) -> None:
    async def host(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(15):
            rows = states(
                TICKER_DTYPE,
                TICKER_DECIMALS,
                *(
                    ticker(NOW_US + int(n) * 1000, int(n), int(random.integers(0, 4)))
                    for n in random.permutation(3000)[:20]
                ),
            )
            await db.sink.write_tickers(rows)

    await asyncio.gather(*(host(seed) for seed in range(3)))
    wrong = await db.conn.fetchval(
        "SELECT count(*) FROM tickers WHERE timestamp <> date_trunc('second', event_time)"
        " OR last_price <> extract(epoch FROM event_time - $1) * 1000 / 100000000",
        at(NOW_US),
    )
    assert wrong == 0
