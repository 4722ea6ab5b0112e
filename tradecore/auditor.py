"""Runs the cross-check: every closed kline against the stored trades of its minute.

The klines come on streams of their own and carry first id, last id, count and sums, so they are a
witness that shares nothing with the trades but the venue.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy import void
from numpy.typing import NDArray

from tradecore import clock
from tradecore.backoff import Backoff
from tradecore.errors import TransientStoreError, VenueError
from tradecore.log import once_per
from tradecore.rest.budget import RestError
from tradecore.schema import KLINE_DTYPE
from tradecore.store.audit import MINUTE_US, AuditReport, audit, put_klines, read_proven
from tradecore.store.store import Store
from tradecore.store.verdict import REASONS

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
_MAX_PAUSE_S = 60.0

SETTLE_S = 3.0
"""A minute is looked at so long after its end: its last trades are stored by then."""

KLINES_INTERVAL_S = 30.0
"""Between two questions to REST for klines that did not come."""

_QUESTIONS = 50  # of one turn, each for one symbol
_QUESTION_US = 1000 * MINUTE_US  # at most: one page of the venue
_LAG_US = 5 * MINUTE_US
"""REST may be behind the streams: that it has no kline of a younger minute says nothing yet."""
_RETRY_S, _RETRY_CAP_S = 60.0, 6 * 3600.0  # of a symbol whose klines cannot be had
_WARN_AFTER = 3  # failures in a row
_TELL_EVERY_S = 600.0
_UNKNOWN_SYMBOL = (-1100, -1121)

FetchKlines = Callable[[str, int, int], Awaitable[NDArray[void]]]
"""(symbol, from, to in us) -> KLINE_DTYPE rows that open at `from` or later and before `to`;
raises VenueError."""


@dataclass(slots=True)
class AuditStats:
    """What the cross-check has found since the start, and what is true now."""

    matched: int = 0
    mismatches: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    """By reason."""
    unproven: int = 0
    """Minutes that are over and not proven, now."""
    proven_us: dict[str, int] = field(default_factory=dict)
    """Up to which time every minute of a symbol is proven."""
    last_ns: int = 0
    """Monotonic clock of the last check that left no minute of any symbol without a look, but for
    the latest ones; 0 before the first."""
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
        on_reopened: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what the check needs of the others.

        `is_under_way(symbol, trade_id)`: that trade was received and is about to be stored.
        `reach(symbol, last_id)` fetches a newest trade that we lack. Without `fetch_klines`
        minutes whose kline did not come stay unproven. `on_reopened` hears that ids that were held
        absent are a hole again.
        """
        self.stats = AuditStats()
        self._store = store
        self._symbols = symbols
        self._is_under_way = is_under_way
        self._reach = reach
        self._fetch_klines = fetch_klines
        self._on_reopened = on_reopened
        self._missing: tuple[tuple[str, int, int], ...] = ()
        self._asked_ns: dict[str, int] = {}
        self._retry_ns: dict[str, tuple[int, Backoff]] = {}

    async def run(self) -> None:
        """Check every few seconds; while there is much to check, without a pause.

        REST is asked beside it: however slow it is, what came by stream is checked.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_checking())
            if self._fetch_klines is not None:
                tasks.create_task(self._keep_asking())

    async def _keep_checking(self) -> None:
        with suppress(TransientStoreError):  # not open yet: the first check tells it
            self.stats.proven_us |= await read_proven(self._store.pool, self._symbols())
        pause_s, failed = INTERVAL_S, 0
        while True:
            await asyncio.sleep(pause_s)
            begun_ns = clock.mono_ns()
            try:
                more = (await self.step()).more
                failed = 0
            except TransientStoreError as error:
                more = False
                self.stats.failures += 1
                failed += 1
                if failed >= _WARN_AFTER:
                    once_per(log, "check").warning(
                        "the cross-check fails again and again; trades are stored unproven",
                        extra={"error": str(error), "in_a_row": failed},
                    )
            # While very many minutes wait for their trades a look takes long: a fifth of the time.
            took_s = (clock.mono_ns() - begun_ns) / 1e9
            pause_s = 0.1 if more else min(max(INTERVAL_S, 4 * took_s), _MAX_PAUSE_S)

    async def _keep_asking(self) -> None:
        failed = 0
        while True:
            pause_s = KLINES_INTERVAL_S
            try:
                if await self.ask():
                    failed = 0
                else:
                    pause_s = 1.0
            except (TransientStoreError, VenueError) as error:
                self.stats.failures += 1
                failed += 1
                if failed >= _WARN_AFTER:
                    once_per(log, "ask").warning(
                        "klines that did not come cannot be fetched; their minutes stay unproven",
                        extra={"error": str(error), "in_a_row": failed},
                    )
            await asyncio.sleep(pause_s)

    async def step(self) -> AuditReport:
        """Check what there is. Raises TransientStoreError."""
        report = await audit(
            self._store.pool,
            now_us=clock.wall_ns() // 1000,
            settle_s=SETTLE_S,
            symbols=self._symbols(),
        )
        self.stats.matched += report.matched
        self.stats.unproven = report.unproven
        self.stats.proven_us.update(report.proven_us)
        if not report.late:
            self.stats.last_ns = clock.mono_ns()
        for one in report.mismatches:
            self.stats.mismatches[one.reason] += 1
            once_per(log, ("mismatch", one.symbol)).error(
                "a minute of stored trades does not equal the venue's kline; compare the rows of "
                "this minute with the venue's trades, and see the audit tables for both sides",
                extra={
                    "symbol": one.symbol,
                    "minute_us": one.open_us,
                    "reason": one.reason,
                    "detail": one.detail,
                },
            )
        for one in report.reopened:
            once_per(log, ("reopened", one.symbol)).warning(
                "the venue counts trades that it was held not to have; they are missing again",
                extra={"symbol": one.symbol, "minute_us": one.open_us, "detail": one.detail},
            )
        if report.reopened:
            self._on_reopened()
        for symbol, last_id in report.tails:
            if not self._is_under_way(symbol, last_id):
                self._reach(symbol, last_id)
        self._missing = report.klines_missing
        return report

    async def ask(self) -> int:
        """Ask REST for klines that the last check missed; return how many questions that took.

        Those symbols come first that have waited longest. One whose klines cannot be had is left
        alone for a while and keeps no other waiting. Raises VenueError when the venue as a whole
        gives nothing, TransientStoreError.
        """
        now_ns = clock.mono_ns()
        due = [one for one in self._missing if self._may_ask(one[0], now_ns)]
        due.sort(key=lambda one: self._asked_ns.get(one[0], 0))
        self._missing = ()
        if due:
            once_per(log, "asking", _TELL_EVERY_S).info(
                "klines did not come by stream; REST is asked for them",
                extra={"symbols": len({one[0] for one in due}), "first": due[0][0]},
            )
        for symbol, first_us, last_us in due[:_QUESTIONS]:
            if not self._may_ask(symbol, now_ns):
                continue
            self._asked_ns[symbol] = now_ns
            end_us = last_us + MINUTE_US
            first_us = max(first_us, end_us - _QUESTION_US)
            rows = await self._fetch(symbol, first_us, end_us)
            if rows is None:
                continue
            told_us = int(rows["open_us"][-1]) + MINUTE_US if len(rows) else 0
            sure_us = (clock.wall_ns() // 1000 - _LAG_US) // MINUTE_US * MINUTE_US
            asked_us = first_us, max(first_us, min(end_us, max(told_us, sure_us)))
            await put_klines(self._store.pool, symbol, rows, asked_us=asked_us)
        return len(due[:_QUESTIONS])

    def _may_ask(self, symbol: str, now_ns: int) -> bool:
        return symbol not in self._retry_ns or self._retry_ns[symbol][0] <= now_ns

    async def _fetch(self, symbol: str, first_us: int, end_us: int) -> NDArray[void] | None:
        """Return the venue's klines, none where it does not know the symbol; None: try later."""
        assert self._fetch_klines is not None
        try:
            rows = await self._fetch_klines(symbol, first_us, end_us)
        except RestError as error:
            if error.code in _UNKNOWN_SYMBOL:
                return np.zeros(0, KLINE_DTYPE)
            if error.kind != "broken" and error.status != 400:
                raise
            once_per(log, ("klines", symbol)).warning(
                "the venue's klines of a symbol cannot be had; trying again later",
                extra={"symbol": symbol, "error": str(error)},
            )
            backoff = self._retry_ns.get(symbol, (0, Backoff(_RETRY_S, _RETRY_CAP_S)))[1]
            delay_s = _RETRY_S + backoff.next_delay_s()
            self._retry_ns[symbol] = (clock.mono_ns() + int(delay_s * 1e9), backoff)
            return None
        self._retry_ns.pop(symbol, None)
        return rows
