"""End to end: simulated exchange -> daemon -> PostgreSQL, each a process, on shared cores.

saturated  the exchange sends as fast as the daemon reads; what counts is committed rows a second,
           and the daemon's CPU from the first trade to the last commit. The ceiling COPYs the same
           rows, prebuilt, in the same batches, into the same table
steady     1,000 trades/s, one a millisecond, with the default batch settings: a batch fills in
           100 ms; latency by the server's commit times and by the daemon's own histogram
bursty     the same number of trades, as the simulated market has them: bursts and lulls; and twenty
           times as many
idle       connected, next to no trade

After each run every row is compared with what was sent.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import asyncpg
import numpy as np
from _database import database, server
from _harness import HERE, Figure, arguments, figure, report
from _processes import Running, cpu_clock, daemon, exchange, output_of, until_ready
from _truth import compare, sent_rows
from _workload import FIRST_US, SYMBOLS, symbol_table, trade_frames, trade_rows
from prometheus_client.parser import text_string_to_metric_families

from tradecore._copyenc import encode_trades
from tradecore.flusher import MAX_BATCH_ROWS
from tradecore.schema import TRADE_COLUMNS
from tradecore.simulate.market import Market
from tradecore.store.partitions import Partitions

TRADES = 1_000_000
SCRIPT_TRADES = 300_000
REPEATS = 3
RATE = 1000
PACED_S = 15.0
WARM_UP_S = 3.0
SPARE_S = 10.0
IDLE_S = 6.0
STALL_LIMIT_S = 60.0

STEADY = f"steady {RATE:,}/s"
BURSTY = f"bursty {RATE:,}/s"
BUSY_RATE = 20_000
BUSY = f"bursty {BUSY_RATE:,}/s"
CPU_LIMITS = {RATE: 2.0, BUSY_RATE: 6.0}
CEILING = "COPY of the same rows prebuilt (ceiling)"
DAEMON = "tradecore"
SCRIPT = "script: picows, orjson, Decimal, copy_records_to_table"
LIST = ",".join(SYMBOLS)
STREAMS = "/".join(f"{symbol.lower()}@trade" for symbol in SYMBOLS)
STORED = "SELECT coalesce(sum(last_id - first_id + 1), 0)::bigint FROM trade_coverage"
LATENCY = """
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM
        pg_xact_commit_timestamp(xmin) - received_at)) AS quantiles, count(*) AS rows
    FROM raw_trades WHERE received_at >= to_timestamp($1)
"""


SPAN = """
    SELECT extract(epoch FROM min(received_at))::float8,
        (SELECT extract(epoch FROM max(pg_xact_commit_timestamp(xid)))::float8
         FROM (SELECT DISTINCT xmin AS xid FROM raw_trades) AS transactions)
    FROM raw_trades
"""
"""From when the first trade was received to the last commit."""


class Saturated(NamedTuple):
    """What came out of one run."""

    rate: float
    """Trades a second, received to committed."""
    cpu_us: float
    """Of the daemon, a trade, in the same span of time."""
    peak_mib: float
    ceiling: float
    """Rows a second of the COPY alone."""


def environ(dsn: str, ws: str, rest: str, streams: str) -> dict[str, str]:
    """Return the daemon's settings; everything else keeps its default."""
    return {
        "DATABASE_URL": dsn,
        "BINANCE_WEBSOCKET_URL": ws,
        "BINANCE_REST_URL": rest,
        "SUPPORTED_SYMBOLS": LIST,
        "STREAMS": streams,
    }


def saturated_by(trades: int) -> tuple[str, ...]:
    """Return options of an exchange that has its frames ready and sends them without a pause."""
    count = str(trades)
    return ("--rate", "0", "--prerender", count, "--prerender-micro", "--count", count)


async def saturated(server_dsn: str, number: int) -> Saturated:
    """Let the daemon store what comes as fast as it can; then COPY the same rows, prebuilt."""
    async with (
        database(server_dsn, f"bench_saturated_{number}") as dsn,
        exchange("--symbols", LIST, *saturated_by(TRADES)) as (venue, ws),
    ):
        connection = await asyncpg.connect(dsn)
        try:
            async with daemon(environ(dsn, ws, venue.http, "trade")) as running:
                async with cpu_clock(running) as cpu:
                    await until_stored(connection, TRADES)
                peak_mib = running.memory_mib("VmHWM")
            begin, end = await connection.fetchrow(SPAN)
            assert await compare(connection, venue) == TRADES
            await compare_ledger(connection, venue)
            ceiling = await copy_prebuilt(connection, venue)
        finally:
            await connection.close()
    cpu_us = cpu.between(begin, end) * 1e6 / TRADES
    return Saturated(TRADES / (end - begin), cpu_us, peak_mib, ceiling)


