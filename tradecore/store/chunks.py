"""The days of raw_trades and tickers as tables: which there are, dropping old ones.

A day is a native partition, or a chunk of a hypertable. Dropping one never lets a writer wait for
long: a partition is detached first, which takes no lock that writers meet; a chunk is locked for
itself, and whoever holds it is waited for a moment only.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import asyncpg

from tradecore.store.migrate import Level

TABLES = ("raw_trades", "tickers")
"""Those that retention and compression are about; klines and candles are kept for ever."""

MARK = "tradecore: below the retention horizon, about to be dropped"
"""The comment of a partition that is not to be taken for somebody's own table later."""

_SETTINGS = "SET lock_timeout = '{lock}'; SET statement_timeout = '{statement}'"
_DETACH_LIMIT = "20s"
"""Of what waits for readers of the table; it blocks nobody and is gone on with later."""

_PARTITIONS = """
SELECT c.relname, i.inhdetachpending FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = to_regclass($1::text) ORDER BY c.relname
"""
_LEFT_OVER = """
SELECT c.relname FROM pg_class AS c
WHERE c.relnamespace = quote_ident(current_schema())::regnamespace AND c.relkind = 'r'
  AND NOT c.relispartition AND obj_description(c.oid, 'pg_class') = $1::text
ORDER BY c.relname
"""

# Bits of `status`: 1 compressed, 2 in part out of order, 4 frozen, 8 with rows that came later.
_CHUNKS = """
SELECT i.hypertable_name AS table,
       format('%I.%I', i.chunk_schema, i.chunk_name) AS name, i.range_start, i.range_end, c.status
FROM timescaledb_information.chunks AS i
JOIN _timescaledb_catalog.chunk AS c
    ON c.schema_name = i.chunk_schema AND c.table_name = i.chunk_name
WHERE i.hypertable_schema = current_schema() AND i.hypertable_name = ANY($1::text[])
ORDER BY i.range_start, i.hypertable_name
"""
_COMPRESSED, _UNORDERED, _FROZEN, _PARTIAL = 1, 2, 4, 8

log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """The rows of one day, as a table of its own."""

    table: str
    name: str
    """As in SQL."""
    begin: datetime
    end: datetime
    state: str = "open"
    """open: rows as they come; compressed; partial: compressed, but rows came later."""
    frozen: bool = False
    """Nobody may write to it."""
    pending: bool = False
    """It is being detached: not to be seen any more."""


@dataclass(frozen=True, slots=True)
class Server:
    """What the statements need to know of the database."""

    level: Level
    schema: str = ""
    """Of TimescaleDB's functions, as in SQL."""


async def read_server(conn: asyncpg.Connection, level: Level) -> Server:
    """Find out where TimescaleDB's functions are."""
    if level == "plain":
        return Server(level)
    schema = await conn.fetchval(
        "SELECT quote_ident(n.nspname) FROM pg_extension AS e"
        " JOIN pg_namespace AS n ON n.oid = e.extnamespace WHERE e.extname = 'timescaledb'"
    )
    return Server(level, schema)


async def chunks(conn: asyncpg.Connection, server: Server) -> list[Chunk]:
    """Return the days there are, the oldest first. Raises asyncpg errors."""
    if server.level != "plain":
        return [
            Chunk(
                row["table"],
                row["name"],
                row["range_start"],
                row["range_end"],
                _state(row["status"]),
                frozen=bool(row["status"] & _FROZEN),
            )
            for row in await conn.fetch(_CHUNKS, TABLES)
        ]
    found = []
    for table in TABLES:
        for name, pending in await conn.fetch(_PARTITIONS, table):
            if match := re.fullmatch(rf"{table}_(\d{{8}})", name):
                begin = datetime.strptime(match[1], "%Y%m%d").replace(tzinfo=UTC)
                found.append(Chunk(table, name, begin, begin + timedelta(days=1), pending=pending))
    return sorted(found, key=lambda one: (one.begin, one.table))


def _state(status: int) -> str:
    if not status & _COMPRESSED:
        return "open"
    return "partial" if status & (_PARTIAL | _UNORDERED) else "compressed"


