"""Reads the running daemon: rates and holes kept fresh, and the snapshot that others look at."""

import asyncio
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tradecore import __version__, clock, log
from tradecore.auditor import AuditStats
from tradecore.backfill.work import FillStats
from tradecore.capture import LATENCY_BOUNDS_US, Capture
from tradecore.continuity import Continuity
from tradecore.errors import TransientStoreError
from tradecore.feed.feed import Feed
from tradecore.flusher import DURATION_BOUNDS_S, LATENCY_BOUNDS_S, ROWS_BOUNDS, FlushStats
from tradecore.http.counts import HttpCounts
from tradecore.http.streams import Streams
from tradecore.lifecycle import LifecycleStats
from tradecore.loop_lag import BOUNDS_S as LAG_BOUNDS_S
from tradecore.loop_lag import LoopLag
from tradecore.refresher import RefreshStats
from tradecore.rest.client import RestClient
from tradecore.ring import Ring
from tradecore.roster import Roster
from tradecore.settings import Settings
from tradecore.sharing import Sharing
from tradecore.snapshot import (
    Audit,
    Candles,
    ConnectionState,
    Counters,
    DatabaseState,
    Histogram,
    Holes,
    HostClock,
    Lifecycle,
    Line,
    PoolUse,
    Repair,
    RingUse,
    Shards,
    Snapshot,
    SymbolState,
    SymbolStates,
    VenueRest,
)
from tradecore.store.holes import HoleSummary
from tradecore.store.store import Store
from tradecore.venue_clock import ClockStats

if TYPE_CHECKING:
    from tradecore.redis.publisher import Publisher

RATE_WINDOW_S = 5
WATCH_INTERVAL_S = 1.0
HOLES_INTERVAL_S = 5.0

TRANSIT_S = 1.0
"""A trade that was printed less than so long ago may be on its way."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What is read."""

    ring: Ring
    capture: Capture
    feed: Feed
    store: Store
    flush: FlushStats
    client: RestClient
    fill: FillStats
    audit: AuditStats
    continuity: Continuity
    roster: Roster
    sharing: Sharing | None
    refresh: RefreshStats
    streams: Streams
    lifecycle: LifecycleStats
    http: HttpCounts
    clock: ClockStats
    redis: "Publisher | None"


