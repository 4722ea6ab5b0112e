"""Fills holes that are long, or that REST no longer has, from the daily dumps, newest day first."""

import logging
import random
from collections.abc import Callable
from datetime import date
from typing import Any

from tradecore import clock
from tradecore.backfill import plan
from tradecore.backfill.absent import COUNTED, Absences, sighting
from tradecore.backfill.dumps import DumpRead, Dumps, DumpTrouble, Passed, trouble_s
from tradecore.backfill.work import HOUR_S, FillPolicy, FillStats, Step, Work
from tradecore.backfill.write import Writer
from tradecore.errors import TransientStoreError
from tradecore.log import once_per
from tradecore.rest import trades
from tradecore.rest.budget import RestError
from tradecore.rest.client import RestClient
from tradecore.store.ledger import Span
from tradecore.store.store import Store

log = logging.getLogger(__name__)

_REPLACED_S = 6 * HOUR_S  # between looks at a dump that was read in vain: they are long
_MOST_MINUTES = 60


class Daily:
    """Makes one step of a hole from a dump."""

    def __init__(
        self,
        store: Store,
        client: RestClient,
        policy: FillPolicy,
        stats: FillStats,
        write: Writer,
        *,
        works_of: Callable[[str], list[Work]],
    ) -> None:
        """`works_of` gives all holes of a symbol that wait to be filled."""
        self._store = store
        self._client = client
        self._policy = policy
        self._stats = stats
        self._absences = Absences(store, stats, policy.dump_confirm_s)
        self._works_of = works_of
        self._dumps = Dumps(policy.dump_url, policy.folder, write, longest_s=policy.dump_retry_s)

    async def step(self, work: Work) -> Step:
        """Read one day's dump for the hole and all holes like it; the newest day first."""
        if self._policy.source == "rest":
            work.why = work.lost
            return Step(HOUR_S)
        if work.days is None:
            oldest_us = max(work.hole.below_us, self._store.horizon_us or 0)
            work.days = plan.days_between(oldest_us, work.above_us)[::-1]
            work.missing_dumps = 0
            work.is_dump_bad = False
        if not work.days:
            work.days = None
            work.dump_rounds += 1
            work.bad_rounds = work.bad_rounds + 1 if work.is_dump_bad else 0
            return Step(self._delay_s(work))
        day = work.days[-1]
        if not plan.is_over(day, clock.wall_ns() // 1000):
            work.days.pop()
            work.missing_dumps += 1
            work.why = _and(work.lost, f"the dump of {day} comes when that day is over")
            return Step()
        lost = {one.hole for one in self._works_of(work.symbol) if one.lost}
        try:
            read = await self._dumps.read(work.symbol, day, sorted({work.hole, *lost}))
        except DumpTrouble as error:
            self._trouble(work, day, error)
            work.why = _and(work.lost, str(error))
            if wait_s := self._dumps.silent_s:
                return Step(wait_s)
            work.days.pop()
            work.missing_dumps += 1
            work.is_dump_bad |= isinstance(error, RestError)
            return Step()
        if read is None:
            work.days.pop()
            work.missing_dumps += 1
            work.why = _and(work.lost, f"the dump of {day} is not there (yet)")
            return Step()
        self._count(work, read)
        if not work.missing_dumps:
            work.why = _and(work.lost, f"the dump of {day} does not have them")
        closed = []
        # If REST was not asked: the dump alone proves nothing.
        for passed in read.passed if work.lost else ():
            jump = passed.jump
            seen = sighting(None, jump) | {"source": "dump", "file": read.name}
            seen |= {"sha256": read.sha256, "rest": work.lost}
            if await self._is_absent(work, passed, seen):
                closed.append(Span(jump.first_id, jump.last_id))
        work.days.pop()  # not before: trouble of the database must not cost the look
        return Step(absent=tuple(closed))

    async def instead_of_pages(self, work: Work) -> bool:
        """Read the dump of a day that would take too many pages; tell whether it was there."""
        day = plan.long_day(work.hole, clock.wall_ns() // 1000)
        if day is None or day in work.without or self._dumps.is_busy:
            return False
        work.without.add(day)
        others = {one.hole for one in self._works_of(work.symbol) if one.below_us is not None}
        try:
            read = await self._dumps.read(work.symbol, day, sorted({work.hole, *others}))
        except DumpTrouble as error:
            self._trouble(work, day, error)
            return False
        if read is None:
            return False
        self._count(work, read)
        work.below_us = None  # what is left of it has other times
        return True

    def _trouble(self, work: Work, day: date, error: Exception) -> None:
        self._stats.last_error = str(error)
        self._stats.retries["dump"] += 1
        once_per(log, ("dump", work.symbol)).warning(
            "a daily dump is not to be had",
            extra={"symbol": work.symbol, "day": str(day), "error": str(error)},
        )

    def _count(self, work: Work, read: DumpRead) -> None:
        self._stats.filled["dump"] += read.stored
        work.filled += read.stored

    async def _is_absent(self, work: Work, passed: Passed, seen: dict[str, Any]) -> bool:
        """Close ids that a dump passes over, if more than this one look speaks for it.

        Files of the venue have lacked trades and been replaced days later. So its klines have to
        count no more trades than are stored around the ids; when that is not to be had, the dump
        has to pass over the ids again hours later.
        """
        jump = passed.jump
        try:
            counts = await self._counts(work.symbol, passed)
        except (RestError, TransientStoreError):
            counts = None
        if counts is not None:
            counted, stored = counts
            if counted != stored:
                work.why = _and(
                    work.lost,
                    f"{seen['file']} passes over {jump.first_id}..{jump.last_id}, but of these"
                    f" minutes the venue counts {counted:,} trades and {stored:,} are stored:"
                    " the file may be replaced, it is read again",
                )
                return False
            seen |= {"klines_count": counted}
        elif (first := self._absences.suspect(work.symbol, Span(*jump[:2]))) is None:
            self._absences.sighted(work.symbol, jump, seen)
            work.why = _and(
                work.lost,
                f"{seen['file']} passes over {jump.first_id}..{jump.last_id}; a running daemon"
                " looks at it again in some hours, and then closes them as absent",
            )
            return False
        elif first.wait_s > 0:
            return False
        else:
            seen |= {"looks": [first.sighting, dict(seen)]}
        if await self._absences.close(work.symbol, jump, seen):
            return True
        work.why = _and(work.lost, COUNTED)
        return False

    async def _counts(self, symbol: str, passed: Passed) -> tuple[int, int] | None:
        """Return how many trades of the minutes around ids the venue counts, and are stored."""
        from_us = passed.below_us // plan.MINUTE_US * plan.MINUTE_US
        to_us = (passed.above_us // plan.MINUTE_US + 1) * plan.MINUTE_US
        if to_us - from_us > _MOST_MINUTES * plan.MINUTE_US:
            return None  # to count the trades of all symbols in so long would take too long
        klines = await trades.klines(self._client, symbol, from_us, to_us)
        if len(klines) == 0:
            return None
        stored = await self._store.trades_between(symbol, from_us, to_us)
        return int(klines["trade_count"].sum()), stored

    def _delay_s(self, work: Work) -> float:
        """Dumps appear the next day, at no promised hour; poor ones are replaced days later."""
        if work.is_dump_bad:
            return trouble_s(work.bad_rounds - 1, self._policy.dump_retry_s)
        cap_s = HOUR_S if work.missing_dumps else _REPLACED_S
        longer: float = min(self._policy.dump_retry_s * 2 ** min(work.dump_rounds, 20), cap_s)
        return longer * random.uniform(0.75, 1.0)


def _and(first: str, second: str) -> str:
    return f"{first}; {second}" if first and first != second else second
