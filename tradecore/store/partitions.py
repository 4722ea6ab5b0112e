"""Daily partitions of plain PostgreSQL, made before the first row of a day needs them.

A partition is built beside its table and attached while it is empty: ATTACH takes a lock that
writers do not meet. TimescaleDB makes its chunks itself, there is nothing to do then.
"""

import asyncio
import logging
import re
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg

from tradecore import clock
from tradecore.errors import StoreError

_LOCK_KEY = 0x74727061  # "trpa"; the second key of the lock is the table
_LOCK_LIMIT = "10s"
_DAYS_PER_TRANSACTION = 50

log = logging.getLogger(__name__)


class Partitions:
    """Knows which daily partitions exist and makes those that are missing.

    One instance serves one database; calls from several tasks and several daemons may meet.
    """

    def __init__(self) -> None:
        self._known: dict[str, set[date] | None] = {}  # None: the table has no native partitions
        self._lock = asyncio.Lock()

    async def ensure(
        self, database: asyncpg.Pool | asyncpg.Connection, table: str, days: Iterable[date]
    ) -> None:
        """Make sure that rows of each UTC day in `days` have a place in `table`.

        When today is among them tomorrow is made as well, so that midnight costs nothing. Without
        work this is a set comparison. A connection must not be in a transaction: the partition
        would stay locked until its end, and a transaction that has used the table may not see
        partitions made later. Raises StoreError when the table
        is missing or another table is in the way, asyncpg errors when the server is away.
        """
        wanted = set(days)
        today = datetime.fromtimestamp(clock.wall_ns() // 10**9, UTC).date()
        if today in wanted:
            wanted.add(today + timedelta(days=1))
        if self._has(table, wanted):
            return
        async with self._lock, _acquire(database) as conn:
            if conn.is_in_transaction():
                raise ValueError("partitions are made outside of transactions")
            if table not in self._known:
                self._known[table] = await _load(conn, table)
            known = self._known[table]
            if known is None:
                return
            missing = sorted(wanted - known)
            try:
                for at in range(0, len(missing), _DAYS_PER_TRANSACTION):
                    known |= await _create(conn, table, missing[at : at + _DAYS_PER_TRANSACTION])
            except StoreError:
                self.forget(table)  # it may be another kind of table by now
                raise

    def forget(self, table: str) -> None:
        """Look again at the next call: a partition was dropped, or a row found none (23514)."""
        self._known.pop(table, None)

    def _has(self, table: str, wanted: set[date]) -> bool:
        if table not in self._known:
            return False
        known = self._known[table]
        return known is None or known >= wanted


def partition_name(table: str, day: date) -> str:
    """Return the name of the partition for `day`, such as raw_trades_20240808."""
    return f"{table}_{day:%Y%m%d}"


def _acquire(
    database: asyncpg.Pool | asyncpg.Connection,
) -> AbstractAsyncContextManager[Any]:
    if isinstance(database, asyncpg.Pool):
        return database.acquire(timeout=30)  # type: ignore[no-any-return]
    return nullcontext(database)


async def _load(conn: asyncpg.Connection, table: str) -> set[date] | None:
    """Return the days that have a partition; None when `table` is not partitioned."""
    kind = await conn.fetchval("SELECT relkind FROM pg_class WHERE oid = to_regclass($1)", table)
    if kind is None:
        raise StoreError(f"the table {table} is missing: run `tradecore migrate`")
    if kind != b"p":
        return None
    names = await conn.fetch(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = $1::text::regclass",
        table,
    )
    matches = (re.fullmatch(rf"{table}_(\d{{8}})", row["relname"]) for row in names)
    return {datetime.strptime(match[1], "%Y%m%d").date() for match in matches if match}


async def _create(conn: asyncpg.Connection, table: str, days: list[date]) -> set[date]:
    """Make the partitions for `days` that no other daemon made first; return all known days."""
    try:
        async with conn.transaction(isolation="read_committed"):
            await conn.execute(f"SET LOCAL lock_timeout = '{_LOCK_LIMIT}'")
            await conn.execute(
                "SELECT pg_advisory_xact_lock($1, hashtext($2))", _LOCK_KEY, table, timeout=15
            )
            present = await _load(conn, table) or set()
            made = [day for day in days if day not in present]
            for day in made:
                name = partition_name(table, day)
                await conn.execute(
                    f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL);"
                    f" ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES"
                    f" FROM ('{day} 00:00:00+00') TO ('{day + timedelta(days=1)} 00:00:00+00')"
                )
    except asyncpg.DuplicateTableError as exc:
        raise StoreError(
            f"{exc}, but it is no partition of {table}: attach it again or rename it"
        ) from exc
    except asyncpg.InvalidObjectDefinitionError as exc:
        raise StoreError(
            f"{exc}: tradecore makes one partition of {table} for each UTC day, detach the other"
        ) from exc
    except asyncpg.InsufficientPrivilegeError as exc:
        raise StoreError(
            f"no partition of {table} for {made[0]} ({exc}): let the role of DATABASE_URL own the"
            " table and grant it CREATE on its schema"
        ) from exc
    if made:
        log.info(
            "partitions made",
            extra={"table": table, "first": str(made[0]), "last": str(made[-1])},
        )
    return present | set(days)
