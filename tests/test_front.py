"""The front of PGlite (tests/levels/pglite): many connections, one session."""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.levels import Server

pytestmark = [pytest.mark.every_level, pytest.mark.only_levels("community")]

COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_END = struct.pack(">h", -1)


@pytest.fixture
async def pair(database: str) -> AsyncIterator[tuple[asyncpg.Connection, asyncpg.Connection]]:
    """Two connections, and the table t (id int primary key, word text)."""
    one, other = await asyncpg.connect(database), await asyncpg.connect(database)
    await one.execute("CREATE TABLE t (id int PRIMARY KEY, word text)")
    yield one, other
    await one.close()
    await other.close()


def copy_row(number: int, word: bytes) -> bytes:
    return struct.pack(">hiii", 2, 4, number, len(word)) + word


async def test_statements_of_one_name(pair: tuple[Any, Any]) -> None:
    """Connections of asyncpg number their statements alike."""
    one, other = pair
    first, second = await one.prepare("SELECT 1 + $1::int"), await other.prepare("SELECT $1::text")
    for turn in range(3):
        assert await first.fetchval(turn) == 1 + turn
        assert await second.fetchval(f"{turn}") == f"{turn}"
    for number in range(150):  # more than asyncpg keeps: it closes the oldest
        assert await one.fetchval(f"SELECT {number} + $1::int", 1) == number + 1
        assert await other.fetchval(f"SELECT {number} - $1::int", 1) == number - 1
    assert await first.fetchval(5) == 6


async def test_statements_without_a_name(database: str) -> None:
    one = await asyncpg.connect(database, statement_cache_size=0)
    other = await asyncpg.connect(database, statement_cache_size=0)
    for turn in range(3):
        assert await asyncio.gather(
            one.fetchval("SELECT $1::int", turn), other.fetchval("SELECT $1::text", "a")
        ) == [turn, "a"]
    await one.close()
    await other.close()


@pytest.mark.parametrize("words", ["DEALLOCATE ALL", "DISCARD ALL"])
async def test_whoever_drops_statements_drops_its_own(pair: tuple[Any, Any], words: str) -> None:
    one, other = pair
    mine, others = await one.prepare("SELECT $1::int"), await other.prepare("SELECT $1::text")
    await one.execute(words)
    assert await others.fetchval("a") == "a"
    with pytest.raises(asyncpg.InvalidSQLStatementNameError):
        await mine.fetchval(1)
    again = await one.prepare("SELECT 3")
    await one.execute(f"DEALLOCATE {again.get_name()}")
    with pytest.raises(asyncpg.InvalidSQLStatementNameError):
        await again.fetchval()


async def test_a_transaction_holds_the_others(pair: tuple[Any, Any]) -> None:
    one, other = pair
    async with one.transaction():
        await one.execute("INSERT INTO t VALUES (1, 'a')")
        reading = asyncio.create_task(other.fetchval("SELECT count(*) FROM t"))
        await asyncio.sleep(0.1)
        assert not reading.done()
        await one.execute("INSERT INTO t VALUES (2, 'b')")
    assert await reading == 2


