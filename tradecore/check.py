"""`tradecore check`: tests everything that a capture needs and says how to mend what is wrong."""

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from difflib import get_close_matches
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orjson

from tradecore import clock, log
from tradecore.errors import (
    EXIT_DATA_DIR,
    EXIT_DATABASE,
    EXIT_OK,
    EXIT_USAGE,
    EXIT_VENUE,
    DataDirError,
    SettingsError,
    TradecoreError,
)
from tradecore.settings import Settings
from tradecore.values import Secret, spoken
from tradecore.venue_clock import RESOLUTION_S, Offset, offset_of, sample

if TYPE_CHECKING:
    import asyncpg

    from tradecore.store.migrate import Level

VENUE_LIMIT_S = 15.0
CLOCK_TOLERANCE_MS = 250.0
_BODY_MAX_BYTES = 64 << 20
_SPARE_BYTES = 5 << 30
"""What the embedded database should have to grow for some days."""
_CLOCK_SAMPLES = 4
_INFO_WEIGHT = 20


class Finding(NamedTuple):
    """One line of the report."""

    grade: Literal["ok", "warn", "fail"]
    what: str
    text: str
    mend: str = ""
    exit_code: int = EXIT_OK


def refuse(error: SettingsError) -> int:
    """Report wrong settings; nothing else can be tested with them."""
    for problem in error.problems:
        _print(Finding("fail", "settings", problem))
    return error.exit_code


async def run(settings: Settings) -> int:
    """Test everything, print a line each, return the exit code of the first failure or 0."""
    exit_code = EXIT_OK
    async for finding in find(settings):
        _print(finding)
        exit_code = exit_code or finding.exit_code
    return exit_code


def _print(finding: Finding) -> None:
    text = f"{finding.grade:<5} {finding.what:<9} {log.mask(finding.text)}"
    print(text + (f": {finding.mend}" if finding.mend else ""), flush=True)


async def find(settings: Settings) -> AsyncIterator[Finding]:
    """Yield the findings, from the nearest (settings) to the farthest (the venue)."""
    text = f"symbols: {len(settings.symbols)}, streams of each: {', '.join(settings.streams)}"
    yield Finding("ok", "settings", text)
    if (finding := _side_server(settings)) is not None:
        yield finding
    for finding in _folder(settings):
        yield finding
    yield _ring(settings)
    async for finding in _database(settings):
        yield finding
    if settings.redis_url is not None:
        async for finding in _redis(settings.redis_url):
            yield finding
    async for finding in _venue(settings):
        yield finding


def _side_server(settings: Settings) -> Finding | None:
    from tradecore.http.access import Policy

    advice = Policy.of(settings).advice(settings.http_host)
    return Finding("warn", "http", advice) if advice else None


# -- the folder and the ring ----------------------------------------------------------------------


def _folder(settings: Settings) -> Iterator[Finding]:
    path = settings.data_dir.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(
            "fail",
            "folder",
            f"DATA_DIR {path} cannot be written",
            "give this user write access or set another DATA_DIR",
            EXIT_DATA_DIR,
        )
        return
    if holder := _holder(path):
        text = f"DATA_DIR {path} is used by a running tradecore (process {holder})"
        yield Finding("warn", "folder", text, "stop it before you start another one there")
    else:
        state = "can be written" if there == path else "will be made"
        yield Finding("ok", "folder", f"DATA_DIR {path} {state}")
    yield _room(settings, path, there)


def _holder(path: Path) -> str:
    """Return the process that holds the folder's lock, "" when nobody does."""
    from tradecore.datadir import LOCK_NAME

    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return ""


def _room(settings: Settings, path: Path, there: Path) -> Finding:
    from tradecore.ring import ROWS_AT
    from tradecore.schema import TRADE_DTYPE

    ring = path / "ring"
    taken = ring.stat().st_size if ring.exists() else 0
    need = max(ROWS_AT + settings.ring_capacity * TRADE_DTYPE.itemsize - taken, 0)
    spare = 0 if settings.database_url else _SPARE_BYTES
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.1f} GiB free"
    if free < need:
        mend = f"free {need / 2**20:.0f} MiB, or set a smaller RING_CAPACITY"
        return Finding("fail", "disk", text, mend, EXIT_DATA_DIR)
    if free < need + spare:
        return Finding("warn", "disk", text, "little for a database that grows every day")
    return Finding("ok", "disk", text)


