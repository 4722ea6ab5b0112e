"""Moves the tables up to what the server can do by now: plain to hypertables, to aggregates.

All of it is one transaction, so that a crash leaves the tables as they were; daemons wait with
their rows in the ring meanwhile. The candles below the retention horizon are carried over, for
nothing else has them, and those of the first day above are computed right after, so that the others
show; the rest is computed by whoever runs next.
"""

import logging
from collections.abc import Callable

import asyncpg

from tradecore.errors import StoreError, TransientStoreError
from tradecore.store.candle_windows import LOCK_OUT_REFRESH
from tradecore.store.candles import REFRESH_LIMIT_S, WIDTHS, read_kind, refresh
from tradecore.store.failure import TROUBLE
from tradecore.store.horizon import DAY, midnight
from tradecore.store.migrate import (
    Level,
    check,
    detect_level,
    load_migrations,
    lock_schema,
    reach_timescale,
    server_level,
)
from tradecore.store.pool import read_timescale
from tradecore.store.statements import LOCK_OUT_WRITERS

log = logging.getLogger(__name__)

_RANK: dict[Level, int] = {"plain": 0, "apache": 1, "community": 2}
_CANDLES, _DROPPER = "010_candles", "012_drop_expired"
_LIMIT_S = 24 * 3600

_PARTITIONED = ("raw_trades", "tickers")
_CHUNK = {"raw_trades": "1 day", "tickers": "1 day", "klines": "30 days"}

_PARTITIONS = """
SELECT c.oid::regclass::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = $1::text::regclass ORDER BY c.relname
"""


async def possible_level(conn: asyncpg.Connection) -> Level:
    """Return what the tables could be on this server; never less than what they are."""
    return max(
        await detect_level(conn),
        await server_level(conn, await read_timescale(conn)),
        key=_RANK.__getitem__,
    )


async def raise_level(
    conn: asyncpg.Connection, *, tell: Callable[[str], None] = lambda text: None
) -> tuple[Level, Level]:
    """Move the tables to the level of the server; return what they were and what they are.

    The schema has to be up to date. Needs as much free disk as the trades take. `tell` is called
    with what is done next. Raises StoreError when migrations are pending.
    """
    state = await check(conn)
    state.raise_unusable()
    if state.pending:
        raise StoreError(f"{', '.join(state.pending)} pending: run `tradecore migrate` first")
    before = state.level
    if await possible_level(conn) == before:
        return before, before
    async with conn.transaction(isolation="read_committed"):
        await lock_schema(conn, run_limit_s=_LIMIT_S)
        await reach_timescale(conn)
        before = await detect_level(conn)
        after = await server_level(conn, await read_timescale(conn))
        if _RANK[after] <= _RANK[before]:
            return before, before
        await conn.execute("LOCK TABLE trade_symbols IN ACCESS EXCLUSIVE MODE", timeout=120)
        await conn.execute(LOCK_OUT_WRITERS, timeout=120)
        if before == "plain":
            for table in _PARTITIONED:
                await _make_hypertable(conn, table, tell)
            tell("klines: made a hypertable")
            await conn.execute(
                "SELECT create_hypertable('klines', 'timestamp', migrate_data => true,"
                f" chunk_time_interval => interval '{_CHUNK['klines']}',"
                " create_default_indexes => false)",
                timeout=_LIMIT_S,
            )
        if after == "community":
            await _make_aggregates(conn, tell)
    if after == "community":
        await _show_candles(conn, tell)
    return before, after


async def _make_hypertable(
    conn: asyncpg.Connection, table: str, tell: Callable[[str], None]
) -> None:
    """Copy a partitioned table into a hypertable of the same name, partition by partition."""
    fresh = f"{table}_hypertable"
    await conn.execute(
        f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;"
        f" CREATE TABLE {fresh} (LIKE {table} INCLUDING ALL);"
        f" SELECT create_hypertable('{fresh}', 'timestamp', create_default_indexes => false,"
        f" chunk_time_interval => interval '{_CHUNK[table]}')",
        timeout=_LIMIT_S,
    )
    for (partition,) in await conn.fetch(_PARTITIONS, table):
        tell(f"{partition}: copied into the hypertable {table}")
        await conn.execute(f"INSERT INTO {fresh} SELECT * FROM {partition}", timeout=_LIMIT_S)
    names = await conn.fetch(
        "SELECT quote_ident(conname) AS name FROM pg_constraint"
        " WHERE conrelid = $1::text::regclass AND contype = 'u'",
        table,
    )
    copies = await conn.fetch(
        "SELECT quote_ident(conname) AS name FROM pg_constraint"
        " WHERE conrelid = $1::text::regclass AND contype = 'u'",
        fresh,
    )
    grants = await _grants(conn, table, table)
    await conn.execute(f"DROP TABLE {table}", timeout=_LIMIT_S)
    await conn.execute(f"ALTER TABLE {fresh} RENAME TO {table}")
    for grant in grants:
        await conn.execute(grant)
    for (old,), (new,) in zip(copies, names, strict=True):
        await conn.execute(f"ALTER TABLE {table} RENAME CONSTRAINT {old} TO {new}")


