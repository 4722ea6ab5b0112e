"""Abuse of the side server: does the capture notice? Exchange, daemon and crowd share the cores.

The same daemon at 2,000 trades/s of 1,400 symbols is left alone, then abused for as long, always
with ten scrapers every 100 ms: by requests (wrong tokens, forged Hosts, huge headers, wrong methods
and paths, TLS on the plain port), then by connections (1,500 that ask nothing, 300 that send a head
byte by byte), by twelve askers of /health/binance as often as each may, and by 250 deaf ones that
ask for it and do not read. What counts is receive -> commit by the server's commit times, that a
probe is answered meanwhile, and that every trade is stored.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import numpy as np
from _database import database, server
from _harness import HERE, Figure, arguments, figure, report
from _processes import Running, daemon, exchange, output_of, until_ready
from bench_e2e import STORED, environ, until_stored
from bench_redis import names
from prometheus_client.parser import text_string_to_metric_families

from tradecore.simulate.market import Market
from tradecore.simulate.proof import prove

RATE = 2_000
SYMBOLS = 1_400
CROWDS = ("requests", "connections", "askers", "deaf")
STAGE_S = 12.0
SPARE_S = 7.0
"""To begin and end a stage."""
PROBE_S = 0.2
TOKEN = "bench-token-of-no-secrecy"

LATENCY = """
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM
        pg_xact_commit_timestamp(xmin) - received_at)) AS quantiles, count(*) AS rows
    FROM raw_trades WHERE received_at BETWEEN to_timestamp($1) AND to_timestamp($2)
"""


async def watch(running: Running, delays_s: list[float]) -> None:
    """Ask whether the daemon is ready, as a supervisor does, with a connection for each time."""
    while True:
        begin = time.monotonic()
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(running.http + "/ready") as response,
        ):
            assert response.status == 200, f"/ready answered {response.status}"
            await response.read()
        delays_s.append(time.monotonic() - begin)
        await asyncio.sleep(PROBE_S)


async def stage(running: Running, dsn: str, who: str, baseline: str = "") -> list[Figure]:
    """Measure the daemon for a while; with a `baseline`, while it is abused."""
    crowds = []
    if baseline:
        for kind in ("scrapes", who):
            port = str(urlsplit(running.http).port)
            command = (sys.executable, str(HERE / "_abuse.py"), port, kind, str(STAGE_S + 2.0))
            crowds.append(asyncio.create_task(output_of(command)))
        await asyncio.sleep(2.0)
    delays_s: list[float] = []
    probe = asyncio.create_task(watch(running, delays_s))
    begin, cpu_s = time.time(), running.cpu_s()
    await asyncio.sleep(STAGE_S)
    end, cpu_s = time.time(), running.cpu_s() - cpu_s
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    if not probe.cancelled():
        probe.result()
    counts: Counter[str] = Counter()
    for crowd in crowds:
        counts.update(json.loads(await crowd))
    await asyncio.sleep(1.0)
    connection = await asyncpg.connect(dsn)
    try:
        row = await connection.fetchrow(LATENCY, begin, end)
    finally:
        await connection.close()
    assert row["rows"] > 0.9 * RATE * STAGE_S, f"{row['rows']} rows in {STAGE_S:.0f} s"
    values = {
        "receive -> commit p50": (row["quantiles"][0] * 1e3, "ms"),
        "receive -> commit p99": (row["quantiles"][1] * 1e3, "ms"),
        "/ready p99": (float(np.percentile(delays_s, 99)) * 1e3, "ms"),
        "CPU of the daemon": (cpu_s / STAGE_S * 100, "% of a core"),
        "peak RSS until then": (running.memory_mib("VmHWM"), "MiB"),
    }
    name = f"abuse, {RATE:,} trades/s"
    figures = []
    for what, (value, unit) in values.items():
        other = f"{what}, {baseline}" if baseline else ""
        figures.append(figure(name, f"{what}, {who}", [value], unit, baseline=other))
    figures += [
        figure(name, f"crowd of {who}: {what}", [count / (STAGE_S + 2.0)], "/s")
        for what, count in sorted(counts.items())
    ]
    return figures


async def refusals(running: Running) -> dict[str, float]:
    """Return what the daemon has counted."""
    families = text_string_to_metric_families(await running.get("/metrics"))
    (family,) = (one for one in families if one.name == "tradecore_http_refused")
    return {one.labels["reason"]: one.value for one in family.samples}


async def measure(server_dsn: str) -> list[Figure]:
    """Return all figures of this bench; raise when a trade is missing, doubled or wrong."""
    count = int(RATE * (1 + len(CROWDS)) * (STAGE_S + SPARE_S))
    symbols = ",".join(names(SYMBOLS))
    pace = ("--symbols", symbols, "--rate", str(RATE), "--count", str(count))
    async with (
        database(server_dsn, "bench_abuse") as dsn,
        exchange(*pace) as (venue, ws),
        daemon(
            environ(dsn, ws, venue.http, "trade")
            | {"SUPPORTED_SYMBOLS": symbols, "HTTP_TOKEN": TOKEN}
        ) as running,
    ):
        await until_ready(running)
        await asyncio.sleep(2.0)
        figures = await stage(running, dsn, "quiet")
        for crowd in CROWDS:
            figures += await stage(running, dsn, crowd, "quiet")
        counted = await refusals(running)
        connection = await asyncpg.connect(dsn)
        try:
            await until_stored(connection, count)
            sent = json.loads(await venue.get("/sim/state"))["symbols"]
            ranges = {name: (one["first_id"], one["last_id"]) for name, one in sent.items()}
            proofs = await prove(connection, Market(**venue.ready["market"]), ranges)
            assert await connection.fetchval(STORED) == count
        finally:
            await connection.close()
    assert all(proof.holds for proof in proofs.values()), [p.differences for p in proofs.values()]
    name = f"abuse, {RATE:,} trades/s"
    equal = sum(proof.equal for proof in proofs.values())
    return [
        *figures,
        figure(name, f"trades of {count:,} equal row by row", [equal], "trades"),
        *(figure(name, f"refused: {reason}", [n], "times") for reason, n in counted.items()),
    ]


async def main() -> list[Figure]:
    """Run this bench alone."""
    async with server() as dsn:
        return await measure(dsn)


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(main()), options.json))
