"""From receive to commit under load: exchange, daemon, PostgreSQL and this bench on shared cores.

rates   100 to 100,000 trades/s with the default settings, and BATCH_TIMEOUT=5 at 1,000/s. The
        market is as bursty as the venue: groups of up to 735 trades with one time, which are also
        shown by themselves
surge   10,000/s, and three times 100,000/s for a second
events  10,000/s while other work goes on: nothing; connections that are cut; candles of old minutes
        computed anew; a scrape ten times a second; four clients that ask for klines and trades
        without a pause; trades that are left out and fetched over REST

Exact quantiles over every trade, from the time that the daemon took it off its socket to the
server's time of its commit; beside them what the daemon's own histogram tells, how often its loop
was away for longer than 5 ms (by its own work, or waiting for the disk; what the machine took from
it is shown apart), and how late the exchange was. After each run every row is compared.
"""

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import asyncpg
from _database import database, server
from _harness import Figure, arguments, figure, report
from _processes import Running, daemon, exchange
from _stalls import LIMIT_MS, Stall, StallWatch
from _truth import compare
from bench_e2e import LIST, commit_buckets, environ, quantile, until_stored

RATES = (100, 1_000, 10_000, 50_000, 100_000)
LIMITS_MS = {100: 1010.0, 1_000: 1010.0, 100_000: 50.0}
"""Targets for p99: BATCH_TIMEOUT + 10 ms, and what group commit should reach."""
QUICK = {"BATCH_TIMEOUT": "5"}
QUICK_LIMIT_MS = 12.0

PACED_S = 15.0
WARM_UP_S = 2.0
START_S = 4.0
"""For the daemon to start and subscribe before the first trade."""
RENDER_S = 8e-6
"""For one trade, generously; prerendered trades cost the exchange next to nothing."""
STEP_S = 0.001
RENDERED_RATE = 5_000
"""From this rate on trades are rendered ahead."""

EVENT_RATE = 10_000
EVENT_S = 8.0
SURGE_RATE, SURGES_S = 100_000, (5.0, 9.0, 13.0)
SURGE_ALONE = "SOLUSDT"
"""What trades outside of the surges, a tenth of all."""

BURST_ROWS = 100

LATENCY = f"""
    WITH latencies AS (
        SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin) - received_at)::float8 * 1e3 AS ms,
               count(*) OVER (PARTITION BY symbol, timestamp) >= {BURST_ROWS} AS is_burst
        FROM raw_trades WHERE received_at >= to_timestamp($1) AND received_at < to_timestamp($2)
    )
    SELECT percentile_cont(ARRAY[0.5, 0.99, 0.999, 1]) WITHIN GROUP (ORDER BY ms) AS quantiles,
           percentile_cont(0.99) WITHIN GROUP (ORDER BY ms) FILTER (WHERE is_burst) AS burst_p99,
           count(*) FILTER (WHERE is_burst) AS burst_rows, count(*) AS rows
    FROM latencies
"""
OLD_MINUTES = """
    INSERT INTO candle_windows (minutes) SELECT tstzmultirange(tstzrange(
        date_trunc('minute', min(first_time)),
        date_trunc('minute', max(last_time)) + interval '1 minute')) FROM trade_coverage
"""


@dataclass
class Scene:
    """A daemon that captures at a pace, and what watches it."""

    venue: Running
    running: Running
    connection: asyncpg.Connection
    watch: StallWatch
    begin_s: float
    """When the first trade is due, since 1970."""

    async def until(self, seconds: float) -> None:
        """Wait until so long after the first trade."""
        await asyncio.sleep(self.begin_s + seconds - time.time())

    async def late_ms(self) -> Counter[int]:
        """Return how late the exchange has been: milliseconds -> steps."""
        late = json.loads(await self.venue.get("/sim/state"))["late_ms"]
        return Counter({int(ms): count for ms, count in late.items()})