class Observer:
    """Reads all parts; changes none, but for telling the continuity what the ledger holds."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self._settings = settings
        self._parts = parts
        self._started_ns = clock.mono_ns()
        self._started_s = clock.wall_ns() / 1e9
        self._rates: deque[tuple[int, int, int]] = deque(maxlen=RATE_WINDOW_S + 1)
        self._holes = HoleSummary(0, 0, None, {})
        self._lag = LoopLag()

    async def watch(self) -> None:
        """Keep the rates and the holes fresh."""
        async with asyncio.TaskGroup() as group:
            # Apart: the database may hang, or be opened for minutes.
            group.create_task(self._watch_rates(), name="watch rates")
            group.create_task(self._watch_holes(), name="watch holes")
            group.create_task(self._lag.run(), name="watch the loop")

    async def _watch_rates(self) -> None:
        parts = self._parts
        while True:
            counted = parts.capture.counters()
            # What a second line brings again takes no room.
            trades = counted["trades"] - counted["duplicate"]
            self._rates.append((clock.mono_ns(), trades, parts.flush.trades_stored))
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _watch_holes(self) -> None:
        """Read the holes now and then, and at once when some were opened or filled."""
        due_ns = 0
        seen = (-1, -1)
        parts = self._parts
        while True:
            now_ns = clock.mono_ns()
            fill = parts.fill
            changes = (parts.flush.holes_opened, fill.filled.total() + fill.ids_absent)
            if now_ns >= due_ns or changes != seen:
                due_ns = now_ns + int(HOLES_INTERVAL_S * 1e9)
                seen = changes
                with suppress(TransientStoreError):  # the last known numbers stay
                    # In this order: a hole is known before the trade above it counts as stored.
                    bounds = await parts.store.bounds()
                    self._holes = await parts.store.hole_summary()
                    parts.continuity.seed(bounds)
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _rate(self, which: int) -> float:
        if len(self._rates) < 2:
            return 0.0
        first, last = self._rates[0], self._rates[-1]
        return (last[which] - first[which]) * 1e9 / max(1, last[0] - first[0])

    def snapshot(self) -> Snapshot:
        """Read the whole daemon at this moment; its symbols when somebody asks for them."""
        parts = self._parts
        now_ns, wall_ns = clock.mono_ns(), clock.wall_ns()
        counted = parts.capture.counters()
        stats = parts.flush
        away_since_ns = stats.away_since(now_ns)
        exchange_counts, exchange_sum_us = parts.capture.latency()
        connections = parts.feed.describe()
        server = parts.store.server
        offset = parts.clock.fresh()
        idle, used = parts.store.pool_use()
        oldest_ns = parts.ring.oldest_recv_ns
        reconnects = parts.feed.reconnects()
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
                    reconnects=c.reconnects,
                    last_end=c.last_end,
                    last_end_age_s=c.last_end_age_s,
                    endpoint=c.endpoint or None,
                    symbols=c.symbols,
                )
                for c in connections
            ),
            streams_wanted=sum(c.streams for c in connections),
            symbols=SymbolStates(self._symbols()),
            stale=tuple(s for s in parts.roster.symbols if s in parts.continuity.stale),
            ring=RingUse(
                rows=parts.ring.pending,
                capacity=parts.ring.capacity,
                above_high_water=parts.capture.above_high_water,
                oldest_age_s=max(0.0, _age_s(wall_ns, oldest_ns) or 0.0),
                disk_free_bytes=_free_bytes(self._settings.data_dir),
            ),
            database=DatabaseState(
                embedded=parts.store.embedded,
                reachable=not away_since_ns and server is not None,
                away_s=(now_ns - away_since_ns) / 1e9 if away_since_ns else None,
                server_version=server.version if server else None,
                edition=server.edition if server else None,
                level=parts.store.level,
                schema_version=parts.store.schema_version,
                last_error=stats.last_error,
                parked_age_s=(now_ns - stats.parked_ns) / 1e9 if stats.parked_ns else None,
            ),
            pool=PoolUse(idle=idle, used=used, limit=self._settings.db_pool_size),
            counters=Counters(
                frames_received=counted["frames"],
                frames_refused=parts.capture.refused(),
                trades_refused={"ring_full": counted["ring_full"]},
                trades_duplicate=counted["duplicate"] + stats.trades_duplicate,
                trades_out_of_order=counted["out_of_order"],
                gaps_detected=counted["gaps"],
                trades_missing=counted["missing"],
                trades_missing_arrived=counted["missing_arrived"],
                trades_far_below=counted["far_below"],
                tickers_received=counted["tickers"],
                klines_received=counted["klines"],
                trades_stored=stats.trades_stored,
                trades_parked=stats.trades_parked,
                trades_expired=stats.trades_expired,
                tickers_stored=stats.tickers_stored,
                klines_stored=stats.klines_stored,
                klines_dropped=stats.klines_dropped,
                flush_retries=dict(stats.retries),
                reconnects=reconnects,
                rollovers=_sum(c.rollovers for c in connections),
            ),
            holes=Holes(
                open=self._holes.holes,
                ids_missing=self._holes.ids_missing,
                oldest_age_s=_age_s(wall_ns, (self._holes.oldest_detected_us or 0) * 1000),
            ),
            repair=Repair(
                trades_filled=dict(parts.fill.filled),
                holes_closed={
                    "filled": parts.fill.holes_filled,
                    "absent": parts.fill.holes_absent,
                },
                retries=dict(parts.fill.retries),
                under_way=len(parts.fill.under_way),
                last_error=parts.fill.last_error,
            ),
            rest=VenueRest(
                used_weight=parts.client.budget.used_weight,
                limit_weight=parts.client.budget.limit_weight,
                banned_s=max(0.0, parts.client.budget.banned_until_s - wall_ns / 1e9),
                requests={
                    (endpoint, str(status)): count
                    for (endpoint, status), count in parts.client.requests.items()
                },
            ),
            audit=Audit(
                matched=parts.audit.matched,
                mismatches=dict(parts.audit.mismatches),
                unproven=parts.audit.unproven,
                age_s=_age_s(now_ns, parts.audit.last_ns),
            ),
            lines=tuple(
                Line(
                    name=name,
                    first=line.first,
                    late=line.late,
                    missing=line.missing,
                    lag_s_sum=line.lag_s_sum,
                    lag_count=line.lag_count,
                )
                for name, line in zip(
                    "AB"[: self._settings.feed_lines], parts.capture.lines(), strict=False
                )
            ),
            shards=Shards(
                held=len(parts.sharing.held),
                total=parts.sharing.total,
                settled=parts.sharing.settled,
            )
            if parts.sharing
            else Shards(),
            lifecycle=self._lifecycle(),
            candles=Candles(
                minutes_waiting=parts.refresh.minutes_waiting,
                minutes_refreshed=parts.refresh.minutes_refreshed,
                failures=parts.refresh.failures,
                age_s=_age_s(now_ns, parts.refresh.refreshed_ns),
            ),
            fan_out=parts.streams.use(),
            http=parts.http.use(),
            redis=parts.redis.use() if parts.redis else None,
            clock=HostClock(offset_s=offset.offset_s, bound_s=offset.bound_s) if offset else None,
            log_records_dropped=log.records_dropped(),
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
            loop_lag=Histogram(LAG_BOUNDS_S, tuple(self._lag.counts), self._lag.sum_s),
        )

    def _lifecycle(self) -> Lifecycle:
        stats = self._parts.lifecycle
        return Lifecycle(
            horizon_us=stats.horizon_us,
            waits=stats.waits,
            waits_s=(clock.mono_ns() - stats.waits_since_ns) / 1e9 if stats.waits_since_ns else 0.0,
            chunks=dict(stats.chunks),
            dropped=dict(stats.dropped),
            compressed=dict(stats.compressed),
            saved=dict(stats.saved),
            jobs=stats.jobs.states,
            job_failures=stats.jobs.failures,
            job_trouble=stats.jobs.trouble,
            failures=dict(stats.failures),
            trouble=dict(stats.trouble),
        )

    def _symbols(self) -> Iterator[SymbolState]:
        parts = self._parts
        # Of one moment, however long the reading takes: what comes meanwhile is newer than these.
        wall_ns, oldest_ns = clock.wall_ns(), parts.ring.oldest_recv_ns
        heard = parts.feed.heard_s()
        captured = frozenset(parts.roster.symbols)
        for symbol, (received, last_id, trade_us) in parts.capture.received().items():
            if symbol not in captured:
                continue
            holes = self._holes.by_symbol.get(symbol)
            yield SymbolState(
                symbol,
                received,
                last_id,
                _age_s(wall_ns, trade_us * 1000),
                holes=holes.holes if holes else 0,
                ids_missing=holes.ids if holes else 0,
                complete_through_us=self._complete_through_us(
                    symbol, wall_ns, oldest_ns, heard.get(symbol)
                ),
                proven_through_us=parts.audit.proven_us.get(symbol),
                stale=symbol in parts.continuity.stale,
            )

    def _complete_through_us(
        self, symbol: str, wall_ns: int, oldest_ns: int, heard_s: float | None
    ) -> int | None:
        """Up to the first hole; else to the last stored trade, and on to what must have come.

        None: nothing is stored of the symbol.
        """
        continuity = self._parts.continuity
        stored_us = continuity.stored_us.get(symbol)
        if (holes := self._holes.by_symbol.get(symbol)) is not None:
            return holes.first_us
        if stored_us is None or heard_s is None or not continuity.is_whole(symbol):
            return stored_us
        heard_us = wall_ns // 1000 - int((heard_s + TRANSIT_S) * 1e6)
        return max(stored_us, min(heard_us, oldest_ns // 1000) if oldest_ns else heard_us)


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


def _age_s(now_ns: int, then_ns: int) -> float | None:
    return (now_ns - then_ns) / 1e9 if then_ns else None


def _free_bytes(folder: Path) -> int:
    """Return the room on the disk of a folder, 0 when it is there no more."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize
