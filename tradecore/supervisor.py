"""Wire everything together, start it in order, watch it, and end it in order.

Start: folder, ring (with the last run's rows), database, feed, side server. End (SIGTERM, SIGINT):
feed first, so that nothing new comes; then the flusher drains the ring; then the rest. What could
not be drained in time stays in the ring and is stored by the next start.
"""

import asyncio
import ctypes
import gc
import logging
import signal
from collections import deque
from contextlib import AsyncExitStack, suppress

from tradecore import __version__, clock, terminal
from tradecore import log as logs
from tradecore.capture import LATENCY_BOUNDS_US, Capture
from tradecore.conflator import Conflator
from tradecore.datadir import DataDir
from tradecore.errors import EXIT_OK, TransientStoreError
from tradecore.feed._listener import FrameListener
from tradecore.feed.feed import Feed
from tradecore.flusher import (
    DURATION_BOUNDS_S,
    LATENCY_BOUNDS_S,
    ROWS_BOUNDS,
    Flusher,
    FlushPolicy,
)
from tradecore.http.server import SideServer
from tradecore.ring import Ring
from tradecore.settings import Settings
from tradecore.snapshot import (
    ConnectionState,
    Counters,
    DatabaseState,
    Histogram,
    PoolUse,
    RingUse,
    Snapshot,
    SymbolState,
)
from tradecore.store.store import Store

log = logging.getLogger(__name__)

DRAIN_LIMIT_S = 20.0
"""How long a stop waits for the rows in the ring; the rest is stored by the next start."""

PAUSE_LIMIT_S = 10.0
"""How long full sockets stay paused: longer and the venue cuts us for unanswered pings."""

ROWS_PER_SOCKET = 16384
"""Frames that a paused socket can still deliver: what a receive buffer of 2 MiB holds."""

RATE_WINDOW_S = 5
WATCH_INTERVAL_S = 1.0
HOLES_INTERVAL_S = 5.0


