"""Queries: candles and trades of clients, from ten million trades, while 1,000/s come in.

A year of trades of seven symbols, the last month of it dense, is made inside the server; candles
are computed from them by the daemon's own code. Then a daemon stores what the simulated exchange
prints (other symbols, the same tables), and questions are asked beside it:

queries    one after the other, by the daemon's own functions; the targets are for the median
under load eight clients that ask over HTTP for klines and trades without a pause, and what becomes
           of the time from receive to commit meanwhile
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import count

import aiohttp
import asyncpg
import numpy as np
from _database import database, server
from _harness import Figure, arguments, figure, report
from _processes import Running, daemon, exchange, until_ready
from bench_e2e import environ

from tradecore.store import queries, trade_queries
from tradecore.store.candles import CandleKind, refresh
from tradecore.store.grids import grid
from tradecore.store.partitions import Partitions
from tradecore.store.queries import Page
from tradecore.store.reader import Reader

HISTORY = ("AAAUSDT", "BBBUSDT", "CCCUSDT", "DDDUSDT", "EEEUSDT", "FFFUSDT", "GGGUSDT")
ASKED = HISTORY[3]
DAYS, DENSE_DAYS = 400, 30
THIN_S, DENSE_S = 86.4, 2.4
"""Seconds between two trades of a symbol, before the last month and in it."""
ROWS = 10_000_000

RATE = 1000
ASKS = 300
CLIENTS = 8
WARM_UP_S, PACED_S = 5.0, 15.0

MAKE = """
INSERT INTO raw_trades (timestamp, symbol, price, quantity, side, trade_id)
SELECT at + s.number * interval '1 millisecond', s.name,
       (60000 / s.number + n * 7919 % 10007 * 0.01)::numeric(20, 8),
       (n * 40503 % 99991 * 0.00001 + 0.00001)::numeric(20, 8),
       CASE WHEN n % 3 = 0 THEN 'BUY' ELSE 'SELL' END, $4 + n
FROM generate_series(0, $3::int8 - 1) AS n
CROSS JOIN LATERAL (SELECT $1::timestamptz + n * $2::float8 * interval '1 second' AS at) AS t
CROSS JOIN unnest($5::text[]) WITH ORDINALITY AS s (name, number)
WHERE at < now() ORDER BY n, s.number
"""
COVER = """
INSERT INTO trade_coverage
SELECT symbol, min(trade_id), max(trade_id), min(timestamp), max(timestamp)
FROM raw_trades GROUP BY symbol
"""
MARKS = """
INSERT INTO trade_times SELECT symbol, min(trade_id), min(timestamp) FROM raw_trades
GROUP BY symbol, date_trunc('hour', timestamp)
"""
FENCE = "UPDATE store_state SET candles_through = date_trunc('minute', now())"
LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM
    pg_xact_commit_timestamp(xmin) - received_at)) AS quantiles, count(*) AS rows
FROM raw_trades WHERE timestamp >= to_timestamp($1::float8 - 60)
    AND received_at >= to_timestamp($1) AND received_at < to_timestamp($2)
"""


