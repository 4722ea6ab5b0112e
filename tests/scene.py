"""A daemon before a simulated exchange and a real database, and whether all that was printed is
stored: once, equal in every column, without a hole.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import WAIT_LIMIT_S, Daemon
from tests.fakes import SimulatedExchange
from tradecore.simulate.proof import prove
from tradecore.store.verify import verify

NOISE = ("Traceback", "Task exception was never retrieved", "never awaited")
MOST_WARNINGS = 60


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        await conn.close()


async def printed(exchange: SimulatedExchange, symbols: Sequence[str]) -> dict[str, int]:
    """Return the newest id of each symbol that the exchange has printed by now."""
    now_us = (await exchange.state())["now_us"]
    market = await exchange.truth_now()
    return {symbol: market.next_id(symbol, now_us) - 1 for symbol in symbols}


async def coverage(dsn: str) -> dict[str, list[tuple[int, int]]]:
    """Return the stored ranges of each symbol."""
    found: dict[str, list[tuple[int, int]]] = {}
    async with connected(dsn) as conn:
        for symbol, first, last in await conn.fetch(
            "SELECT symbol, first_id, last_id FROM trade_coverage ORDER BY symbol, first_id"
        ):
            found.setdefault(symbol, []).append((first, last))
    return found


async def gaps(dsn: str, symbol: str | None = None) -> list[tuple[Any, ...]]:
    """Return the history of holes: symbol, first id, last id, cause, state, filled_by."""
    query = (
        "SELECT symbol, first_id, last_id, cause, state, filled_by FROM trade_gaps"
        " WHERE symbol = $1 OR $1 IS NULL ORDER BY symbol, first_id"
    )
    async with connected(dsn) as conn:
        return [tuple(row) for row in await conn.fetch(query, symbol)]


async def until_whole(
    dsn: str, exchange: SimulatedExchange, symbols: Sequence[str], limit_s: float = WAIT_LIMIT_S
) -> None:
    """Wait until all that is printed by now is stored without a hole."""
    marks = await printed(exchange, symbols)
    lacking: dict[str, Any] = {}
    try:
        async with asyncio.timeout(limit_s):
            while True:
                stored = await coverage(dsn)
                lacking = {
                    symbol: (stored.get(symbol), mark)
                    for symbol, mark in marks.items()
                    if len(ranges := stored.get(symbol, [])) != 1 or ranges[0][1] < mark
                }
                if not lacking:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not whole (stored ranges, printed up to): {lacking}") from None


async def assert_exact(dsn: str, exchange: SimulatedExchange, *, holes: bool = False) -> None:
    """Every id between the first and the last stored one is there, equal to the truth, once."""
    market = await exchange.truth_now()
    async with connected(dsn) as conn:
        stored = await coverage(dsn)
        assert stored
        for symbol, ranges in stored.items():
            if not holes:
                assert len(ranges) == 1, (symbol, ranges, await gaps(dsn, symbol))
                (proof,) = (await prove(conn, market, {symbol: ranges[0]})).values()
                assert proof.holds, proof
                continue
            for one in ranges:
                (proof,) = (await prove(conn, market, {symbol: one})).values()
                assert proof.equal == proof.sent, proof
        report = await verify(conn)
        report.raise_if_different()
        assert report.rows == report.expected_rows


async def metrics(one: Daemon) -> dict[str, float]:
    """Return what /metrics shows: name, or name{label values with commas}, to number.

    The values stand in the order of their labels' names.
    """
    found = {}
    for family in text_string_to_metric_families(await one.text("/metrics")):
        for sample in family.samples:
            labels = ",".join(value for _, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def assert_readable(one: Daemon, most: int = MOST_WARNINGS) -> None:
    """The log is one that an operator can read: no tracebacks, no flood."""
    log = one.log
    for noise in NOISE:
        assert noise not in log, log[-5000:]
    loud = [line for line in log.splitlines() if '"level":"info"' not in line]
    assert len(loud) <= most, "\n".join(loud[-50:])


def hang_up(one: Daemon) -> None:
    """Send SIGHUP."""
    assert one.process is not None
    one.process.send_signal(signal.SIGHUP)


async def command(*arguments: str, **environ: Any) -> tuple[int, str]:
    """Run `tradecore` to its end; return exit code and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tradecore", *arguments),
        env={
            **{k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "DATA_DIR")},
            **{name: str(value) for name, value in environ.items()},
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), WAIT_LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, output.decode()
