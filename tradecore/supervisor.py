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
from contextlib import AsyncExitStack, suppress

from tradecore import log as logs
from tradecore import terminal
from tradecore.backpressure import Backpressure
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.datadir import DataDir
from tradecore.errors import EXIT_OK, TransientStoreError
from tradecore.feed._listener import FrameListener
from tradecore.feed.feed import Feed
from tradecore.flusher import Flusher, FlushPolicy
from tradecore.http.server import SideServer
from tradecore.observer import Observer
from tradecore.ring import Ring
from tradecore.settings import Settings
from tradecore.store.store import Store

log = logging.getLogger(__name__)

DRAIN_LIMIT_S = 20.0
"""How long a stop waits for the rows in the ring; the rest is stored by the next start."""


class Supervisor:
    """The running daemon; `run` returns its exit code."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()

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
            pressure = Backpressure(
                self._ring, self._capture, self._feed, lambda: len(self._feed.connections)
            )
            self._flusher = Flusher(
                self._ring,
                self._capture,
                self._conflator,
                self._store,
                FlushPolicy(self._settings.batch_size, self._settings.batch_timeout_ms / 1e3),
                after_release=pressure.after_release,
            )
            self._observer = Observer(
                self._settings,
                self._ring,
                self._capture,
                self._feed,
                self._store,
                self._flusher.stats,
            )
            server = SideServer(
                self._settings.http_host, self._settings.http_port, self._observer.snapshot
            )
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
        watch = asyncio.create_task(self._observer.watch(), name="watch")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        tasks: set[asyncio.Task[object]] = {flush, feed, watch, stop}
        if logs.on_terminal():
            tasks.add(
                asyncio.create_task(terminal.show(self._observer.snapshot), name="terminal line")
            )
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