async def _grants(conn: asyncpg.Connection, table: str, successor: str) -> list[str]:
    """Return the statements that give `successor` the reading rights that `table` has."""
    rows = await conn.fetch(
        "SELECT format('GRANT SELECT ON %s TO %s', $2::text,"
        " CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE grantee::regrole::text END)"
        " FROM pg_class, aclexplode(relacl) WHERE oid = $1::text::regclass"
        " AND privilege_type = 'SELECT' AND grantee <> relowner",
        table,
        successor,
    )
    return [row[0] for row in rows]


async def _make_aggregates(conn: asyncpg.Connection, tell: Callable[[str], None]) -> None:
    """Put continuous aggregates in the place of the tables of candles."""
    tell("candles: tables become continuous aggregates")
    for width in reversed(WIDTHS):
        await conn.execute(f"ALTER TABLE candles_{width} RENAME TO candles_{width}_table")
    for migration in load_migrations():
        if migration.name in (_CANDLES, _DROPPER):
            await conn.execute(migration.render_only("community"), timeout=_LIMIT_S)
    for width in WIDTHS:
        place = await conn.fetchrow(
            "SELECT format('%I.%I', materialization_hypertable_schema,"
            " materialization_hypertable_name) AS name"
            " FROM timescaledb_information.continuous_aggregates"
            " WHERE view_schema = current_schema() AND view_name = $1",
            f"candles_{width}",
        )
        assert place is not None
        columns = ", ".join(
            row[0]
            for row in await conn.fetch(
                "SELECT quote_ident(attname) FROM pg_attribute"
                " WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped"
                " ORDER BY attnum",
                f"candles_{width}",
            )
        )
        await conn.execute(
            f"INSERT INTO {place['name']} ({columns}) SELECT {columns} FROM candles_{width}_table"
            " WHERE bucket < (SELECT raw_from FROM store_state)",
            timeout=_LIMIT_S,
        )
        for grant in await _grants(conn, f"candles_{width}_table", f"candles_{width}"):
            await conn.execute(grant)
        await conn.execute(f"DROP TABLE candles_{width}_table")
    # The daemon computes the rest: the fence passes over all of it once more.
    await conn.execute(
        "UPDATE store_state SET candles_through = '-infinity'; DELETE FROM candle_windows"
    )


async def _show_candles(conn: asyncpg.Connection, tell: Callable[[str], None]) -> None:
    """Compute the first day above the horizon, so that candles below it are read, not computed.

    What is below the latest candle that was ever computed is read from the aggregate; else it is
    computed from trades, which are gone there.
    """
    raw_from = await conn.fetchval("SELECT raw_from FROM store_state WHERE isfinite(raw_from)")
    if raw_from is None:
        return
    first = await conn.fetchval(
        "SELECT min(timestamp) FROM raw_trades WHERE timestamp >= $1::timestamptz", raw_from
    )
    if first is None:
        return
    tell(f"candles: computed of {first:%Y-%m-%d}, the first day that has trades")
    day = midnight(first)
    try:
        await conn.execute(LOCK_OUT_REFRESH, timeout=REFRESH_LIMIT_S)
        try:
            now = await conn.fetchval("SELECT clock_timestamp()")
            kind = await read_kind(conn, "community")
            await refresh(conn, kind, day, day + DAY, raw_from=raw_from, closed=now)
        finally:
            await conn.execute(LOCK_OUT_REFRESH.replace("pg_advisory_lock", "pg_advisory_unlock"))
    except (*TROUBLE, TransientStoreError) as error:
        # The daemon computes them all the same, this day with the others.
        log.warning("candles are not computed yet", extra={"error": str(error)})
