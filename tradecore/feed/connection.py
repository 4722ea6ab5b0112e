"""One connection to the venue, kept up without end and replaced without a break.

At most two sessions are open: the present one and, during a rollover, its successor.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tradecore import clock
from tradecore.backoff import Backoff, Repeats
from tradecore.feed.gate import Gate
from tradecore.feed.leg import Leg, Upkeep
from tradecore.feed.lines import Alternates
from tradecore.feed.plan import Cause, Plan, Reason, SessionOver, Trouble
from tradecore.feed.rollover import Proof
from tradecore.feed.session import Session
from tradecore.feed.states import State
from tradecore.feed.subscriptions import Share

log = logging.getLogger(__name__)

DEAD_AGAIN_S = 5.0
"""A connection is replaced for the same dead stream again after so long, then twice as long: the
venue itself may bring no trades of a symbol, or such that are not its own any more."""

_DEAD_AGAIN_CAP_S = 3600.0

_YOUNGEST = 0.8
"""Sessions live 80 to 100 % of the maximal age, so that they do not roll over together."""


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """A connection at one moment, for metrics, health and the terminal."""

    name: str
    line: int
    state: State
    since_s: float
    """How long it has been in this state."""
    streams: int
    symbols: tuple[str, ...]
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
    last_end_age_s: float | None
    rollovers: dict[str, int]
    """Sessions that a successor took the place of, by cause; every cause is there."""
    endpoint: str
    """Host and port of the present session, or of the one before; empty before the first."""
    age_s: float
    """How long the present socket has been open; 0 while none is."""


class Connection:
    """Keep a share of the streams (at most 1,024) flowing into the listeners that it makes.

    `gate` and `next_epoch` are shared by all connections of the feed, `backoff` is its own.
    """

    def __init__(
        self,
        plan: Plan,
        share: Share,
        backoff: Backoff,
        gate: Gate,
        next_epoch: Callable[[], int],
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.plan = plan
        self._reading = asyncio.Event()
        self._reading.set()
        self._up = Upkeep(
            plan,
            share,
            backoff,
            Alternates(plan.endpoints),
            gate,
            next_epoch,
            lambda most_s: min(plan.max_age_s, most_s) * uniform(_YOUNGEST, 1.0),
            self._reading,
        )
        self._present: Leg | None = None
        self._successor: Leg | None = None
        self._retiring: Leg | None = None
        self._rolling = False
        self._wish: Trouble | None = None
        self._dead_again = Repeats(DEAD_AGAIN_S, _DEAD_AGAIN_CAP_S)
        self._work: asyncio.Task[None] | None = None
        self._ending = False
        self._born_ns = self._resumed_ns = clock.mono_ns()
        self._closed = asyncio.Event()

    @property
    def name(self) -> str:
        """A name from a bounded set, such as A0: line and number."""
        return self.plan.name

    @property
    def share(self) -> Share:
        """What it carries."""
        return self._up.share

    @property
    def state(self) -> State:
        """The state of the present session; a successor's does not show before it takes over."""
        if self._closed.is_set():
            return State.CLOSED
        if self._present is None:
            return State.DRAINING if self._ending else State.CONNECTING
        return self._present.machine.state

    @property
    def rolling(self) -> bool:
        """Whether the session is being replaced."""
        return self._rolling

    @property
    def moved_ns(self) -> int:
        """Monotonic time of the last step of any of its sessions, or between two of them.

        While reading is paused it may stand still for as long as that takes; so that is now.
        """
        if not self._reading.is_set():
            return clock.mono_ns()
        return max([self._resumed_ns, *(leg.moved_ns for leg in self._legs)])

    @property
    def sessions(self) -> list[Session]:
        """The sessions that there are now, two at most, the present one first."""
        return [leg.session for leg in self._legs if leg.session is not None]

    @property
    def _legs(self) -> list[Leg]:
        legs = (self._present, self._successor, self._retiring)
        return [leg for leg in legs if leg is not None]

    async def run(self) -> None:
        """Keep the connection up; returns only after close(). Raises only on a bug."""
        if self._ending:
            return
        self._work = asyncio.create_task(self._keep_up(), name=f"feed connection {self.name}")
        try:
            await asyncio.wait({self._work})
            if not self._work.cancelled():
                self._work.result()
            await self._end_legs(drain=True)
        finally:
            self._ending = True
            if self._work.cancel():  # it is still at work only when run() itself was cancelled
                await asyncio.wait({self._work}, timeout=self.plan.timing.close_s)
            await self._end_legs(drain=False)
            self._closed.set()

    async def close(self) -> None:
        """Say goodbye to the venue and end run(), from any state, within seconds. Idempotent."""
        if not self._ending:
            self._ending = True
            for leg in self._legs:
                leg.machine.drain()
                leg.task.cancel()
            if self._work is None:
                self._closed.set()
            else:
                self._work.cancel()
        async with asyncio.timeout(5 * self.plan.timing.close_s):
            await self._closed.wait()

    def pause_reading(self) -> None:
        """Leave data in the kernel and at the venue; no time limit runs and nothing reconnects."""
        self._reading.clear()
        for session in self.sessions:
            session.pause_reading()

    def resume_reading(self) -> None:
        """Take data again."""
        if self._reading.is_set():
            return
        self._resumed_ns = clock.mono_ns()
        self._reading.set()
        for session in self.sessions:
            session.resume_reading()

    def replace(self, why: str) -> None:
        """Ask for a successor: some data are missing. Nothing happens while one is on its way."""
        if not self._rolling and self._wish is None:
            self._wish = Trouble(Cause.STALE, why)

    async def apply(self, share: Share, limit_s: float) -> bool:
        """Change what is carried; streams that stay are not touched.

        Returns whether the open sessions were in step with it within `limit_s`; a session that is
        opened later takes the new share in any case.
        """
        self._up.share = share
        for session in self.sessions:
            session.want(share)
        deadline_ns = clock.mono_ns() + int(limit_s * 1e9)
        while not self._ending and any(
            not session.in_step for session in self.sessions if session.opened
        ):
            if clock.mono_ns() > deadline_ns:
                return False
            await asyncio.sleep(self.plan.timing.tick_s)
        return True

    def carries(self, symbols: Collection[str]) -> bool:
        """Tell whether it is live and those of these symbols that it has were seen to continue."""
        if self.state is not State.LIVE:
            return False
        ids = [self.plan.symbol_id(symbol) for symbol in self.share.traded if symbol in symbols]
        return not self.sessions[0].unconfirmed(ids)

    def describe(self) -> ConnectionStatus:
        """Return a snapshot."""
        now_ns = clock.mono_ns()
        leg, tally = self._present, self._up.tally
        session = leg.session if leg is not None else None
        sessions = self.sessions
        last_ns = max(tally.last_data_ns, *(one.last_data_ns for one in sessions), 0)
        since_ns = leg.machine.since_ns if leg is not None else self._born_ns
        return ConnectionStatus(
            name=self.name,
            line=self.plan.line,
            state=self.state,
            since_s=(now_ns - since_ns) / 1e9,
            streams=len(self.share.symbols) * len(self.share.kinds),
            symbols=self.share.symbols,
            refused=tuple(session.refused) if session is not None else (),
            last_data_age_s=(now_ns - last_ns) / 1e9 if last_ns else None,
            epoch=leg.epoch if leg is not None else 0,
            connects=tally.connects + sum(one.opened for one in sessions),
            attempts_failed=tally.attempts_failed,
            reconnects=dict(tally.reconnects),
            last_end=tally.last_end,
            last_end_age_s=(now_ns - tally.last_end_ns) / 1e9 if tally.last_end_ns else None,
            rollovers={cause.value: tally.rollovers[cause.value] for cause in Cause},
            endpoint=session.endpoint.address if session is not None else tally.endpoint,
            age_s=leg.age_s if leg is not None else 0.0,
        )

    async def _keep_up(self) -> None:
        self._present = Leg(self._up)
        while True:
            await asyncio.wait({self._present.task}, timeout=self.plan.timing.tick_s)
            if self._present.task.done():
                self._present.task.result()  # it never ends by itself, but by a bug
            trouble = self._trouble(self._present)
            if trouble is not None and self._reading.is_set():
                await self._roll_over(self._present, trouble)

    def _trouble(self, leg: Leg) -> Trouble | None:
        """Return why the session should be replaced now; one that is not open is not replaced."""
        wish, session = self._wish, leg.session
        self._wish = None
        if session is None or not session.opened:
            return None
        if session.trouble is not None:
            return session.trouble
        if not session.in_step:
            return None
        if leg.age_s > leg.lifetime_s:
            return Trouble(Cause.AGE, f"open for {leg.age_s:.0f} s")
        if dead := self._dead_again.due(clock.mono_ns() / 1e9, session.dead):
            return Trouble(Cause.STALE, self._tell_dead(dead))
        return wish

    def _tell_dead(self, symbol_ids: Collection[int]) -> str:
        names = [s for s in self.share.traded if self.plan.symbol_id(s) in symbol_ids]
        return f"trades of {len(symbol_ids)} symbols are printed and do not come: {names[:3]}"

    async def _roll_over(self, old: Leg, trouble: Trouble) -> None:
        """Open a successor, wait until it carries everything, then close the old session."""
        timing = self.plan.timing
        log.info(
            "rollover begins",
            extra={
                "connection": self.name,
                "cause": str(trouble.cause),
                "detail": trouble.detail,
                "symbols": len(self.share.traded),
            },
        )
        deaf = False
        old.last = self._rolling = True
        await self._hold_back(old)
        proof = Proof(self._up, trouble)
        new = self._successor = Leg(self._up, old)
        while not old.task.done():
            await asyncio.wait({old.task, new.task}, timeout=timing.tick_s)
            if new.task.done():
                new.task.result()
            deaf = old.session is not None and old.session.deaf
            if await proof.given(new, old.session):
                break
            self._end_if_useless(new, old.session)
        died = old.task.done()
        if died:
            old.task.result()
            new.hurry()
        self._present, self._successor, self._retiring = new, None, old
        self._up.tally.rollovers[trouble.cause.value] += 1
        await old.end(drain=not deaf)
        self._retiring = self._wish = None
        self._rolling = False
        proof.tell(died=died)

    def _end_if_useless(self, leg: Leg, old: Session | None) -> None:
        """A successor that brings less than the old session is a failed attempt."""
        session = leg.session
        if session is None:
            return
        lacks = session.dead - (old.dead if old is not None else frozenset())
        if lacks:
            detail = self._tell_dead(lacks)
        elif session.trouble and (session.deaf or session.trouble.cause is Cause.STALE):
            detail = session.trouble.detail
        else:
            return
        session.settled = False
        session.end(SessionOver(Reason.SILENT, detail))

    async def _hold_back(self, old: Leg) -> None:
        """Wait for the back-off when sessions want a successor again and again while young."""
        session = old.session
        if session is not None and session.settled and old.age_s > self.plan.timing.steady_s:
            self._up.backoff.reset()
        elif session is not None:
            delay_s = self._up.backoff.next_delay_s() - old.age_s
            if delay_s > 0:
                await asyncio.wait({old.task}, timeout=delay_s)

    async def _end_legs(self, *, drain: bool) -> None:
        await asyncio.gather(*(leg.end(drain=drain) for leg in self._legs))
