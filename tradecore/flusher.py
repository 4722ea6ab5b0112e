"""Bring rows from ring and conflator to the sink: when, how many, and again after a failure.

A batch is written as soon as `batch_rows` trades wait or the oldest has waited `batch_age_s`.
While a batch is under way the next one grows, up to MAX_BATCH_ROWS (group commit), so the load
sets the batch size by itself; and batches begin PACE_S apart, unless PACE_ROWS wait, so that a
busy market is a few commits of many rows and not hundreds of a few. The ring's durable cursor
moves after COMMIT only: whatever fails in between is written again, and the ledger sees to it
that nothing is stored twice. While nothing comes to be written, the database is asked whether it
is still there.
"""

import asyncio
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tradecore import clock
from tradecore._walks import observe_latency
from tradecore.backoff import Backoff
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.errors import TransientStoreError
from tradecore.log import once_per
from tradecore.ring import Ring

log = logging.getLogger(__name__)

MAX_BATCH_ROWS = 32768
"""Rows of one transaction at most. A transaction has half a dozen trips, on each of which either
side waits for the other: with twice the rows they are 6 % less of the time."""

TOO_SLOW = ("timeout", "57014")
"""Reasons for which a batch may have failed because it is too large for what the database, or the
way to it, gets done in the time that a transaction has: the next one has half its rows."""

LEAST_ROWS = 1024
"""It becomes no smaller for that."""

PACE_S = 0.05
"""Batches begin no closer together, or BATCH_TIMEOUT if that is shorter: each costs about a
millisecond of processor time whatever its size."""

PACE_ROWS = 2048
"""So many rows do not wait for the pace."""

STATE_INTERVAL_S = 1.0
"""Tickers and klines are written once a second, so at most one ticker a second and symbol."""

IDLE_LOOK_S = 0.5
"""How often an idle flusher looks at the ring although nothing woke it: a read that ends in a
protocol violation wakes nobody."""

QUIET_S = 5.0
"""Without a successful write for so long, the database is asked whether it is there."""

SILENT_S = 10.0
"""A database that has answered nothing for so long since it was asked is away."""

RETRY_BASE_S = 0.1
RETRY_CAP_S = 1.0
"""Rows wait: a server that is back is met within a second."""

REFUSED_PATIENCE = 5.0
"""So many times longer is waited for one that refuses writes: somebody has to mend it, and each
attempt is an error in its log."""

DURATION_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS_BOUNDS = (1, 10, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16_000, MAX_BATCH_ROWS)
LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5,
    1.0, 1.5, 2.0, 5.0, 10.0, 60.0, 600.0,
)  # fmt: skip

Answer = TypeVar("Answer")

_LATENCY_BOUNDS_NS = np.array([round(bound * 1e9) for bound in LATENCY_BOUNDS_S], np.int64)


class WriteResult(Protocol):
    """What became of the rows of one batch."""

    @property
    def stored(self) -> int: ...
    @property
    def duplicate(self) -> int: ...
    @property
    def parked(self) -> int: ...
    @property
    def expired(self) -> int: ...
    @property
    def opened(self) -> Sequence[tuple[str, int, int]]:
        """Holes that the batch opened: symbol, first id, last id."""


class Sink(Protocol):
    """Where rows go; raises TransientStoreError when they have to be offered again."""

    async def write_trades(self, rows: NDArray[np.void]) -> WriteResult: ...
    async def write_tickers(self, rows: NDArray[np.void]) -> WriteResult: ...
    async def write_klines(self, rows: NDArray[np.void]) -> WriteResult: ...
    async def ping(self) -> None: ...


class Wait(NamedTuple):
    """How long to wait for the next look at the ring."""

    limit_s: float
    """0.0: a batch is due now."""
    rows: int
    """Look earlier when so many rows are there."""


