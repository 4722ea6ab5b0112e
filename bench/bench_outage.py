"""Drain: the database is stopped for a minute at 10,000 trades/s; how soon is all live again?

The server is really stopped and started again; what comes meanwhile waits in the ring. The clock
runs from the server's own word that it accepts connections to the first commit whose oldest row had
waited for less than 0.2 s, by the commit times of the server. Afterwards every row is compared:
nothing was refused, nothing was fetched over REST, nothing is missing, doubled or different.
"""

import asyncio
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
from _database import database, open_folder, postgres_in
from _generator import count_equal
from _harness import Figure, arguments, figure, report
from _processes import GENERATOR, Running, daemon, exchange, until_ready
from bench_e2e import LIST, environ, until_stored
from bench_flush import CEILING, Bench

from tradecore.flusher import MAX_BATCH_ROWS
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.migrate import migrate
from tradecore.store.pool import open_pool

RATE = 10_000
BEFORE_S, OUTAGE_S, AFTER_S = 3.0, 60.0, 12.0
LIVE_S = 0.2
DRAIN_LIMIT_S = 3.0
STREAMS = "trade,ticker,kline_1m"

BATCHES = """
    SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 AS at_s,
           extract(epoch FROM pg_xact_commit_timestamp(xmin) - min(received_at))::float8 AS age_s,
           count(*) AS rows
    FROM raw_trades GROUP BY xmin ORDER BY at_s
"""
LEFT_OVER = """
    SELECT (SELECT count(*) FROM raw_trades WHERE received_at IS NULL) AS fetched,
           (SELECT count(*) FROM trade_gaps) AS holes,
           (SELECT count(*) FROM dead_letters) AS parked
"""
_READY = re.compile(r"^(\S+ \S+) UTC .*database system is ready to accept connections", re.M)


def reachable_s(log: Path) -> float:
    """Return when the server said last that it takes connections, in seconds since 1970."""
    text = _READY.findall(log.read_text())[-1]
    return datetime.fromisoformat(f"{text}+00:00").timestamp()


async def compare(connection: asyncpg.Connection, state: dict[str, Any], total: int) -> None:
    """Assert that all trades are stored and equal, and that all came over the live stream."""
    rows, equal = await count_equal(connection, state)
    left_over = dict(await connection.fetchrow(LEFT_OVER))
    assert rows == equal == total, f"{total:,} sent, {rows:,} stored, {equal:,} equal"
    assert not any(left_over.values()), left_over


async def measure(outage_s: float) -> list[Figure]:
    """Return the figures of one outage, and what the same server can do at most."""
    folder = open_folder()
    name = f"outage of {outage_s:.0f} s, {RATE:,}/s"
    async with postgres_in(folder) as postgres:
        figures = await outage(name, postgres, folder / "postgres" / "server.log", outage_s)
        return [*figures, figure(name, CEILING, await ceiling(postgres.dsn), "trades/s")]


async def ceiling(server_dsn: str) -> list[float]:
    """Return rates of a COPY of prebuilt rows in batches of the same size, without a ledger."""
    async with database(server_dsn, "bench_ceiling") as dsn:
        pool = await open_pool(dsn, 2)
        try:
            bench = Bench(pool, MAX_BATCH_ROWS, 16)
            await bench.seconds(bench.with_sink)  # makes the partitions
            return [bench.total / await bench.seconds(bench.with_bytes) for _ in range(3)]
        finally:
            await pool.close()


async def outage(name: str, postgres: EmbeddedPostgres, log: Path, outage_s: float) -> list[Figure]:
    """Return the figures of one outage; `log` is the server's."""
    total = round(RATE * (BEFORE_S + outage_s + AFTER_S))
    load = ("--symbols", LIST, "--rate", str(RATE), "--count", str(total))
    async with (
        exchange(*load, program=GENERATOR) as (venue, ws),
        daemon(environ(await migrated(postgres), ws, venue.http, STREAMS)) as running,
    ):
        await until_ready(running)
        await asyncio.sleep(BEFORE_S)
        await postgres.stop()
        await asyncio.sleep(outage_s)
        waiting = await pending(running)
        await postgres.start()
        began_s = reachable_s(log)
        connection = await asyncpg.connect(postgres.dsn)
        try:
            await until_stored(connection, total)
            await compare(connection, json.loads(await venue.get("/sim/state")), total)
            batches = await connection.fetch(BATCHES)
        finally:
            await connection.close()
    return figures_of(name, waiting, [b for b in batches if b["at_s"] > began_s], began_s)


async def migrated(postgres: EmbeddedPostgres) -> str:
    """Make the tables in the server's own database and return its DSN."""
    connection = await asyncpg.connect(postgres.dsn)
    try:
        await migrate(connection)
    finally:
        await connection.close()
    return postgres.dsn


async def pending(running: Running) -> int:
    """Return how many rows wait in the ring."""
    return int(json.loads(await running.get("/health"))["ring"]["rows"])


def figures_of(
    name: str, waiting: int, batches: list[asyncpg.Record], began_s: float
) -> list[Figure]:
    """Return when the first batch was committed, when all was live, and what came between."""
    live = next(n for n, batch in enumerate(batches) if batch["age_s"] < LIVE_S)
    # Without the last one, for which the market had nothing more to fill it.
    late = max((batch["age_s"] for batch in batches[live:-1]), default=0.0)
    first_s, live_s = batches[0]["at_s"], batches[live]["at_s"]
    rows = sum(batch["rows"] for batch in batches[1 : live + 1])
    drained = rows / (live_s - first_s)
    return [
        figure(name, "rows that wait when it is over", [waiting], "trades"),
        figure(name, "server reachable -> first commit", [first_s - began_s], "s"),
        figure(
            name, "server reachable -> live again", [live_s - began_s], "s", limit=DRAIN_LIMIT_S
        ),
        figure(name, "stored while it drains", [drained], "trades/s", baseline=CEILING),
        figure(name, "oldest row of a batch afterwards, at most", [late * 1e3], "ms"),
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=OUTAGE_S, help="length of the outage")
    options = parser.parse_args()
    raise SystemExit(report(asyncio.run(measure(options.seconds)), options.json))
