"""Fan-out of live streams: exchange -> daemon -> clients, each a process, on shared cores.

20,000 trades/s go to none, one, ten and fifty clients of one daemon, which stores them all the
while. What counts is how long after the daemon's socket read a trade is at a client (by the
`received_at` of its row), and what the clients cost the capture: CPU a trade, receive -> commit.
"""

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit

import asyncpg
import numpy as np
from _database import database, server
from _harness import HERE, Figure, arguments, figure, report
from _processes import Running, daemon, exchange, until_ready
from bench_e2e import LATENCY, LIST, STORED, STREAMS, environ

RATE = 20_000
STAGE_S = 8.0
PROCESSES = 2
CLIENTS = (0, 1, 10, 50)
SETTLE_S = 2.0
LIMIT_S = 60.0

RECEIVED = """
    SELECT n.at_us - (extract(epoch FROM r.received_at) * 1000000)::int8 AS us
    FROM unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, trade_id, at_us)
    JOIN raw_trades AS r USING (symbol, trade_id)
"""


class Stage:
    """What was measured with one number of clients."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.trades_per_s = 0.0
        self.cpu_us = 0.0
        self.commit_p99_ms = 0.0
        self.delays_ms = np.zeros(1)


async def measure_stage(running: Running, dsn: str, clients: int) -> Stage:
    """Run so many clients for a while, in two processes."""
    stage = Stage(clients)
    shares = [clients // PROCESSES + (n < clients % PROCESSES) for n in range(PROCESSES)]
    port = str(urlsplit(running.http).port)
    command = (sys.executable, str(HERE / "_stream_client.py"), port, f"/stream?streams={STREAMS}")
    processes = [
        await asyncio.create_subprocess_exec(
            *command, str(share), str(STAGE_S), stdout=asyncio.subprocess.PIPE, limit=1 << 28
        )
        for share in shares
        if share
    ]
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(LIMIT_S):
            for process in processes:
                assert process.stdout is not None
                assert (await process.stdout.readline()).strip() == b"flowing"
            begin, cpu_s = time.time(), running.cpu_s()
            stored = await connection.fetchval(STORED)
            await asyncio.sleep(STAGE_S)
            seconds = time.time() - begin
            cpu_s = running.cpu_s() - cpu_s
            trades = await connection.fetchval(STORED) - stored
            results = [json.loads((await process.communicate())[0]) for process in processes]
        await asyncio.sleep(SETTLE_S)
        stage.trades_per_s = trades / seconds
        stage.cpu_us = cpu_s * 1e6 / trades
        stage.commit_p99_ms = (await connection.fetchrow(LATENCY, begin))["quantiles"][1] * 1e3
        delays: list[int] = []
        for result in results:
            assert result["left_out"] == 0 and result["closed"] == 0, "a client was left behind"
            assert min(result["trades"]) > 0.9 * RATE * STAGE_S, min(result["trades"])
            columns = [list(column) for column in zip(*result["notes"], strict=True)]
            delays += [row["us"] for row in await connection.fetch(RECEIVED, *columns)]
        if delays:
            stage.delays_ms = np.array(delays) / 1e3
    finally:
        await connection.close()
        for process in processes:
            if process.returncode is None:
                process.kill()
    return stage


def figures_of(stages: list[Stage]) -> list[Figure]:
    """Return the table's lines; the baseline of the cost is the run without clients."""
    found = []
    name = f"streams, {RATE:,}/s"
    for stage in stages:
        who = f"{stage.clients} clients"
        base = {} if not stage.clients else {"baseline": "CPU of the daemon, 0 clients"}
        cpu = figure(name, f"CPU of the daemon, {who}", [stage.cpu_us], "us/trade", **base)
        base = {} if not stage.clients else {"baseline": "receive -> commit p99, 0 clients"}
        commit = figure(name, f"receive -> commit p99, {who}", [stage.commit_p99_ms], "ms", **base)
        found += [cpu, commit]
        if stage.clients:
            for share in (50, 99):
                value = float(np.percentile(stage.delays_ms, share))
                limit = 25.0 if share == 99 else None
                subject = f"socket read -> client p{share}, {who}"
                found.append(figure(name, subject, [value], "ms", limit=limit))
            rate = stage.trades_per_s * stage.clients
            found.append(figure(name, f"events to {who}", [rate], "events/s"))
    return found


async def measure(server_dsn: str) -> list[Figure]:
    """Return all figures of this bench."""
    async with (
        database(server_dsn, "bench_streams") as dsn,
        exchange("--symbols", LIST, "--rate", str(RATE)) as (venue, ws),
        daemon(environ(dsn, ws, venue.http, "trade")) as running,
    ):
        await until_ready(running)
        await asyncio.sleep(SETTLE_S)
        return figures_of([await measure_stage(running, dsn, count) for count in CLIENTS])


async def main() -> list[Figure]:
    """Run this bench alone."""
    async with server() as dsn:
        return await measure(dsn)


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(main()), options.json))