@dataclass(frozen=True, slots=True)
class FlushPolicy:
    """When a batch is due: `batch_rows` rows wait, or the oldest waits `batch_age_s`."""

    batch_rows: int
    batch_age_s: float
    hurry_rows: int = PACE_ROWS
    """So many do not wait for the pace."""

    @classmethod
    def fitting(cls, batch_rows: int, batch_age_s: float, capacity: int) -> "FlushPolicy":
        """Return the policy of a ring of `capacity` rows: a quarter of it is due in any case,
        before the sockets have to be paused."""
        quarter = max(capacity // 4, 1)
        return cls(min(batch_rows, MAX_BATCH_ROWS, quarter), batch_age_s, min(PACE_ROWS, quarter))

    def wait(self, pending: int, oldest_age_s: float, since_s: float) -> Wait:
        """Tell when a batch is due; the last one has begun `since_s` ago."""
        if pending == 0:
            # Whoever looks again before a row can be overdue need not be told of the first one.
            patient = self.batch_age_s >= IDLE_LOOK_S
            return Wait(IDLE_LOOK_S, self.batch_rows if patient else 1)
        hurry = max(self.hurry_rows, self.batch_rows)
        pace_s = min(PACE_S, self.batch_age_s) - since_s if pending < hurry else 0.0
        if pending >= self.batch_rows:
            return Wait(max(0.0, pace_s), hurry)
        # A clock that stepped back makes an age negative: how long the row has waited is not known.
        due_s = self.batch_age_s - oldest_age_s if oldest_age_s >= 0 else 0.0
        return Wait(max(due_s, pace_s, 0.0), self.batch_rows)


@dataclass(slots=True)
class FlushStats:
    """What the flusher has done, in plain numbers that a scrape reads."""

    trades_stored: int = 0
    trades_duplicate: int = 0
    trades_parked: int = 0
    trades_expired: int = 0
    holes_opened: int = 0
    tickers_stored: int = 0
    klines_stored: int = 0
    klines_dropped: int = 0
    """Closed ones that found no room while the database was away."""
    retries: Counter[str] = field(
        default_factory=lambda: Counter({"connection": 0, "down": 0, "timeout": 0})
    )
    """By SQLSTATE or word; those that every outage shows are there from the start."""
    duration_counts: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS_S) + 1))
    duration_sum_s: float = 0.0
    rows_counts: list[int] = field(default_factory=lambda: [0] * (len(ROWS_BOUNDS) + 1))
    rows_sum: int = 0
    latency_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(LATENCY_BOUNDS_S) + 1, np.int64)
    )
    latency_sum_ns: int = 0
    reachable_ns: int = 0
    """Monotonic clock of the last successful write or ping; 0 before the first."""
    away_since_ns: int = 0
    """Monotonic clock of when the first attempt that failed since the last success had begun."""
    last_error: str | None = None
    asked_ns: dict[str, int] = field(default_factory=dict)
    """By what is written: monotonic clock of when the attempt under way began."""
    parked_ns: int = 0
    """Monotonic clock of the last batch of which rows were parked; 0 before the first."""
    turned_ns: dict[str, int] = field(default_factory=dict)
    """By what is written: monotonic clock of when its writer last began a round of its loop."""

    def away_since(self, now_ns: int) -> int:
        """Return since when the database does not answer; 0 while it does, or is not asked."""
        unanswered_ns = [ns for ns in self.asked_ns.values() if ns > self.reachable_ns]
        since_ns = min(unanswered_ns, default=now_ns)
        return self.away_since_ns or (since_ns if now_ns - since_ns > SILENT_S * 1e9 else 0)

    def failed(self, error: TransientStoreError, asked_ns: int | None = None) -> None:
        """Note a failed attempt that began at `asked_ns`, or now."""
        self.retries[error.reason] += 1
        self.last_error = str(error)
        self.away_since_ns = self.away_since_ns or max(
            asked_ns or clock.mono_ns(), self.reachable_ns
        )

    def succeeded(self) -> None:
        """Note that the database has answered."""
        self.reachable_ns = clock.mono_ns()
        self.away_since_ns = 0
        self.last_error = None

    def observe_flush(self, rows: NDArray[np.void], result: WriteResult, began_ns: int) -> None:
        """Note one committed batch of trades that was begun at `began_ns` (monotonic)."""
        duration_s = (clock.mono_ns() - began_ns) / 1e9
        self.duration_counts[bisect_left(DURATION_BOUNDS_S, duration_s)] += 1
        self.duration_sum_s += duration_s
        self.rows_counts[bisect_left(ROWS_BOUNDS, len(rows))] += 1
        self.rows_sum += len(rows)
        self.trades_stored += result.stored
        self.trades_duplicate += result.duplicate
        self.trades_parked += result.parked
        if result.parked:
            self.parked_ns = clock.mono_ns()
        self.trades_expired += result.expired
        self.holes_opened += len(result.opened)
        _, total_ns, _ = observe_latency(
            rows, clock.wall_ns(), _LATENCY_BOUNDS_NS, self.latency_counts
        )
        self.latency_sum_ns += total_ns


