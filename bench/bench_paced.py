"""CPU at a steady rate: what of a core the daemon takes, beside the script and the prototype.

Each gets the same market (bursts and lulls, in steps of 5 ms) and writes with the daemon's default
batches: 100 rows or a second. The prototype only parses, encodes and copies: most of what it takes
is waking up. After each run every row is compared with what was sent.
"""

import asyncio
import subprocess
import sys
import time

import asyncpg
from _database import database, server
from _harness import Figure, arguments, figure, report
from _processes import cpu_clock, exchange
from _truth import compare
from bench_e2e import make_partitions
from bench_peers import (
    BARE,
    PROGRAMS,
    SYMBOLS,
    TRADECORE,
    WITH_PICOWS,
    Peer,
    settled,
    started,
)

LIMITS = {1_000: 2.0, 20_000: 6.0, 100_000: None}
"""Trades/s, and the most of a core that the daemon may take, in percent."""
WARM_UP_S = 4.0
SECONDS = 8.0
REPEATS = 2
PEERS = (TRADECORE, BARE, WITH_PICOWS)


async def share(peer: Peer, rate: int, server_dsn: str) -> float:
    """Return the percentage of a core that a peer takes."""
    count = int(rate * (WARM_UP_S + SECONDS))
    pace = ("--rate", str(rate), "--count", str(count), "--prerender", str(count))
    async with (
        database(server_dsn, "bench_paced") as dsn,
        exchange("--symbols", SYMBOLS, *pace, "--prerender-micro") as (venue, ws),
    ):
        connection = await asyncpg.connect(dsn)
        try:
            if peer.program:
                today = venue.ready["epoch_us"] // 86_400_000_000
                await make_partitions(connection, [today, today + 1])
            async with started(peer, venue, ws, dsn) as running:
                async with cpu_clock(running) as cpu:
                    await settled(connection, "raw_trades", venue, count)
                end = await connection.fetchval(
                    "SELECT extract(epoch FROM max(received_at))::float8 FROM raw_trades"
                )
                assert end < time.time()
            assert await compare(connection, venue) == count
        finally:
            await connection.close()
    return 100 * cpu.between(end - SECONDS, end) / SECONDS


async def measure() -> list[Figure]:
    """Return the figures; at each rate the peers take turns."""
    figures = []
    async with server() as dsn:
        for rate, limit in LIMITS.items():
            found: dict[Peer, list[float]] = {peer: [] for peer in PEERS if peer.python.exists()}
            for _ in range(REPEATS):
                for peer, values in found.items():
                    values.append(await share(peer, rate, dsn))
            for peer, values in found.items():
                own = peer is TRADECORE
                figures.append(
                    figure(
                        f"CPU at {rate:,}/s",
                        peer.name,
                        values,
                        "% of a core",
                        baseline="" if own else TRADECORE.name,
                        limit=limit if own else None,
                    )
                )
    return figures


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    subprocess.run([sys.executable, PROGRAMS / "build_bare.py"], check=True)
    raise SystemExit(report(asyncio.run(measure()), options.json))