async def make_history(conn: asyncpg.Connection) -> None:
    """Fill the tables with a year of trades, their ledger and their candles."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = [(today - timedelta(days=n)).date() for n in range(-1, DAYS + 1)]
    await Partitions().ensure(conn, "raw_trades", days)
    await conn.execute("SET statement_timeout = 0")
    first_id = 1
    for first, end, step in ((DAYS, DENSE_DAYS, THIN_S), (DENSE_DAYS, 0, DENSE_S)):
        number = round((first - end) * 86_400 / step)
        begin = today - timedelta(days=first - 1)
        await conn.execute(MAKE, begin, step, number, first_id, list(HISTORY), timeout=600)
        first_id += number
    await conn.execute("VACUUM ANALYZE raw_trades", timeout=600)
    await conn.execute("INSERT INTO trade_symbols SELECT unnest($1::text[])", list(HISTORY))
    for statement in (COVER, MARKS, FENCE):
        await conn.execute(statement, timeout=600)
    for back in range(DAYS, -1, -20):
        first = today - timedelta(days=back)
        await refresh(conn, CandleKind(aggregates=False), first, first + timedelta(days=20))
    await conn.execute("VACUUM ANALYZE", timeout=600)
    await conn.execute("CHECKPOINT", timeout=600)
    rows = await conn.fetchval("SELECT sum(last_id - first_id + 1) FROM trade_coverage")
    assert rows >= ROWS, f"{rows} trades"


Ask = Callable[[asyncpg.Connection, Reader], Awaitable[Page]]


def questions() -> dict[str, tuple[float | None, int, Ask]]:
    """Return by name the target in ms, the rows that must come, and what asks."""
    day_us = 86_400_000_000
    today_us = int(time.time() * 1e6) // day_us * day_us

    def candles(interval: str, **options: int) -> Ask:
        async def ask(conn: asyncpg.Connection, reader: Reader) -> Page:
            page = await queries.candles(conn, reader.tables, ASKED, grid(interval), **options)
            assert page is not None
            return page

        return ask

    async def newest(conn: asyncpg.Connection, reader: Reader) -> Page:
        span = await queries.trade_span(conn, ASKED)
        assert span is not None
        return await trade_queries.newest_trades(conn, reader.tables, ASKED, span.last_us, 500)

    async def by_id(conn: asyncpg.Connection, reader: Reader) -> Page:
        return await trade_queries.trades_from(conn, reader.tables, ASKED, 1_000_000, 500)

    yesterday = {"start_us": today_us - day_us, "end_us": today_us - 1}
    year = {"start_us": today_us - 365 * day_us, "end_us": today_us}
    return {
        "one day of 1m candles": (5.0, 1440, candles("1m", limit=1440, **yesterday)),
        "the latest 500 1m candles": (3.0, 500, candles("1m", limit=500)),
        "one year of 1d candles": (3.0, 366, candles("1d", limit=1000, **year)),
        "500 of 30m, rolled up": (None, 500, candles("30m", limit=500)),
        "the newest 500 trades": (None, 500, newest),
        "500 trades by id": (None, 500, by_id),
    }


async def ask_all(dsn: str) -> list[Figure]:
    """Ask every question ASKS times, one after the other."""
    figures = []
    reader = Reader(lambda: dsn)
    for name, (limit, rows, ask) in questions().items():
        times_ms = []
        for number in range(-10, ASKS):
            begin = time.perf_counter()
            async with reader.session() as conn:
                page = await ask(conn, reader)
            if number >= 0:
                times_ms.append((time.perf_counter() - begin) * 1e3)
            assert rows - 3 <= page.rows <= rows, (name, page.rows)
        p50, p99 = np.percentile(times_ms, (50, 99))
        figures.append(figure("queries", f"{name}, p50", [p50], "ms", limit=limit))
        figures.append(figure("queries", f"{name}, p99", [p99], "ms"))
    await reader.close()
    return figures


async def latency(conn: asyncpg.Connection, begin_s: float, end_s: float) -> tuple[float, float]:
    """Return p50 and p99 of receive to commit in ms."""
    await asyncio.sleep(2.0)
    row = await conn.fetchrow(LATENCY, begin_s, end_s)
    assert row["rows"] > 0.8 * RATE * (end_s - begin_s), f"{row['rows']} rows"
    p50_s, p99_s = row["quantiles"]
    return p50_s * 1e3, p99_s * 1e3


async def hammer(running: Running, until_s: float) -> tuple[Counter[int], list[float]]:
    """Ask for klines and trades with CLIENTS clients; return the statuses and the times in ms."""
    paths = (
        f"/api/v3/klines?symbol={ASKED}&interval=1m&limit=1000",
        f"/api/v3/trades?symbol={ASKED}&limit=500",
        f"/api/v3/klines?symbol={ASKED}&interval=1d&limit=400",
        f"/api/v3/historicalTrades?symbol={ASKED}&fromId=700000&limit=500",
    )
    statuses: Counter[int] = Counter()
    times_ms: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for number in count():
            if time.time() >= until_s:
                return
            begin = time.perf_counter()
            async with session.get(running.http + paths[number % len(paths)]) as response:
                await response.read()
            statuses[response.status] += 1
            times_ms.append((time.perf_counter() - begin) * 1e3)

    async with aiohttp.ClientSession(headers={"Accept-Encoding": "identity"}) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return statuses, times_ms


async def measure(server_dsn: str) -> list[Figure]:
    """Return all figures of this bench."""
    symbols = "BTCUSDT,ETHUSDT,SOLUSDT,PEPEUSDT"
    async with (
        database(server_dsn, "bench_queries") as dsn,
        exchange("--symbols", symbols, "--rate", str(RATE)) as (venue, ws),
    ):
        conn = await asyncpg.connect(dsn)
        await make_history(conn)
        settings = environ(dsn, ws, venue.http, "trade,ticker,kline_1m")
        async with daemon({**settings, "SUPPORTED_SYMBOLS": symbols}) as running:
            await until_ready(running)
            await asyncio.sleep(WARM_UP_S)
            begin_s = time.time()
            await asyncio.sleep(PACED_S)
            quiet = await latency(conn, begin_s, begin_s + PACED_S)
            figures = await ask_all(dsn)
            await hammer(running, time.time() + 2.0)
            begin_s = time.time()
            statuses, times_ms = await hammer(running, begin_s + PACED_S)
            busy = await latency(conn, begin_s, begin_s + PACED_S)
        await conn.close()
    assert set(statuses) <= {200, 429, 503}, statuses
    p50, p99 = np.percentile(times_ms, (50, 99))
    load = f"under load, {CLIENTS} clients"
    alone = "receive -> commit p99, nobody asks"
    return [
        *figures,
        figure(load, "receive -> commit p50, nobody asks", [quiet[0]], "ms"),
        figure(load, "receive -> commit p50", [busy[0]], "ms"),
        figure(load, alone, [quiet[1]], "ms"),
        figure(load, "receive -> commit p99", [busy[1]], "ms", baseline=alone),
        figure(load, "answers", [statuses[200] / PACED_S], "answers/s"),
        figure(
            load, "refused (429, 503)", [(len(times_ms) - statuses[200]) / PACED_S], "refused/s"
        ),
        figure(load, "an answer over HTTP, p50", [p50], "ms"),
        figure(load, "an answer over HTTP, p99", [p99], "ms"),
    ]


async def main() -> list[Figure]:
    """Run this bench alone: about three minutes."""
    async with server() as dsn:
        return await measure(dsn)


if __name__ == "__main__":
    os.environ.setdefault("TZ", "UTC")
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(main()), options.json))
