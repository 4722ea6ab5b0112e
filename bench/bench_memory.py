"""Memory: of an idle daemon with 7 and with 1,400 symbols, and its growth at 100,000 trades/s.

idle    connected, all streams of the default subscribed, next to no trade
steady  an even 100,000 trades/s for a minute, or --minutes, cross-check and candles included;
        resident memory each second by kind, from /proc: what is ours alone, pages of files (the
        ring's and the programs') and shared ones. Growth is the slope of a line through all but
        the first fifth. Every row is compared with the truth at the end
"""

import asyncio
import json
import time

import asyncpg
import numpy as np
from _database import database, server
from _generator import count_equal
from _harness import Figure, arguments, figure, report
from _processes import GENERATOR, Running, daemon, exchange, until_ready
from _scaling import Scaling
from bench_e2e import environ, until_stored
from bench_redis import names

IDLE_SYMBOLS = (7, 1_400)
IDLE_S = 8.0
IDLE_LIMITS_MIB = (64, 96)
STREAMS = "trade,ticker,kline_1m"
RATE = 100_000
STEADY_LIMIT_MIB = 96
GROWTH_LIMIT_MIB = 1.0
KINDS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "of files", "RssShmem": "shared"}


async def until_live(running: Running) -> None:
    """Wait until all streams are subscribed."""
    await until_ready(running)
    async with asyncio.timeout(60):
        while True:
            found = json.loads(await running.get("/health"))["feed"]
            if found["streams_live"] == found["streams_wanted"]:
                return
            await asyncio.sleep(0.2)


async def idle(server_dsn: str, count: int, limit: float) -> list[Figure]:
    """Return the memory of a daemon of so many symbols that gets one trade a second."""
    listed = ",".join(names(count))
    async with (
        database(server_dsn, "bench_memory") as dsn,
        exchange("--symbols", listed, "--rate", "1") as (venue, ws),
        daemon(environ(dsn, ws, venue.http, STREAMS) | {"SUPPORTED_SYMBOLS": listed}) as running,
    ):
        await until_live(running)
        await running.get("/metrics")
        await asyncio.sleep(IDLE_S)
        name = f"idle, {count:,} symbols"
        return [
            figure(
                name, what, [running.memory_mib(key)], "MiB", limit=limit * (key == "VmRSS") or None
            )
            for key, what in KINDS.items()
        ]


async def watch(running: Running, samples: list[tuple[float, ...]]) -> None:
    """Note (seconds, MiB of each kind) once a second until cancelled."""
    begin = time.monotonic()
    while True:
        kinds = [running.memory_mib(key) for key in KINDS]
        samples.append((time.monotonic() - begin, *kinds))
        await asyncio.sleep(1.0)


async def steady(server_dsn: str, minutes: float) -> tuple[list[Figure], list[tuple[float, ...]]]:
    """Return the figures of an even load, and the samples."""
    count = round(RATE * 60 * minutes)
    load = ("--symbols", ",".join(names(7)), "--rate", str(RATE), "--count", str(count))
    samples: list[tuple[float, ...]] = []
    async with (
        database(server_dsn, "bench_memory") as dsn,
        exchange(*load, program=GENERATOR) as (venue, ws),
        daemon(environ(dsn, ws, venue.http, STREAMS)) as running,
    ):
        connection = await asyncpg.connect(dsn)
        try:
            await until_stored(connection, 1)
            begin, cpu_s = time.monotonic(), running.cpu_s()
            watching = asyncio.create_task(watch(running, samples))
            await until_stored(connection, count)
            watching.cancel()
            took_s, cpu_s = time.monotonic() - begin, running.cpu_s() - cpu_s
            state = json.loads(await venue.get("/sim/state"))
            audits = json.loads(await running.get("/health"))["completeness"]["audit"]
            rows, equal = await count_equal(connection, state)
            others = await connection.fetchval("SELECT count(*) FROM trade_gaps")
        finally:
            await connection.close()
    assert rows == equal == count, f"{count} sent, {rows} stored, {equal} equal"
    assert not others and not audits["klines_mismatched"], (others, audits)
    seconds, *kinds = np.array(samples).T
    late = seconds > seconds[-1] / 5
    name = f"{RATE:,} trades/s for {minutes:g} min"
    figures = []
    for (key, what), values in zip(KINDS.items(), kinds, strict=True):
        peak = STEADY_LIMIT_MIB if key == "VmRSS" else None
        figures.append(figure(name, f"{what}, at most", [values.max()], "MiB", limit=peak))
        slope = np.polyfit(seconds[late], values[late], 1)[0] * (seconds[-1] - seconds[late][0])
        growth = GROWTH_LIMIT_MIB if key == "VmRSS" else None
        figures.append(
            figure(name, f"{what}, growth after the first fifth", [slope], "MiB", limit=growth)
        )
    figures += [
        figure(name, "stored", [count / took_s], "trades/s", limit=0.99 * RATE),
        figure(name, "CPU of the daemon", [cpu_s * 1e6 / count], "us/trade"),
        figure(name, f"rows of {count:,} equal to what was sent", [equal], "rows"),
        figure(name, "klines proven by the cross-check", [audits["klines_proven"]], "klines"),
    ]
    return figures, samples


async def measure(server_dsn: str, minutes: float) -> tuple[list[Figure], list[tuple[float, ...]]]:
    """Return all figures of this bench, and the samples of the steady load."""
    figures = []
    for count, limit in zip(IDLE_SYMBOLS, IDLE_LIMITS_MIB, strict=True):
        figures += await idle(server_dsn, count, limit)
    more, samples = await steady(server_dsn, minutes)
    return figures + more, samples


async def main(minutes: float, save: bool) -> list[Figure]:
    """Run this bench alone; `save` for bench/report.py."""
    async with server() as dsn:
        figures, samples = await measure(dsn, minutes)
    if save:
        saved = Scaling.load()
        saved.add_memory(figures, samples)
        saved.save()
    return figures


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of the steady load")
    parser.add_argument("--save", action="store_true", help="for bench/report.py --saved")
    options = parser.parse_args()
    raise SystemExit(report(asyncio.run(main(options.minutes, options.save)), options.json))
