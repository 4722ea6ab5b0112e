import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from importlib.resources.abc import Traversable
from pathlib import Path

import asyncpg
import pytest
from conftest import replace_database

from tradecore import schema
from tradecore.errors import StoreError
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import (
    Migration,
    bring_up_to_date,
    check,
    detect_level,
    load_migrations,
    migrate,
)
from tradecore.store.partitions import Partitions
from tradecore.store.pool import describe_server

pytestmark = pytest.mark.every_level

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

FIRST = Migration(1, "001_first", "CREATE TABLE first (a int);\nINSERT INTO first VALUES (1);")
SECOND = Migration(2, "002_second", "ALTER TABLE first ADD b int;")
BROKEN = Migration(2, "002_broken", "ALTER TABLE first ADD b int; SELECT 1/0;")


@pytest.fixture
async def empty(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a fresh and empty database."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def columns(connection: asyncpg.Connection, table: str) -> tuple[str, ...]:
    rows = await connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0"
        " ORDER BY attnum",
        table,
    )
    return tuple(row["attname"] for row in rows)


async def test_an_empty_database_gets_all_tables(empty: asyncpg.Connection) -> None:
    before = await check(empty)
    assert before.pending == tuple(migration.name for migration in load_migrations())
    assert not before.current
    assert await empty.fetchval("SELECT to_regclass('schema_migrations')") is None
    assert await migrate(empty) == list(before.pending)
    after = await check(empty)
    assert after.current
    assert after.applied == before.pending
    assert await migrate(empty) == []


async def test_the_tables_have_the_columns_that_are_copied(connection: asyncpg.Connection) -> None:
    assert await columns(connection, "raw_trades") == schema.TRADE_COLUMNS
    assert await columns(connection, "tickers") == schema.TICKER_COLUMNS
    assert set(await columns(connection, "klines")) == set(schema.KLINE_COLUMNS)


async def test_the_sole_unique_key_of_trades(connection: asyncpg.Connection) -> None:
    definitions = await connection.fetch(
        "SELECT indexdef FROM pg_indexes WHERE tablename = 'raw_trades'"
    )
    (row,) = definitions
    assert row["indexdef"].endswith('btree ("timestamp", symbol, trade_id)')
    assert "UNIQUE" in row["indexdef"]


async def test_the_greatest_trade_fits(connection: asyncpg.Connection) -> None:
    await Partitions().ensure(connection, "raw_trades", [datetime.now(UTC).date()])
    price, quantity, number = await connection.fetchrow(
        "INSERT INTO raw_trades VALUES (now(), '币安USDT', 92233720368.54775807,"
        " 92233720368.54775807, 'SELL', 9223372036854775807) RETURNING price, quantity, trade_id"
    )
    assert str(price) == str(quantity) == "92233720368.54775807"
    assert number == 2**63 - 1


async def test_two_processes_at_once(database: str) -> None:
    async def run() -> list[str]:
        connection = await asyncpg.connect(database)
        try:
            return await migrate(connection)
        finally:
            await connection.close()

    applied = await asyncio.gather(*(run() for _ in range(4)))
    names = [migration.name for migration in load_migrations()]
    assert sorted(applied) == [[], [], [], names]


async def test_forward_step_by_step(empty: asyncpg.Connection) -> None:
    assert await migrate(empty, [FIRST]) == ["001_first"]
    state = await check(empty, [FIRST, SECOND])
    assert (state.applied, state.pending) == (("001_first",), ("002_second",))
    assert await migrate(empty, [FIRST, SECOND]) == ["002_second"]
    assert await columns(empty, "first") == ("a", "b")
    assert await empty.fetchval("SELECT count(*) FROM first") == 1


