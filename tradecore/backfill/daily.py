"""Fills holes that REST no longer has from the daily dumps, the newest day first."""

import logging
import random
from collections.abc import Callable

from tradecore import clock
from tradecore.backfill import plan
from tradecore.backfill.absent import Absences, sighting
from tradecore.backfill.dumps import Dumps, DumpTrouble
from tradecore.backfill.work import HOUR_S, FillPolicy, FillStats, Step, Work
from tradecore.backfill.write import Writer
from tradecore.store.ledger import Span

log = logging.getLogger(__name__)

_REPLACED_S = 6 * HOUR_S  # between looks at a dump that was read in vain: they are long
_REST_AGAIN = 6  # rounds through the dumps after which REST is asked again too


class Daily:
    """Makes one step of a hole from a dump."""

    def __init__(
        self,
        policy: FillPolicy,
        stats: FillStats,
        write: Writer,
        absences: Absences,
        *,
        works_of: Callable[[str], list[Work]],
    ) -> None:
        """`works_of` gives all holes of a symbol that wait to be filled."""
        self._policy = policy
        self._stats = stats
        self._absences = absences
        self._works_of = works_of
        self._dumps = Dumps(policy.dump_url, policy.folder, write)

    async def step(self, work: Work) -> Step:
        """Read one day's dump for the hole and all holes like it; the newest day first."""
        if self._policy.source == "rest":
            work.why = work.lost
            return Step(HOUR_S)
        if work.days is None:
            work.days = plan.days_between(work.hole.below_us, work.above_us)[::-1]
            work.missing_dumps = 0
        if not work.days:
            work.days = None
            work.dump_rounds += 1
            if work.dump_rounds % _REST_AGAIN == 0:
                work.lost = ""  # REST may have been mistaken
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
            work.days.pop()
            work.missing_dumps += 1
            self._stats.last_error = str(error)
            self._stats.retries["dump"] += 1
            work.why = _and(work.lost, str(error))
            log.warning(
                "a daily dump is not to be had and is asked for later",
                extra={"symbol": work.symbol, "day": str(day), "error": str(error)},
            )
            return Step()
        work.days.pop()
        if read is None:
            work.missing_dumps += 1
            work.why = _and(work.lost, f"the dump of {day} is not there (yet)")
            return Step()
        self._stats.filled["dump"] += read.stored
        work.filled += read.stored
        if not work.missing_dumps:
            work.why = _and(work.lost, f"the dump of {day} does not have them")
        if not work.lost:
            return Step()  # REST was not asked: the dump alone proves nothing
        for jump in read.jumps:
            evidence = sighting(None, jump) | {"source": "dump", "file": read.name}
            await self._absences.close(work.symbol, jump, evidence | {"rest": work.lost})
        return Step(absent=tuple(Span(jump.first_id, jump.last_id) for jump in read.jumps))

    def _delay_s(self, work: Work) -> float:
        """Dumps appear the next day, at no promised hour; bad ones are replaced days later."""
        cap_s = HOUR_S if work.missing_dumps else _REPLACED_S
        longer: float = min(self._policy.dump_retry_s * 2 ** min(work.dump_rounds, 20), cap_s)
        return longer * random.uniform(0.75, 1.0)


def _and(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second
