"""Brings the schema up to date: numbered files, forward only, each in one transaction.

What ran is recorded in `schema_migrations` with a checksum. Two processes that migrate at once
meet at an advisory lock; the second finds the work done.
"""

import hashlib
import importlib.resources
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import asyncpg

from tradecore.errors import StoreError
from tradecore.store.pool import COMMUNITY, Timescale, probe_edition, read_timescale

Level = Literal["plain", "apache", "community"]
"""What the tables are: native partitions; hypertables; these with continuous aggregates."""

_MARKS: dict[str, tuple[Level, ...]] = {
    "any": ("plain", "apache", "community"),
    "plain": ("plain",),
    "timescale": ("apache", "community"),
    "tables": ("plain", "apache"),
    "community": ("community",),
}
"""A line "-- level: MARK" in a migration: the levels for which the lines after it are meant."""

OLDEST_SERVER = 15

_LOCK_KEY = 0x7472636F  # "trco"; the second key of the lock is the schema
_LOCK_LIMIT_S = 60
_RUN_LIMIT_S = 600

_CREATE_HISTORY = """
CREATE TABLE schema_migrations (
    version    int         PRIMARY KEY,
    name       text        NOT NULL,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
_HISTORY_COLUMNS = {"version", "name", "checksum", "applied_at"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of sql/."""

    version: int
    name: str
    """Its file name without the suffix, such as "001_tables"."""
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, level: Level) -> str:
        """Return the statements for `level`: the lines under its marks and under "any"."""
        return "\n".join(line for mark, line in self._marked() if level in _MARKS[mark])

    def render_only(self, mark: str) -> str:
        """Return the lines under one mark."""
        return "\n".join(line for found, line in self._marked() if found == mark)

    def _marked(self) -> Iterator[tuple[str, str]]:
        current = "any"
        for line in self.text.splitlines():
            if mark := re.fullmatch(r"-- level: (\w+)", line.strip()):
                current = mark[1]
                if current not in _MARKS:
                    raise ValueError(f"{self.name}: unknown level {current!r}")
            else:
                yield current, line


@dataclass(frozen=True, slots=True)
class SchemaState:
    """What the database has, held against what this program knows; names of migrations."""

    applied: tuple[str, ...]
    pending: tuple[str, ...]
    newer: tuple[str, ...]
    """Ran there and unknown here: a newer tradecore made them."""
    changed: tuple[str, ...]
    """Ran there with another text than we have."""
    level: Level

    @property
    def current(self) -> bool:
        return not (self.pending or self.newer or self.changed)

    def raise_unusable(self) -> None:
        """Raise StoreError when no migration of ours can mend this schema."""
        if self.newer:
            raise StoreError(
                f"the schema is newer than this program ({', '.join(self.newer)} ran there):"
                " run a newer tradecore"
            )
        if self.changed:
            raise StoreError(
                f"{', '.join(self.changed)} ran there with another text than this program has:"
                " it is not the schema of a released tradecore; use another database or restore one"
            )


def load_migrations(folder: Traversable | None = None) -> list[Migration]:
    """Return all files of sql/ (or of `folder`) by number."""
    found = []
    for entry in (folder or _sql_folder()).iterdir():
        if match := re.fullmatch(r"(\d{3})_\w+\.sql", entry.name):
            text = entry.read_text(encoding="utf-8").replace("\r\n", "\n")
            found.append(Migration(int(match[1]), entry.name.removesuffix(".sql"), text))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)) or not found:
        raise ValueError(f"sql/ is not numbered 001, 002, ...: {[m.name for m in found]}")
    return found


def _sql_folder() -> Traversable:
    """Return sql/: the package tradecore.sql, in a bare source tree the folder beside ours."""
    try:
        return importlib.resources.files("tradecore.sql")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "sql"


async def check(
    conn: asyncpg.Connection, migrations: Iterable[Migration] | None = None
) -> SchemaState:
    """Compare the schema with ours; change nothing.

    Raises StoreError when the server, its default schema or its rights do not do.
    """
    ours = list(migrations or load_migrations())
    try:
        await _require_usable_server(conn)
        return _compare(ours, await _history(conn), await detect_level(conn))
    except asyncpg.InsufficientPrivilegeError as exc:
        raise await _missing_right(conn, exc) from exc


