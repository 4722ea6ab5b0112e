"""Back-fill: fetches what the ledger lacks, the newest holes first, a few symbols at a time.

The daemon runs it for ever over the holes younger than BACKFILL_MAX_AGE; `tradecore backfill` runs
it once over the holes that it names. Each turn of a hole is one step (see `step`), and then
the newest hole that is due gets the next one. So a hole that cannot be filled keeps no other one
waiting, and a long one those of its own symbol for a step. Dumps are read one at a time, since they
take minutes: the other workers are left to what needs none. A venue that gives nothing of use is
asked every few seconds, by one hole at a time, and for all of them from its first good reply on.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

from tradecore import clock
from tradecore.backfill import plan, table
from tradecore.backfill.step import Filler
from tradecore.backfill.table import Table, age_order, backoffs
from tradecore.backfill.work import (
    HOUR_S,
    FillPolicy,
    FillStats,
    Reach,
    Step,
    Work,
    WrongReplyError,
)
from tradecore.backoff import Backoff
from tradecore.errors import TransientStoreError
from tradecore.log import once_per
from tradecore.rest.budget import RestError
from tradecore.rest.client import RestClient
from tradecore.store.holes import OpenHole
from tradecore.store.store import Store

__all__ = ["Backfill", "FillPolicy", "FillStats", "Work"]

log = logging.getLogger(__name__)

GRACE_S = 0.5
"""A fresh hole is left alone so long: the other line or a late frame may fill it."""

KEEP_S = 3 * 86_400.0
"""So much older a hole that was found in time may get: the longest ban, or a dump that is late."""

_MAX_REACHES = 4096
_REACH_TRIES = 100
_LOOK_AGAIN_S = 5.0
_PAUSE_S = 0.5
_BAD_REQUEST = 400
_MOST_TOLD_S = 60.0  # of what a host that is out of order says itself

# Of a run over given holes: what has not come by then is left and reported.
_PATIENCE_S = 30.0
_BAN_PATIENCE_S = 900.0
_FRUITLESS = 15
_FAILURES = 8


class Backfill:
    """Fills holes; `run` it in the daemon, or `fill` given ones."""

    def __init__(
        self,
        store: Store,
        client: RestClient,
        policy: FillPolicy,
        *,
        grace: Callable[[str], float] = lambda _: GRACE_S,
        paused: Callable[[], bool] = lambda: False,
        on_progress: Callable[[FillStats], None] = lambda _: None,
    ) -> None:
        """`grace` gives the seconds that a fresh hole of a symbol is left alone.

        While `paused` says so no new step is begun. `on_progress` is called after each step.
        """
        self.stats = FillStats()
        self._store = store
        self._policy = policy
        self._grace = grace
        self._paused = paused
        self._on_progress = on_progress
        self._reaches: dict[str, Reach] = {}
        self._busy: dict[str, Work | Reach] = {}
        self._table = Table(policy, self._busy)
        self._filler = Filler(store, client, policy, self.stats, works_of=self._table.of)
        self.stats.tell_under_way = self._table.under_way
        self._woken = asyncio.Event()
        self._looked_s = self._next_look_s = 0.0
        self._newest_us: int | None = None  # time of the newest stored trade
        self._venue_pause = Backoff(policy.lag_base_s, policy.host_cap_s)
        self._venue_not_before_s = 0.0
        self._left: list[Work] | None = None  # a run over given holes: those given up

    # ---- the faces ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Fill holes until cancelled."""
        if self._policy.max_age_s <= 0:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            while True:
                if _now_s() >= self._next_look_s:
                    await self._look()
                self._begin(group)
                await self._wait()

    async def fill(self, holes: Iterable[OpenHole]) -> list[Work]:
        """Fill these holes, whatever their age; return those that are left, `why` says why."""
        self._left = []
        for hole in holes:
            self._table.add_open(hole)
        async with asyncio.TaskGroup() as group:
            while self._table or self._busy:
                self._begin(group)
                await self._wait()
        return self._left

    def wake(self, holes: Iterable[tuple[str, int, int]]) -> None:
        """Tell of holes that have just been opened: symbol, first id, last id."""
        if self._policy.max_age_s <= 0:
            return
        fresh = list(holes)
        if len(self._table.active) + len(fresh) > table.MAX_HOLES:
            self.look_soon()  # the newest matter most; the look chooses them
            fresh = []
        now_us = clock.wall_ns() // 1000
        for symbol, first_id, last_id in fresh:
            self._table.add(symbol, first_id, last_id, now_us)
        self._woken.set()

    def look_soon(self) -> None:
        """Tell of holes that have been opened, without knowing which."""
        self._next_look_s = min(self._next_look_s, self._looked_s + _LOOK_AGAIN_S)
        self._woken.set()

    def reach(self, symbol: str, last_id: int, cause: str = "disconnect") -> None:
        """Fetch up to `last_id`, the venue's newest, of a symbol of which less is stored.

        One page is stored; what it leaves out below is a hole then, with this cause. A symbol of
        which nothing is stored is left alone.
        """
        if self._policy.max_age_s <= 0:
            return
        known = self._reaches.get(symbol)
        if known is not None and known.refusals and known.last_id < last_id:
            known = None  # a trade that it was not tried with
            del self._reaches[symbol]
        if known is not None:
            known.last_id = last_id  # the latest word: one that was too high must not stay
        elif len(self._reaches) < _MAX_REACHES:
            now_us = clock.wall_ns() // 1000
            delays = backoffs(self._policy)
            self._reaches[symbol] = Reach(symbol, last_id, cause, now_us, *delays)
        self._woken.set()

    @property
    def idle(self) -> bool:
        """Whether it knows of nothing to do."""
        return not (self._table or self._reaches or self._busy)

    # ---- which hole is next ------------------------------------------------------------------

    async def _look(self) -> None:
        """Choose the newest of the open holes; forget those that are open no longer."""
        began_us = clock.wall_ns() // 1000
        limit = self._table.look_limit
        self._looked_s = _now_s()
        self._next_look_s = self._looked_s + self._policy.look_s * random.uniform(0.9, 1.1)
        try:
            holes = await self._store.open_holes(limit=limit)
            ends_us = [one.last_us for one in (await self._store.bounds()).values()]
        except TransientStoreError as error:
            self.stats.last_error = str(error)
            self._next_look_s = _now_s() + _LOOK_AGAIN_S
            return
        self._newest_us = max(ends_us, default=None)
        wanted = [one for one in holes if self._is_wanted(one.above_us, one.detected_us)]
        gone = self._table.choose(wanted, soon_s=self._next_look_s, began_us=began_us)
        if len(holes) < limit:  # so what is not among them is open no longer
            still = {hole[:2] for hole in holes}
            filled = [work for work in gone if work.filled and work.key not in still]
            self.stats.holes_filled += len(filled)  # by pages for others

    def _begin(self, group: asyncio.TaskGroup) -> None:
        """Begin the steps that are due, the newest first, one a symbol; refused ones last."""
        now_s = _now_s()
        if self._is_full or self._paused() or now_s < self._venue_not_before_s:
            return
        due = [work for work in self._free() if work.not_before_s <= now_s]
        due.sort(key=lambda work: (-work.refusals, *age_order(work)), reverse=True)
        if self._is_failing:
            # One whose trouble is its own must not be all that is asked for.
            due.sort(key=lambda work: work.failed_s)
        for work in due:
            if self._is_full:
                return
            if not self._is_free(work) or self._is_fresh(work, now_s):
                continue
            self._busy[work.symbol] = work
            group.create_task(self._turn(work), name=f"fill {work}")

    def _is_fresh(self, work: Work | Reach, now_s: float) -> bool:
        """Tell whether the work still has its grace; its next turn is then at the end of that."""
        if self._left is not None or (isinstance(work, Work) and work.requests):
            return False
        age_s = (clock.wall_ns() // 1000 - work.since_us) / 1e6
        wait_s = self._grace(work.symbol) - age_s
        # A clock that stepped back makes an age negative.
        if wait_s <= 0 or age_s < 0:
            return False
        work.not_before_s = now_s + wait_s
        return True

    async def _wait(self) -> None:
        """Wait for the end of a step, for a new hole, or for the next thing that is due."""
        now_s = _now_s()
        times = [] if self._is_full else [work.not_before_s for work in self._free()]
        wait_s = max(min(times), self._venue_not_before_s) - now_s if times else 60.0
        if self._left is None:
            wait_s = min(wait_s, self._next_look_s - now_s)
        if self._paused():
            wait_s = max(wait_s, _PAUSE_S)
        try:
            async with asyncio.timeout(max(wait_s, 0.0)):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()

    # ---- one turn ----------------------------------------------------------------------------

    async def _turn(self, work: Work | Reach) -> None:
        try:
            step = await self._attempt(work)
        finally:
            del self._busy[work.symbol]
            self._woken.set()
        work.not_before_s = _now_s() + step.delay_s
        if isinstance(work, Reach):
            if step.pieces is not None or work.fruitless > _REACH_TRIES:
                self._reaches.pop(work.symbol, None)
        else:
            self._settle(work, step)
            if self._left is None and work.not_before_s > self._next_look_s:
                self._table.park(work)
        self._on_progress(self.stats)

    async def _attempt(self, work: Work | Reach) -> Step:
        """Make a step; an error becomes a delay."""
        before = self.stats.last_error
        began_s = _now_s()
        try:
            if isinstance(work, Work):
                step = await self._filler.step(work)
            else:
                step, opened = await self._filler.reach(work)
                self.wake(opened)
        except RestError as error:
            return self._venue_failed(work, error)
        except TransientStoreError as error:
            return self._failed(work, "database", error)
        except WrongReplyError as error:
            if not error.delay_s:
                return self._host_failed(work, "broken", error)
            return Step(max(self._failed(work, "broken", error).delay_s, error.delay_s))
        except OSError as error:  # the disk: no hole is worth the capture of all others
            return self._failed(work, "dump", error)
        if self._filler.answered_s >= began_s:
            self._venue_pause.reset()
            self._venue_not_before_s = 0.0
        if self.stats.last_error is before:
            self.stats.last_error = None
        return step

    def _failed(self, work: Work | Reach, reason: str, error: Exception) -> Step:
        self._note(work, reason, error)
        return self._later(work)

    def _note(self, work: Work | Reach, reason: str, error: Exception) -> None:
        work.failures += 1
        self.stats.retries[reason] += 1
        self.stats.last_error = work.why = str(error)
        once_per(log, (reason, work.symbol)).warning(
            "a request for missing trades failed and is made again",
            extra={"hole": str(work), "reason": reason, "error": str(error)},
        )

    def _later(self, work: Work | Reach) -> Step:
        return Step(max(work.trouble.next_delay_s(), self._policy.lag_base_s))

    def _venue_failed(self, work: Work | Reach, error: RestError) -> Step:
        refused = error.kind == "refused" and error.retry_after_s > 0
        if error.kind in ("banned", "limited") or refused:
            self.stats.retries[error.kind] += 1
            self.stats.last_error = work.why = str(error)
            return Step(max(error.retry_after_s, 1.0))
        if error.kind == "refused" and error.status == _BAD_REQUEST:
            self._note(work, error.kind, error)
            # The symbol is not listed any more, mostly. The dumps may still have it.
            if isinstance(work, Reach):
                return Step(pieces=[])
            work.lost, work.rest_due_s = str(error), _now_s() + HOUR_S
            return Step()
        return self._host_failed(work, error.kind, error, min(error.retry_after_s, _MOST_TOLD_S))

    def _host_failed(
        self, work: Work | Reach, reason: str, error: Exception, told_s: float = 0.0
    ) -> Step:
        """Let all holes wait a little; this one for longer, if others were answered meanwhile.

        So trouble of the host ends for all of them with its first good reply, and trouble of one
        hole is asked about ever more seldom.
        """
        self._note(work, reason, error)
        is_own = 0 < work.failed_s < self._filler.answered_s
        work.failed_s = _now_s()
        pause_s = max(self._venue_pause.next_delay_s(), self._policy.lag_base_s, told_s)
        self._venue_not_before_s = work.failed_s + pause_s
        return self._later(work) if is_own else Step()

    @property
    def _is_failing(self) -> bool:
        """Whether the venue gives nothing of use, several times in a row."""
        return self._venue_pause.attempts > 1

    def _settle(self, work: Work, step: Step) -> None:
        """Note what has become of the hole."""
        if step.absent:
            for other in self._table.of(work.symbol):
                left = plan.missing(other.span, step.absent)
                if left != [other.span]:
                    self._table.replace(other, left)
        elif step.pieces is not None:
            if not step.pieces and work.filled:
                self.stats.holes_filled += 1
            self._table.replace(work, step.pieces)
        if work not in self._table:
            return
        if self._left is not None and self._is_vain(work, step.delay_s):
            self._table.drop(work)
            self._left.append(work)
        elif not self._is_wanted(work.above_us, work.since_us):
            self._table.drop(work)

    def _is_vain(self, work: Work, delay_s: float) -> bool:
        banned = self.stats.retries["banned"] + self.stats.retries["limited"]
        patience_s = _BAN_PATIENCE_S if banned and not work.lost else _PATIENCE_S
        failures = max(work.failures, self._venue_pause.attempts // 2)
        if work.refusals:
            return True
        return delay_s > patience_s or work.fruitless >= _FRUITLESS or failures > _FAILURES

    # ---- whose turn it can be ----------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        return len(self._busy) >= self._policy.workers

    def _free(self) -> list[Work | Reach]:
        """Return what could have a turn now, as far as others' turns go."""
        works: list[Work | Reach] = [*self._reaches.values(), *self._table.active.values()]
        return self._free_of(works)

    def _is_free(self, work: Work | Reach) -> bool:
        return bool(self._free_of((work,)))

    def _free_of(self, works: Iterable[Work | Reach]) -> list[Work | Reach]:
        busy = self._busy
        reading = [self._needs_dump(one) for one in busy.values()]
        # One question is enough to see whether a venue that fails has come back.
        may_ask, may_read = not self._is_failing or all(reading), not any(reading)
        return [
            work
            for work in works
            if work.symbol not in busy
            and (may_read if self._needs_dump(work) and not self._asks_again(work) else may_ask)
        ]

    def _needs_dump(self, work: Work | Reach) -> bool:
        return isinstance(work, Work) and (bool(work.lost) or self._policy.source == "dump")

    def _asks_again(self, work: Work | Reach) -> bool:
        """Tell whether the next step asks REST for what it has lost."""
        return isinstance(work, Work) and bool(work.lost) and work.rest_due_s <= _now_s()

    def _is_wanted(self, above_us: int, since_us: int) -> bool:
        """Tell whether a hole with this time above, found then, is young enough to be filled."""
        oldest_us = self._oldest_us()
        in_time = since_us - above_us <= self._policy.max_age_s * 1e6
        oldest_us -= int(KEEP_S * 1e6) if in_time else 0
        return above_us >= max(oldest_us, self._horizon_us())

    def _oldest_us(self) -> int:
        """Return the time from which on trades are fetched; none below the retention horizon.

        Counted from the newest stored trade where our clock is ahead of it: ages are those of the
        venue's times, and a clock that is wrong must not make all holes too old.
        """
        horizon_us = self._horizon_us()
        if self._left is not None or self._policy.max_age_s == float("inf"):
            return horizon_us
        now_us = clock.wall_ns() // 1000
        if self._newest_us is not None:
            now_us = min(now_us, self._newest_us)
        return max(now_us - int(self._policy.max_age_s * 1e6), horizon_us)

    def _horizon_us(self) -> int:
        return -(2**62) if self._store.horizon_us is None else self._store.horizon_us


def _now_s() -> float:
    return clock.mono_ns() / 1e9
