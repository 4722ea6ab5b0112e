"""What publishing in Redis costs at 20,000 trades/s, of 7 symbols and of 600.

alone    frames go into a capture, one process, with and without a publisher: its share of a core,
         without the noise of all else that a daemon does
daemon   exchange -> daemon -> PostgreSQL and a redis-server, each a process; the daemon's CPU with
         and without REDIS_URL, in turns, and that of redis-server. On a machine with other work the
         difference is lost in the noise; what counts then is the figure above
"""

import asyncio
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import uvloop
from _database import database, server
from _harness import ROOT, Figure, arguments, figure, report
from _processes import Running, _end, _free_port, daemon, exchange, until_ready
from _workload import FIRST_ID, SYMBOLS
from bench_e2e import STORED, environ

from tradecore import clock
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.redis.address import parse
from tradecore.redis.publisher import Publisher
from tradecore.ring import Ring

sys.path.append(str(ROOT))
from tests.snapshots import HEALTHY

RATE = 20_000
ALONE_S = 4.0
DAEMON_S = 8.0
PAIRS = 3
DAEMON_PAIRS = 4
SETTLE_S = 2.0
BURST_S = 0.005
LIMIT_PERCENT = 2.0


def names(count: int) -> tuple[str, ...]:
    """Return so many symbols."""
    return tuple((*SYMBOLS, *(f"S{number}USDT" for number in range(count))))[:count]