async def copy_prebuilt(connection: asyncpg.Connection, venue: Running) -> float:
    """Return rows/s of a COPY that has its bytes ready, a transaction a batch."""
    state = json.loads(await venue.get("/sim/state"))
    rows = sent_rows(Market(**state["market"]), SYMBOLS, state["symbols"])
    rows["recv_ns"] = rows["trade_us"] * 1000
    batches = [
        [bytes(part) for part in encode_trades(rows[at : at + MAX_BATCH_ROWS], symbol_table())]
        for at in range(0, len(rows), MAX_BATCH_ROWS)
    ]
    await connection.execute("TRUNCATE raw_trades; CHECKPOINT")
    begin = time.perf_counter()
    for batch in batches:

        async def parts(batch: list[bytes] = batch) -> AsyncIterator[bytes]:
            for part in batch:
                yield part

        await connection.copy_to_table(
            "raw_trades", source=parts(), columns=TRADE_COLUMNS, format="binary"
        )
    rate = len(rows) / (time.perf_counter() - begin)
    assert await compare(connection, venue) == TRADES
    return rate


async def until_stored(connection: asyncpg.Connection, count: int) -> None:
    """Wait until the ledger covers `count` trades; complain when it stops growing."""
    stored, changed = 0, time.monotonic()
    while stored < count:
        now = await connection.fetchval(STORED)
        if now > stored:
            stored, changed = now, time.monotonic()
        elif time.monotonic() - changed > STALL_LIMIT_S:
            raise RuntimeError(f"{stored} of {count} trades are stored and no more come")
        await asyncio.sleep(0.02)


async def compare_ledger(connection: asyncpg.Connection, venue: Running) -> None:
    """Assert that the ledger holds what the exchange has sent, no more and no less."""
    sent = json.loads(await venue.get("/sim/state"))["symbols"]
    found = await connection.fetch("SELECT symbol, first_id, last_id FROM trade_coverage")
    assert {row["symbol"]: (row["first_id"], row["last_id"]) for row in found} == {
        symbol: (ids["first_id"], ids["last_id"]) for symbol, ids in sent.items()
    }, "the ledger differs from what was sent"