async def migrate(
    conn: asyncpg.Connection, migrations: Iterable[Migration] | None = None
) -> list[str]:
    """Apply what is pending, one transaction a file; return the names that this call applied.

    `conn` must not be in a transaction. Raises StoreError when the schema is newer than this
    program or altered, a right is missing, or another process holds the lock for a minute.
    """
    ours = list(migrations or load_migrations())
    state = await check(conn, ours)
    state.raise_unusable()
    applied = []
    try:
        for migration in ours:
            if migration.name in state.pending and await _apply(conn, migration, ours):
                applied.append(migration.name)
                log.info("schema migrated", extra={"migration": migration.name})
    except asyncpg.InsufficientPrivilegeError as exc:
        raise await _missing_right(conn, exc) from exc
    except asyncpg.LockNotAvailableError as exc:
        raise StoreError(
            f"another session has held the schema for {_LOCK_LIMIT_S} s, so it was not migrated:"
            " try again when it is done"
        ) from exc
    except asyncpg.ReadOnlySQLTransactionError as exc:
        raise StoreError(
            "the server takes no writes (a standby, or default_transaction_read_only is on):"
            " point DATABASE_URL at the primary"
        ) from exc
    return applied


async def bring_up_to_date(conn: asyncpg.Connection, *, auto_migrate: bool) -> list[str]:
    """Migrate, or with `auto_migrate` off raise StoreError unless there is nothing to do."""
    if auto_migrate:
        return await migrate(conn)
    state = await check(conn)
    state.raise_unusable()
    if state.pending:
        raise StoreError(
            f"the schema is older than this program ({', '.join(state.pending)} pending) and"
            " AUTO_MIGRATE is off: run `tradecore migrate`"
        )
    return []


async def _apply(conn: asyncpg.Connection, migration: Migration, ours: list[Migration]) -> bool:
    """Run one file under the lock; return False when another process was first."""
    async with conn.transaction(isolation="read_committed"):
        await lock_schema(conn)
        history = await _history(conn)
        level = await detect_level(conn)
        state = _compare(ours, history, level)
        state.raise_unusable()
        if migration.name not in state.pending:
            return False
        if level != "plain":
            await reach_timescale(conn)
            level = await detect_level(conn)  # only now the server can be asked for its edition
        if history is None:
            await conn.execute(_CREATE_HISTORY)
        # A file may have nothing for this level, and asyncpg knows no answer to an empty query.
        await conn.execute(f"SELECT;\n{migration.render(level)}", timeout=_RUN_LIMIT_S + 10)
        await conn.execute(
            "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)",
            migration.version,
            migration.name,
            migration.checksum,
        )
        return True


async def lock_schema(conn: asyncpg.Connection, *, run_limit_s: int = _RUN_LIMIT_S) -> None:
    """Let this transaction alone change the schema; its statements may take `run_limit_s`."""
    await conn.execute(
        f"SET LOCAL lock_timeout = '{_LOCK_LIMIT_S}s';"
        f" SET LOCAL statement_timeout = '{run_limit_s}s';"
        " SET LOCAL idle_in_transaction_session_timeout = '60s'"
    )
    await conn.execute(
        "SELECT pg_advisory_xact_lock($1, hashtext(current_schema()))",
        _LOCK_KEY,
        timeout=_LOCK_LIMIT_S + 10,
    )


def _compare(
    ours: list[Migration], history: dict[int, asyncpg.Record] | None, level: Level
) -> SchemaState:
    ran = history or {}
    known = {migration.version for migration in ours}
    return SchemaState(
        applied=tuple(ran[version]["name"] for version in sorted(ran)),
        pending=tuple(m.name for m in ours if m.version not in ran),
        newer=tuple(ran[version]["name"] for version in sorted(ran) if version not in known),
        changed=tuple(
            m.name for m in ours if m.version in ran and ran[m.version]["checksum"] != m.checksum
        ),
        level=level,
    )


