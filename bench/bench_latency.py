"""From receive to commit under load: exchange, daemon, PostgreSQL and this bench on shared cores.

rates   100 to 100,000 trades/s with the default settings, and BATCH_TIMEOUT=5 at 1,000/s. The
        market is as bursty as the venue: groups of up to 735 trades with one time, which are also
        shown by themselves
surge   10,000/s, and three times 100,000/s for a second
events  10,000/s while other work goes on: nothing; connections that are cut; candles of old minutes
        computed anew; a scrape, or a look at /health, ten times a second; four clients that ask for
        klines and trades without a pause; trades that are left out and fetched over REST
many    the same at 5,000/s of 1,400 symbols, with a Redis

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
from bench_memory import until_live
from bench_redis import names, redis_server

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
RENDERED_RATE = 10_000
"""From this rate on trades are rendered ahead."""

EQUAL_LIMIT_S = 90.0
"""For the rest to be stored, holes filled, and compared."""

EVENT_RATE = 10_000
EVENT_S = 8.0
MANY_SYMBOLS, MANY_RATE = 1_400, 5_000
SURGE_RATE, SURGES_S = 100_000, (5.0, 9.0, 13.0)
SURGE_ALONE = "SOLUSDT"
"""What trades outside of the surges, a tenth of all."""

BURST_ROWS = 100
TRACES: Path | None = None
"""Where `--traces` wants them."""

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
    is_wide: bool
    """Many symbols: each has a hole of its own, and REST fills 240 of them a minute."""

    async def until(self, seconds: float) -> None:
        """Wait until so long after the first trade."""
        await asyncio.sleep(self.begin_s + seconds - time.time())

    async def late_ms(self) -> Counter[int]:
        """Return how late the exchange has been: milliseconds -> steps."""
        late = json.loads(await self.venue.get("/sim/state"))["late_ms"]
        return Counter({int(ms): count for ms, count in late.items()})


@asynccontextmanager
async def scene(
    server_dsn: str, rate: int, seconds: float, settings: dict[str, str], *more: str
) -> AsyncIterator[Scene]:
    """Yield a scene that trades for so long; compare every row at its end."""
    count = int(rate * seconds)
    ahead = count if rate >= RENDERED_RATE else 0
    begin_s = time.time() + START_S + ahead * RENDER_S
    pace = ["--rate", str(rate), "--step", str(STEP_S), "--epoch", str(int(begin_s * 1e6))]
    if ahead:
        pace += ["--prerender", str(ahead), "--prerender-micro"]
    listed = settings.get("SUPPORTED_SYMBOLS", LIST)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        watch = StallWatch(folder, TRACES)
        dsn = await stack.enter_async_context(database(server_dsn, "bench_latency"))
        venue, ws = await stack.enter_async_context(
            exchange("--symbols", listed, "--count", str(count), *pace, *more)
        )
        assert time.time() < begin_s - START_S / 2, "the exchange was not ready in time"
        its = environ(dsn, ws, venue.http, "trade,ticker,kline_1m")
        running = await stack.enter_async_context(daemon({**its, **watch.environ, **settings}))
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        here = Scene(venue, running, connection, watch, begin_s, listed != LIST)
        await until_live(running)
        await here.until(WARM_UP_S)
        yield here
        await until_equal(here)


async def until_equal(scene: Scene) -> None:
    """Wait until all that was sent is stored, holes filled; then compare every row."""
    async with asyncio.timeout(EQUAL_LIMIT_S):
        while not (state := json.loads(await scene.venue.get("/sim/state")))["done"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        symbols = state["symbols"].values()
        await until_stored(scene.connection, sum(one["trades"] for one in symbols))
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
    """Cut a connection, every two seconds or once."""
    while True:
        await fault(scene, fault="cut", connections="one")
        await asyncio.sleep(EVENT_S * 2 if scene.is_wide else 2.0)


async def leave_out(scene: Scene) -> None:
    """Leave trades out: holes that are filled over REST, as fast as its weight lets."""
    while True:
        await fault(scene, fault="drop", n=10 if scene.is_wide else 200, connections="one")
        await asyncio.sleep(1.0 if scene.is_wide else 0.2)


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


async def look(scene: Scene) -> None:
    """Look at /health ten times a second."""
    while True:
        assert json.loads(await scene.running.get("/health"))["ready"]
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
    "/health": look,
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
    return await each_event(server_dsn, EVENT_RATE, {})


async def many(server_dsn: str) -> list[Figure]:
    """Measure the same with many symbols."""
    async with redis_server() as redis:
        settings = {"SUPPORTED_SYMBOLS": ",".join(names(MANY_SYMBOLS)), "REDIS_URL": redis.http}
        return await each_event(server_dsn, MANY_RATE, settings, f"{MANY_SYMBOLS:,} symbols, ")


async def each_event(
    server_dsn: str, rate: int, settings: dict[str, str], title: str = ""
) -> list[Figure]:
    """Return the figures of all events."""
    figures = []
    seconds = WARM_UP_S + len(EVENTS) * (EVENT_S + 4.0)
    async with scene(server_dsn, rate, seconds, settings) as here:
        for name, event in EVENTS.items():
            title_of = f"{title}{rate:,}/s, {name}"
            figures += await measure_while(here, title_of, EVENT_S, event)
            await asyncio.sleep(1.0)
    return figures


PARTS = {"rates": rates, "surge": surge, "events": events, "many": many}


async def main(parts: Sequence[str]) -> list[Figure]:
    """Run this bench, or parts of it: about five minutes."""
    async with server() as dsn:
        return [one for part in parts for one in await PARTS[part](dsn)]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all unless given")
    parser.add_argument("--traces", type=Path, help="append tracebacks of the stalls to this file")
    options = parser.parse_args()
    TRACES = options.traces
    raise SystemExit(report(asyncio.run(main(options.parts or list(PARTS))), options.json))