@asynccontextmanager
async def scene(
    server_dsn: str, rate: int, seconds: float, settings: dict[str, str], *options: str
) -> AsyncIterator[Scene]:
    """Yield a scene that trades for so long; compare every row at its end."""
    count = int(rate * seconds)
    ahead = count if rate >= RENDERED_RATE else 0
    begin_s = time.time() + START_S + ahead * RENDER_S
    pace = ["--rate", str(rate), "--step", str(STEP_S), "--epoch", str(int(begin_s * 1e6))]
    if ahead:
        pace += ["--prerender", str(ahead), "--prerender-micro"]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        watch = StallWatch(folder)
        dsn = await stack.enter_async_context(database(server_dsn, "bench_latency"))
        venue, ws = await stack.enter_async_context(
            exchange("--symbols", LIST, "--count", str(count), *pace, *options)
        )
        assert time.time() < begin_s - START_S / 2, "the exchange was not ready in time"
        its = environ(dsn, ws, venue.http, "trade,ticker,kline_1m")
        running = await stack.enter_async_context(daemon({**its, **watch.environ, **settings}))
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        here = Scene(venue, running, connection, watch, begin_s)
        await here.until(WARM_UP_S)
        yield here
        await until_equal(here)


async def until_equal(scene: Scene) -> None:
    """Wait until all that was sent is stored, holes filled; then compare every row."""
    while not (state := json.loads(await scene.venue.get("/sim/state")))["done"]:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await until_stored(scene.connection, sum(one["trades"] for one in state["symbols"].values()))
    await compare(scene.connection, scene.venue)


Event = Callable[[Scene], Awaitable[None]]


async def measure_while(scene: Scene, name: str, seconds: float, event: Event) -> list[Figure]:
    """Return the figures of the next seconds, in which `event` goes on until it is cancelled."""
    late_ms = await scene.late_ms()
    before = await commit_buckets(scene.running)
    begin_s = time.time()
    going_on = asyncio.ensure_future(event(scene))
    await asyncio.wait({going_on}, timeout=seconds)
    end_s = time.time()
    if not going_on.cancel():
        going_on.result()
        raise RuntimeError(f"{name} ended too soon")
    after = await commit_buckets(scene.running)
    late_ms = await scene.late_ms() - late_ms
    await asyncio.sleep(1.5)  # until all of these trades are committed
    row = await scene.connection.fetchrow(LATENCY, begin_s, end_s, timeout=60)
    p50, p99, p999, most = row["quantiles"]
    bound_s = quantile({le: after[le] - before[le] for le in after}, 0.99)
    what = "receive -> commit"
    figures = [
        figure(name, f"{what} p50", [p50], "ms"),
        figure(name, f"{what} p99", [p99], "ms"),
        figure(name, f"{what} p99.9", [p999], "ms"),
        figure(name, f"{what}, the longest of {row['rows']:,}", [most], "ms"),
        figure(name, f"{what} p99, daemon's histogram", [bound_s * 1e3], "ms"),
    ]
    if row["burst_rows"]:
        text = f"{what} p99 of {row['burst_rows']:,} in bursts of {BURST_ROWS} and more"
        figures.append(figure(name, text, [row["burst_p99"]], "ms"))
    return figures + stall_figures(name, scene.watch.read(begin_s, end_s), late_ms)


def stall_figures(name: str, stalls: Sequence[Stall], late_ms: Counter[int]) -> list[Figure]:
    """Return the figures of the loop's stalls and of the exchange's lateness."""
    own = [stall.own_ms for stall in stalls if stall.own_ms > LIMIT_MS]
    late = sorted(late_ms.elements())
    return [
        figure(name, f"loop away > {LIMIT_MS:.0f} ms by its own doing", [len(own)], "times"),
        figure(name, "the longest of them", [max(own, default=0.0)], "ms"),
        figure(name, "kept from the processor so long", [len(stalls) - len(own)], "times"),
        figure(name, "exchange late, p99", [late[int(len(late) * 0.99)] if late else 0.0], "ms"),
    ]


# ---- what goes on meanwhile --------------------------------------------------------------------


async def nothing(scene: Scene) -> None:
    """Let the daemon alone."""
    await asyncio.Event().wait()