async def test_a_failed_transaction_holds_them_too(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await one.execute("BEGIN")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await one.execute("SELECT 1 / 0")
    reading = asyncio.create_task(other.fetchval("SELECT 7"))
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await one.execute("SELECT 1")
    assert not reading.done()
    await one.execute("ROLLBACK")
    assert await reading == 7


async def test_whoever_vanishes_in_a_transaction_is_rolled_back(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await one.prepare("SELECT 1")
    await one.execute("BEGIN; INSERT INTO t VALUES (1, 'a')")
    reading = asyncio.create_task(other.fetchval("SELECT count(*) FROM t"))
    await asyncio.sleep(0.05)
    one.terminate()
    assert await reading == 0
    assert await other.fetchval("SELECT count(*) FROM pg_prepared_statements") == 2


async def test_whoever_waits_may_vanish_or_give_up(database: str, pair: tuple[Any, Any]) -> None:
    one, other = pair
    third = await asyncpg.connect(database)
    async with one.transaction():
        await one.execute("INSERT INTO t VALUES (1, 'a')")
        vanishing = asyncio.create_task(third.execute("DELETE FROM t"))
        await asyncio.sleep(0.05)
        third.terminate()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await vanishing
        with pytest.raises(TimeoutError):
            await other.execute("DELETE FROM t", timeout=0.1)
        await asyncio.sleep(0.2)  # asyncpg asks for the cancellation after it has raised
    assert await other.fetchval("SELECT count(*) FROM t") == 1


async def test_a_copy_of_many_rows(pair: tuple[Any, Any]) -> None:
    one, other = pair
    rows = [(number, f"word {number}") for number in range(100_000)]
    assert await one.copy_records_to_table("t", records=rows) == "COPY 100000"

    async def pieces() -> AsyncIterator[bytes]:
        yield COPY_HEAD
        for begin in range(100_000, 200_000, 100):
            yield b"".join(copy_row(number, b"x") for number in range(begin, begin + 100))
        yield COPY_END

    assert await other.copy_to_table("t", source=pieces(), format="binary") == "COPY 100000"
    assert await one.fetchval("SELECT count(*) || ' ' || sum(id) FROM t") == "200000 19999900000"
    read = bytearray()

    async def take(piece: bytes) -> None:
        read.extend(piece)

    assert await one.copy_from_table("t", output=take, format="binary") == "COPY 200000"
    assert read.count(b"word ") == 100_000


async def test_many_rows_by_executemany(pair: tuple[Any, Any]) -> None:
    one, other = pair
    rows = [(number, "x" * (number % 50)) for number in range(10_000)]
    insert = "INSERT INTO t VALUES ($1, $2)"
    await one.executemany(insert, rows)
    assert await other.fetch("SELECT * FROM t ORDER BY id") == rows
    returned = await one.fetchmany("UPDATE t SET word = $2 WHERE id = $1 RETURNING id", rows)
    assert returned == [(number,) for number in range(10_000)]


@pytest.mark.parametrize("size", [*range(16), 8000, 70_000])
async def test_a_message_ends_with_the_buffer_of_pglite(pair: tuple[Any, Any], size: int) -> None:
    """It reads 8192 bytes at once; at some of these sizes a message ends just there."""
    one, _ = pair
    rows = [(number, "x" * size) for number in range(1_000)]
    await one.executemany("INSERT INTO t VALUES ($1, $2)", rows)
    assert await one.fetchval("SELECT sum(length(word)) FROM t") == size * 1_000


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("wrong", [0, 1, 5_000, 9_999])
async def test_an_executemany_that_fails(
    pair: tuple[Any, Any], wrong: int, in_transaction: bool
) -> None:
    one, other = pair
    await one.execute("INSERT INTO t VALUES (-1, 'a')")
    rows = [(-1 if number == wrong else number, "b" * 30) for number in range(10_000)]
    if in_transaction:
        await one.execute("BEGIN; INSERT INTO t VALUES (-2, 'a')")
    with pytest.raises(asyncpg.UniqueViolationError):
        await one.executemany("INSERT INTO t VALUES ($1, $2)", rows)
    if in_transaction:
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await one.execute("SELECT 1")
        await one.execute("ROLLBACK")
    assert await other.fetch("SELECT * FROM t") == [(-1, "a")]
    rows[wrong] = (wrong, "b")
    await one.executemany("INSERT INTO t VALUES ($1, $2)", rows)
    assert await other.fetchval("SELECT count(*) FROM t") == 10_001


async def test_an_executemany_with_rows_that_cannot_be_sent(pair: tuple[Any, Any]) -> None:
    """asyncpg then ends the request with a ROLLBACK of its own."""
    one, other = pair
    rows: list[tuple[object, str]] = [(number, "b") for number in range(10_000)]
    rows[8_000] = ("eight thousand", "b")
    with pytest.raises(asyncpg.DataError):
        await one.executemany("INSERT INTO t VALUES ($1, $2)", rows)
    assert await other.fetchval("SELECT count(*) FROM t") == 0


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_a_copy_that_the_client_breaks_off(
    pair: tuple[Any, Any], in_transaction: bool
) -> None:
    one, other = pair

    async def breaks_off() -> AsyncIterator[bytes]:
        yield COPY_HEAD + copy_row(1, b"a")
        raise KeyError("enough")

    if in_transaction:
        await one.execute("BEGIN")
    with pytest.raises((KeyError, asyncpg.QueryCanceledError)):
        await one.copy_to_table("t", source=breaks_off(), format="binary")
    if in_transaction:
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await one.execute("SELECT 1")
        await one.execute("ROLLBACK")
    assert await one.fetchval("SELECT count(*) FROM t") == 0
    assert await other.fetchval("SELECT 1") == 1


async def test_an_error_inside_a_copy(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await one.execute("INSERT INTO t VALUES (70000, 'a')")
    rows = [(number, "b") for number in range(100_000)]
    async with other.transaction():
        with pytest.raises(asyncpg.UniqueViolationError) as caught:
            async with other.transaction():
                await other.copy_records_to_table("t", records=rows)
        assert caught.value.detail == "Key (id)=(70000) already exists."
        assert await other.fetchval("SELECT count(*) FROM t") == 1
    with pytest.raises(asyncpg.UndefinedTableError):
        await other.copy_records_to_table("nowhere", records=rows)
    assert await one.fetchval("SELECT count(*) FROM t") == 1


async def test_settings_belong_to_their_connection(database: str, pair: tuple[Any, Any]) -> None:
    one, other = pair
    third = await asyncpg.connect(
        database,
        server_settings={"application_name": "third", "statement_timeout": "7s", "jit": "off"},
    )
    await one.execute("SET timezone = 'Asia/Tokyo'; SET search_path = pg_catalog, public")
    await other.execute("SELECT set_config('lock_timeout', '3s', false)")
    show = "SELECT concat_ws(' ', {})".format(
        ", ".join(
            f"current_setting('{name}')"
            for name in ("application_name", "statement_timeout", "timezone", "lock_timeout")
        )
    )
    for _ in range(2):
        assert await one.fetchval(show) == " 0 Asia/Tokyo 0"
        assert await other.fetchval(show) == " 0 GMT 3s"
        assert await third.fetchval(show) == "third 7s GMT 0"
    assert await one.fetchval("SHOW search_path") == "pg_catalog, public"
    assert await other.fetchval("SHOW search_path") == '"$user", public'
    await third.execute("SET statement_timeout = '9s'; SET lock_timeout = '9s'")
    await third.execute("RESET ALL")
    assert await third.fetchval(show) == "third 7s GMT 0"
    assert await one.fetchval(show) == " 0 Asia/Tokyo 0"
    await third.close()
    with pytest.raises(asyncpg.UndefinedObjectError):
        await asyncpg.connect(database, server_settings={"no_such_setting": "1"})
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(database, database="nowhere")


async def test_roles_belong_to_their_connection(database: str, pair: tuple[Any, Any]) -> None:
    one, other = pair
    await one.execute("CREATE ROLE weak LOGIN; CREATE ROLE reader; GRANT reader TO weak")
    weak = await asyncpg.connect(database, user="weak")
    await other.execute("SET ROLE reader")
    for _ in range(2):
        assert await one.fetchval("SELECT current_user") == "postgres"
        assert await other.fetchval("SELECT current_user") == "reader"
        assert await weak.fetchval("SELECT current_user") == "weak"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await weak.execute("SELECT FROM t")
    await weak.close()


async def test_a_pool_gives_back_clean_connections(database: str, pair: tuple[Any, Any]) -> None:
    one, _ = pair
    async with asyncpg.create_pool(
        database, min_size=1, max_size=1, server_settings={"statement_timeout": "7s"}
    ) as pool:
        async with pool.acquire() as conn:
            await conn.execute("SET statement_timeout = '9s'; SET timezone = 'Asia/Tokyo'")
        await one.execute("SET lock_timeout = '3s'")
        async with pool.acquire() as conn:
            assert await conn.fetchval("SHOW statement_timeout") == "7s"
            assert await conn.fetchval("SHOW timezone") == "GMT"
        assert await one.fetchval("SHOW lock_timeout") == "3s"
        # An open transaction is rolled back, not handed on.
        async with pool.acquire() as conn:
            await conn.execute("BEGIN; INSERT INTO t VALUES (1, 'a')")
        assert await one.fetchval("SELECT count(*) FROM t") == 0


async def test_many_at_once(database: str, pair: tuple[Any, Any]) -> None:
    one, _ = pair
    async with asyncpg.create_pool(database, min_size=8, max_size=8) as pool:

        async def add(number: int) -> None:
            async with pool.acquire() as conn, conn.transaction():
                await conn.execute("INSERT INTO t VALUES ($1, $2)", number, "a")
                if number % 7 == 0:
                    await conn.copy_records_to_table("t", records=[(-number - 1, "b")])
                if number % 10 == 9:
                    raise KeyError

        done = await asyncio.gather(*map(add, range(200)), return_exceptions=True)
    assert [number for number in range(200) if done[number] is not None] == [*range(9, 200, 10)]
    kept = [number for number in range(200) if number % 10 != 9]
    expected = len(kept) + sum(number % 7 == 0 for number in kept)
    assert await one.fetchval("SELECT count(*) FROM t") == expected


async def test_a_cursor(pair: tuple[Any, Any]) -> None:
    one, _ = pair
    await one.execute("INSERT INTO t SELECT n, 'a' FROM generate_series(1, 1000) AS n")
    async with one.transaction():
        rows = [row["id"] async for row in one.cursor("SELECT id FROM t ORDER BY id", prefetch=70)]
    assert rows == [*range(1, 1001)]


async def test_a_fresh_database_has_nothing_of_the_last_one(server: Server) -> None:
    for turn, migrated in enumerate((True, True, False, True, True)):
        async with server.database(migrated=migrated) as dsn:
            one, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
            assert await other.fetchval("SELECT to_regclass('t')") is None
            assert await other.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = 'me'") == 0
            tables = await one.fetchval(
                "SELECT count(*) FROM pg_tables WHERE tablename IN ('raw_trades', 'klines')"
            )
            assert tables == (2 if migrated else 0), turn
            await one.execute("CREATE ROLE me; CREATE TABLE t (id int)")
            await one.copy_records_to_table("t", records=[(number,) for number in range(10_000)])
            if migrated:
                await one.execute("DROP TABLE klines; INSERT INTO trade_symbols VALUES ('ABC')")
            await one.execute("CHECKPOINT")
            await one.execute("SET timezone = 'Asia/Tokyo'; BEGIN; INSERT INTO t VALUES (1)")
            one.terminate()
            other.terminate()