class Flusher:
    """Owns the consumer's side of the ring; `run` it until `drain`."""

    def __init__(
        self,
        ring: Ring,
        capture: Capture,
        conflator: Conflator,
        sink: Sink,
        policy: FlushPolicy,
        *,
        after_release: Callable[[], None] = lambda: None,
        on_opened: Callable[[Sequence[tuple[str, int, int]]], None] = lambda holes: None,
    ) -> None:
        """Take what `run` moves rows between; nothing is started yet.

        `after_release` is called when rows have left the ring (it lifts the back-pressure),
        `on_opened` with the holes of a commit that opened some (it wakes the back-fill).
        """
        self.stats = FlushStats()
        self._ring = ring
        self._capture = capture
        self._conflator = conflator
        self._sink = sink
        self._policy = policy
        self._after_release = after_release
        self._on_opened = on_opened
        self._due = asyncio.Event()
        self._draining = asyncio.Event()
        self._most_rows = MAX_BATCH_ROWS
        self._began_ns = 0  # monotonic clock of the last batch of trades
        self._again: set[str] = set()  # what failed last, and waits for its next attempt

    async def run(self) -> None:
        """Write until `drain` was called and everything that waited is stored."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_trades(), name="flush trades")
            group.create_task(self._run_states(), name="flush tickers and klines")
            watch = group.create_task(self._watch_database(), name="watch the database")
            await self._draining.wait()
            watch.cancel()

    def drain(self) -> None:
        """Write what waits without waiting for more, then let `run` return."""
        self._draining.set()
        self._due.set()

    async def _run_trades(self) -> None:
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
        while True:
            await self._until_due()
            rows = self._ring.peek(self._most_rows)
            if len(rows) == 0:
                if self._draining.is_set():
                    return
                continue
            began_ns = self._began_ns = clock.mono_ns()
            write = self._sink.write_trades(rows)
            result = await self._attempt("trades", len(rows), write, backoff)
            if result is not None:
                self._most_rows = min(2 * self._most_rows, MAX_BATCH_ROWS)
                self.stats.observe_flush(rows, result, began_ns)
                self._ring.release(len(rows))
                self._after_release()
                if result.opened:
                    self._on_opened(result.opened)

    async def _until_due(self) -> None:
        """Wait until the policy wants a batch, or the drain wants everything."""
        while not self._draining.is_set():
            self.stats.turned_ns["trades"] = clock.mono_ns()
            pending = self._ring.pending
            age_s = (clock.wall_ns() - self._ring.oldest_recv_ns) / 1e9 if pending else 0.0
            since_s = (clock.mono_ns() - self._began_ns) / 1e9
            limit_s, rows = self._policy.wait(pending, age_s, since_s)
            if limit_s == 0.0:
                return
            self._due.clear()
            self._capture.wake_when(rows, self._due.set)
            timer = asyncio.get_running_loop().call_later(limit_s, self._due.set)
            try:
                await self._due.wait()
            finally:
                timer.cancel()

    async def _run_states(self) -> None:
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
        while True:
            self.stats.turned_ns["tickers and klines"] = clock.mono_ns()
            last = self._draining.is_set()
            if not last:
                await _wait(self._draining, STATE_INTERVAL_S)
            await self._write_states(backoff)
            if last:
                return

    async def _write_states(self, backoff: Backoff) -> None:
        tickers = self._conflator.take_tickers()
        if len(tickers):
            write = self._sink.write_tickers(tickers)
            result = await self._attempt("tickers", len(tickers), write, backoff)
            if result is None:
                self._conflator.put_back_tickers(tickers)
            else:
                self.stats.tickers_stored += result.stored
        self._note_dropped(self._conflator.closed_dropped)
        klines = self._conflator.take_klines()
        if len(klines):
            write = self._sink.write_klines(klines)
            result = await self._attempt("klines", len(klines), write, backoff)
            if result is None:
                self._conflator.put_back_klines(klines)
            else:
                self.stats.klines_stored += result.stored

    async def _watch_database(self) -> None:
        """Notice that the database is gone, or back, while nothing comes to be written."""
        backoff = Backoff(RETRY_BASE_S, RETRY_CAP_S)
        while True:
            quiet_s = (clock.mono_ns() - self.stats.reachable_ns) / 1e9
            # A database that refuses writes may well answer; the next attempt tells more.
            if quiet_s < QUIET_S or self._again:
                await asyncio.sleep(QUIET_S / 10)
            else:
                await self._attempt("nothing", 0, self._sink.ping(), backoff)

    def _note_dropped(self, count: int) -> None:
        if count and not self.stats.klines_dropped:
            log.warning("closed klines find no room; the cross-check asks the venue for them later")
        self.stats.klines_dropped = count

    async def _attempt(
        self, what: str, count: int, write: Awaitable[Answer], backoff: Backoff
    ) -> Answer | None:
        """Await one write; on a passing failure wait for the next attempt and return None."""
        asked_ns = self.stats.asked_ns[what] = clock.mono_ns()
        try:
            result = await write
        except TransientStoreError as error:
            self._report(what, count, error)
            self.stats.failed(error, asked_ns)
            if count:
                self._again.add(what)
            if what == "trades" and error.reason in TOO_SLOW:
                self._most_rows = max(count // 2, LEAST_ROWS)
            # While draining the supervisor's time limit ends the attempts.
            patience = REFUSED_PATIENCE if error.fatal_looking else 1.0
            await asyncio.sleep(max(patience * backoff.next_delay_s(), 0.01))
            return None
        finally:
            del self.stats.asked_ns[what]
        if self.stats.away_since_ns:
            away_s = (clock.mono_ns() - self.stats.away_since_ns) / 1e9
            log.info("database answers again", extra={"away_s": round(away_s, 1)})
        self.stats.succeeded()
        self._again.discard(what)
        backoff.reset()
        return result

    def _report(self, what: str, count: int, error: TransientStoreError) -> None:
        extra = {
            "what": what,
            "rows": count,
            "reason": error.reason,
            "error": str(error),
            "pending": self._ring.pending,
        }
        if error.fatal_looking:
            once_per(log, error.reason).error(
                "the database refuses writes; rows wait in the ring", extra=extra
            )
        elif self.stats.away_since_ns:
            log.debug("write failed again", extra=extra)
        elif not count:
            log.warning("the database does not answer; what comes waits in the ring", extra=extra)
        else:
            log.warning("write failed and is tried again; rows wait in the ring", extra=extra)


async def _wait(event: asyncio.Event, limit_s: float) -> None:
    """Wait for `event`, `limit_s` seconds at most."""
    try:
        await asyncio.wait_for(event.wait(), limit_s)
    except TimeoutError:
        return
