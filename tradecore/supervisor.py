"""Start the parts in order, watch them, and end them in order.

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
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

from tradecore import clock, terminal
from tradecore import log as logs
from tradecore.datadir import DataDir
from tradecore.errors import EXIT_OK, TransientStoreError
from tradecore.http.access import Policy
from tradecore.http.api import Api
from tradecore.http.server import SideServer
from tradecore.notify import Notifier
from tradecore.settings import Settings
from tradecore.sharing import Sharing
from tradecore.watchdog import Progress, Watchdog
from tradecore.wiring import PATIENCE_S, Wiring

log = logging.getLogger(__name__)

_NEW_PATIENCE_S = 20.0

DRAIN_LIMIT_S = 20.0
"""How long a stop waits for the rows in the ring; the rest is stored by the next start."""

_SHOWN_TO_THE_END = ("redis", "terminal line", "watchdog")


class Supervisor:
    """The running daemon; `run` returns its exit code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._notifier = Notifier(os.environ)
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()

    async def run(self) -> int:
        """Capture until SIGTERM or SIGINT. Raises TradecoreError when it cannot start."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        async with AsyncExitStack() as stack:
            folder = DataDir(self._settings.data_dir)
            stack.callback(folder.close)
            self._parts = parts = Wiring(self._settings, folder, stack)
            if parts.store.is_new and parts.ring.was_used:
                log.warning(
                    "a new database is made in DATA_DIR, although trades were captured here before;"
                    " if they are in another one, stop and set DATABASE_URL again (systemd: the"
                    " file credentials/database_url)"
                )
            server = SideServer(
                self._settings.http_host,
                self._settings.http_port,
                parts.observer.snapshot,
                parts.streams,
                Api(parts.store.reading_dsn, parts.all_symbols, parts.observer.snapshot),
                Policy.of(self._settings),
                parts.http_counts,
            )
            await server.start()
            stack.push_async_callback(server.stop)
            self._opening = asyncio.create_task(self._open_store(), name="database")
            if await self._is_soon_open():
                self._opening.result()
            await self._capture_until_stopped(server)
        log.info("stopped", extra={"rows_left": self._parts.ring.pending})
        return EXIT_OK

    async def _open_store(self) -> None:
        """Open the database; raises TradecoreError when trying again cannot help."""
        parts = self._parts
        try:
            await parts.store.open()
            parts.continuity.seed(await parts.store.bounds())
        except TransientStoreError as error:
            log.warning(
                "database is down; capture runs all the same and rows wait in the ring",
                extra={"error": str(error), "capacity_rows": parts.ring.capacity},
            )
            parts.flusher.stats.failed(error)
        else:
            parts.flusher.stats.succeeded()
        _settle_memory()

    async def _is_soon_open(self) -> bool:
        """Wait a moment for the database: it may hang, recover, or be migrated by another."""
        # Nobody misses anything while a new one is made, and "capturing" tells where to look.
        limit_s = _NEW_PATIENCE_S if self._parts.store.is_new else PATIENCE_S
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait(
            {self._opening, stop}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
        )
        await _cancel(stop)
        if not self._opening.done():
            if not self._stop.is_set():
                log.info("database is not open yet; capture starts and rows wait in the ring")
            self._parts.flusher.stats.away_since_ns = clock.mono_ns()
        return self._opening.done()

    async def _capture_until_stopped(self, server: SideServer) -> None:
        parts = self._parts
        flush = asyncio.create_task(parts.flusher.run(), name="flusher")
        feed = asyncio.create_task(parts.feed.run(), name="feed")
        helpers: dict[str, Coroutine[Any, Any, object]] = {
            "stop": self._stop.wait(),
            "reload": self._follow_reloads(),
            "additions": parts.follow_additions(),
            "watch": parts.observer.watch(),
            "continuity": parts.watch_continuity(self._opening),
            "backfill": parts.backfill.run(),
            "auditor": parts.auditor.run(),
            "news": parts.news.run(),
            "candles": parts.refresher.run(),
            "lifecycle": parts.lifecycle.run(),
            "clock": parts.venue_clock.run(),
        }
        if parts.sharing is not None:
            helpers["sharing"] = parts.sharing.run()
        if parts.redis is not None:
            helpers["redis"] = parts.redis.run()
        if logs.on_terminal():
            helpers["terminal line"] = terminal.show(parts.observer.snapshot)
        if self._notifier.listens:
            progress = Progress(
                parts.flusher.stats,
                parts.feed,
                lambda: parts.store.is_opening,
                self._settings.max_reconnect_delay_ms / 1e3,
            )
            watchdog = Watchdog(self._notifier, parts.observer.snapshot, progress.stuck)
            helpers["watchdog"] = watchdog.run()
        others = {asyncio.create_task(work, name=name) for name, work in helpers.items()}
        log.info(
            "capturing",
            extra={
                "symbols": len(parts.roster.symbols),
                "streams": list(self._settings.streams),
                "connections": len(parts.feed.connections),
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
            if parts.sharing is not None:
                await self._hand_over(parts.sharing)
            await self._drain(flush, feed)
            if parts.redis is not None:
                await parts.redis.close()
        finally:
            await _cancel(flush, feed, *others, self._opening)

    async def _follow_reloads(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            await self._parts.roster.reload(os.environ)

    async def _hand_over(self, sharing: Sharing) -> None:
        """Let others take our shards while we still capture them; a second signal ends that."""
        self._stop.clear()
        over = asyncio.create_task(sharing.close())
        again = asyncio.create_task(self._stop.wait())
        await asyncio.wait({over, again}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(over, again)

    async def _drain(self, flush: "asyncio.Task[None]", feed: "asyncio.Task[None]") -> None:
        parts = self._parts
        log.info("stopping: feed first, then the ring is drained")
        parts.streams.announce_shutdown()
        self._stop.clear()
        await parts.feed.close()
        await asyncio.wait({feed}, timeout=1.0)
        parts.flusher.drain()
        again = asyncio.create_task(self._stop.wait())
        await asyncio.wait(
            {flush, again}, timeout=DRAIN_LIMIT_S, return_when=asyncio.FIRST_COMPLETED
        )
        await _cancel(again)
        if not flush.done():
            log.warning(
                "not everything could be stored; the rest stays in the ring for the next start",
                extra={"rows": parts.ring.pending, "error": parts.flusher.stats.last_error},
            )


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