async def _history(conn: asyncpg.Connection) -> dict[int, asyncpg.Record] | None:
    """Return the rows of schema_migrations by version, None when the table is not there."""
    columns = await conn.fetch(
        "SELECT a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
        " WHERE c.relnamespace = quote_ident(current_schema())::regnamespace"
        " AND c.relname = 'schema_migrations' AND a.attnum > 0 AND NOT a.attisdropped"
    )
    if not columns:
        return None
    if not {row["attname"] for row in columns} >= _HISTORY_COLUMNS:
        raise StoreError(
            "another program keeps its own schema_migrations in this schema:"
            " give tradecore a database of its own"
        )
    rows = await conn.fetch("SELECT version, name, checksum FROM schema_migrations")
    return {row["version"]: row for row in rows}


async def detect_level(conn: asyncpg.Connection) -> Level:
    """Return what the tables are, or in an empty schema what the server lets them be.

    Raises StoreError when the database uses TimescaleDB and the server does not load it:
    hypertables would then silently omit their compressed rows.
    """
    timescale = await read_timescale(conn)
    if timescale.version is not None and not timescale.preloaded:
        raise StoreError(
            "this database uses TimescaleDB but the server does not load it: add timescaledb to"
            " shared_preload_libraries and restart the server"
        )
    kinds = dict(
        await conn.fetch(
            "SELECT relname, relkind FROM pg_class WHERE relname IN ('raw_trades', 'candles_1m')"
            " AND relnamespace = quote_ident(current_schema())::regnamespace"
        )
    )
    if kinds.get("raw_trades") == b"p":
        return "plain"
    if "candles_1m" in kinds:
        return "community" if kinds["candles_1m"] == b"v" else "apache"
    return await server_level(conn, timescale)


async def server_level(conn: asyncpg.Connection, timescale: Timescale) -> Level:
    """Return what tables can be on this server, by trying it; at least, before it is made."""
    if not timescale.preloaded or (timescale.version is None and not timescale.creatable):
        return "plain"
    if timescale.version is None:
        return "apache"  # at least; which edition it is shows when it is there
    return "community" if await probe_edition(conn, timescale) == COMMUNITY else "apache"


async def reach_timescale(conn: asyncpg.Connection) -> None:
    """Create the extension where it is not, and let this transaction see its functions."""
    await conn.execute("CREATE EXTENSION IF NOT EXISTS timescaledb", timeout=_RUN_LIMIT_S)
    await conn.execute(
        "SELECT set_config('search_path', format('%I, %I', current_schema(), n.nspname), true)"
        " FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace"
        " WHERE e.extname = 'timescaledb'"
    )


async def _require_usable_server(conn: asyncpg.Connection) -> None:
    major = conn.get_server_version().major
    if major < OLDEST_SERVER:
        raise StoreError(
            f"the server is PostgreSQL {major}: tradecore needs {OLDEST_SERVER} or newer"
        )
    row = await conn.fetchrow(
        "SELECT current_schema() AS schema, getdatabaseencoding() AS encoding,"
        " current_setting('search_path') AS path"
    )
    assert row is not None
    if row["schema"] is None:
        raise StoreError(
            f"no schema of the search_path ({row['path']}) exists or may be used:"
            " create one, or grant USAGE on it"
        )
    if row["encoding"] != "UTF8":
        raise StoreError(
            f"the database is encoded in {row['encoding']}: create it with ENCODING 'UTF8'"
        )


async def _missing_right(
    conn: asyncpg.Connection, exc: asyncpg.InsufficientPrivilegeError
) -> StoreError:
    """Name the right that `exc` misses and the grant that gives it."""
    row = await conn.fetchrow(
        """
        SELECT quote_ident(current_user) AS role,
               quote_ident(current_schema()) AS schema,
               has_schema_privilege(current_schema(), 'CREATE') AS create
        """
    )
    assert row is not None
    if not row["create"]:
        return StoreError(
            f"the role {row['role']} may not create tables:"
            f" GRANT CREATE ON SCHEMA {row['schema']} TO {row['role']}"
        )
    return StoreError(
        f"the role {row['role']} lacks a right ({exc}): let it own the tables of tradecore"
    )
