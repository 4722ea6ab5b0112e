"""Wire everything together, start it in order, watch it, and end it in order.

Start: folder, ring (with the last run's rows), side server, database, feed, and what repairs and
proves. End (SIGTERM, SIGINT): feed first, so that nothing new comes; then the flusher drains the
ring; then the rest. What could not be drained in time stays in the ring and is stored by the next
start.
"""

import asyncio
import ctypes
import gc
import logging
import os
import signal
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tradecore import clock, terminal
from tradecore import log as logs
from tradecore.auditor import Auditor
from tradecore.backfill.engine import Backfill, FillPolicy
from tradecore.backpressure import Backpressure
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.continuity import Continuity
from tradecore.datadir import DataDir
from tradecore.errors import EXIT_OK, TradecoreError, TransientStoreError
from tradecore.feed._listener import FrameListener
from tradecore.feed.feed import Feed
from tradecore.feed.gate import Gate
from tradecore.feed.states import State
from tradecore.flusher import Flusher, FlushPolicy
from tradecore.hole_news import HoleNews
from tradecore.http.access import Policy
from tradecore.http.api import Api
from tradecore.http.counts import HttpCounts
from tradecore.http.server import SideServer
from tradecore.http.streams import Captured, Streams
from tradecore.lifecycle import Lifecycle
from tradecore.notify import Notifier
from tradecore.observer import Observer, Parts
from tradecore.refresher import Refresher
from tradecore.rest import trades
from tradecore.rest.budget import Budget
from tradecore.rest.client import RestClient
from tradecore.ring import Ring
from tradecore.roster import Roster, first_symbols
from tradecore.schema import STREAM_KLINE, STREAM_TRADE
from tradecore.settings import Settings
from tradecore.sharing import Sharing, node_of
from tradecore.store.leases import Leases
from tradecore.store.store import Store
from tradecore.venue_clock import VenueClock
from tradecore.watchdog import Progress, Watchdog

