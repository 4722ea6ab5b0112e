import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta

import asyncpg
import pytest

from tradecore import clock
from tradecore.errors import StoreError
from tradecore.store.partitions import Partitions

pytestmark = pytest.mark.usefixtures("plain_level")

DAY = date(2024, 8, 8)

INSERT = """
INSERT INTO raw_trades (timestamp, symbol, price, quantity, side, trade_id)
VALUES ($1, 'BTCUSDT', 1, 1, 'BUY', $2)
"""


def at(day: date, hour: int = 12) -> datetime:
    return datetime(day.year, day.month, day.day, hour, tzinfo=UTC)


async def partitions_of(connection: asyncpg.Connection, table: str) -> list[str]:
    rows = await connection.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits"
        " WHERE inhparent = $1::text::regclass ORDER BY 1",
        table,
    )
    return [row["name"] for row in rows]


@pytest.fixture
async def pool(migrated_database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(migrated_database, min_size=1, max_size=8) as pool:
        yield pool


async def test_rows_of_a_day_have_a_place(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(INSERT, at(DAY), 1)
    await Partitions().ensure(connection, "raw_trades", [DAY])
    midnight = at(DAY, 0)
    last = midnight + timedelta(days=1, microseconds=-1)
    await connection.execute(INSERT, midnight, 1)
    await connection.execute(INSERT, last, 2)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(INSERT, midnight + timedelta(days=1), 3)
    assert await partitions_of(connection, "raw_trades") == ["raw_trades_20240808"]
    assert await connection.fetchval("SELECT count(*) FROM raw_trades_20240808") == 2


async def test_a_partition_has_only_the_unique_key(connection: asyncpg.Connection) -> None:
    await Partitions().ensure(connection, "raw_trades", [DAY])
    await connection.execute(INSERT, at(DAY), 1)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(INSERT, at(DAY), 1)
    query = "SELECT count(*) FROM pg_indexes WHERE tablename = 'raw_trades_20240808'"
    assert await connection.fetchval(query) == 1


async def test_the_zone_of_the_session_does_not_move_the_day(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute("SET timezone = 'Asia/Tokyo'")
    await Partitions().ensure(connection, "raw_trades", [DAY])
    await connection.execute(INSERT, at(DAY, 0), 1)
    await connection.execute(INSERT, at(DAY, 23), 2)


async def test_today_brings_tomorrow(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "wall_ns", lambda: int(at(DAY, 23).timestamp() * 1e9))
    partitions = Partitions()
    await partitions.ensure(connection, "tickers", [DAY - timedelta(days=3)])
    assert await partitions_of(connection, "tickers") == ["tickers_20240805"]
    await partitions.ensure(connection, "tickers", [DAY])
    assert await partitions_of(connection, "tickers") == [
        "tickers_20240805",
        "tickers_20240808",
        "tickers_20240809",
    ]


async def test_two_daemons_meet(pool: asyncpg.Pool, connection: asyncpg.Connection) -> None:
    days = [DAY + timedelta(days=n) for n in range(20)]
    daemons = [Partitions() for _ in range(4)]
    await asyncio.gather(
        *(
            daemon.ensure(pool, "raw_trades", days[n:] + days[:n])
            for n, daemon in enumerate(daemons)
        )
    )
    assert len(await partitions_of(connection, "raw_trades")) == 20


async def test_nothing_to_do_asks_no_server(connection: asyncpg.Connection) -> None:
    partitions = Partitions()
    await partitions.ensure(connection, "raw_trades", [DAY])
    await connection.close()
    await partitions.ensure(connection, "raw_trades", [DAY])


async def test_a_writer_under_way_is_not_in_the_way(
    pool: asyncpg.Pool, connection: asyncpg.Connection
) -> None:
    partitions = Partitions()
    await partitions.ensure(pool, "raw_trades", [DAY])
    tomorrow = DAY + timedelta(days=1)
    async with connection.transaction():
        await connection.execute(INSERT, at(DAY), 1)
        async with asyncio.timeout(5):
            await partitions.ensure(pool, "raw_trades", [tomorrow])
        await connection.execute(INSERT, at(DAY), 2)
    await connection.execute(INSERT, at(tomorrow), 3)
    assert await connection.fetchval("SELECT count(*) FROM raw_trades") == 3


async def test_a_dropped_partition_is_made_again(connection: asyncpg.Connection) -> None:
    partitions = Partitions()
    await partitions.ensure(connection, "raw_trades", [DAY])
    await connection.execute("DROP TABLE raw_trades_20240808")
    partitions.forget("raw_trades")
    await partitions.ensure(connection, "raw_trades", [DAY])
    await connection.execute(INSERT, at(DAY), 1)


async def test_many_days_at_once(connection: asyncpg.Connection) -> None:
    days = [DAY + timedelta(days=n) for n in range(120)]
    await Partitions().ensure(connection, "raw_trades", days)
    assert len(await partitions_of(connection, "raw_trades")) == 120


async def test_a_table_without_partitions_needs_none(connection: asyncpg.Connection) -> None:
    await Partitions().ensure(connection, "klines", [DAY])
    assert await partitions_of(connection, "klines") == []


async def test_a_stranger_in_the_way_is_named(connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE TABLE raw_trades_20240808 (a int)")
    with pytest.raises(StoreError, match=r"raw_trades_20240808.*no partition of raw_trades"):
        await Partitions().ensure(connection, "raw_trades", [DAY])
    await connection.execute("DROP TABLE raw_trades_20240808")
    await connection.execute(
        "CREATE TABLE august PARTITION OF raw_trades"
        " FOR VALUES FROM ('2024-08-01 00:00+00') TO ('2024-09-01 00:00+00')"
    )
    with pytest.raises(StoreError, match="august"):
        await Partitions().ensure(connection, "raw_trades", [DAY])
    assert await connection.fetchval("SELECT 1") == 1


async def test_a_missing_table_and_an_open_transaction_are_refused(
    connection: asyncpg.Connection,
) -> None:
    with pytest.raises(StoreError, match="tradecore migrate"):
        await Partitions().ensure(connection, "nothing", [DAY])
    async with connection.transaction():
        with pytest.raises(ValueError, match="outside of transactions"):
            await Partitions().ensure(connection, "raw_trades", [DAY])
