"""Reads the running daemon: rates and holes kept fresh, and the snapshot that others look at."""

import asyncio
from collections import deque

from tradecore import __version__, clock
from tradecore.capture import LATENCY_BOUNDS_US, Capture
from tradecore.feed.feed import Feed
from tradecore.flusher import DURATION_BOUNDS_S, LATENCY_BOUNDS_S, ROWS_BOUNDS, FlushStats
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

RATE_WINDOW_S = 5
WATCH_INTERVAL_S = 1.0
HOLES_INTERVAL_S = 5.0


class Observer:
    """Reads all parts; changes none."""

    def __init__(
        self,
        settings: Settings,
        ring: Ring,
        capture: Capture,
        feed: Feed,
        store: Store,
        stats: FlushStats,
    ) -> None:
        self._settings = settings
        self._ring = ring
        self._capture = capture
        self._feed = feed
        self._store = store
        self._stats = stats
        self._started_ns = clock.mono_ns()
        self._started_s = clock.wall_ns() / 1e9
        self._rates: deque[tuple[int, int, int]] = deque(maxlen=RATE_WINDOW_S + 1)
        self._holes = 0

    async def watch(self) -> None:
        """Keep the rates and the number of holes fresh."""
        holes_due_ns = 0
        while True:
            now_ns = clock.mono_ns()
            counters = self._capture.counters()
            self._rates.append((now_ns, counters["trades"], self._stats.trades_stored))
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
        stats = self._stats
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


def _age_s(now_ns: int, then_ns: int) -> float | None:
    return (now_ns - then_ns) / 1e9 if then_ns else None
