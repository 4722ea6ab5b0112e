"""Opens connections with time limits everywhere, and tells a wrong setting from a bad moment."""

import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import asyncpg

from tradecore.errors import StoreError
from tradecore.store.dsn import Dsn, parse_dsn
from tradecore.store.rights import of_another_role

CONNECT_LIMIT_S = 10.0
COMMAND_LIMIT_S = 60.0

SERVER_SETTINGS = {
    "application_name": "tradecore",
    # The server gives up before the client does: what is cancelled there holds no lock.
    "statement_timeout": "50s",
    "lock_timeout": "20s",
    "idle_in_transaction_session_timeout": "60s",
    # A host that vanished keeps the lock rows of its symbols no longer than this.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "jit": "off",
}
"""Of every session; the query part of the DSN may say otherwise."""

Edition = Literal["plain", "timescale-apache", "timescale-community"]
COMMUNITY: Edition = "timescale-community"

_OLDEST_COMMUNITY = (2, 13)
"""Aggregates on aggregates that show the newest rows too; older ones are used as Apache is."""

# What the SQLSTATE of a refused connection calls for; classes without an entry are bad moments.
_ADVICE = {
    "28P01": "correct the password in DATABASE_URL",
    "28": "the role must exist and may log in, and pg_hba.conf must let it in from this host",
    "3D": "create it with CREATE DATABASE, or correct its name in DATABASE_URL",
    "42501": "GRANT CONNECT ON DATABASE to the role",
    "42": "the query part of DATABASE_URL asks for a server setting that does not exist",
    "22": "the query part of DATABASE_URL asks for a server setting with a wrong value",
    "08P01": "connect to PostgreSQL itself: what answers is a pooler that refuses our settings",
    "0A": "connect to PostgreSQL 15 or newer",
    "55": "allow connections to it, or correct its name in DATABASE_URL",
}

_UNKNOWN_AUTHORITY = (
    "name the authority that signed it in sslrootcert=/path/of/root.crt, or sslrootcert=system"
    " where it is one that everybody knows"
)
_OTHER_NAME = "name the host in DATABASE_URL as the certificate does"
_OTHER_TIME = "renew it at the server, or set the clock of this host"
_CERTIFICATE_ADVICE = {62: _OTHER_NAME, 64: _OTHER_NAME, 9: _OTHER_TIME, 10: _OTHER_TIME}
"""By the number of OpenSSL's X509_V_ERR_*."""

_UNKNOWN_HOST = {
    getattr(socket, name)
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY", "EAI_FAIL")
    if hasattr(socket, name)
}


class ConnectFailure(NamedTuple):
    """Why no connection came about."""

    kind: Literal["down", "fatal"]
    """"down": try again later. "fatal": trying again cannot help."""
    sentence: str
    """What happened; for "fatal" also what to do."""


def classify_connect_error(exc: BaseException) -> ConnectFailure:
    """Tell by type and SQLSTATE whether a failed connect is worth another try.

    An exception that has nothing to do with connecting is raised again: it is a bug.
    """
    match exc:
        case asyncpg.TargetServerAttributeNotMatched():
            return _away(str(exc))
        case asyncpg.PostgresError():
            state = exc.sqlstate or ""
            advice = _ADVICE.get(state) or _ADVICE.get(state[:2])
            if advice is None:
                return _away(f"{exc} ({state})")
            return ConnectFailure("fatal", f"the database refuses us, {exc} ({state}): {advice}")
        case asyncpg.InterfaceError() | asyncpg.InternalClientError():
            return ConnectFailure("fatal", f"DATABASE_URL cannot be used: {exc}")
        case ssl.SSLCertVerificationError():
            return ConnectFailure(
                "fatal",
                f"the certificate of the database is not to be trusted ({exc.verify_message}):"
                f" {_CERTIFICATE_ADVICE.get(exc.verify_code, _UNKNOWN_AUTHORITY)}",
            )
        case ssl.SSLError() if re.search("ALERT|PROTOCOL", reason := _reason(exc)):
            return ConnectFailure(
                "fatal",
                f"no TLS with the database ({reason}): it has to speak TLS 1.2 or 1.3, and may"
                " ask for a client's certificate, sslcert and sslkey in DATABASE_URL",
            )
        case ConnectionError() if "rejected SSL upgrade" in str(exc):
            # asyncpg's own words: no SQLSTATE and no type tells it from a lost connection.
            return ConnectFailure(
                "fatal",
                f"{exc}: DATABASE_URL asks for TLS (sslmode) and the server has none; switch ssl on"
                " at the server, or take sslmode out of DATABASE_URL",
            )
        case socket.gaierror() if exc.errno in _UNKNOWN_HOST:
            return ConnectFailure(
                "fatal", f"the host of DATABASE_URL is unknown ({exc.strerror}): correct its name"
            )
        case PermissionError():
            return ConnectFailure(
                "fatal", f"{exc}: this OS user may not use the socket of the database"
            )
        case TimeoutError():
            return _away("it did not answer in time")
        case OSError():
            return _away(str(exc) or type(exc).__name__)
    raise exc