async def test_missing_klines_of_an_older_schema_become_runs(empty: asyncpg.Connection) -> None:
    await migrate(empty, load_migrations()[:5])
    await empty.execute("INSERT INTO audit_state (symbol) VALUES ('A'), ('B')")
    await empty.execute(
        "INSERT INTO trade_audits (symbol, open_time, state, reason, asked_at)"
        " SELECT 'A', timestamptz '2026-01-01 00:00+0' + n * interval '1 minute', 'waiting',"
        " CASE WHEN n = 1 THEN 'hole' ELSE 'kline' END, CASE WHEN n = 6 THEN now() END"
        " FROM unnest('{1, 2, 3, 5, 6}'::int[]) AS n"
    )
    await migrate(empty)
    rows = await empty.fetch(
        "SELECT symbol, extract(minute FROM lower(gap))::int, extract(minute FROM upper(gap))::int"
        " FROM audit_state LEFT JOIN unnest(no_kline) AS gap ON true ORDER BY 1, 2"
    )
    assert [tuple(row) for row in rows] == [("A", 2, 4), ("A", 5, 6), ("B", None, None)]
    kept = await empty.fetch("SELECT extract(minute FROM open_time)::int FROM trade_audits")
    assert sorted(row[0] for row in kept) == [1, 6]