def _ring(settings: Settings) -> Finding:
    rows = settings.ring_capacity
    return Finding(
        "ok",
        "ring",
        f"{rows:,} trades ({rows * 64 / 2**20:,.0f} MiB) bridge a database outage of "
        f"{_duration(rows / 1_000)} at 1,000 trades/s, {_duration(rows / 10_000)} at 10,000",
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


# -- the database ---------------------------------------------------------------------------------


async def _database(settings: Settings) -> AsyncIterator[Finding]:
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
    samples = [await sample(lambda: connection.fetchval(query)) for _ in range(_CLOCK_SAMPLES)]
    yield _clock("database", offset_of(samples, 0.0))


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


def _clock(whose: str, measured: Offset) -> Finding:
    """Judge our clock by what was measured."""
    offset_ms, bound_ms = measured.offset_s * 1e3, measured.bound_s * 1e3
    text = f"this clock is {offset_ms:+.1f} ms against the {whose}'s, give or take {bound_ms:.1f}"
    if abs(offset_ms) - bound_ms > CLOCK_TOLERANCE_MS:
        mend = "run an NTP client, since received_at and latencies come from this clock"
        return Finding("warn", "clock", text, mend)
    return Finding("ok", "clock", text)


# -- Redis ----------------------------------------------------------------------------------------


async def _redis(url: Secret) -> AsyncIterator[Finding]:
    """Do what the daemon does; nothing here keeps a capture from running, so nothing fails."""
    from tradecore.redis import scripts
    from tradecore.redis.address import parse
    from tradecore.redis.wire import RedisError, Wire, command

    address = parse(url.reveal())
    try:
        wire = await Wire.open(address)
        try:
            probe = f"{scripts.STATUS}check"
            await wire.call(
                [
                    command("SET", probe, "1", "EX", 1),
                    command("EVAL", scripts.PUT, 2, scripts.LAST, scripts.LAST),
                    command("DEL", probe),
                ]
            )
        finally:
            wire.close()
    except RedisError as error:
        text = f"{address} takes no values: {error}"
        yield Finding("warn", "redis", text, "capture runs without it")
        return
    yield Finding("ok", "redis", f"{address} takes values")
    if address.in_the_clear:
        text = f"{address}: password and values travel in the clear"
        yield Finding("warn", "redis", text, "use rediss:// or a unix socket")


# -- the venue ------------------------------------------------------------------------------------


async def _venue(settings: Settings) -> AsyncIterator[Finding]:
    """Ask the venue as the daemon does: within the budget, and not at all while it bans us."""
    from tradecore.rest.budget import Budget, RestError
    from tradecore.rest.client import RestClient
    from tradecore.rest.trades import venue_time_us

    url = settings.rest_url
    client = RestClient(url, Budget.of(settings.data_dir, url), limit_s=VENUE_LIMIT_S)
    try:
        ask = partial(venue_time_us, client, wait_s=0, tries=1)
        samples = [await sample(ask) for _ in range(_CLOCK_SAMPLES)]
        yield Finding("ok", "venue", f"{url} answers")
        yield _clock("venue", offset_of(samples, RESOLUTION_S))
        body = await client.get(
            "/api/v3/exchangeInfo",
            {"showPermissionSets": "false"},
            _INFO_WEIGHT,
            wait_s=0,
            tries=1,
            max_bytes=_BODY_MAX_BYTES,
        )
        for finding in _symbols(settings, orjson.loads(body)):
            yield finding
    except RestError as error:
        yield Finding("fail", "venue", str(error), exit_code=EXIT_VENUE)
    except (KeyError, TypeError, ValueError) as error:
        text = f"{url} does not answer as the venue does ({error!r})"
        yield _unreachable(text, "BINANCE_REST_URL")
    finally:
        await client.close()
    for one in settings.websocket_urls:
        yield await _websocket(one, settings.data_dir)
    if settings.feed_lines > 1 and len(hosts := _hosts(settings)) == 1:
        text = f"both lines go over {hosts.pop()} and fail together"
        yield Finding("warn", "venue", text, "give BINANCE_WEBSOCKET_URL a second host")


def _hosts(settings: Settings) -> set[str]:
    from tradecore.feed.lines import line_endpoints

    lines = range(settings.feed_lines)
    return {line_endpoints(settings.websocket_urls, line)[0].host for line in lines}


def _unreachable(text: str, variable: str) -> Finding:
    mend = f"check the network and {variable}"
    return Finding("fail", "venue", text, mend, EXIT_VENUE)


def _symbols(settings: Settings, info: Any) -> Iterator[Finding]:
    states: dict[str, str] = {one["symbol"]: one["status"] for one in info["symbols"]}
    trading = 0
    for symbol in settings.symbols:
        state = states.get(symbol)
        if state is None:
            near = get_close_matches(symbol, states, n=1, cutoff=0.7)
            mend = "correct SUPPORTED_SYMBOLS" + (f", did you mean {near[0]}?" if near else "")
            text = f"{symbol} is not listed at the venue"
            yield Finding("fail", "symbols", text, mend, EXIT_USAGE)
        elif state != "TRADING":
            yield Finding("warn", "symbols", f"{symbol} is not trading now ({state})")
        else:
            trading += 1
    if trading == len(settings.symbols):
        yield Finding("ok", "symbols", f"trading: {trading} of {trading}")


async def _websocket(url: str, folder: Path) -> Finding:
    """Open and close a connection in the very way that the feed does, and only when it may."""
    from picows import WSListener

    from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
    from tradecore.feed.gate import Gate

    endpoint, gate = Endpoint.parse(url), Gate(folder)
    if wait_s := gate.take_s(endpoint):
        text = f"{url} is not asked for a connection for another {ceil(wait_s)} s"
        mend = "wait: it has refused this address, or was asked too often"
        return Finding("fail", "venue", text, mend, EXIT_VENUE)
    begin_ns = clock.mono_ns()
    try:
        transport, _ = await endpoint.open(WSListener, VENUE_LIMIT_S)
        took_ms = (clock.mono_ns() - begin_ns) / 1e6
        transport.disconnect()
        await asyncio.wait_for(transport.wait_disconnected(), VENUE_LIMIT_S)
    except (OSError, TradecoreError) as error:
        if isinstance(error, UpgradeRefusedError):
            gate.refused(endpoint, error)
        return _unreachable(f"{url}: {error}", "BINANCE_WEBSOCKET_URL")
    return Finding("ok", "venue", f"{url} takes connections ({took_ms:.0f} ms)")