def _away(text: str) -> ConnectFailure:
    return ConnectFailure("down", f"the database cannot be reached: {text}")


def _reason(exc: ssl.SSLError) -> str:
    return getattr(exc, "reason", None) or ""


async def open_pool(
    dsn: str | Dsn,
    size: int,
    *,
    command_limit_s: float = COMMAND_LIMIT_S,
    connect_limit_s: float = CONNECT_LIMIT_S,
) -> asyncpg.Pool:
    """Open a pool of at most `size` connections, one of them at once.

    Nothing is reset when a connection is given back, see `transaction`. Raises whatever the
    connect raised (see `classify_connect_error`), StoreError for a wrong DSN.
    """
    return await asyncpg.create_pool(
        min_size=1,
        max_size=size,
        max_inactive_connection_lifetime=300.0,
        reset=_keep,
        **_arguments(dsn, command_limit_s, connect_limit_s),
    )


async def open_reading_pool(dsn: str | Dsn, size: int, limit_s: float) -> asyncpg.Pool:
    """Open a pool of at most `size` connections that only answer questions, one statement at once.

    It connects when somebody asks, and hangs up after a quiet minute. `limit_s`: how long the
    server works on a statement. The planner is kept to the indexes, and nothing is reset between
    two questions, which would cost a trip to the server. Raises StoreError for a wrong DSN.
    """
    arguments = _arguments(dsn, limit_s + 1.0, min(CONNECT_LIMIT_S, limit_s))
    arguments["server_settings"] |= {
        "application_name": "tradecore reader",
        "default_transaction_read_only": "on",
        "statement_timeout": f"{round(limit_s * 1000)}ms",
        "lock_timeout": "1s",
        "enable_seqscan": "off",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
        "max_parallel_workers_per_gather": "0",
    }
    return await asyncpg.create_pool(
        min_size=0,
        max_size=size,
        max_inactive_connection_lifetime=60.0,
        reset=_keep,
        **arguments,
    )


async def _keep(_conn: asyncpg.Connection) -> None:
    """Leave a connection as it is."""


async def connect(
    dsn: str | Dsn,
    *,
    command_limit_s: float = COMMAND_LIMIT_S,
    connect_limit_s: float = CONNECT_LIMIT_S,
) -> asyncpg.Connection:
    """Open one connection with the limits of the pool, for commands that need no pool.

    Raises StoreError with a sentence when there is none, down or fatal.
    """
    try:
        return await asyncpg.connect(**_arguments(dsn, command_limit_s, connect_limit_s))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
        raise StoreError(classify_connect_error(exc).sentence) from exc


def _arguments(dsn: str | Dsn, command_limit_s: float, connect_limit_s: float) -> dict[str, Any]:
    checked = parse_dsn(dsn) if isinstance(dsn, str) else dsn
    return {
        **checked.arguments(),
        "timeout": connect_limit_s,
        "command_timeout": command_limit_s,
        "server_settings": {**SERVER_SETTINGS, **checked.settings, "timezone": "UTC"},
    }


@dataclass(frozen=True, slots=True)
class Timescale:
    """What there is of the TimescaleDB extension."""

    version: str | None
    """None: not installed in this database."""
    schema: str | None
    preloaded: bool
    """Without, hypertables silently omit compressed rows and CREATE EXTENSION ends the session."""
    creatable: bool
    """The server has it and our role may create it here."""

    @property
    def has_aggregates(self) -> bool:
        """Whether its continuous aggregates, in the community edition, are new enough for us."""
        numbers = re.findall(r"\d+", self.version or "")
        return tuple(map(int, numbers[:2])) >= _OLDEST_COMMUNITY


