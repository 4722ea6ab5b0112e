"""Makes the parts of the daemon from the settings, and knows what they ask of each other."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from tradecore.auditor import Auditor
from tradecore.backfill.engine import Backfill, FillPolicy
from tradecore.backpressure import Backpressure
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.continuity import Continuity
from tradecore.datadir import DataDir
from tradecore.errors import TradecoreError, TransientStoreError
from tradecore.feed._listener import FrameListener
from tradecore.feed.feed import Feed
from tradecore.feed.gate import Gate
from tradecore.feed.states import State
from tradecore.flusher import Flusher, FlushPolicy
from tradecore.hole_news import HoleNews
from tradecore.http.counts import HttpCounts
from tradecore.http.streams import Captured, Streams
from tradecore.lifecycle import Lifecycle
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

if TYPE_CHECKING:
    from tradecore.redis.publisher import Publisher

PATIENCE_S = 1.0
"""How long the start, and a change of the symbols, waits for the database; then it does without."""

_GRACE_S = 0.3
_GRACE_OF_TWO_S = 2.0
"""How long a fresh hole is left alone before the venue is asked."""

_ADDED_GRACE_S = 3.0
"""After which REST is asked for added symbols that have not traded: most have by then."""


class Wiring:
    """The parts, connected with each other; none of them runs yet."""

    def __init__(self, settings: Settings, folder: DataDir, stack: AsyncExitStack) -> None:
        """`stack` closes what has to be closed in the end."""
        self._settings = settings
        self._added = asyncio.Event()
        self.ring = Ring(folder.ring_path, settings.ring_capacity)
        stack.callback(self.ring.sync)
        self._recovered_seq = self.ring.published_seq
        for symbol in settings.symbols:
            self.ring.intern(symbol)
        conflator = Conflator(len(self.ring.symbols))
        self._capture = Capture(self.ring, self.ring.symbols, conflator)
        self.store = Store(settings, self.ring.symbols)
        stack.push_async_callback(self.store.close)
        client = RestClient(settings.rest_url, Budget.of(settings.data_dir, settings.rest_url))
        stack.push_async_callback(client.close)
        self.feed = Feed(
            replace(settings, symbols=first_symbols(settings)),
            self._make_listener,
            symbol_id=self.ring.intern,
            confirm=self._confirm,
            gate=Gate(settings.data_dir),
        )
        self._pressure = Backpressure(
            self.ring, self._capture, self.feed, lambda: len(self.feed.connections)
        )
        self.roster = Roster(
            settings, self.ring, self._capture, self.feed, self._on_added, self._on_changed
        )
        self.http_counts = HttpCounts()
        self.streams = Streams(
            self._capture,
            lambda: Captured(self.roster.symbols, self.roster.streams),
            settings.cors_origins,
        )
        self.news = HoleNews(self.store, self.streams.holes_wanted, self.streams.tell_hole)
        self.backfill = Backfill(
            self.store,
            client,
            FillPolicy(
                max_age_s=settings.backfill_max_age_s,
                dump_url=settings.dump_url,
                folder=settings.data_dir,
            ),
            grace=self._grace_s,
            paused=self._is_busy,
            on_progress=self.news.changed,
        )
        self.continuity = Continuity(
            self._capture,
            lambda: self.roster.symbols,
            lambda symbols: trades.last_ids(client, symbols),
            self.backfill.reach,
            self.feed.replace,
            is_live=lambda: self.feed.live > 0 and not self._capture.above_high_water,
            breaks=self.feed.breaks,
        )
        self.flusher = Flusher(
            self.ring,
            self._capture,
            conflator,
            self.store,
            FlushPolicy.fitting(
                settings.batch_size, settings.batch_timeout_ms / 1e3, self.ring.capacity
            ),
            after_release=self._pressure.after_release,
            on_opened=self._on_opened,
        )
        self.auditor = Auditor(
            self.store,
            self._audited,
            lambda symbol, trade_id: (self._capture.track(symbol).last_id or -1) >= trade_id,
            self.backfill.reach,
            lambda symbol, from_us, to_us: trades.klines(client, symbol, from_us, to_us),
            self.backfill.look_soon,
        )
        self.refresher = Refresher(self.store)
        self.lifecycle = Lifecycle(self.store, settings)
        self.venue_clock = VenueClock(lambda: trades.venue_time_us(client, wait_s=2.0, tries=1))
        self.sharing: Sharing | None = None
        if settings.shards:
            leases = Leases(lambda: self.store.pool, node_of(settings), settings.shards)
            self.sharing = Sharing(leases, settings.shards, self.roster.share, self._reaches_venue)
        self.redis: Publisher | None = None
        if settings.redis_url is not None:
            from tradecore.redis.publisher import publisher_of

            self.redis = publisher_of(
                settings,
                self._capture,
                lambda: self.roster.symbols,
                lambda: self.observer.snapshot(),
            )
        self.observer = Observer(
            settings,
            Parts(
                self.ring,
                self._capture,
                self.feed,
                self.store,
                self.flusher.stats,
                client,
                self.backfill.stats,
                self.auditor.stats,
                self.continuity,
                self.roster,
                self.sharing,
                self.refresher.stats,
                self.streams,
                self.lifecycle.stats,
                self.http_counts,
                self.venue_clock.stats,
                self.redis,
            ),
        )

    # -- what the parts ask of each other ------------------------------------------------------

    def _on_opened(self, holes: Sequence[tuple[str, int, int]]) -> None:
        self.backfill.wake(holes)
        self.news.opened(holes)

    async def watch_continuity(self, opening: "asyncio.Task[None]") -> None:
        """Hold the ledger against the venue as soon as it can be read, then go on watching."""
        await asyncio.shield(opening)  # a stop first lets the rows of the ring be stored
        while True:
            try:
                await self.store.open()
                self.continuity.seed(await self.store.bounds())
                break
            except TradecoreError:
                await asyncio.sleep(1.0)  # the flusher meets it too, and reports it
        async with asyncio.TaskGroup() as group:
            # Of its own: it may wait long for REST, which what tickers tell does not need.
            group.create_task(self._look_back(), name="look back")
            await self.continuity.run()

    async def _look_back(self) -> None:
        """Ask the venue what has moved, once the rows of the last run are stored."""
        while self.ring.durable_seq < self._recovered_seq:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.1)
        await self._take_marks()  # or else do without the symbols that were only in the ring
        if self._settings.backfill_max_age_s:
            await self.continuity.look_back()

    async def _on_added(self, symbols: Sequence[str]) -> None:
        """Take the marks of symbols that are captured from now on."""
        taking = asyncio.create_task(self._take_marks())
        # Without them, their first trades show the holes all the same.
        await asyncio.wait({taking}, timeout=PATIENCE_S)

    async def _take_marks(self) -> None:
        with suppress(TransientStoreError):
            self.continuity.seed(await self.store.bounds())

    def _on_changed(self, added: Sequence[str]) -> None:
        self._pressure.watch()
        if added:
            self._added.set()

    async def follow_additions(self) -> None:
        """Ask what symbols did before we captured them: they may not trade again for long."""
        while True:
            await self._added.wait()
            await asyncio.sleep(_ADDED_GRACE_S)
            self._added.clear()
            await self._look_back()

    def all_symbols(self) -> Sequence[str]:
        """Return the symbols that are captured, by us or by those who share them with us."""
        return self._settings.symbols if self._settings.shards else self.roster.symbols

    def _audited(self) -> Sequence[str]:
        """Return the symbols whose klines can be held against their trades."""
        both = {STREAM_KLINE, STREAM_TRADE} <= set(self.roster.streams)
        return self.continuity.known() if both else ()

    async def _confirm(self, symbols: Sequence[str]) -> set[str]:
        return await self.continuity.confirm(symbols)

    def _grace_s(self, symbol: str) -> float:
        """A hole may close by itself while two connections, or daemons, bring the same trades."""
        several = (
            self._settings.feed_lines > 1 or self._settings.shards > 0 or self.feed.rolling(symbol)
        )
        return _GRACE_OF_TWO_S if several else _GRACE_S

    def _reaches_venue(self) -> bool:
        """Tell whether any connection is open, or none is wanted."""
        states = {connection.state for connection in self.feed.connections}
        return not states or not states.isdisjoint((State.SUBSCRIBING, State.LIVE))

    def _is_busy(self) -> bool:
        """The rows of the ring come first."""
        return self._capture.above_high_water or bool(self.flusher.stats.away_since_ns)

    def _make_listener(self, owner: object, line: int, epoch: int) -> FrameListener:
        return FrameListener(self._capture, owner, line, epoch)