async def drop_below(
    conn: asyncpg.Connection, server: Server, found: Sequence[Chunk], horizon: datetime
) -> list[Chunk]:
    """Drop the days that are wholly below the horizon, the oldest first; return which.

    `conn` must not be in a transaction. Stops at the first one that others hold; the next call goes
    on there. Raises asyncpg errors; what was dropped until then is.
    """
    dropped: list[Chunk] = []
    if server.level == "plain":
        await _drop_left_over(conn)
    for one in found:
        if one.end > horizon:
            break
        try:
            if server.level == "plain":
                await _drop_partition(conn, one)
            else:
                await _drop_chunk(conn, server, one)
        except (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError):
            log.info(
                "a day below the retention horizon is in use and is dropped later",
                extra={"table": one.table, "day": f"{one.begin:%Y-%m-%d}"},
            )
            break
        dropped.append(one)
    return dropped


async def _drop_chunk(conn: asyncpg.Connection, server: Server, one: Chunk) -> None:
    await conn.execute(_SETTINGS.format(lock="2s", statement="50s"))
    # Older ones are gone already, so that this is one only.
    drop = f"{server.schema}.drop_chunks('{one.table}'::regclass, older_than => $1::timestamptz)"
    await conn.execute(f"SELECT {drop}", one.end)


async def _drop_partition(conn: asyncpg.Connection, one: Chunk) -> None:
    """Detach a partition and drop it; each statement is a transaction of its own."""
    await conn.execute(_SETTINGS.format(lock="2s", statement=_DETACH_LIMIT))
    if not one.pending:
        await conn.execute(f"COMMENT ON TABLE {one.name} IS '{MARK}'")
    await conn.execute(_SETTINGS.format(lock=_DETACH_LIMIT, statement=_DETACH_LIMIT))
    detach = f"ALTER TABLE {one.table} DETACH PARTITION {one.name}"
    if one.pending:
        await conn.execute(f"{detach} FINALIZE")
    else:
        try:
            await conn.execute(f"{detach} CONCURRENTLY")
        except asyncpg.ObjectNotInPrerequisiteStateError:
            # A default partition of somebody's: then only with a lock on the whole table.
            await conn.execute(_SETTINGS.format(lock="1s", statement="10s"))
            await conn.execute(detach)
    await _drop_table(conn, one.name)


async def _drop_left_over(conn: asyncpg.Connection) -> None:
    """Drop partitions that were detached by a call that went no further."""
    for (name,) in await conn.fetch(_LEFT_OVER, MARK):
        if re.fullmatch(rf"({'|'.join(TABLES)})_\d{{8}}", name):
            with suppress(asyncpg.LockNotAvailableError):
                await _drop_table(conn, name)


async def _drop_table(conn: asyncpg.Connection, name: str) -> None:
    await conn.execute(_SETTINGS.format(lock="2s", statement="50s"))
    await conn.execute(f"DROP TABLE {name}")


async def compress(conn: asyncpg.Connection, server: Server, one: Chunk, limit_s: float) -> None:
    """Compress a day, or compress it again with the rows that came since.

    Who writes to it waits meanwhile, about a second per million rows. Raises asyncpg errors.
    """
    await conn.execute(_SETTINGS.format(lock="2s", statement=f"{limit_s:.0f}s"))
    await conn.execute(
        f"SELECT {server.schema}.compress_chunk('{one.name}'::regclass, if_not_compressed => true)",
        timeout=limit_s + 10,
    )


async def is_compressed(conn: asyncpg.Connection, server: Server, one: Chunk) -> bool:
    """Tell whether a day is compressed now, or gone."""
    those = [other for other in await chunks(conn, server) if other.name == one.name]
    return all(other.state == "compressed" for other in those)


async def saved(conn: asyncpg.Connection, server: Server) -> dict[str, tuple[int, int]]:
    """Return by table the bytes of its compressed days before, heap and index, and after.

    As they were when each was compressed; a table without compressed days is not among them.
    """
    found = {}
    if server.level == "community":
        for table in TABLES:
            row = await conn.fetchrow(
                "SELECT before_compression_total_bytes, after_compression_total_bytes"
                f" FROM {server.schema}.hypertable_compression_stats('{table}'::regclass)"
                " WHERE number_compressed_chunks > 0"
            )
            if row is not None and row[0]:
                found[table] = int(row[0]), int(row[1])
    return found