async def read_timescale(conn: asyncpg.Connection) -> Timescale:
    """Find out about TimescaleDB; changes nothing and cannot fail on a server without it."""
    row = await conn.fetchrow(
        """
        SELECT e.extversion AS version, n.nspname AS schema,
               -- This option is defined by the library that shared_preload_libraries loads;
               -- the list itself is not for everyone to see.
               EXISTS (SELECT FROM pg_settings
                       WHERE name = 'timescaledb.disable_load') AS preloaded,
               has_database_privilege(current_database(), 'CREATE')
                   AND EXISTS (SELECT FROM pg_available_extension_versions
                               WHERE name = 'timescaledb'
                                 AND (trusted OR NOT superuser
                                      OR current_setting('is_superuser') = 'on')) AS creatable
        FROM (SELECT) AS always
        LEFT JOIN pg_extension e ON e.extname = 'timescaledb'
        LEFT JOIN pg_namespace n ON n.oid = e.extnamespace
        """
    )
    assert row is not None
    return Timescale(**row)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server as this role sees it, for `tradecore check` and /health/db."""

    edition: Edition
    version: str
    """Of PostgreSQL, such as "18.6"."""
    timescale_version: str | None
    database: str
    role: str
    schema: str | None
    encoding: str
    time_zone: str
    standby: bool
    problems: tuple[str, ...]
    """Sentences, each with the remedy: rights that are missing, settings that do not do."""


async def describe_server(conn: asyncpg.Connection) -> ServerInfo:
    """Look at edition, version, time zone and rights; change nothing."""
    row = await conn.fetchrow(
        """
        SELECT current_setting('server_version') AS version,
               current_setting('server_version_num')::int / 10000 AS major,
               quote_ident(current_database()) AS database,
               quote_ident(current_user) AS role,
               quote_ident(current_schema()) AS schema,
               getdatabaseencoding() AS encoding,
               current_setting('TimeZone') AS time_zone,
               pg_is_in_recovery() AS standby,
               current_setting('default_transaction_read_only') = 'on' AS read_only,
               has_schema_privilege(current_schema(), 'CREATE') AS may_create,
               has_database_privilege(current_database(), 'TEMP') AS may_temp
        """
    )
    assert row is not None
    timescale = await read_timescale(conn)
    role, database, schema = row["role"], row["database"], row["schema"]
    checks = (
        (row["major"] < 15, f"PostgreSQL {row['version']} is too old: use 15 or newer"),
        (
            timescale.version is not None and not timescale.preloaded,
            "the server does not load the TimescaleDB of this database: add timescaledb to"
            " shared_preload_libraries and restart it",
        ),
        (schema is None, "no schema of the search_path exists or may be used: create one"),
        (row["encoding"] != "UTF8", f"the encoding is {row['encoding']}: use a UTF8 database"),
        (row["standby"], "the server is a standby: point DATABASE_URL at the primary"),
        (row["read_only"], "default_transaction_read_only is on: turn it off for this role"),
        (
            row["may_create"] is False,
            f"tables cannot be made: GRANT CREATE ON SCHEMA {schema} TO {role}",
        ),
        (
            not row["may_temp"],
            f"doubled rows cannot be sorted out: GRANT TEMP ON DATABASE {database} TO {role}",
        ),
    )
    return ServerInfo(
        edition=await probe_edition(conn, timescale),
        version=row["version"].split()[0],
        timescale_version=timescale.version,
        database=database,
        role=role,
        schema=schema,
        encoding=row["encoding"],
        time_zone=row["time_zone"],
        standby=row["standby"],
        problems=(
            *(problem for wrong, problem in checks if wrong),
            *await of_another_role(conn, role),
        ),
    )


async def probe_edition(conn: asyncpg.Connection, timescale: Timescale) -> Edition:
    """Try a function of the community edition: what the configuration says can be wrong."""
    if timescale.version is None or not timescale.preloaded:
        return "plain"
    if not timescale.has_aggregates:
        return "timescale-apache"
    schema = '"' + str(timescale.schema).replace('"', '""') + '"'
    try:
        async with conn.transaction():
            await conn.execute(
                f"SELECT {schema}.time_bucket_gapfill(interval '1 day', t, t, t + interval '1 day')"
                " FROM (VALUES (now())) AS v (t) GROUP BY 1, t"
            )
    except asyncpg.FeatureNotSupportedError:
        return "timescale-apache"
    return COMMUNITY
