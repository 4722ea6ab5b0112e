"""Attempt after attempt, session after session, with back-off: half of a rollover, or all of it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tradecore import clock
from tradecore.backoff import Backoff
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.gate import Gate
from tradecore.feed.lines import Alternates
from tradecore.feed.plan import Plan, Reason, SessionOver
from tradecore.feed.pulse import Pulse
from tradecore.feed.session import Session
from tradecore.feed.states import Machine, State
from tradecore.feed.subscriptions import Share

log = logging.getLogger(__name__)

_FIRST_LIMIT = 0.25
"""Part of the time limit that the first attempt to open a socket gets; doubled after each failure.
One handshake that hangs does not tell of the next."""
_POLL_S = 0.25


@dataclass(slots=True)
class Tally:
    """What a connection counts over all its sessions."""

    connects: int = 0
    attempts_failed: int = 0
    reconnects: Counter[str] = field(default_factory=Counter)
    rollovers: Counter[str] = field(default_factory=Counter)
    last_end: str | None = None
    last_end_ns: int = 0
    last_data_ns: int = 0
    endpoint: str = ""


@dataclass(slots=True)
class Upkeep:
    """What the sessions of a connection share; `gate` and `next_epoch` belong to the feed."""

    plan: Plan
    share: Share
    backoff: Backoff
    alternates: Alternates
    gate: Gate
    next_epoch: Callable[[], int]
    draw_lifetime_s: Callable[[float], float]
    """Takes how long a session may live at most."""
    reading: asyncio.Event
    tally: Tally = field(default_factory=Tally)
    pulse: Pulse = field(default_factory=Pulse)
    """Of the latest session."""


class Leg:
    """Keep one session up; `last` set means that the present one has no other after it.

    `before` is the leg that this one takes the place of.
    """

    def __init__(self, upkeep: Upkeep, before: "Leg | None" = None) -> None:
        self.machine = Machine()
        self.session: Session | None = None
        self.epoch = 0
        self.lifetime_s = 0.0
        self.last = False
        self._failed = 0  # attempts to open a socket, in a row
        self._asked_ns = 0
        self._hurry = asyncio.Event()
        self._up = upkeep
        self._before = before
        self.task = asyncio.create_task(self._run(), name=f"feed leg of {upkeep.plan.name}")

    @property
    def age_s(self) -> float:
        """How long the socket has been open; 0 while none is."""
        if self.session is None or not self.session.opened_ns:
            return 0.0
        return (clock.mono_ns() - self.session.opened_ns) / 1e9

    @property
    def moved_ns(self) -> int:
        """Monotonic time of its last step: of the state, the session, or the wait for the gate."""
        ticked_ns = self.session.ticked_ns if self.session is not None else 0
        return max(self.machine.since_ns, self._asked_ns, ticked_ns)

    async def end(self, *, drain: bool) -> None:
        """Close whatever is open; with `drain` after taking what the venue had sent before."""
        close_s = self._up.plan.timing.close_s
        if self.task.cancel():
            await asyncio.wait({self.task}, timeout=close_s)
        if self.session is not None:  # and stays so when this is cancelled: it can be ended again
            if drain:
                self.machine.drain()
                await self.session.drain()
            await self.session.drop()
            self._note(self.session)
            self.session = None
        self.machine.close()
        self._before = None  # or all there ever were would hang together

    async def _run(self) -> None:
        up = self._up
        while not self.last:
            endpoint = await self._admission()
            began_ns = clock.mono_ns()
            self.machine.connect()
            self.epoch = up.next_epoch()
            self.lifetime_s = up.draw_lifetime_s(up.alternates.stay_s(endpoint))
            up.pulse = up.pulse.handed_on()
            self.session = Session(
                up.plan, up.share, self.epoch, endpoint, self.machine, up.reading, up.pulse
            )
            self.session.connect_s *= min(1.0, _FIRST_LIMIT * 2**self._failed)
            over = await self.session.live()
            if over.refusal is not None:
                up.gate.refused(endpoint, over.refusal)
            await self.session.drop()
            session, self.session = self.session, None
            self._failed = 0 if session.opened else min(self._failed + 1, 8)
            self.machine.back_off()
            delay_s = self._take_stock(session, over, (clock.mono_ns() - began_ns) / 1e9)
            if not self.last:
                await self._pause(delay_s)
                # A feed that cannot take data has no use for a socket. Ends by resume or close.
                await up.reading.wait()

    def hurry(self) -> None:
        """The session before has died: make the next attempt now, as after any break."""
        self._hurry.set()

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._hurry.wait()
        self._hurry.clear()

    async def _admission(self) -> Endpoint:
        """Wait until an attempt may be made, and return where."""
        up = self._up
        while True:
            self._asked_ns = clock.mono_ns()
            endpoint = up.alternates.pick(clock.mono_ns(), up.gate.silent_s)
            wait_s = up.gate.take_s(endpoint, planned=self._planned)
            if wait_s <= 0:
                return endpoint
            await asyncio.sleep(min(wait_s, _POLL_S))

    @property
    def _planned(self) -> bool:
        """Whether another session delivers, so that the next attempt can wait."""
        before = self._before
        if before is None or before.task.done():
            return False
        return before.session is not None and not before.session.deaf

    def _note(self, session: Session) -> None:
        """Take over what the end of a session must not make forgotten."""
        tally = self._up.tally
        tally.connects += session.opened
        tally.endpoint = session.endpoint.address
        tally.last_data_ns = max(session.last_data_ns, tally.last_data_ns)
        if session.settled:
            self._up.alternates.worked(session.endpoint)

    def _take_stock(self, session: Session, over: SessionOver, lived_s: float) -> float:
        """Count and log the end of a session; return the seconds to wait before the next."""
        up, tally = self._up, self._up.tally
        if over.reason is Reason.CONNECT_FAILED:
            tally.attempts_failed += 1
            lived_s = 0.0
        elif self._planned:
            tally.attempts_failed += 1  # nothing was missed: another session delivers
        else:
            tally.reconnects[over.reason.value] += 1
        self._note(session)
        if session.settled:
            up.backoff.reset()
        else:
            up.alternates.failed(session.endpoint, clock.mono_ns())
        # What it lived is time between two attempts as well.
        delay_s = max(up.backoff.next_delay_s() - lived_s, 0.0)
        tally.last_end, tally.last_end_ns = str(over), clock.mono_ns()
        log.warning(
            "connection to the venue ended",
            extra={
                "connection": up.plan.name,
                "cause": tally.last_end,
                "endpoint": session.endpoint.address,
                "next": "its successor" if self.last else "another attempt",
                "delay_s": round(delay_s, 3),
                "attempt": up.backoff.attempts,
                "streams": len(up.share.streams),
            },
        )
        return delay_s

    @property
    def live(self) -> bool:
        """Whether its session is in state LIVE."""
        return self.machine.state is State.LIVE
