"""Start and stop: from exec to the first stored trade, and from SIGTERM to the end of the process.

The database is migrated and empty, DATA_DIR is new, exchange, daemon and PostgreSQL share the
cores. The market starts when the daemon has subscribed, and goes on while it is stopped. After each
stop the rows are compared: all that was sent until just before SIGTERM is stored, without a hole
and equal in each column. Beside that, without a target, 1,400 symbols, which are subscribed at the
pace that the venue allows, and the embedded database: made anew, and made before.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import asyncpg
from _database import database, server
from _generator import count_equal
from _harness import Figure, arguments, figure, report
from _processes import GENERATOR, Running, daemon, daemon_in, exchange, output_of
from bench_e2e import LIST, environ, until_stored
from bench_redis import names

STREAMS = "trade,ticker,kline_1m"
START_RATE, STOP_RATE = 1_000, 10_000
MANY = 1_400
REPEATS = 5
RUN_S = 2.0
IN_FLIGHT_S = 0.05
"""What was sent so long before SIGTERM has to be stored."""
LIMIT_S = 60.0
LOOK_S = 0.01

IMPORTS = "import aiohttp.web, asyncpg, numpy, orjson, picows, uvloop"
FIRST_STORED = "exec -> first stored trade"
LIBRARIES = "Python that imports the libraries and ends"

FIRST_COMMIT = (
    "SELECT extract(epoch FROM min(pg_xact_commit_timestamp(xmin)))::float8 FROM raw_trades"
)
RANGES = "SELECT symbol, first_id, last_id FROM trade_coverage"


class Cycle(NamedTuple):
    """Seconds of one start and stop."""

    ready_s: float
    stored_s: float
    stop_s: float


async def until(running: Running, path: str, holds: Callable[[Any], bool]) -> None:
    """Look at `path` until its answer holds; RuntimeError when the daemon has ended."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            with suppress(aiohttp.ClientError):
                if holds(json.loads(await running.get(path))):
                    return
            if running.process.returncode is not None:
                raise RuntimeError(f"the daemon ended with {running.process.returncode}")
            await asyncio.sleep(LOOK_S)


async def stop(running: Running) -> float:
    """Send SIGTERM; return the seconds until the process has ended."""
    begin = time.monotonic()
    running.process.terminate()
    async with asyncio.timeout(LIMIT_S):
        code = await running.process.wait()
    assert code == 0, f"the daemon ended with {code}"
    return time.monotonic() - begin


async def cycle(server_dsn: str, rate: int, listed: str = LIST) -> Cycle:
    """Start the daemon at `rate` trades/s, stop it, and compare the rows."""
    async with (
        database(server_dsn, "bench_start") as dsn,
        exchange("--symbols", listed, "--rate", str(rate), program=GENERATOR) as (venue, ws),
    ):
        settings = environ(dsn, ws, venue.http, STREAMS) | {"SUPPORTED_SYMBOLS": listed}
        connection = await asyncpg.connect(dsn)
        try:
            begin_s, began = time.time(), time.monotonic()
            async with daemon(settings) as running:
                await until(running, "/ready", lambda answer: answer["ready"])
                ready_s = time.monotonic() - began
                await until_stored(connection, round(RUN_S * rate))
                before = json.loads(await venue.get("/sim/state"))
                await asyncio.sleep(IN_FLIGHT_S)
                stop_s = await stop(running)
            await compare(connection, before, json.loads(await venue.get("/sim/state")))
            stored_s = await connection.fetchval(FIRST_COMMIT) - begin_s
        finally:
            await connection.close()
    return Cycle(ready_s, stored_s, stop_s)


async def compare(
    connection: asyncpg.Connection, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Assert that all that was sent is stored up to an id that came after `before`."""
    stored = {row["symbol"]: dict(row) for row in await connection.fetch(RANGES)}
    assert stored.keys() == after["symbols"].keys(), "symbols are missing, or there are holes"
    for symbol, ids in stored.items():
        assert ids["first_id"] == after["symbols"][symbol]["first_id"], ids
        least, most = (state["symbols"][symbol]["last_id"] for state in (before, after))
        assert least <= ids["last_id"] <= most, f"{ids}: {least} was sent before the stop"
    rows, equal = await count_equal(connection, {**after, "symbols": stored})
    total = await connection.fetchval("SELECT count(*) FROM raw_trades")
    wanted = sum(ids["last_id"] - ids["first_id"] + 1 for ids in stored.values())
    assert rows == equal == total == wanted, f"{rows=} {equal=} {total=} {wanted=}"


async def libraries() -> float:
    """Return the seconds of a process that imports what the daemon is built on: the floor."""
    begin = time.monotonic()
    await output_of((sys.executable, "-c", IMPORTS))
    return time.monotonic() - begin


async def embedded() -> list[Figure]:
    """Return what a start with the embedded database takes, the first one and the next."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder:
        for subject in ("made anew", "made before"):
            async with exchange(
                "--symbols", LIST, "--rate", str(START_RATE), program=GENERATOR
            ) as (venue, ws):
                settings = {**environ("", ws, venue.http, STREAMS), "DATA_DIR": folder}
                del settings["DATABASE_URL"]
                began = time.monotonic()
                async with daemon_in(Path(folder), settings) as running:
                    await until(running, "/health", lambda all: all["counts"]["trades_stored"] > 0)
                    stored_s = time.monotonic() - began
                    stop_s = await stop(running)
            name = f"embedded, {subject}"
            figures.append(figure(name, FIRST_STORED, [stored_s], "s"))
            figures.append(figure(name, "SIGTERM -> end, database included", [stop_s], "s"))
    return figures


async def measure(server_dsn: str) -> list[Figure]:
    """Return the figures of this bench."""
    figures = []
    for rate in (START_RATE, STOP_RATE):
        cycles = [await cycle(server_dsn, rate) for _ in range(REPEATS)]
        figures += figures_of(f"start, {rate:,}/s", cycles, 1.5, 1.0)
    alone = [await libraries() for _ in range(REPEATS)]
    figures.append(figure(f"start, {START_RATE:,}/s", LIBRARIES, alone, "s"))
    many = await cycle(server_dsn, STOP_RATE, ",".join(names(MANY)))
    return figures + figures_of(f"start, {STOP_RATE:,}/s of {MANY:,} symbols", [many])


def figures_of(
    name: str,
    cycles: list[Cycle],
    start_limit_s: float | None = None,
    stop_limit_s: float | None = None,
) -> list[Figure]:
    """Return the figures of several cycles."""
    ready, stored, stopped = zip(*cycles, strict=True)
    return [
        figure(name, "exec -> /ready", ready, "s"),
        figure(name, FIRST_STORED, stored, "s", limit=start_limit_s, baseline=LIBRARIES),
        figure(name, "SIGTERM -> end", stopped, "s", limit=stop_limit_s),
    ]


async def main() -> list[Figure]:
    """Run this bench alone."""
    async with server() as dsn:
        figures = await measure(dsn)
    return figures + await embedded()


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(main()), options.json))
