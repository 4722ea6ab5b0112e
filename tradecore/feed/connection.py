"""One connection to the venue, kept up without end: session after session, with back-off."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tradecore import clock
from tradecore.backoff import AttemptBudget, Backoff
from tradecore.feed.session import Plan, Reason, Session, SessionOver
from tradecore.feed.states import Machine, State

log = logging.getLogger(__name__)

_MAX_RETRY_AFTER_S = 900.0


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A connection at one moment, for metrics, health and the terminal."""

    name: str
    line: int
    state: State
    since_s: float
    """How long it has been in this state."""
    streams: int
    refused: tuple[str, ...]
    """Streams of the present session that the venue does not know."""
    last_data_age_s: float | None
    """Seconds since the last data event, whichever session brought it; None before the first."""
    epoch: int
    connects: int
    attempts_failed: int
    reconnects: dict[str, int]
    """Ended sessions by reason, attempts that failed not counted."""
    last_end: str | None


class Connection:
    """Keep the streams of a plan (at most 1,024) flowing into the listeners that it makes.

    `budget` and `next_epoch` are shared by all connections of the feed, `backoff` is its own.
    """

    def __init__(
        self,
        plan: Plan,
        backoff: Backoff,
        budget: AttemptBudget,
        next_epoch: Callable[[], int],
    ) -> None:
        self.plan = plan
        self._backoff = backoff
        self._budget = budget
        self._next_epoch = next_epoch
        self._machine = Machine()
        self._session: Session | None = None
        self._work: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._reading = asyncio.Event()
        self._reading.set()
        self._epoch = 0
        self._last_data_ns = 0
        self._connects = 0
        self._attempts_failed = 0
        self._reconnects: Counter[str] = Counter()
        self._last_end: str | None = None

    @property
    def name(self) -> str:
        """A name from a bounded set, such as A0: line and number."""
        return self.plan.name

    @property
    def state(self) -> State:
        """The state right now."""
        return self._machine.state

    async def run(self) -> None:
        """Keep the connection up; returns only after close(). Raises only on a bug."""
        if self._machine.ending:
            return
        self._work = asyncio.create_task(self._keep_up(), name=f"feed connection {self.name}")
        try:
            await asyncio.wait({self._work})
            if not self._work.cancelled():
                self._work.result()
            if self._session is not None:
                await self._session.drain()
        finally:
            if self._work.cancel():  # it is still at work only when run() itself was cancelled
                await asyncio.wait({self._work}, timeout=self.plan.timing.close_s)
            if self._session is not None:
                await self._session.drop()
            self._machine.close()
            self._closed.set()

    async def close(self) -> None:
        """Say goodbye to the venue and end run(), from any state, within seconds. Idempotent."""
        if self._machine.drain():
            if self._work is None:
                self._machine.close()
                self._closed.set()
            else:
                self._work.cancel()
        async with asyncio.timeout(4 * self.plan.timing.close_s):
            await self._closed.wait()

    def pause_reading(self) -> None:
        """Leave data in the kernel and at the venue; no time limit runs and nothing reconnects."""
        self._reading.clear()
        if self._session is not None:
            self._session.pause_reading()

    def resume_reading(self) -> None:
        """Take data again."""
        if self._reading.is_set():
            return
        self._reading.set()
        if self._session is not None:
            self._session.resume_reading()

    def describe(self) -> ConnectionStatus:
        """Return a snapshot."""
        now_ns = clock.mono_ns()
        session = self._session
        last_ns = (session.last_data_ns if session is not None else 0) or self._last_data_ns
        return ConnectionStatus(
            name=self.name,
            line=self.plan.line,
            state=self.state,
            since_s=(now_ns - self._machine.since_ns) / 1e9,
            streams=len(self.plan.streams),
            refused=tuple(session.refused) if session is not None else (),
            last_data_age_s=(now_ns - last_ns) / 1e9 if last_ns else None,
            epoch=self._epoch,
            connects=self._connects + (session is not None and session.opened),
            attempts_failed=self._attempts_failed,
            reconnects=dict(self._reconnects),
            last_end=self._last_end,
        )

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(self._budget.reserve_s())
            self._machine.connect()
            self._epoch = self._next_epoch()
            session = Session(self.plan, self._epoch, self._machine, self._reading)
            self._session = session
            over = await session.live()
            await session.drop()
            self._session = None
            self._machine.back_off()
            delay_s = self._take_stock(session, over)
            await asyncio.sleep(delay_s)
            # A feed that cannot take data has no use for a socket. Ends by resume or close.
            await self._reading.wait()

    def _take_stock(self, session: Session, over: SessionOver) -> float:
        """Count and log the end of a session; return the seconds to wait before the next."""
        if over.reason is Reason.CONNECT_FAILED:
            self._attempts_failed += 1
        else:
            self._reconnects[over.reason.value] += 1
        self._connects += session.opened
        self._last_data_ns = session.last_data_ns or self._last_data_ns
        if session.settled or over.reason is Reason.SILENT:
            # It has worked for a while, or has just waited longer than any back-off.
            self._backoff.reset()
        delay_s = max(self._backoff.next_delay_s(), min(over.retry_after_s, _MAX_RETRY_AFTER_S))
        self._last_end = str(over)
        log.warning(
            "connection to the venue ended, trying again",
            extra={
                "connection": self.name,
                "cause": self._last_end,
                "delay_s": round(delay_s, 3),
                "attempt": self._backoff.attempts,
                "streams": len(self.plan.streams),
            },
        )
        return delay_s
