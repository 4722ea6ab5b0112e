"""Flush: ring rows into the committed table, ledger included, against two baselines.

The usual way builds tuples with Decimal for `copy_records_to_table`. The ceiling copies bytes that
were encoded beforehand and knows no ledger: nothing on this server can be faster.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import numpy as np
import uvloop
from _database import database, server
from _harness import Figure, arguments, figure, report
from _workload import symbol_table, trade_rows
from bench_encode import records
from numpy.typing import NDArray

from tradecore._copyenc import encode_trades
from tradecore.schema import TRADE_COLUMNS
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import Sink

SINK = "tradecore sink, with ledger"
USUAL = "copy_records_to_table, tuples with Decimal"
CEILING = "COPY of prebuilt bytes (ceiling)"
REPEATS = 3
TOTALS = "SELECT count(*), sum(price), sum(quantity), sum(trade_id) FROM raw_trades"

Rows = NDArray[np.void]
Write = Callable[[int], Awaitable[object]]


class Bench:
    """One database, one set of batches, three ways to write them."""

    def __init__(self, pool: asyncpg.Pool, batch_rows: int, batches: int) -> None:
        rows = trade_rows(batch_rows * batches)
        self.pool = pool
        self.total = len(rows)
        self.batches = [rows[i : i + batch_rows] for i in range(0, len(rows), batch_rows)]
        self._symbols = symbol_table()
        self._sink = Sink(pool, self._symbols, Partitions())
        self._bytes = [
            [bytes(part) for part in encode_trades(batch, self._symbols)] for batch in self.batches
        ]

    async def with_sink(self, number: int) -> None:
        """Write a batch as the daemon does."""
        await self._sink.write_trades(self.batches[number])

    async def with_tuples(self, number: int) -> None:
        """Write a batch as a script does."""
        async with self.pool.acquire() as connection:
            await connection.copy_records_to_table(
                "raw_trades", records=records(self.batches[number]), columns=TRADE_COLUMNS
            )

    async def with_bytes(self, number: int) -> None:
        """Write a batch that was encoded beforehand."""

        async def parts() -> AsyncIterator[bytes]:
            for part in self._bytes[number]:
                yield part

        async with self.pool.acquire() as connection:
            await connection.copy_to_table(
                "raw_trades", source=parts(), columns=TRADE_COLUMNS, format="binary"
            )

    async def seconds(self, write: Write) -> tuple[float, float]:
        """Empty the tables, write all batches; return the time it took, and our CPU time."""
        await self.pool.execute("TRUNCATE raw_trades, trade_coverage, trade_gaps")
        await self.pool.execute("CHECKPOINT")
        start, cpu_s = time.perf_counter(), time.process_time()
        for number in range(len(self.batches)):
            await write(number)
        return time.perf_counter() - start, time.process_time() - cpu_s

    async def measure(self) -> dict[str, list[tuple[float, float]]]:
        """Return what every way took in every repeat; the ways take turns."""
        await self.seconds(self.with_sink)  # makes the partitions, warms the caches
        wanted = await self.pool.fetchrow(TOTALS)
        assert wanted is not None and wanted[0] == self.total
        found: dict[str, list[tuple[float, float]]] = {SINK: [], USUAL: [], CEILING: []}
        ways = ((SINK, self.with_sink), (USUAL, self.with_tuples), (CEILING, self.with_bytes))
        for _ in range(REPEATS):
            for name, write in ways:
                found[name].append(await self.seconds(write))
                assert await self.pool.fetchrow(TOTALS) == wanted, name
        return found


def figures_of(
    bench: Bench, name: str, title: str, took: list[tuple[float, float]]
) -> list[Figure]:
    """Return the figures of one way: throughput of large batches, time of default ones; CPU."""
    baseline = "" if name == USUAL else USUAL
    cpu_us = [cpu_s * 1e6 / bench.total for _, cpu_s in took]
    if len(bench.batches[0]) > 1000:
        values, unit = [bench.total / wall_s for wall_s, _ in took], "trades/s"
    else:
        values, unit = [wall_s * 1e3 / len(bench.batches) for wall_s, _ in took], "ms/batch"
    limit = 0.2 if name == SINK and unit == "trades/s" else None
    return [
        figure(title, name, values, unit, baseline=baseline),
        figure(*(f"{title}: own CPU", name, cpu_us, "us/trade"), baseline=baseline, limit=limit),
    ]


async def measure(server_dsn: str) -> list[Figure]:
    """Return the figures of large batches and of default ones."""
    figures = []
    async with database(server_dsn, "bench_flush") as dsn:
        pool = await open_pool(dsn, 2)
        try:
            for rows, batches in ((16_384, 16), (100, 200)):
                bench = Bench(pool, rows, batches)
                for name, took in (await bench.measure()).items():
                    figures += figures_of(bench, name, f"flush {rows:,}", took)
        finally:
            await pool.close()
    return figures


async def main() -> list[Figure]:
    """Run this bench alone."""
    async with server() as dsn:
        return await measure(dsn)


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(uvloop.run(main()), options.json))
