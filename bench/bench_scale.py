"""What grows with the work: 7 to 1,400 symbols, 1 to 6 streams of each, 0 to 100 million rows.

Each point is a daemon of its own with a database of its own, twice: at an even 2,000 trades/s, then
saturated; every stored row is compared with what was sent. Streams of a symbol: 1 is trades, 3 all
kinds that there are (trade, ticker, kline_1m), 6 the same over two lines, which is the most. Tables
with rows hold ten days of seven symbols, and a ledger that agrees.

The short form leaves out two lines and 100 million rows and takes seven minutes; --full takes 20.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import asyncpg
import numpy as np
from _database import database, server
from _generator import FIRST_ID, GROUP, count_equal
from _history import History
from _processes import GENERATOR, START_LIMIT_S, Running, daemon, exchange
from _scaling import Point, Scaling
from bench_e2e import environ
from bench_redis import names

SYMBOLS = (7, 70, 700, 1_400)
ALL_KINDS = "trade,ticker,kline_1m"
STREAMS = {1: ("trade", 1), 3: (ALL_KINDS, 1), 6: (ALL_KINDS, 2)}
"""Subscriptions of a symbol -> kinds, lines."""
ROWS = (10_000_000, 100_000_000)
SHORT_STREAMS, SHORT_ROWS = (1, 3), ROWS[:1]

RATE = 2_000
WARM_UP_S, PACED_S = 2.0, 5.0
SCRAPES = 5
SCRAPE_EVERY_S = 1.1
"""So that none is answered with what was made for the one before."""
TRADES = 500_000
REPEATS = 3
"""Of the saturated load, each with a daemon of its own; the median counts."""
LIMIT_S = 60.0

COMMITTED = "SELECT coalesce(sum(last_id + 1 - $1), 0)::int8 FROM trade_coverage"
SPAN = """
    SELECT extract(epoch FROM min(received_at))::float8,
           extract(epoch FROM max(pg_xact_commit_timestamp(xmin)))::float8
    FROM raw_trades WHERE timestamp >= to_timestamp($1) AND trade_id >= $2
"""
LATENCY = """
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM
        pg_xact_commit_timestamp(xmin) - received_at)) AS quantiles, count(*) AS rows
    FROM raw_trades WHERE timestamp >= to_timestamp($1::float8 - 60)
        AND received_at BETWEEN to_timestamp($1) AND to_timestamp($2)
"""


@asynccontextmanager
async def running(
    dsn: str, count: int, streams: int, first_id: int, *load: str
) -> AsyncIterator[tuple[Running, Running, float]]:
    """Yield a daemon that has just been started, its exchange, and the time of its start."""
    listed = ",".join(names(count))
    kinds, lines = STREAMS[streams]
    ids = ("--first-id", str(first_id))
    options = ("--symbols", listed, "--lines", str(lines), *ids, *load)
    async with exchange(*options, program=GENERATOR) as (venue, ws):
        urls = [ws, ws.replace("127.0.0.1", "localhost")]
        settings = environ(dsn, ",".join(urls[:lines]), venue.http, kinds)
        begin_s = time.monotonic()
        more = {"SUPPORTED_SYMBOLS": listed, "FEED_LINES": str(lines)}
        async with daemon(settings | more) as started:
            yield started, venue, begin_s


async def until(begin_s: float, started: Running, is_so: Callable[[Any], bool]) -> float:
    """Wait until /health is so; return how long after the start that is."""
    async with (
        asyncio.timeout(START_LIMIT_S),
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
    ):
        while True:
            with suppress(aiohttp.ClientConnectionError):
                async with session.get(started.http + "/health") as response:
                    if is_so(await response.json()):
                        return time.monotonic() - begin_s
            await asyncio.sleep(0.05)


async def until_committed(connection: asyncpg.Connection, first_id: int, count: int) -> None:
    """Wait until the ledger holds `count` trades from `first_id` of each symbol on."""
    async with asyncio.timeout(LIMIT_S):
        while await connection.fetchval(COMMITTED, first_id) < count:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.02)


async def compare(connection: asyncpg.Connection, venue: Running, count: int) -> None:
    """Assert that what was sent is stored and equal, row by row."""
    state = json.loads(await venue.get("/sim/state"))
    rows, equal = await count_equal(connection, state)
    assert rows == equal == count, f"{count} sent, {rows} stored, {equal} equal"
    holes = await connection.fetchval("SELECT count(*) FROM trade_gaps")
    assert not holes, f"{holes} holes"


async def scrapes(started: Running) -> tuple[float, float]:
    """Return the median milliseconds of a scrape, and its KiB."""
    times_ms, size = [], 0
    async with aiohttp.ClientSession(headers={"Accept-Encoding": "identity"}) as session:
        for _ in range(SCRAPES):
            begin = time.perf_counter()
            async with session.get(started.http + "/metrics") as response:
                size = len(await response.read())
            times_ms.append((time.perf_counter() - begin) * 1e3)
            await asyncio.sleep(SCRAPE_EVERY_S)
    return float(np.median(times_ms)), size / 1024


async def paced(dsn: str, count: int, streams: int, first_id: int) -> tuple[int, dict[str, float]]:
    """Return how many trades came at an even RATE, and what they cost."""
    trades = whole(RATE * (WARM_UP_S + PACED_S + SCRAPES * SCRAPE_EVERY_S + 1), count)
    load = ("--rate", str(RATE), "--count", str(trades), "--step", "0.001")
    async with running(dsn, count, streams, first_id, *load) as (started, venue, begin_s):
        ready_s = await until(begin_s, started, lambda health: health["ready"])
        all_s = await until(begin_s, started, is_complete)
        await asyncio.sleep(WARM_UP_S)
        begin, cpu_s = time.time(), started.cpu_s()
        await asyncio.sleep(PACED_S)
        end, cpu_s = time.time(), started.cpu_s() - cpu_s
        scrape_ms, scrape_kib = await scrapes(started)
        rss_mib = started.memory_mib("VmRSS")
        connection = await asyncpg.connect(dsn)
        try:
            await until_committed(connection, first_id, trades)
            found = await connection.fetchrow(LATENCY, begin, end)
            await compare(connection, venue, trades)
        finally:
            await connection.close()
    assert found["rows"] > 0.9 * RATE * PACED_S, f"{found['rows']} rows in {PACED_S} s"
    return trades, {
        "p50_ms": found["quantiles"][0] * 1e3,
        "p99_ms": found["quantiles"][1] * 1e3,
        "cpu_percent": cpu_s / PACED_S * 100,
        "rss_mib": rss_mib,
        "scrape_ms": scrape_ms,
        "scrape_kib": scrape_kib,
        "ready_s": ready_s,
        "all_s": all_s,
    }


async def saturated(dsn: str, count: int, streams: int, first_id: int) -> dict[str, float]:
    """Return what the daemon makes of trades that come as fast as it reads."""
    trades = whole(TRADES, count)
    load = ("--rate", "0", "--count", str(trades))
    began = time.time()
    async with running(dsn, count, streams, first_id, *load) as (started, venue, _):
        connection = await asyncpg.connect(dsn)
        try:
            await until_committed(connection, first_id, 1)
            before, cpu_s = await connection.fetchval(COMMITTED, first_id), started.cpu_s()
            await until_committed(connection, first_id, trades)
            cpu_s = started.cpu_s() - cpu_s
            begin_s, end_s = await connection.fetchrow(SPAN, began - 1, first_id)
            await compare(connection, venue, trades)
        finally:
            await connection.close()
        return {
            "stored": trades / (end_s - begin_s),
            "cpu_us": cpu_s * 1e6 / (trades - before),
            "peak_mib": started.memory_mib("VmHWM"),
        }


def medians(repeats: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each measure."""
    return {key: float(np.median([one[key] for one in repeats])) for key in repeats[0]}