async def script(server_dsn: str) -> tuple[float, float]:
    """Return trades/s and CPU us a trade of the script."""
    count, saturating = str(SCRIPT_TRADES), saturated_by(SCRIPT_TRADES)
    async with (
        database(server_dsn, "bench_script") as dsn,
        exchange("--symbols", LIST, *saturating) as (
            venue,
            ws,
        ),
    ):
        state = json.loads(await venue.get("/sim/state"))
        connection = await asyncpg.connect(dsn)
        days = [state["epoch_us"] // 86_400_000_000 + day for day in (0, 1)]
        await make_partitions(connection, days)
        await connection.close()
        url = f"{ws}/stream?streams={STREAMS}&timeUnit=MICROSECOND"
        command = (sys.executable, str(HERE / "peers" / "with_picows.py"), url, dsn, count)
        result = json.loads(await output_of(command))
    return result["trades"] / result["seconds"], result["cpu_s"] * 1e6 / result["trades"]


async def paced(server_dsn: str, name: str, rate: int, *pace: str) -> list[Figure]:
    """Return latency and CPU with the default batch settings; `pace` are the exchange's options."""
    async with (
        database(server_dsn, "bench_paced") as dsn,
        exchange(*pace) as (venue, ws),
        daemon(environ(dsn, ws, venue.http, "trade,ticker,kline_1m")) as running,
    ):
        await until_ready(running)
        await asyncio.sleep(WARM_UP_S)
        begin, cpu_s = time.time(), running.cpu_s()
        before = await commit_buckets(running)
        await asyncio.sleep(PACED_S)
        after = await commit_buckets(running)
        cpu_s = running.cpu_s() - cpu_s
        connection = await asyncpg.connect(dsn)
        try:
            row = await connection.fetchrow(LATENCY, begin)
        finally:
            await connection.close()
    p50_s, p99_s = row["quantiles"]
    trades = rate * PACED_S
    assert row["rows"] > 0.9 * trades, f"{row['rows']} rows in {PACED_S:.0f} s"
    bound_s = quantile({le: after[le] - before[le] for le in after}, 0.99)
    limit = 150.0 if name == STEADY else None
    return [
        figure(name, "receive -> commit p50, by commit time", [p50_s * 1e3], "ms"),
        figure(name, "receive -> commit p99, by commit time", [p99_s * 1e3], "ms", limit=limit),
        figure(
            name, "receive -> commit p99, daemon's histogram", [bound_s * 1e3], "ms", limit=limit
        ),
        figure(
            name,
            "CPU of the daemon",
            [100 * cpu_s / PACED_S],
            "% of a core",
            limit=CPU_LIMITS[rate],
        ),
    ]


def write_steady_recording(path: Path) -> None:
    """Write trades that come one a millisecond, as a recording for the simulated exchange."""
    rows = trade_rows(int(RATE * (WARM_UP_S + PACED_S + SPARE_S)))
    rows["trade_us"] = FIRST_US + np.arange(len(rows)) * (1_000_000 // RATE)
    path.write_bytes(b"\n".join(trade_frames(rows)))


async def latencies(server_dsn: str) -> list[Figure]:
    """Return latency and CPU at RATE: on an even stream, and on the market's bursts and lulls."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "steady.jsonl"
        write_steady_recording(recording)
        figures = await paced(server_dsn, STEADY, RATE, "--replay", str(recording))
    for name, rate in ((BURSTY, RATE), (BUSY, BUSY_RATE)):
        pace = ("--symbols", LIST, "--rate", str(rate))
        figures += await paced(server_dsn, name, rate, *pace)
    return figures


async def idle(server_dsn: str) -> list[Figure]:
    """Return the memory of a daemon that is connected and gets one trade a second."""
    async with (
        database(server_dsn, "bench_idle") as dsn,
        exchange("--symbols", LIST, "--rate", "1") as (venue, ws),
        daemon(environ(dsn, ws, venue.http, "trade,ticker,kline_1m")) as running,
    ):
        await until_ready(running)
        await running.get("/metrics")
        await asyncio.sleep(IDLE_S)
        return [figure("idle", "RSS of the daemon", [running.memory_mib("VmRSS")], "MiB", limit=64)]


async def commit_buckets(running: Running) -> dict[float, float]:
    """Return the cumulative buckets of the daemon's receive -> commit histogram."""
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(await running.get("/metrics"))
        if family.name == "tradecore_receive_commit_latency_seconds"
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }


def quantile(buckets: dict[float, float], share: float) -> float:
    """Return the upper bound of the bucket that holds the quantile."""
    total = buckets[float("inf")]
    return next(le for le in sorted(buckets) if buckets[le] >= share * total)


async def make_partitions(connection: asyncpg.Connection, days: list[int]) -> None:
    """Make the daily partitions that the script's rows go to; `days` count from 1970."""
    await Partitions().ensure(
        connection, "raw_trades", [date(1970, 1, 1) + timedelta(days=day) for day in days]
    )


async def measure(server_dsn: str) -> list[Figure]:
    """Return all figures of this bench."""
    figures = await idle(server_dsn)
    figures += await latencies(server_dsn)
    runs = [await saturated(server_dsn, number) for number in range(REPEATS)]
    rates, cpu_us, peaks, ceilings = zip(*runs, strict=True)
    script_rate, script_cpu_us = await script(server_dsn)
    name = "saturated"
    return [
        *figures,
        figure(*(name, DAEMON, rates, "trades/s"), baseline=SCRIPT, limit=400_000, ratio_least=3.0),
        figure(name, SCRIPT, [script_rate], "trades/s"),
        figure(name, CEILING, ceilings, "trades/s", baseline=SCRIPT),
        figure(
            *(name, f"{DAEMON} beside the ceiling", rates, "trades/s"),
            baseline=CEILING,
            ratio_least=0.8,
        ),
        figure(
            name,
            "CPU of the daemon",
            cpu_us,
            "us/trade",
            baseline="CPU of the script",
            limit=0.3,
            ratio_least=12.0,
        ),
        figure(name, "CPU of the script", [script_cpu_us], "us/trade"),
        figure(name, "peak RSS of the daemon", peaks, "MiB", limit=96),
    ]


async def main() -> list[Figure]:
    """Run this bench alone."""
    async with server() as dsn:
        return await measure(dsn)


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(main()), options.json))