async def test_a_file_that_fails_leaves_nothing(empty: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(empty, [FIRST, BROKEN])
    assert await columns(empty, "first") == ("a",)
    assert (await check(empty, [FIRST, SECOND])).pending == ("002_second",)


async def test_a_newer_schema_is_left_alone(empty: asyncpg.Connection) -> None:
    await migrate(empty, [FIRST, SECOND])
    state = await check(empty, [FIRST])
    assert state.newer == ("002_second",)
    with pytest.raises(StoreError, match="run a newer tradecore"):
        await migrate(empty, [FIRST])
    await migrate(empty, [FIRST, SECOND])


async def test_a_changed_file_is_refused(empty: asyncpg.Connection) -> None:
    await migrate(empty, [FIRST])
    other = Migration(1, "001_first", FIRST.text + "-- more")
    assert (await check(empty, [other])).changed == ("001_first",)
    with pytest.raises(StoreError, match="001_first ran there with another text"):
        await migrate(empty, [other])


async def test_without_auto_migrate(empty: asyncpg.Connection) -> None:
    with pytest.raises(StoreError, match="run `tradecore migrate`"):
        await bring_up_to_date(empty, auto_migrate=False)
    assert await bring_up_to_date(empty, auto_migrate=True)
    assert await bring_up_to_date(empty, auto_migrate=False) == []


async def test_a_schema_of_its_own(empty: asyncpg.Connection) -> None:
    await empty.execute('CREATE SCHEMA "my Schema"; CREATE TABLE schema_migrations (id int)')
    with pytest.raises(StoreError, match="another program"):
        await migrate(empty)
    await empty.execute('SET search_path = "my Schema"')
    await migrate(empty)
    assert (await check(empty)).current
    names = await empty.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'my Schema'")
    assert {"raw_trades", "schema_migrations"} < {row["tablename"] for row in names}
    await empty.execute("SET search_path = nowhere")
    with pytest.raises(StoreError, match="search_path"):
        await check(empty)


async def test_missing_rights_are_named(empty: asyncpg.Connection) -> None:
    database = await empty.fetchval("SELECT current_database()")
    role = f"{database}_role"
    await empty.execute(f"CREATE ROLE {role}; GRANT CONNECT ON DATABASE {database} TO {role}")
    try:
        await empty.execute(f"SET ROLE {role}")
        with pytest.raises(StoreError, match=f"GRANT CREATE ON SCHEMA public TO {role}"):
            await migrate(empty)
        await empty.execute(f"RESET ROLE; GRANT CREATE ON SCHEMA public TO {role}")
        await migrate(empty, [FIRST])
        await empty.execute(f"SET ROLE {role}")
        with pytest.raises(StoreError, match="lacks a right"):
            await migrate(empty, [FIRST, SECOND])
        await empty.execute("RESET ROLE")
        await empty.execute(f"GRANT SELECT, INSERT ON schema_migrations TO {role}")
        await empty.execute(f"SET ROLE {role}")
        with pytest.raises(StoreError, match="own the tables"):
            await migrate(empty, [FIRST, SECOND])
    finally:
        await empty.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_server_that_takes_no_writes(empty: asyncpg.Connection) -> None:
    await empty.execute("SET default_transaction_read_only = on")
    assert (await check(empty)).pending
    with pytest.raises(StoreError, match="primary"):
        await migrate(empty)


@pytest.mark.two_sessions
async def test_a_lock_that_is_held_too_long(
    database: str, empty: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tradecore.store.migrate._LOCK_LIMIT_S", 1)
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute(
            "SELECT pg_advisory_xact_lock($1, hashtext(current_schema()))", 0x7472636F
        )
        with pytest.raises(StoreError, match="another session"):
            await migrate(empty)
    await other.close()
    assert await migrate(empty)


@pytest.mark.only_levels("plain", "apache", "timescale")
async def test_another_encoding(database: str, empty: asyncpg.Connection) -> None:
    name = await empty.fetchval("SELECT current_database() || '_latin'")
    await empty.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    connection = await asyncpg.connect(replace_database(database, name))
    with pytest.raises(StoreError, match="UTF8"):
        await migrate(connection)
    await connection.close()
    await empty.execute(f"DROP DATABASE {name}")


def test_levels_choose_lines() -> None:
    text = (
        "a\n-- level: plain\nb\n-- level: any\nc\n-- level: timescale\nd\n-- level: tables\ne\n"
        "-- level: community\nf\n"
    )
    migration = Migration(1, "001_x", text)
    assert migration.render("plain") == "a\nb\nc\ne"
    assert migration.render("apache") == "a\nc\nd\ne"
    assert migration.render("community") == "a\nc\nd\nf"
    with pytest.raises(ValueError, match="unknown level"):
        Migration(1, "001_x", "-- level: enterprise").render("plain")


def test_files_are_numbered_without_holes(tmp_path: Path) -> None:
    folder: Traversable = tmp_path
    with pytest.raises(ValueError, match="not numbered"):
        load_migrations(folder)
    (tmp_path / "001_a.sql").write_bytes(b"SELECT 1;\r\n")
    (tmp_path / "README").write_text("no migration")
    (only,) = load_migrations(folder)
    assert (only.version, only.name, only.text) == (1, "001_a", "SELECT 1;\n")
    (tmp_path / "003_c.sql").write_text("SELECT 3;")
    with pytest.raises(ValueError, match="003_c"):
        load_migrations(folder)


@pytest.mark.only_levels("plain")
async def test_plain_is_plain(connection: asyncpg.Connection) -> None:
    assert await detect_level(connection) == "plain"
    kinds = await connection.fetch(
        "SELECT relname, relkind FROM pg_class WHERE relname IN ('raw_trades','tickers','klines')"
    )
    assert {row["relname"]: row["relkind"] for row in kinds} == {
        "raw_trades": b"p",
        "tickers": b"p",
        "klines": b"r",
    }


@pytest.mark.only_levels("apache", "community", "timescale")
async def test_hypertables_where_there_is_timescaledb(connection: asyncpg.Connection) -> None:
    assert (await describe_server(connection)).edition.startswith("timescale-")
    rows = await connection.fetch(
        "SELECT hypertable_name, time_interval FROM timescaledb_information.dimensions"
        " WHERE hypertable_schema = current_schema()"
    )
    assert {row["hypertable_name"]: row["time_interval"].days for row in rows} == {
        "raw_trades": 1,
        "tickers": 1,
        "klines": 30,
    }
    await Partitions().ensure(connection, "raw_trades", [datetime.now(UTC).date()])
    assert await connection.fetchval("SELECT count(*) FROM pg_inherits") == 0


@pytest.mark.skipif(not DEBIAN_15.exists(), reason=f"no PostgreSQL in {DEBIAN_15}")
async def test_the_oldest_server(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADECORE_PG_BIN", str(DEBIAN_15))
    server = EmbeddedPostgres(short_dir, settings={"fsync": "off"})
    connection = await asyncpg.connect(await server.start())
    assert connection.get_server_version().major == 15
    await migrate(connection)
    assert (await check(connection)).current
    await connection.close()
    await server.stop()