if TYPE_CHECKING:
    from tradecore.redis.publisher import Publisher

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long the start, and a change of the symbols, waits for the database; then it does without."""

_NEW_PATIENCE_S = 20.0

DRAIN_LIMIT_S = 20.0
"""How long a stop waits for the rows in the ring; the rest is stored by the next start."""

_SHOWN_TO_THE_END = ("redis", "terminal line", "watchdog")

_GRACE_S = 0.3
_GRACE_OF_TWO_S = 2.0
"""How long a fresh hole is left alone before the venue is asked."""

_ADDED_GRACE_S = 3.0
"""After which REST is asked for added symbols that have not traded: most have by then."""


class Supervisor:
    """The running daemon; `run` returns its exit code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._notifier = Notifier(os.environ)
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._added = asyncio.Event()

    async def run(self) -> int:
        """Capture until SIGTERM or SIGINT. Raises TradecoreError when it cannot start."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        async with AsyncExitStack() as stack:
            folder = DataDir(self._settings.data_dir)
            stack.callback(folder.close)
            self._make_parts(folder, stack)
            server = SideServer(
                self._settings.http_host,
                self._settings.http_port,
                self._observer.snapshot,
                self._streams,
                Api(
                    self._store.reading_dsn,
                    self._all_symbols,
                    self._observer.snapshot,
                ),
                Policy.of(self._settings),
                self._http_counts,
            )
            await server.start()
            stack.push_async_callback(server.stop)
            self._opening = asyncio.create_task(self._open_store(), name="database")
            if await self._is_soon_open():
                self._opening.result()
            await self._capture_until_stopped(server)
        log.info("stopped", extra={"rows_left": self._ring.pending})
        return EXIT_OK

    def _make_parts(self, folder: DataDir, stack: AsyncExitStack) -> None:
        settings = self._settings
        self._ring = Ring(folder.ring_path, settings.ring_capacity)
        stack.callback(self._ring.sync)
        self._recovered_seq = self._ring.published_seq
        for symbol in settings.symbols:
            self._ring.intern(symbol)
        conflator = Conflator(len(self._ring.symbols))
        self._capture = Capture(self._ring, self._ring.symbols, conflator)
        self._store = Store(settings, self._ring.symbols)
        stack.push_async_callback(self._store.close)
        client = RestClient(settings.rest_url, Budget.of(settings.data_dir, settings.rest_url))
        stack.push_async_callback(client.close)
        self._feed = Feed(
            replace(settings, symbols=first_symbols(settings)),
            self._make_listener,
            symbol_id=self._ring.intern,
            confirm=self._confirm,
            gate=Gate(settings.data_dir),
        )
        self._pressure = Backpressure(
            self._ring, self._capture, self._feed, lambda: len(self._feed.connections)
        )
        self._roster = Roster(
            settings, self._ring, self._capture, self._feed, self._on_added, self._on_changed
        )
        self._http_counts = HttpCounts()
        self._streams = Streams(
            self._capture,
            lambda: Captured(self._roster.symbols, self._roster.streams),
            settings.cors_origins,
        )
        self._news = HoleNews(self._store, self._streams.holes_wanted, self._streams.tell_hole)
        self._backfill = Backfill(
            self._store,
            client,
            FillPolicy(
                max_age_s=settings.backfill_max_age_s,
                dump_url=settings.dump_url,
                folder=settings.data_dir,
            ),
            grace=self._grace_s,
            paused=self._is_busy,
            on_progress=self._news.changed,
        )
        self._continuity = Continuity(
            self._capture,
            lambda: self._roster.symbols,
            lambda symbols: trades.last_ids(client, symbols),
            self._backfill.reach,
            self._feed.replace,
            is_live=lambda: self._feed.live > 0 and not self._capture.above_high_water,
            breaks=self._feed.breaks,
        )
        self._flusher = Flusher(
            self._ring,
            self._capture,
            conflator,
            self._store,
            FlushPolicy(settings.batch_size, settings.batch_timeout_ms / 1e3),
            after_release=self._pressure.after_release,
            on_opened=self._on_opened,
        )
        self._auditor = Auditor(
            self._store,
            self._audited,
            lambda symbol, trade_id: (self._capture.track(symbol).last_id or -1) >= trade_id,
            self._backfill.reach,
            lambda symbol, from_us, to_us: trades.klines(client, symbol, from_us, to_us),
            self._backfill.look_soon,
        )
        self._refresher = Refresher(self._store)
        self._lifecycle = Lifecycle(self._store, settings)
        self._venue_clock = VenueClock(lambda: trades.venue_time_us(client, wait_s=2.0, tries=1))
        self._sharing: Sharing | None = None
        if settings.shards:
            leases = Leases(lambda: self._store.pool, node_of(settings), settings.shards)
            self._sharing = Sharing(
                leases, settings.shards, self._roster.share, self._reaches_venue
            )
        self._redis: Publisher | None = None
        if settings.redis_url is not None:
            from tradecore.redis.publisher import publisher_of

            self._redis = publisher_of(
                settings,
                self._capture,
                lambda: self._roster.symbols,
                lambda: self._observer.snapshot(),
            )
        self._observer = Observer(
            settings,
            Parts(
                self._ring,
                self._capture,
                self._feed,
                self._store,
                self._flusher.stats,
                client,
                self._backfill.stats,
                self._auditor.stats,
                self._continuity,
                self._roster,
                self._sharing,
                self._refresher.stats,
                self._streams,
                self._lifecycle.stats,
                self._http_counts,
                self._venue_clock.stats,
                self._redis,
            ),
        )

    async def _open_store(self) -> None:
        """Open the database; raises TradecoreError when trying again cannot help."""
        try:
            await self._store.open()
            self._continuity.seed(await self._store.bounds())
        except TransientStoreError as error:
            log.warning(
                "database is down; capture runs all the same and rows wait in the ring",
                extra={"error": str(error), "capacity_rows": self._ring.capacity},
            )
            self._flusher.stats.failed(error)
        else:
            self._flusher.stats.succeeded()
        _settle_memory()

    async def _is_soon_open(self) -> bool:
        """Wait a moment for the database: it may hang, recover, or be migrated by another."""
        # Nobody misses anything while a new one is made, and "capturing" tells where to look.
        limit_s = _NEW_PATIENCE_S if self._store.is_new else PATIENCE_S
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait(
            {self._opening, stop}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
        )
        await _cancel(stop)
        if not self._opening.done():
            if not self._stop.is_set():
                log.info("database is not open yet; capture starts and rows wait in the ring")
            self._flusher.stats.away_since_ns = clock.mono_ns()
        return self._opening.done()

    async def _capture_until_stopped(self, server: SideServer) -> None:
        flush = asyncio.create_task(self._flusher.run(), name="flusher")
        feed = asyncio.create_task(self._feed.run(), name="feed")
        helpers: dict[str, Coroutine[Any, Any, object]] = {
            "stop": self._stop.wait(),
            "reload": self._follow_reloads(),
            "additions": self._follow_additions(),
            "watch": self._observer.watch(),
            "continuity": self._watch_continuity(),
            "backfill": self._backfill.run(),
            "auditor": self._auditor.run(),
            "news": self._news.run(),
            "candles": self._refresher.run(),
            "lifecycle": self._lifecycle.run(),
            "clock": self._venue_clock.run(),
        }
        if self._sharing is not None:
            helpers["sharing"] = self._sharing.run()
        if self._redis is not None:
            helpers["redis"] = self._redis.run()
        if logs.on_terminal():
            helpers["terminal line"] = terminal.show(self._observer.snapshot)
        if self._notifier.listens:
            progress = Progress(
                self._flusher.stats,
                self._feed,
                lambda: self._store.is_opening,
                self._settings.max_reconnect_delay_ms / 1e3,
            )
            watchdog = Watchdog(self._notifier, self._observer.snapshot, progress.stuck)
            helpers["watchdog"] = watchdog.run()
        others = {asyncio.create_task(work, name=name) for name, work in helpers.items()}
        log.info(
            "capturing",
            extra={
                "symbols": len(self._roster.symbols),
                "streams": list(self._settings.streams),
                "connections": len(self._feed.connections),
                "http": f"http://{self._settings.http_host}:{server.port}",
            },
        )
        try:
            # All but `stop` end only by a bug, which their result() raises.
            done, _ = await asyncio.wait(
                {flush, feed, *others}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            self._notifier.send("STOPPING=1")
            await _cancel(*(one for one in others if one.get_name() not in _SHOWN_TO_THE_END))
            if self._sharing is not None:
                await self._hand_over(self._sharing)
            await self._drain(flush, feed)
            if self._redis is not None:
                await self._redis.close()
        finally:
            await _cancel(flush, feed, *others, self._opening)

    async def _hand_over(self, sharing: Sharing) -> None:
        """Let others take our shards while we still capture them; a second signal ends that."""
        self._stop.clear()
        over = asyncio.create_task(sharing.close())
        again = asyncio.create_task(self._stop.wait())
        await asyncio.wait({over, again}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(over, again)

    async def _drain(self, flush: "asyncio.Task[None]", feed: "asyncio.Task[None]") -> None:
        log.info("stopping: feed first, then the ring is drained")
        self._streams.announce_shutdown()
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

    # -- what the parts ask of each other ------------------------------------------------------

    def _on_opened(self, holes: Sequence[tuple[str, int, int]]) -> None:
        self._backfill.wake(holes)
        self._news.opened(holes)

    async def _watch_continuity(self) -> None:
        """Hold the ledger against the venue as soon as it can be read, then go on watching."""
        await asyncio.shield(self._opening)  # a stop first lets the rows of the ring be stored
        while True:
            try:
                await self._store.open()
                self._continuity.seed(await self._store.bounds())
                break
            except TradecoreError:
                await asyncio.sleep(1.0)  # the flusher meets it too, and reports it
        async with asyncio.TaskGroup() as group:
            # Of its own: it may wait long for REST, which what tickers tell does not need.
            group.create_task(self._look_back(), name="look back")
            await self._continuity.run()

    async def _look_back(self) -> None:
        """Ask the venue what has moved, once the rows of the last run are stored."""
        while self._ring.durable_seq < self._recovered_seq:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.1)
        await self._take_marks()  # or else do without the symbols that were only in the ring
        if self._settings.backfill_max_age_s:
            await self._continuity.look_back()

    async def _follow_reloads(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            await self._roster.reload(os.environ)

    async def _on_added(self, symbols: Sequence[str]) -> None:
        """Take the marks of symbols that are captured from now on."""
        taking = asyncio.create_task(self._take_marks())
        # Without them, their first trades show the holes all the same.
        await asyncio.wait({taking}, timeout=PATIENCE_S)

    async def _take_marks(self) -> None:
        with suppress(TransientStoreError):
            self._continuity.seed(await self._store.bounds())

    def _on_changed(self, added: Sequence[str]) -> None:
        self._pressure.watch()
        if added:
            self._added.set()

    async def _follow_additions(self) -> None:
        """Ask what symbols did before we captured them: they may not trade again for long."""
        while True:
            await self._added.wait()
            await asyncio.sleep(_ADDED_GRACE_S)
            self._added.clear()
            await self._look_back()

    def _all_symbols(self) -> Sequence[str]:
        """Return the symbols that are captured, by us or by those who share them with us."""
        return self._settings.symbols if self._settings.shards else self._roster.symbols

    def _audited(self) -> Sequence[str]:
        """Return the symbols whose klines can be held against their trades."""
        both = {STREAM_KLINE, STREAM_TRADE} <= set(self._roster.streams)
        return self._continuity.known() if both else ()

    async def _confirm(self, symbols: Sequence[str]) -> set[str]:
        return await self._continuity.confirm(symbols)

    def _grace_s(self, symbol: str) -> float:
        """A hole may close by itself while two connections, or daemons, bring the same trades."""
        several = (
            self._settings.feed_lines > 1 or self._settings.shards > 0 or self._feed.rolling(symbol)
        )
        return _GRACE_OF_TWO_S if several else _GRACE_S

    def _reaches_venue(self) -> bool:
        """Tell whether any connection is open, or none is wanted."""
        states = {connection.state for connection in self._feed.connections}
        return not states or not states.isdisjoint((State.SUBSCRIBING, State.LIVE))

    def _is_busy(self) -> bool:
        """The rows of the ring come first."""
        return self._capture.above_high_water or bool(self._flusher.stats.away_since_ns)

    def _make_listener(self, owner: object, line: int, epoch: int) -> FrameListener:
        return FrameListener(self._capture, owner, line, epoch)


def _settle_memory() -> None:
    """Give back what only the start needed."""
    gc.collect()
    # What was made until now lives as long as the process: the collector need not visit it.
    gc.freeze()
    with suppress(AttributeError):  # of the GNU C library only; worth about 1 MiB
        ctypes.CDLL(None).malloc_trim(0)


async def _cancel(*tasks: "asyncio.Task[object]") -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task


async def run(settings: Settings) -> int:
    """Run the daemon; return its exit code. Raises TradecoreError when it cannot start."""
    return await Supervisor(settings).run()
