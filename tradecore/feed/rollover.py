"""When a successor carries everything, so that the session before it may be closed."""

import asyncio
import logging

from tradecore import clock
from tradecore.errors import VenueError
from tradecore.feed.leg import Leg, Upkeep
from tradecore.feed.plan import Trouble
from tradecore.feed.session import Session

log = logging.getLogger(__name__)

_ASK_AGAIN = 3.0
"""REST is asked again after so many graces, for what is still open."""


class Proof:
    """Each trade symbol was seen to continue on the successor, or is quiet at the venue.

    A symbol continues when the successor brought a trade right behind those that were received, or
    a ticker of it told no newer one. `confirm` is asked only for symbols of which neither came. An
    acknowledged subscription proves nothing: without data or the word of REST nothing is closed.
    Neither ticker nor REST can speak for a symbol that moved meanwhile: its trades have to come.
    """

    def __init__(self, upkeep: Upkeep, trouble: Trouble) -> None:
        self.trouble = trouble
        self.asked = 0
        """How many symbols REST was asked for, over all requests."""
        self.open: tuple[str, ...] = ()
        """The symbols that the last look found without proof."""
        self._up = upkeep
        self._began_ns = clock.mono_ns()
        self._session: Session | None = None
        self._ready_ns = 0
        self._asked_ns = 0
        self._quiet: set[str] = set()

    async def given(self, successor: Leg, old: Session | None) -> bool:
        """Tell whether the old session may go now."""
        session = successor.session
        if session is not self._session:  # another attempt: what the last one proved is gone
            self._session, self._ready_ns, self._asked_ns = session, 0, 0
            self._quiet.clear()
        if session is None or not session.in_step or not self._up.reading.is_set():
            return False
        now_ns = clock.mono_ns()
        self._ready_ns = self._ready_ns or now_ns
        if old is not None and old.deaf:
            self.open = ()
            return successor.live
        self.open, left_out = self._unproven(session, old)
        if not self.open:
            return successor.live or bool(self._quiet)
        timing = self._up.plan.timing
        waited_s = (now_ns - self._ready_ns) / 1e9
        if waited_s > timing.rollover_s and successor.live:
            return True  # one trade may be lost on the successor; a dead stream had ended it
        grace_s = timing.grace_s if self._up.share.ticks else timing.quiet_grace_s
        since_asked_s = (now_ns - self._asked_ns) / 1e9
        if waited_s < grace_s or (self._asked_ns and since_asked_s < _ASK_AGAIN * grace_s):
            return False
        asked = tuple(symbol for symbol in self.open if symbol not in left_out)
        if not asked:
            return False
        self._asked_ns = now_ns
        self.asked += len(asked)
        quiet = await self._ask(asked)
        if self._session is successor.session:
            self._quiet |= quiet
        return False  # the next look tells

    def tell(self, *, died: bool) -> None:
        """Log how it ended; `died`: the old session was gone before the proof was there."""
        log.log(
            logging.WARNING if self.open or died else logging.INFO,
            "the old session died during its rollover" if died else "rollover is done",
            extra={
                "connection": self._up.plan.name,
                "cause": str(self.trouble.cause),
                "symbols": len(self._up.share.traded),
                "asked": self.asked,
                "unconfirmed": len(self.open),
                "first_unconfirmed": list(self.open[:10]),
                "took_s": round((clock.mono_ns() - self._began_ns) / 1e9, 3),
            },
        )

    def _unproven(self, session: Session, old: Session | None) -> tuple[tuple[str, ...], set[str]]:
        """Return the symbols without proof, and those of them that moved elsewhere only.

        What the old session does not bring either needs none.
        """
        ids = {self._up.plan.symbol_id(symbol): symbol for symbol in session.traded}
        if old is not None:
            for symbol_id in old.dead.union(old.left_out(list(ids))):
                ids.pop(symbol_id, None)
        left_out = {ids[symbol_id] for symbol_id in session.left_out(list(ids))}
        self._quiet -= left_out
        open_ids = session.unconfirmed([i for i in ids if ids[i] not in self._quiet])
        return tuple(ids[symbol_id] for symbol_id in open_ids), left_out

    async def _ask(self, symbols: tuple[str, ...]) -> set[str]:
        plan = self._up.plan
        try:
            async with asyncio.timeout(plan.timing.confirm_s):
                return await plan.confirm(symbols)
        except (VenueError, TimeoutError) as error:
            log.warning(
                "quiet symbols could not be confirmed for a rollover; it waits",
                extra={
                    "connection": plan.name,
                    "symbols": len(symbols),
                    "cause": str(error) or "no answer in time",
                },
            )
            return set()