async def fault(scene: Scene, **order: str | int) -> None:
    """Order a fault of the exchange."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(scene.venue.http + "/sim/fault", json=order) as response,
    ):
        response.raise_for_status()


async def reconnect(scene: Scene) -> None:
    """Cut the connection every two seconds."""
    while True:
        await fault(scene, fault="cut")
        await asyncio.sleep(2.0)


async def leave_out(scene: Scene) -> None:
    """Leave a thousand trades out each second: holes that are filled over REST."""
    while True:
        await fault(scene, fault="drop", n=1000)
        await asyncio.sleep(1.0)


async def refresh_old(scene: Scene) -> None:
    """Have the candles of all minutes computed anew, again and again."""
    while True:
        await scene.connection.execute(OLD_MINUTES)
        await asyncio.sleep(0.5)


async def scrape(scene: Scene) -> None:
    """Scrape ten times a second."""
    while True:
        assert "tradecore_ready 1.0" in await scene.running.get("/metrics")
        await asyncio.sleep(0.1)


async def ask(scene: Scene) -> None:
    """Ask for klines and trades with four clients."""
    paths = (
        "/api/v3/klines?symbol=BTCUSDT&interval=1m&limit=1000",
        "/api/v3/trades?symbol=ETHUSDT&limit=1000",
        "/api/v3/ticker/24hr?symbol=BTCUSDT",
        "/api/coverage",
    )

    async def client(session: aiohttp.ClientSession) -> None:
        while True:
            for path in paths:
                async with session.get(scene.running.http + path) as response:
                    await response.read()
                assert response.status in (200, 429, 503), f"{path}: {response.status}"

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(client(session))


EVENTS: dict[str, Event] = {
    "nothing else": nothing,
    "cut connections": reconnect,
    "old candles": refresh_old,
    "scrapes": scrape,
    "API queries": ask,
    "back-fill": leave_out,
}


# ---- the parts of the bench --------------------------------------------------------------------


async def rates(server_dsn: str) -> list[Figure]:
    """Measure each rate with the default settings, and a short BATCH_TIMEOUT."""
    figures = []
    cases: list[tuple[int, dict[str, str], float | None]]
    cases = [(rate, {}, LIMITS_MS.get(rate)) for rate in RATES]
    for rate, settings, limit in [*cases, (1_000, QUICK, QUICK_LIMIT_MS)]:
        name = f"{rate:,}/s" + (", BATCH_TIMEOUT=5" if settings else "")
        seconds = WARM_UP_S + PACED_S + 1.0
        async with scene(server_dsn, rate, seconds, settings) as here:
            figures += with_limit(await measure_while(here, name, PACED_S, nothing), limit)
    return figures


def with_limit(figures: Sequence[Figure], limit: float | None) -> list[Figure]:
    """Return the figures with the target of the p99."""
    return [
        figure(f.bench, f.subject, [f.value], f.unit, limit=limit)
        if f.subject.endswith("commit p99")
        else f
        for f in figures
    ]


async def surge(server_dsn: str) -> list[Figure]:
    """Measure ten times the rate for a second, by a market that pauses all but one symbol."""
    seconds = SURGES_S[-1] + 4.0
    edges = [0.0, *(edge for at in SURGES_S for edge in (at, at + 1.0)), seconds + 60.0]
    pauses = [
        option
        for symbol in LIST.split(",")
        if symbol != SURGE_ALONE
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
        for option in ("--pause", f"{symbol}={begin}-{end}")
    ]
    name = f"{SURGE_RATE // 10:,}/s, {len(SURGES_S)} times {SURGE_RATE:,}/s for 1 s"
    count = int(SURGE_RATE * (len(SURGES_S) + (seconds - len(SURGES_S)) / 10) * 0.9)
    async with scene(server_dsn, SURGE_RATE, count / SURGE_RATE, {}, *pauses) as here:
        return await measure_while(here, name, SURGES_S[-1] + 1.5 - WARM_UP_S, nothing)


async def events(server_dsn: str) -> list[Figure]:
    """Measure one daemon while one thing after the other goes on."""
    figures = []
    seconds = WARM_UP_S + len(EVENTS) * (EVENT_S + 4.0)
    async with scene(server_dsn, EVENT_RATE, seconds, {}) as here:
        for name, event in EVENTS.items():
            figures += await measure_while(here, f"{EVENT_RATE:,}/s, {name}", EVENT_S, event)
            await asyncio.sleep(1.0)
    return figures


PARTS = {"rates": rates, "surge": surge, "events": events}


async def main(parts: Sequence[str]) -> list[Figure]:
    """Run this bench, or parts of it: about five minutes."""
    async with server() as dsn:
        return [one for part in parts for one in await PARTS[part](dsn)]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all unless given")
    options = parser.parse_args()
    raise SystemExit(report(asyncio.run(main(options.parts or list(PARTS))), options.json))
