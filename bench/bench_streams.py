"""Fan-out of live streams: exchange -> daemon -> clients, each a process, on shared cores.

20,000 trades/s go to none, one, ten and fifty clients of one daemon, which stores them all the
while. What counts is how long after the daemon's socket read a trade is at a client (by the
`received_at` of its row), and what the clients cost the capture: CPU a trade, receive -> commit.
Then the same fifty clients at a rate that a plain relay can follow, from the venue's event time on.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import numpy as np
from _database import database, server
from _harness import HERE, Figure, arguments, figure, report
from _processes import Running, _end, _free_port, daemon, exchange, until_ready
from bench_e2e import LATENCY, LIST, STORED, STREAMS, environ

RATE = 20_000
SLOW_RATE = 1_000
CLIENTS = (0, 1, 10, 50)
STAGE_S = 8.0
PROCESSES = 2
SETTLE_S = 2.0
LIMIT_S = 60.0

RELAY = "relay: picows, a send per client and event"

RECEIVED = """
    SELECT n.at_us - (extract(epoch FROM r.received_at) * 1000000)::int8 AS us
    FROM unnest($1::text[], $2::int8[], $3::int8[]) AS n (symbol, trade_id, at_us)
    JOIN raw_trades AS r USING (symbol, trade_id)
"""


@dataclass
class Stage:
    """What was measured with one number of clients."""

    clients: int
    trades: int = 0
    cpu_us: float = 0.0
    """Of the process that they are connected to, a trade."""
    behind: float = 0.0
    """Share of the trades that had not come to the slowest client by the end."""
    notes: list[tuple[str, int, int, int]] = field(default_factory=list)


async def run_clients(
    source: Running, path: str, clients: int, count: Callable[[], Awaitable[int]], folder: Path
) -> Stage:
    """Let so many clients, in two processes, read for a while; `count` tells the trades so far."""
    stage = Stage(clients)
    shares = [clients // PROCESSES + (n < clients % PROCESSES) for n in range(PROCESSES)]
    command = (sys.executable, str(HERE / "_stream_client.py"), str(urlsplit(source.http).port))
    processes = [
        await asyncio.create_subprocess_exec(
            *(*command, path, str(share), str(STAGE_S), str(folder / str(number))),
            stdout=asyncio.subprocess.PIPE,
        )
        for number, share in enumerate(shares)
        if share
    ]
    try:
        async with asyncio.timeout(LIMIT_S):
            for process in processes:
                assert process.stdout is not None
                assert (await process.stdout.readline()).strip() == b"flowing"
            before, cpu_s = await count(), source.cpu_s()
            await asyncio.sleep(STAGE_S)
            cpu_s = source.cpu_s() - cpu_s
            stage.trades = await count() - before
            for process in processes:
                await process.wait()
        results = _read(folder)
    finally:
        for process in processes:
            await _end(process)
    stage.cpu_us = cpu_s * 1e6 / stage.trades
    for result in results:
        assert result["left_out"] == 0 and result["closed"] == 0, "a client has not got all"
        stage.behind = max(stage.behind, 1 - min(result["trades"]) / stage.trades)
        stage.notes += result["notes"]
    return stage


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.iterdir()]


async def fast(running: Running, dsn: str, clients: int) -> list[Figure]:
    """Return cost and delays of so many clients at RATE."""
    connection = await asyncpg.connect(dsn)
    begin = time.time()
    try:
        path = f"/stream?streams={STREAMS}"
        with tempfile.TemporaryDirectory() as folder:
            stage = await run_clients(
                running, path, clients, lambda: connection.fetchval(STORED), Path(folder)
            )
        assert stage.behind < 0.1, f"{stage.behind:.0%} of the trades have not come to a client"
        await asyncio.sleep(SETTLE_S)
        commit_s = (await connection.fetchrow(LATENCY, begin))["quantiles"][1]
        columns = list(zip(*stage.notes, strict=True))[:3]
        delays = (
            [row["us"] for row in await connection.fetch(RECEIVED, *columns)] if columns else []
        )
    finally:
        await connection.close()
    name, who = f"streams, {RATE:,}/s", f"{clients} clients"
    cpu, commit = "CPU of the daemon, ", "receive -> commit p99, "
    bases = [{"baseline": what + "0 clients"} if clients else {} for what in (cpu, commit)]
    found = [
        figure(name, cpu + who, [stage.cpu_us], "us/trade", **bases[0]),
        figure(name, commit + who, [commit_s * 1e3], "ms", **bases[1]),
    ]
    if clients:
        found += [
            _percentile(name, f"socket read -> client, {who}", delays, 50),
            _percentile(name, f"socket read -> client, {who}", delays, 99, limit=25.0),
            figure(name, f"events to {who}", [stage.trades / STAGE_S * clients], "events/s"),
        ]
    return found


def _percentile(
    name: str, subject: str, delays_us: Sequence[int], share: int, **rest: float | str | None
) -> Figure:
    value_ms = float(np.percentile(delays_us, share)) / 1e3
    return figure(name, f"{subject} p{share}", [value_ms], "ms", **rest)


@asynccontextmanager
async def relay(ws: str) -> AsyncIterator[Running]:
    """Yield the plain relay, connected to the exchange."""
    url, port = f"{ws}/stream?streams={STREAMS}&timeUnit=MICROSECOND", _free_port()
    command = (sys.executable, str(HERE / "_relay.py"), url, str(port))
    # It complains of each write to a client that has gone.
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        yield Running(process, f"http://127.0.0.1:{port}")
    finally:
        await _end(process)


async def slow(source: Running, venue: Running, who: str, baseline: str = "") -> list[Figure]:
    """Return cost and delays of fifty clients at SLOW_RATE."""

    async def sent() -> int:
        symbols = json.loads(await venue.get("/sim/state"))["symbols"].values()
        return sum(ids["last_id"] - ids["first_id"] + 1 for ids in symbols)

    path, clients = f"/stream?streams={STREAMS}&timeUnit=MICROSECOND", CLIENTS[-1]
    with tempfile.TemporaryDirectory() as folder:
        stage = await run_clients(source, path, clients, sent, Path(folder))
    delays = [at_us - event_us for _, _, at_us, event_us in stage.notes]
    name = f"streams, {SLOW_RATE:,}/s, {clients} clients"
    found = [figure(name, f"CPU, {who}", [stage.cpu_us], "us/trade")]
    found += [_percentile(name, f"event -> client, {who}", delays, share) for share in (50, 99)]
    if baseline:
        return [
            figure(
                one.bench, one.subject, [one.value], one.unit,
                baseline=one.subject.replace(who, baseline),
            )
            for one in found
        ]  # fmt: skip
    return found


async def measure(server_dsn: str) -> list[Figure]:
    """Return all figures of this bench."""
    figures = []
    async with (
        database(server_dsn, "bench_streams") as dsn,
        exchange("--symbols", LIST, "--rate", str(RATE)) as (venue, ws),
        daemon(environ(dsn, ws, venue.http, "trade")) as running,
    ):
        await until_ready(running)
        await asyncio.sleep(SETTLE_S)
        for clients in CLIENTS:
            figures += await fast(running, dsn, clients)
    async with (
        database(server_dsn, "bench_relay") as dsn,
        exchange("--symbols", LIST, "--rate", str(SLOW_RATE)) as (venue, ws),
    ):
        async with daemon(environ(dsn, ws, venue.http, "trade")) as running:
            await until_ready(running)
            await asyncio.sleep(SETTLE_S)
            figures += await slow(running, venue, "tradecore, storing", RELAY)
        async with relay(ws) as running:
            await _until_open(running)
            figures += await slow(running, venue, RELAY)
    return figures


async def _until_open(running: Running) -> None:
    """Wait until a process takes connections."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await running.get("/")
            except (aiohttp.ClientConnectorError, ConnectionRefusedError):
                await asyncio.sleep(0.05)
            except aiohttp.ClientError:
                return
            else:
                return


async def main() -> list[Figure]:
    """Run this bench alone."""
    async with server() as dsn:
        return await measure(dsn)


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(main()), options.json))
