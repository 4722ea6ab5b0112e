"""Keeps candles fresh: the minute under way, and every minute that late or old trades touched.

Of several daemons with one database one does it at a time. What has to be done is in the database
(see `store.candle_windows`), so that any of them may die at any moment.
"""

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from tradecore import clock
from tradecore.backoff import Backoff
from tradecore.errors import TransientStoreError
from tradecore.log import once_per
from tradecore.store.candle_windows import (
    TRY_TO_REFRESH,
    count_waiting,
    first_chunk,
    move_fence,
    read_waiting,
    settle,
)
from tradecore.store.candles import CandleKind, refresh
from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.store import Store
from tradecore.store.transaction import session

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""Between two looks; the minute under way is as old as that at most, while it is cheap."""

_DUTY = 0.15
"""Part of the time that the minute under way may take: with many trades it is shown later."""

SETTLE = timedelta(seconds=5)
"""A minute is closed so long after its end: by then hardly any of its trades is still to come."""

_NEAR = timedelta(hours=1)  # no chunk was dropped there
_AHEAD = timedelta(minutes=1)  # trades may be ahead of the server's clock by so much

_PAST_S = 2.0
"""Of each round for old minutes, at most one slice more."""

_SLICE = timedelta(hours=1)
_SLICE_MIN, _SLICE_MAX = timedelta(minutes=1), timedelta(days=30)
_SLICE_S = 1.0
"""How long one slice of old minutes shall take: slices shrink and grow to that."""

_LOCKED, _LOCKED_S, _LOCKED_MAX = "55P03", 0.5, 20
_RETRY_S, _RETRY_CAP_S = 0.5, 30.0

# What is lost by a crash of the server is lost together with the note that it is done. What is
# read is a window of everything, so hashing is right, and never a plan for single rows.
_SETTINGS = """
SET synchronous_commit = off; SET statement_timeout = '120s'; SET lock_timeout = '10s';
SET work_mem = '64MB'
"""


@dataclass(slots=True)
class RefreshStats:
    """What the refresher has done since the start, and what waits now."""

    refreshed_ns: int = 0
    """Monotonic clock of the last time that the minute under way was refreshed, 0 before."""
    minutes_waiting: int = 0
    """Closed minutes whose candles are not up to date; 0 where another daemon refreshes."""
    minutes_refreshed: int = 0
    rounds: int = 0
    failures: int = 0


class Refresher:
    """`run` it until it is cancelled."""

    def __init__(self, store: Store) -> None:
        self.stats = RefreshStats()
        self._store = store
        self._slice = _SLICE
        self._failed = False
        self._present_s = 0.0

    async def run(self) -> None:
        """Refresh for ever; what fails is tried again with growing pauses."""
        backoff = Backoff(_RETRY_S, _RETRY_CAP_S)
        locked = 0
        while True:
            began_ns = clock.mono_ns()
            try:
                await self._round()
            except TransientStoreError as error:
                locked += 1
                if error.reason == _LOCKED and locked < _LOCKED_MAX:
                    # A policy of TimescaleDB computes the same candles at this moment.
                    log.debug("candles are being refreshed by another", extra={"error": str(error)})
                    await asyncio.sleep(_LOCKED_S)
                    continue
                self._failed = True
                self.stats.failures += 1
                # When the database is away the flusher says so.
                level = logging.WARNING if self._store.is_open else logging.DEBUG
                once_per(log, error.reason).log(
                    level,
                    "candles are not refreshed and are tried again",
                    extra={"reason": error.reason, "error": str(error)},
                )
                await asyncio.sleep(max(backoff.next_delay_s(), 0.01))
                continue
            self._failed = False
            locked = 0
            backoff.reset()
            took_s = (clock.mono_ns() - began_ns) / 1e9
            # Half of the time at most for the past, so that it never crowds out the trades.
            await asyncio.sleep(max(INTERVAL_S - took_s, self._present_s / _DUTY, took_s / 2))

    async def _round(self) -> None:
        """Bring what is due up to date, unless another daemon is at it."""
        try:
            async with session(self._store.pool, 10) as conn:
                if self._failed:
                    await self._store.read_level(conn)
                if await conn.fetchval(TRY_TO_REFRESH):
                    await conn.execute(_SETTINGS)
                    await self._refresh_all(conn, self._store.candle_kind)
                else:
                    self.stats.minutes_waiting = 0
        except TROUBLE as exc:
            raise as_transient(exc, "refresh candles") from exc

    async def _refresh_all(self, conn: asyncpg.Connection, kind: CandleKind) -> None:
        through, raw_from, now = await move_fence(conn, SETTLE)
        ids, spans = await read_waiting(conn)
        if kind.aggregates and (spans or through is None or now - through > _NEAR):
            begin = await first_chunk(conn)
            raw_from = max(filter(None, (begin, raw_from)), default=None)
        began_ns = clock.mono_ns()
        if through is not None:
            await refresh(conn, kind, through, now + _AHEAD, raw_from=raw_from, closed=through)
        self.stats.refreshed_ns = clock.mono_ns()
        self.stats.rounds += 1
        self._present_s = (self.stats.refreshed_ns - began_ns) / 1e9
        while True:
            if not spans or clock.mono_ns() - began_ns > _PAST_S * 1e9:
                self.stats.minutes_waiting = await count_waiting(conn) if spans else 0
                return
            window = self._last_slice(spans)
            await self._refresh_slice(conn, kind, ids, window, raw_from, through)
            ids, spans = await read_waiting(conn)

    def _last_slice(self, spans: list[tuple[datetime, datetime]]) -> tuple[datetime, datetime]:
        """Return the newest part of `spans`, from its first to its last minute."""
        first, end = spans[-1]
        floor = end - self._slice
        for begin, until in reversed(spans):
            if until <= floor:
                break
            first = max(begin, floor)
        return first, end

    async def _refresh_slice(
        self,
        conn: asyncpg.Connection,
        kind: CandleKind,
        ids: list[int],
        window: tuple[datetime, datetime],
        raw_from: datetime | None,
        closed: datetime | None,
    ) -> None:
        began_ns = clock.mono_ns()
        first, end = window
        try:
            await refresh(conn, kind, first, end, raw_from=raw_from, closed=closed)
            await settle(conn, ids, first, end)
        except TROUBLE:
            self._slice = max(self._slice / 4, _SLICE_MIN)
            raise
        took_s = (clock.mono_ns() - began_ns) / 1e9
        self.stats.minutes_refreshed += int((end - first).total_seconds()) // 60
        if took_s > 2 * _SLICE_S:
            self._slice = max(self._slice / 2, _SLICE_MIN)
        elif took_s < _SLICE_S / 2 and end - first > self._slice / 2:
            self._slice = min(self._slice * 2, _SLICE_MAX)