@asynccontextmanager
async def redis_server() -> AsyncIterator[Running]:
    """Yield a redis-server that keeps nothing on disk; `http` is its URL."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed: apt-get install redis-server")
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder:
        process = await asyncio.create_subprocess_exec(
            *(program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder),
            *("--save", "", "--appendonly", "no"),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            yield Running(process, f"redis://127.0.0.1:{port}/0")
        finally:
            await _end(process)


# -- alone ---------------------------------------------------------------------------------------


def frames_of(symbols: Sequence[str], count: int) -> list[bytes]:
    """Return trades of all symbols in turn, as of now, in the form of the venue."""
    now_us = clock.wall_ns() // 1000
    return [
        f'{{"stream":"{symbol.lower()}@trade","data":{{"e":"trade","E":{now_us + number},'
        f'"s":"{symbol}","t":{FIRST_ID + number},"p":"64000.{number % 100:02d}000000",'
        f'"q":"0.00100000","T":{now_us + number},"m":true,"M":true}}}}'.encode()
        for number in range(count)
        for symbol in (symbols[number % len(symbols)],)
    ]


async def cpu_percent(symbols: Sequence[str], url: str, trades_kept: int = 0) -> float:
    """Return the share of a core that this process takes for RATE trades/s; no URL: no Redis."""
    frames = frames_of(symbols, int(RATE * ALONE_S))
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder:
        ring = Ring(Path(folder) / "ring", 1 << 17)
        for symbol in symbols:
            ring.intern(symbol)
        capture = Capture(ring, ring.symbols, Conflator(len(symbols)))
        task = publisher = None
        if url:
            publisher = Publisher(
                parse(url), capture, lambda: symbols, lambda: HEALTHY, "b", trades_kept=trades_kept
            )
            task = asyncio.create_task(publisher.run())
            while not publisher.use().up:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
        begin_s, cpu_s = time.monotonic(), _cpu_s()
        done = 0
        while done < len(frames):
            due = min(len(frames), int((time.monotonic() - begin_s) * RATE))
            for frame in frames[done:due]:
                capture.feed(frame)
            done = due
            await asyncio.sleep(BURST_S)
        cpu_s = _cpu_s() - cpu_s
        took_s = time.monotonic() - begin_s
        if publisher is not None and task is not None:
            await publisher.close()
            await task
            use = publisher.use()
            assert use.values and not sum(use.errors.values()) and not use.trades_dropped, use
    return 100 * cpu_s / took_s


def _cpu_s() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


async def alone(count: int) -> list[Figure]:
    """Return what the publisher costs by itself."""
    symbols = names(count)
    added: dict[int, list[float]] = {0: [], 1000: []}
    theirs: list[float] = []
    for _ in range(PAIRS):
        for kept, costs in added.items():
            async with redis_server() as redis:
                without = await cpu_percent(symbols, "")
                before, begin = redis.cpu_s(), time.monotonic()
                costs.append(await cpu_percent(symbols, redis.http, kept) - without)
                if not kept:
                    spent = redis.cpu_s() - before
                    theirs.append(100 * spent / (time.monotonic() - begin))
    name = f"redis, {RATE:,}/s, {count} symbols"
    return [
        figure(name, "alone: publishing", added[0], "% of a core", limit=LIMIT_PERCENT),
        figure(name, "alone: redis-server", theirs, "% of a core"),
        figure(name, "alone: publishing, and all trades", added[1000], "% of a core"),
    ]


# -- in the daemon -------------------------------------------------------------------------------


async def share(server_dsn: str, symbols: Sequence[str], redis: Running | None) -> list[float]:
    """Return CPU of the daemon in us a trade, and of redis-server as % of a core."""
    listed = ",".join(symbols)
    async with (
        database(server_dsn, "bench_redis") as dsn,
        exchange("--symbols", listed, "--rate", str(RATE)) as (venue, ws),
        daemon(
            {
                **environ(dsn, ws, venue.http, "trade,ticker"),
                "SUPPORTED_SYMBOLS": listed,
                **({"REDIS_URL": redis.http} if redis else {}),
            }
        ) as running,
    ):
        await until_ready(running)
        await asyncio.sleep(SETTLE_S)
        connection = await asyncpg.connect(dsn)
        try:
            stored, begin = await connection.fetchval(STORED), time.monotonic()
            cpu_s, theirs_s = running.cpu_s(), redis.cpu_s() if redis else 0.0
            await asyncio.sleep(DAEMON_S)
            cpu_s, theirs_s = running.cpu_s() - cpu_s, (redis.cpu_s() if redis else 0.0) - theirs_s
            took_s = time.monotonic() - begin
            stored = await connection.fetchval(STORED) - stored
        finally:
            await connection.close()
        if redis:
            use = json.loads(await running.get("/health"))["redis"]
            assert use["up"] and use["values"] and not sum(use["errors"].values()), use
    return [cpu_s * 1e6 / stored, 100 * theirs_s / took_s]


async def in_the_daemon(server_dsn: str, count: int) -> list[Figure]:
    """Return what REDIS_URL adds to a daemon that stores all the while."""
    symbols = names(count)
    off, on = [], []
    async with redis_server() as redis:
        for _ in range(DAEMON_PAIRS):
            off.append(await share(server_dsn, symbols, None))
            on.append(await share(server_dsn, symbols, redis))
    # Other work on the machine only ever adds, and more than what is looked for.
    added = min(one[0] for one in on) - min(one[0] for one in off)
    name = f"redis, {RATE:,}/s, {count} symbols"
    return [
        figure(name, "CPU of the daemon, no Redis", [one[0] for one in off], "us/trade"),
        figure(
            name,
            "CPU of the daemon, with Redis",
            [one[0] for one in on],
            "us/trade",
            baseline="CPU of the daemon, no Redis",
        ),
        figure(name, "added, lowest against lowest", [added * RATE / 1e4], "% of a core"),
        figure(name, "redis-server", [one[1] for one in on], "% of a core"),
    ]


async def main(count: int | None, only_alone: bool) -> list[Figure]:
    """Run this bench."""
    counts = (7, 600) if count is None else (count,)
    figures = [one for symbols in counts for one in await alone(symbols)]
    if not only_alone:
        async with server() as dsn:
            for symbols in counts:
                figures += await in_the_daemon(dsn, symbols)
    return figures


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--symbols", type=int, help="only with so many; else with 7 and 600")
    parser.add_argument("--alone", action="store_true", help="leave the daemon out")
    options = parser.parse_args()
    figures = uvloop.run(main(options.symbols, options.alone))
    raise SystemExit(report(figures, options.json))
