"""Runs the cross-check: every closed kline against the stored trades of its minute.

The klines come on streams of their own and carry first id, last id, count and sums, so they are a
witness that shares nothing with the trades but the venue.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from numpy import void
from numpy.typing import NDArray

from tradecore import clock
from tradecore.errors import TransientStoreError, VenueError
from tradecore.store.audit import MINUTE_US, AuditReport, audit, put_klines
from tradecore.store.store import Store

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
SETTLE_S = 3.0
"""A minute is looked at so long after its end: its last trades are stored by then."""

KLINES_INTERVAL_S = 30.0
"""Between two questions to REST for klines that did not come."""

FetchKlines = Callable[[str, int, int], Awaitable[NDArray[void]]]
"""(symbol, from, to in us) -> KLINE_DTYPE rows that open at `from` or later and before `to`;
raises VenueError."""


@dataclass(slots=True)
class AuditStats:
    """What the cross-check has found since the start, and what is true now."""

    matched: int = 0
    mismatches: Counter[str] = field(default_factory=Counter)
    """By reason."""
    unproven: int = 0
    """Minutes that are over and not proven, now."""
    proven_us: dict[str, int] = field(default_factory=dict)
    """Up to which time every minute of a symbol is proven."""
    last_ns: int = 0
    """Monotonic clock of the last finished check; 0 before the first."""
    failures: int = 0


class Auditor:
    """`run` it until it is cancelled."""

    def __init__(
        self,
        store: Store,
        symbols: Callable[[], Sequence[str]],
        is_under_way: Callable[[str, int], bool],
        reach: Callable[[str, int], None],
        fetch_klines: FetchKlines | None,
    ) -> None:
        """Take what the check needs of the others.

        `is_under_way(symbol, trade_id)`: that trade was received and is about to be stored.
        `reach(symbol, last_id)` fetches a newest trade that we lack. Without `fetch_klines`
        minutes whose kline did not come stay unproven.
        """
        self.stats = AuditStats()
        self._store = store
        self._symbols = symbols
        self._is_under_way = is_under_way
        self._reach = reach
        self._fetch_klines = fetch_klines
        self._klines_due_ns = 0

    async def run(self) -> None:
        """Check every few seconds; while there is much to check, without a pause."""
        more = False
        while True:
            await asyncio.sleep(0.1 if more else INTERVAL_S)
            more = False
            try:
                more = (await self.step()).more
            except (TransientStoreError, VenueError) as error:
                self.stats.failures += 1
                log.debug("cross-check put off", extra={"error": str(error)})

    async def step(self) -> AuditReport:
        """Do one round. Raises TransientStoreError or VenueError."""
        report = await audit(
            self._store.pool,
            now_us=clock.wall_ns() // 1000,
            settle_s=SETTLE_S,
            symbols=self._symbols(),
        )
        self.stats.matched += report.matched
        self.stats.unproven = report.unproven
        self.stats.proven_us.update(report.proven_us)
        self.stats.last_ns = clock.mono_ns()
        for one in report.mismatches:
            self.stats.mismatches[one.reason] += 1
            log.error(
                "a minute of stored trades does not equal the venue's kline; compare the rows of "
                "this minute with the venue's trades, and see the audit tables for both sides",
                extra={
                    "symbol": one.symbol,
                    "minute_us": one.open_us,
                    "reason": one.reason,
                    "detail": one.detail,
                },
            )
        for symbol, last_id in report.tails:
            if not self._is_under_way(symbol, last_id):
                self._reach(symbol, last_id)
        if self._fetch_klines and report.klines_missing and clock.mono_ns() >= self._klines_due_ns:
            self._klines_due_ns = clock.mono_ns() + int(KLINES_INTERVAL_S * 1e9)
            for symbol, first_us, last_us in report.klines_missing[:20]:
                span_us = (first_us, last_us + MINUTE_US)
                rows = await self._fetch_klines(symbol, *span_us)
                await put_klines(self._store.pool, symbol, rows, asked_us=span_us)
        return report
