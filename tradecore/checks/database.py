"""What a capture needs of the database: that it opens, its schema, its old trades, its clock."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from tradecore.checks.finding import CLOCK_SAMPLES, Finding, judge_clock
from tradecore.errors import EXIT_DATABASE, DataDirError, TradecoreError
from tradecore.settings import Settings
from tradecore.values import spoken
from tradecore.venue_clock import offset_of, sample

if TYPE_CHECKING:
    import asyncpg

    from tradecore.store.migrate import Level


async def check_database(settings: Settings) -> AsyncIterator[Finding]:
    """Yield what there is to say; changes nothing."""
    from tradecore.commands import open_database

    if settings.database_url is None:
        finding = _embedded(settings)
        yield finding
        if finding.grade == "fail" or not _cluster(settings).exists():
            return
    elif warnings := _dsn_warnings(settings):
        for warning in warnings:
            yield Finding("warn", "database", warning)
    try:
        async with open_database(settings) as connection:
            async for finding in _server(settings, connection):
                yield finding
    except TradecoreError as error:
        yield Finding("fail", "database", str(error), exit_code=error.exit_code)


def _cluster(settings: Settings) -> Path:
    return settings.data_dir / "postgres" / "cluster" / "PG_VERSION"


def _embedded(settings: Settings) -> Finding:
    from tradecore.store.binaries import find_binaries

    try:
        binaries = find_binaries()
    except DataDirError as error:
        return Finding("fail", "database", str(error), exit_code=error.exit_code)
    state = "is there" if _cluster(settings).exists() else "will be made by the first `run`"
    text = f"no DATABASE_URL: own PostgreSQL {binaries.version} in DATA_DIR {state}"
    return Finding("ok", "database", text)


def _dsn_warnings(settings: Settings) -> tuple[str, ...]:
    from tradecore.store.dsn import parse_dsn

    assert settings.database_url is not None
    try:
        return tuple(parse_dsn(settings.database_url.reveal()).warnings)
    except TradecoreError:
        return ()  # told when it is opened


async def _server(settings: Settings, connection: "asyncpg.Connection") -> AsyncIterator[Finding]:
    from tradecore.store.migrate import check
    from tradecore.store.pool import describe_server
    from tradecore.store.raise_level import possible_level

    server = await describe_server(connection)
    text = f"PostgreSQL {server.version}, edition {server.edition}"
    if server.timescale_version:
        text += f" {server.timescale_version}"
    text += f", database {server.database}, role {server.role}, time zone {server.time_zone}"
    yield Finding("ok", "database", text)
    for problem in server.problems:
        yield Finding("fail", "database", problem, exit_code=EXIT_DATABASE)
    try:
        state = await check(connection)
        state.raise_unusable()
    except TradecoreError as error:
        yield Finding("fail", "schema", str(error), exit_code=error.exit_code)
    else:
        if state.pending:
            text = f"{len(state.pending)} migrations pending"
            yield Finding("warn", "schema", text, "`run` applies them unless AUTO_MIGRATE=off")
        else:
            yield Finding("ok", "schema", f"up to date ({state.applied[-1]}), level {state.level}")
            possible = await possible_level(connection)
            if possible != state.level:
                yield Finding(
                    "warn",
                    "schema",
                    f"the tables are of level {state.level} and the server can do {possible}",
                    "`tradecore migrate --raise-level` moves them; it copies what is stored",
                )
            async for finding in _old_trades(settings, connection, state.level):
                yield finding
    query = "SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint"
    samples = [await sample(lambda: connection.fetchval(query)) for _ in range(CLOCK_SAMPLES)]
    yield judge_clock("database", offset_of(samples, 0.0))


async def _old_trades(
    settings: Settings, connection: "asyncpg.Connection", level: "Level"
) -> AsyncIterator[Finding]:
    """Tell what becomes of trades with time, and whether the server's own jobs for it work."""
    from tradecore.store.chunks import chunks, read_server, saved
    from tradecore.store.horizon import read_state
    from tradecore.store.jobs import health

    server = await read_server(connection, level)
    state = await read_state(connection)
    kept = "kept for ever"
    if settings.retention_s is not None:
        kept = f"kept for {spoken(settings.retention_s)}"
    since = f", given up below {state.raw_from:%Y-%m-%d}" if state.raw_from else ""
    days = [one for one in await chunks(connection, server) if one.table == "raw_trades"]
    text = f"trades are {kept}{since}, {len(days)} days are there"
    if level != "community":
        text += f"; level {level} has no compression"
    elif settings.compress_after_s is None:
        text += "; they are not compressed"
    else:
        closed = sum(one.state != "open" for one in days)
        text += (
            f", {closed} of them compressed, as each is after {spoken(settings.compress_after_s)}"
        )
        if sizes := (await saved(connection, server)).get("raw_trades"):
            text += f" ({1 - sizes[1] / sizes[0]:.1%} of heap and index saved)"
    yield Finding("ok", "retention", text)
    jobs = await health(connection, server)
    if trouble := jobs.trouble:
        mend = "`run` does their work itself; see timescaledb_information.job_errors"
        yield Finding("warn", "retention", trouble, mend)
    elif jobs.jobs:
        yield Finding("ok", "retention", f"jobs of TimescaleDB: {len(jobs.jobs)}, none has failed")