def whole(trades: float, count: int) -> int:
    """Return a number of trades of which all symbols have equally many."""
    return -(-round(trades) // (GROUP * count)) * GROUP * count


def is_complete(health: Any) -> bool:
    """Tell whether all streams are subscribed."""
    feed = health["feed"]
    return bool(0 < feed["streams_wanted"] == feed["streams_live"])


async def on_empty(server_dsn: str, count: int, streams: int) -> Point:
    """Measure a daemon that begins with empty tables."""
    async with database(server_dsn, "bench_scale") as dsn:
        _, measures = await paced(dsn, count, streams, FIRST_ID)
    repeats = []
    for _ in range(REPEATS):
        async with database(server_dsn, "bench_scale") as dsn:
            repeats.append(await saturated(dsn, count, streams, FIRST_ID))
    measures |= medians(repeats)
    return Point(symbols=count, streams=streams, measures=measures)


async def on_rows(server_dsn: str, rows: int) -> Point:
    """Measure a daemon of seven symbols on tables with so many rows."""
    async with database(server_dsn, "bench_scale") as dsn:
        begin = time.monotonic()
        history = History(names(7), rows)
        await history.store(dsn)
        say(f"{rows:,} rows made in {time.monotonic() - begin:.0f} s")
        trades, measures = await paced(dsn, 7, 3, FIRST_ID)
        repeats = []
        for number in range(REPEATS):
            first_id = FIRST_ID + (trades + number * whole(TRADES, 7)) // 7
            repeats.append(await saturated(dsn, 7, 3, first_id))
        measures |= medians(repeats)
    return Point(symbols=7, streams=3, rows=rows, measures=measures)


async def measure(
    server_dsn: str, symbols: Iterable[int], streams: Collection[int], rows: Iterable[int]
) -> AsyncIterator[Point]:
    """Yield all points of this bench."""
    for count in symbols:
        for several in streams:
            yield await on_empty(server_dsn, count, several)
    for stored in rows:
        yield await on_rows(server_dsn, stored)


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


async def main(
    streams: Collection[int], rows: Iterable[int], symbols: Iterable[int] = SYMBOLS
) -> Scaling:
    """Run this bench alone."""
    found = Scaling()
    async with server() as dsn:
        async for point in measure(dsn, symbols, streams, rows):
            found.points.append(point)
            costs = ", ".join(f"{key} {value:.4g}" for key, value in point.measures.items())
            say(f"{point.symbols} symbols x {point.streams} on {point.rows:,} rows: {costs}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="two lines and 100 million rows, too")
    parser.add_argument("--symbols", type=int, nargs="*", default=SYMBOLS)
    parser.add_argument("--streams", type=int, nargs="*", choices=STREAMS)
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--save", action="store_true", help="for bench/report.py --saved")
    options = parser.parse_args()
    streams = options.streams or (tuple(STREAMS) if options.full else SHORT_STREAMS)
    rows = (ROWS if options.full else SHORT_ROWS) if options.rows is None else options.rows
    found = asyncio.run(main(streams, rows, options.symbols))
    if options.save:
        saved = Scaling.load()
        saved.add_points(found)
        saved.save()
    print(found.markdown())