class Supervisor:
    """The running daemon; `run` returns its exit code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._started_ns = clock.mono_ns()
        self._started_s = clock.wall_ns() / 1e9
        self._rates: deque[tuple[int, int, int]] = deque(maxlen=RATE_WINDOW_S + 1)
        self._holes = 0
        self._resume_timer: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Capture until SIGTERM or SIGINT. Raises TradecoreError when it cannot start."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        async with AsyncExitStack() as stack:
            folder = DataDir(self._settings.data_dir)
            stack.callback(folder.close)
            self._ring = Ring(folder.ring_path, self._settings.ring_capacity)
            stack.callback(self._ring.sync)
            for symbol in self._settings.symbols:
                self._ring.intern(symbol)
            self._conflator = Conflator(len(self._ring.symbols))
            self._capture = Capture(self._ring, self._ring.symbols, self._conflator)
            self._store = Store(self._settings, self._ring.symbols)
            stack.push_async_callback(self._store.close)
            self._feed = Feed(self._settings, self._make_listener)
            self._flusher = Flusher(
                self._ring,
                self._capture,
                self._conflator,
                self._store,
                FlushPolicy(self._settings.batch_size, self._settings.batch_timeout_ms / 1e3),
                after_release=self._after_release,
            )
            self._watch_ring()
            server = SideServer(self._settings.http_host, self._settings.http_port, self.snapshot)
            await server.start()
            stack.push_async_callback(server.stop)
            await self._open_store()
            await self._capture_until_stopped(server)
        log.info("stopped", extra={"rows_left": self._ring.pending})
        return EXIT_OK

    async def _open_store(self) -> None:
        """Open the database; one that is down is waited for while capture already runs."""
        try:
            await self._store.open()
        except TransientStoreError as error:
            log.warning(
                "database is down; capture starts all the same and rows wait in the ring",
                extra={"error": str(error), "capacity_rows": self._ring.capacity},
            )
            self._flusher.stats.failed(error)
        else:
            self._flusher.stats.succeeded()

    async def _capture_until_stopped(self, server: SideServer) -> None:
        _settle_memory()
        flush = asyncio.create_task(self._flusher.run(), name="flusher")
        feed = asyncio.create_task(self._feed.run(), name="feed")
        watch = asyncio.create_task(self._watch(), name="watch")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        tasks: set[asyncio.Task[object]] = {flush, feed, watch, stop}
        if logs.on_terminal():
            tasks.add(asyncio.create_task(terminal.show(self.snapshot), name="terminal line"))
        log.info(
            "capturing",
            extra={
                "symbols": len(self._settings.symbols),
                "streams": list(self._settings.streams),
                "connections": len(self._feed.connections),
                "http": f"http://{self._settings.http_host}:{server.port}",
            },
        )
        try:
            # All but `stop` end only by a bug, which their result() raises.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self._drain(flush, feed)
        finally:
            await _cancel(*tasks)

    async def _drain(self, flush: "asyncio.Task[None]", feed: "asyncio.Task[None]") -> None:
        log.info("stopping: feed first, then the ring is drained")
        self._stop.clear()
        await self._feed.close()
        await asyncio.wait({feed}, timeout=1.0)
        self._flusher.drain()
        again = asyncio.create_task(self._stop.wait())
        await asyncio.wait(
            {flush, again}, timeout=DRAIN_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
        )
        await _cancel(again)
        if not flush.done():
            log.warning(
                "not everything could be stored; the rest stays in the ring for the next start",
                extra={"rows": self._ring.pending, "error": self._flusher.stats.last_error},
            )

    def _make_listener(self, owner: object, line: int, epoch: int) -> FrameListener:
        return FrameListener(self._capture, owner, line, epoch)

    # -- back-pressure -------------------------------------------------------------------------

    def _watch_ring(self) -> None:
        headroom = min(
            self._ring.capacity // 2, ROWS_PER_SOCKET * max(1, len(self._feed.connections))
        )
        high = self._ring.capacity - headroom
        self._low_water = high // 2
        self._capture.watch_high_water(high, self._pause)

    def _pause(self) -> None:
        log.warning(
            "ring is past its high-water mark; sockets are paused",
            extra={"pending": self._ring.pending, "capacity": self._ring.capacity},
        )
        self._feed.pause_reading()
        self._resume_timer = asyncio.get_running_loop().call_later(PAUSE_LIMIT_S, self._overflow)

    def _overflow(self) -> None:
        log.error(
            "the database is away for longer than the ring can hold; new trades are refused as a "
            "known hole until it drains",
            extra={"pending": self._ring.pending, "capacity": self._ring.capacity},
        )
        self._feed.resume_reading()

    def _after_release(self) -> None:
        if self._capture.above_high_water and self._ring.pending <= self._low_water:
            self._capture.below_high_water()
            if self._resume_timer is not None:
                self._resume_timer.cancel()
            self._feed.resume_reading()
            log.info(
                "ring is below its low-water mark again", extra={"pending": self._ring.pending}
            )

    # -- what others read ----------------------------------------------------------------------

    async def _watch(self) -> None:
        """Keep the rates and the number of holes fresh."""
        holes_due_ns = 0
        while True:
            now_ns = clock.mono_ns()
            counters = self._capture.counters()
            self._rates.append((now_ns, counters["trades"], self._flusher.stats.trades_stored))
            if now_ns >= holes_due_ns:
                holes_due_ns = now_ns + int(HOLES_INTERVAL_S * 1e9)
                holes = await self._store.count_holes()
                self._holes = self._holes if holes is None else holes
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _rate(self, which: int) -> float:
        if len(self._rates) < 2:
            return 0.0
        first, last = self._rates[0], self._rates[-1]
        return (last[which] - first[which]) * 1e9 / max(1, last[0] - first[0])

    def snapshot(self) -> Snapshot:
        """Read the whole daemon at this moment; plain integers, a few microseconds a symbol."""
        now_ns, wall_ns = clock.mono_ns(), clock.wall_ns()
        counted = self._capture.counters()
        stats = self._flusher.stats
        exchange_counts, exchange_sum_us = self._capture.latency()
        connections = self._feed.describe()
        server = self._store.server
        idle, used = self._store.pool_use()
        oldest_ns = self._ring.oldest_recv_ns
        reconnects = {"A": 0}
        for connection in connections:
            reconnects["AB"[connection.line]] = reconnects.get("AB"[connection.line], 0) + sum(
                connection.reconnects.values()
            )
        return Snapshot(
            version=__version__,
            started_s=self._started_s,
            uptime_s=(now_ns - self._started_ns) / 1e9,
            connections=tuple(
                ConnectionState(
                    name=c.name,
                    line="AB"[c.line],
                    state=str(c.state),
                    streams=c.streams,
                    data_age_s=c.last_data_age_s,
                )
                for c in connections
            ),
            streams_wanted=sum(c.streams for c in connections),
            symbols=tuple(
                SymbolState(symbol, received, last_id, _age_s(wall_ns, trade_us * 1000))
                for symbol, (received, last_id, trade_us) in self._capture.received().items()
            ),
            ring=RingUse(
                rows=self._ring.pending,
                capacity=self._ring.capacity,
                above_high_water=self._capture.above_high_water,
                oldest_age_s=max(0.0, _age_s(wall_ns, oldest_ns) or 0.0),
            ),
            database=DatabaseState(
                embedded=self._store.embedded,
                reachable=not stats.away_since_ns and server is not None,
                away_s=(now_ns - stats.away_since_ns) / 1e9 if stats.away_since_ns else None,
                server_version=server.version if server else None,
                level=server.edition if server else None,
                schema_version=self._store.schema_version,
                last_error=stats.last_error,
            ),
            pool=PoolUse(idle=idle, used=used, limit=self._settings.db_pool_size),
            counters=Counters(
                frames_received=counted["frames"],
                frames_refused=self._capture.refused(),
                trades_refused={"ring_full": counted["ring_full"]},
                trades_duplicate=counted["duplicate"] + stats.trades_duplicate,
                trades_out_of_order=counted["out_of_order"],
                gaps_detected=counted["gaps"],
                trades_missing=counted["missing"],
                tickers_received=counted["tickers"],
                klines_received=counted["klines"],
                trades_stored=stats.trades_stored,
                trades_parked=stats.trades_parked,
                tickers_stored=stats.tickers_stored,
                klines_stored=stats.klines_stored,
                flush_retries=dict(stats.retries),
                reconnects=reconnects,
            ),
            holes=self._holes,
            received_per_s=self._rate(1),
            stored_per_s=self._rate(2),
            flush_duration=Histogram(
                DURATION_BOUNDS_S, tuple(stats.duration_counts), stats.duration_sum_s
            ),
            flush_rows=Histogram(
                tuple(map(float, ROWS_BOUNDS)), tuple(stats.rows_counts), stats.rows_sum
            ),
            exchange_receive_latency=Histogram(
                tuple(bound / 1e6 for bound in LATENCY_BOUNDS_US),
                tuple(exchange_counts),
                exchange_sum_us / 1e6,
            ),
            receive_commit_latency=Histogram(
                LATENCY_BOUNDS_S, tuple(stats.latency_counts.tolist()), stats.latency_sum_ns / 1e9
            ),
        )


def _settle_memory() -> None:
    """Give back what only the start needed."""
    gc.collect()
    # What was made until now lives as long as the process: the collector need not visit it.
    gc.freeze()
    with suppress(AttributeError):  # of the GNU C library only; worth about 1 MiB
        ctypes.CDLL(None).malloc_trim(0)


def _age_s(now_ns: int, then_ns: int) -> float | None:
    return (now_ns - then_ns) / 1e9 if then_ns else None


async def _cancel(*tasks: "asyncio.Task[object]") -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task


async def run(settings: Settings) -> int:
    """Run the daemon; return its exit code. Raises TradecoreError when it cannot start."""
    return await Supervisor(settings).run()
