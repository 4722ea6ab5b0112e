"""One step of filling one hole: a request, what it tells, and what is written because of it.

A step asks the ledger first what is still missing: another host, the other line or a late frame
may have brought it. Then, as far as that goes:

    newest    for holes among the newest 1,000 ids, once: this comes from the venue's memory
    day       where very many pages of a past day are missing: that day's dump
    page      the highest 1,000 ids of the hole, again and again; the hole shrinks from above, and
              holes of the symbol that lie so near are filled by the same page
    probe     a page that had nothing of the hole: does the venue serve the trade below it?
    dump      it does not, and some seconds later neither: the daily dumps of the days in between;
              REST is asked again each minute while a day of them is not over, later each hour,
              since a replica that lags or has a short history heals
    confirm   it does, and passes over the ids: the same again some seconds later, since the
              venue's database may lag; then the hole is closed as absent, or, if a stored kline
              counts the ids, looked for like what REST does not serve

The dumps are read in `daily`, and ids are closed in `absent`. Which hole is next and what happens
after an error is decided in `engine`.
"""

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy.typing as npt

from tradecore import clock
from tradecore.backfill import plan
from tradecore.backfill.absent import COUNTED, Absences, sighting
from tradecore.backfill.daily import Daily
from tradecore.backfill.plan import Asked, Told
from tradecore.backfill.refusals import Refusals
from tradecore.backfill.work import (
    HOUR_S,
    FillPolicy,
    FillStats,
    Reach,
    Step,
    Work,
    WrongReplyError,
)
from tradecore.backfill.write import Writer
from tradecore.log import once_per
from tradecore.rest import trades
from tradecore.rest.client import RestClient
from tradecore.store.ledger import HoleId, Span
from tradecore.store.sink import WriteResult
from tradecore.store.store import Store

log = logging.getLogger(__name__)

Rows = npt.NDArray[Any]

_MAX_LAG_US = 10_000_000
_PATIENT_AFTER = 30  # replies without a trade, after which the venue is asked more seldom
_HOURLY_AFTER = 100
_REFUSED = "the database refuses these trades: see dead_letters"
_AGAIN_EVERY_S = 0.5  # between two questions about what REST has lost, of all symbols


class _RefusedError(Exception):
    """The database has taken nothing of a page, and refused what it has of the hole."""


class _ExpiredError(Exception):
    """What was fetched is in part below the retention horizon; `spans` need not be looked for."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)


class Filler:
    """Makes the steps; its tables hold what was learnt from one to the next."""

    def __init__(
        self,
        store: Store,
        client: RestClient,
        policy: FillPolicy,
        stats: FillStats,
        *,
        works_of: Callable[[str], list[Work]],
    ) -> None:
        """`works_of` gives all holes of a symbol that wait to be filled."""
        self._store = store
        self._client = client
        self._policy = policy
        self._stats = stats
        self._works_of = works_of
        self._write = Writer(store, stats.retries)
        self.answered_s = 0.0
        """When the venue's database last answered as it should, by the monotonic clock."""
        self._lag_us = 0
        self._next_again_s = 0.0
        self._refusals = Refusals(policy.refused_base_s, policy.refused_cap_s)
        self._absences = Absences(store, stats, policy.confirm_s)
        self._daily = Daily(store, client, policy, stats, self._write, works_of=works_of)

    # ---- a hole ------------------------------------------------------------------------------

    async def step(self, work: Work) -> Step:
        """Make one step. Raises TransientStoreError, RestError, WrongReplyError."""
        try:
            return await self._step(work)
        except _ExpiredError as expired:
            return Step(absent=expired.spans)
        except _RefusedError:
            work.refusals += 1
            self._refusals.refused(work.symbol)
            return self._refused_by_database(work)

    async def _step(self, work: Work) -> Step:
        if work.refusals and self._refusals.wait_s(work.symbol) > 0:
            return self._refused_by_database(work)
        pieces = plan.missing(work.span, await self._store.covered(work.symbol, *work.span))
        if work.refusals and pieces != [work.span]:
            self._takes_again(work.symbol)
        if len(pieces) != 1 or pieces[0].first_id != work.first_id:
            return Step(pieces=pieces)
        work.last_id = pieces[0].last_id
        if not await self._know_times([work]):
            return Step(pieces=[])  # nothing is stored around it any more: it is no hole
        waits = self._refusals.wait_s(work.symbol) > 0
        if waits and await self._store.is_parked(work.symbol, *work.span):
            return self._refused_by_database(work)
        if (suspect := self._absences.suspect(work.symbol, work.span)) is not None:
            if suspect.wait_s > 0:
                work.why = "the venue passed over these ids, which is asked again"
                return Step(suspect.wait_s)
            return await self._confirm(work)
        if work.lost or self._policy.source == "dump":
            return await self._instead(work)
        age_us = clock.wall_ns() // 1000 - work.above_us
        # A clock that stands behind the venue's makes it negative: never wait longer than the lag.
        if (wait_us := min(self._lag_us - age_us, self._lag_us)) > 0:
            # Others have seen that the database lags so much; memory does not.
            if not await self._try_newest(work):
                return Step(wait_us / 1e6)
            return Step()
        if await self._try_newest(work):
            return Step()
        if work.probing:
            return await self._probe(work)
        if self._policy.source == "auto" and await self._daily.instead_of_pages(work):
            return Step()
        return await self._page(work)

    async def _know_times(self, works: list[Work]) -> bool:
        """Look up the times of holes that were told of by their ids; tell whether all are known."""
        if unknown := [one for one in works if one.below_us is None]:
            spans = [one.span for one in unknown]
            times = await self._store.hole_times(unknown[0].symbol, spans)
            for one in unknown:
                if found := times.get(one.first_id):
                    one.below_us, one.above_us = found
        return all(one.below_us is not None for one in works)

    async def _try_newest(self, work: Work) -> bool:
        """Take what the venue's memory has of the hole, once; tell whether that was anything."""
        if work.tried_newest:
            return False
        work.tried_newest = True
        bounds = (await self._store.bounds(work.symbol)).get(work.symbol)
        if bounds is None or bounds.last_id - work.first_id >= plan.PAGE_ROWS:
            return False
        page = await trades.newest(self._client, work.symbol)
        ids = page.rows["trade_id"]
        if len(ids) == 0:
            return False
        result = await self._take(work, page.rows, Asked(int(ids[0]), plan.PAGE_ROWS))
        return result.stored + result.duplicate > 0

    async def _page(self, work: Work) -> Step:
        others = [
            one.span
            for one in self._works_of(work.symbol)
            if not one.lost and (work.refusals or not one.refusals)
        ]
        asked = plan.page_from_above(work.span, others)
        rows, told = await self._ask(work, asked)
        await self._take(work, rows, asked)
        if told.ends_early:
            return self._lags(work)
        self._caught_up(work)
        work.probing = not told.inside
        return Step()

    async def _probe(self, work: Work) -> Step:
        asked = await self._below(work)
        rows, told = await self._ask(work, asked)
        await self._take(work, rows, asked)
        if len(rows) == 0 or (told.ends_early and not told.inside):
            return self._lags(work)
        if not told.has_below and not told.inside:
            return self._begins_late(work, rows)
        work.probing = False
        work.late_s = 0.0
        self._learn_begin(work.symbol, int(rows["trade_id"][0]))
        return Step()

    async def _instead(self, work: Work) -> Step:
        """Ask REST again for what it has lost, when it is time to; else read the dumps."""
        now_s = clock.mono_ns() / 1e9
        asks = self._policy.source != "dump"
        if asks and work.rest_due_s <= now_s:
            work.rest_due_s = now_s + self._again_s(work)
            if now_s < self._next_again_s:
                return Step()  # there are many of them: the next time
            self._next_again_s = now_s + _AGAIN_EVERY_S
            return await self._probe(work)
        step = Step(work.dump_due_s - now_s)
        if step.delay_s <= 0:
            step = await self._daily.step(work)
            now_s = clock.mono_ns() / 1e9
            work.dump_due_s = now_s + step.delay_s
        due_s = min(work.dump_due_s, work.rest_due_s) if asks else work.dump_due_s
        return step._replace(delay_s=max(due_s - now_s, 0.0))

    async def _below(self, work: Work) -> Asked:
        """Return the probe of a hole, from a trade that the venue is known to have had."""
        below = work.first_id - 1
        known = await self._store.covered(work.symbol, below, below)
        return plan.probe_from_below(work.span, wide=not known)

    async def _confirm(self, work: Work) -> Step:
        """Ask for the second time about ids that a reply passed over, and others near below."""
        asked = await self._below(work)
        others = self._due_below(work)
        if others:
            from_id = min(asked.from_id, others[0].first_id - 1)
            limit = min(max(asked.limit, work.last_id + 2 - from_id), plan.PAGE_ROWS)
            asked = Asked(from_id, limit)
        rows, told = await self._ask(work, asked)
        self._hold_against_times(work, rows)
        if told.ends_early and not told.inside:
            return self._lags(work)
        if told.inside or not told.has_below:
            self._absences.forget(work.symbol, work.span)
            if not told.inside:
                return self._begins_late(work, rows)
            await self._take(work, rows, asked)
            return Step()
        closed = [one.span for one in (work, *others) if await self._close(one, rows, asked)]
        return Step(absent=tuple(closed))

    def _due_below(self, work: Work) -> list[Work]:
        """Return holes, from below, that one page can show together with this one to be absent."""
        lowest = work.last_id + 3 - plan.PAGE_ROWS
        return sorted(
            (
                one
                for one in self._works_of(work.symbol)
                if lowest <= one.first_id < work.first_id
                and (suspect := self._absences.suspect(one.symbol, one.span)) is not None
                and suspect.wait_s <= 0
            ),
            key=lambda one: one.first_id,
        )

    async def _close(self, work: Work, rows: Rows, asked: Asked) -> bool:
        """Close a hole that this second reply passes over as well; tell whether it is.

        One that a kline counts is lost to REST: the dump may have it.
        """
        ids = rows["trade_id"]
        jumps = plan.jumps(ids[plan.around(ids, work.span)], work.span)
        suspect = self._absences.suspect(work.symbol, work.span)
        if [jump[:2] for jump in jumps] != [work.span] or suspect is None:
            return False
        second = sighting(asked, jumps[0])
        replies = [suspect.sighting, second]
        evidence = {"source": "rest", **second, "replies": replies}
        if await self._absences.close(work.symbol, jumps[0], evidence):
            return True
        work.lost = work.why = COUNTED
        work.rest_due_s = clock.mono_ns() / 1e9 + self._again_s(work)
        return False

    async def _ask(self, work: Work, asked: Asked) -> tuple[Rows, Told]:
        work.requests += 1
        work.fruitless += 1
        page = await trades.historical(self._client, work.symbol, asked.from_id, asked.limit)
        told = self._judge(work, page.rows, asked)
        self.answered_s = clock.mono_ns() / 1e9
        return page.rows, told

    def _judge(self, work: Work, rows: Rows, asked: Asked) -> Told:
        try:
            return plan.judge(rows["trade_id"], work.span, asked)
        except ValueError as error:
            raise WrongReplyError(
                f"the venue's reply for {work.symbol} from {asked.from_id} is not usable: {error}"
            ) from None

    async def _take(self, work: Work, rows: Rows, asked: Asked) -> WriteResult:
        """Store the rows of this hole and of others that they reach; note what they pass over."""
        told = self._judge(work, rows, asked)
        ids = rows["trade_id"]
        self._hold_against_times(work, rows)
        works = await self._reached(work, rows)
        chosen = rows[plan.select(ids, [one.span for one in works])]
        if told.inside:
            work.lost = ""  # not any more
            work.above_us = min(work.above_us, int(rows["trade_us"][told.low]))
        result = WriteResult()
        if len(chosen):
            result = await self._write(work.symbol, chosen, "rest")
            self._stats.filled["rest"] += result.stored
            if result.expired:
                await self._give_up_below(works, chosen)
        if result.stored or result.duplicate:
            work.fruitless = 0
            work.late_s = 0.0
            work.failures = 0
            work.lag.reset()
            work.trouble.reset()
        for one in works:
            if result.stored:
                one.filled += int(plan.select(ids, [one.span]).sum())
            for jump in plan.jumps(ids, one.span):
                self._absences.sighted(work.symbol, jump, sighting(asked, jump))
        if told.inside and result.parked and not result.stored:
            raise _RefusedError
        return result

    async def _give_up_below(self, works: list[Work], rows: Rows) -> None:
        """Close what of these holes is below the newest of `rows` that are too old to be stored.

        Raises _ExpiredError, which says what was closed.
        """
        old = rows["trade_id"][rows["trade_us"] < (self._store.horizon_us or 0)]
        if len(old) == 0:
            return
        top = int(old[-1])
        closed = [Span(one.first_id, min(one.last_id, top)) for one in works if one.first_id <= top]
        evidence = {"source": "retention", "id_above": top}
        for span in closed:
            await self._store.close_absent(works[0].symbol, *span, evidence)
        raise _ExpiredError(closed)

    def _hold_against_times(self, work: Work, rows: Rows) -> None:
        try:
            plan.hold_against_times(rows, work.hole)
        except ValueError as error:
            raise WrongReplyError(
                f"what {self._client.base_url} has of {work.symbol} is not stored: {error};"
                " correct BINANCE_REST_URL, or record a symbol that is listed anew in another"
                " database",
                delay_s=_misfit_delay_s(work),
            ) from None

    async def _reached(self, work: Work, rows: Rows) -> list[Work]:
        """Return this hole and those of its symbol that `rows` reach and fit."""
        if len(rows) == 0:
            return []
        first_id, last_id = int(rows["trade_id"][0]), int(rows["trade_id"][-1])
        others = [
            one
            for one in self._works_of(work.symbol)
            if one is not work
            and one.last_id >= first_id
            and one.first_id <= last_id
            and (work.refusals or not one.refusals)
        ]
        await self._know_times(others)
        reached = [work]
        for one in others:
            with suppress(ValueError):  # it is told of when it has its own turn
                if one.below_us is not None:
                    plan.hold_against_times(rows, one.hole)
                    reached.append(one)
        return reached

    def _lags(self, work: Work | Reach) -> Step:
        """The venue's database has not got there yet: wait, longer each time."""
        self._stats.retries["lag"] += 1
        if isinstance(work, Work):
            age_us = clock.wall_ns() // 1000 - work.above_us
            self._lag_us = min(max(self._lag_us, age_us), _MAX_LAG_US)
        work.why = "the venue's database does not have these trades yet"
        delay_s = max(work.lag.next_delay_s(), self._policy.lag_base_s / 2)
        if work.fruitless >= _PATIENT_AFTER:
            delay_s = delay_s * 12 if work.fruitless < _HOURLY_AFTER else HOUR_S
        return Step(delay_s)

    def _caught_up(self, work: Work) -> None:
        self._lag_us = min(self._lag_us, max(0, clock.wall_ns() // 1000 - work.above_us))

    def _begins_late(self, work: Work, rows: Rows) -> Step:
        """REST begins above the hole: told twice, seconds apart, what it lacks is for the dumps."""
        now_s = clock.mono_ns() / 1e9
        begins = int(rows["trade_id"][0])
        work.late_s = work.late_s or now_s
        wait_s = work.late_s + self._policy.confirm_s - now_s
        if wait_s > 0 and not work.lost:
            work.probing = True
            work.why = f"the venue's reply began at {begins}, above these ids: it is asked again"
            return Step(wait_s)
        if not work.lost:
            once_per(log, ("lost", work.symbol)).warning(
                "REST does not have the trades of a hole; it is asked again now and then, and the "
                "hole is filled from the venue's daily dump if that is there first, the day after",
                extra={
                    "symbol": work.symbol,
                    "first_id": work.first_id,
                    "last_id": work.last_id,
                    "begins": begins,
                },
            )
        work.probing = False
        work.lost = f"the venue's REST has nothing older than {begins}"
        self._learn_begin(work.symbol, begins)
        return Step()

    def _learn_begin(self, symbol: str, begins: int) -> None:
        """REST has trades from `begins` on: what was lost above is asked for, the rest waits."""
        now_s = clock.mono_ns() / 1e9
        for one in self._works_of(symbol):
            if one.lost == COUNTED and one.last_id >= begins:
                continue  # REST has what is around it, and was asked for it twice
            if one.lost and one.last_id >= begins:
                one.lost, one.late_s, one.not_before_s = "", 0.0, 0.0
            elif one.lost:
                one.rest_due_s = now_s + self._again_s(one)
                one.not_before_s = min(one.dump_due_s, one.rest_due_s)

    def _again_s(self, work: Work) -> float:
        """Return the seconds until REST is asked again for what it should have and does not give.

        While the day is not over nobody else can have it.
        """
        over = plan.is_over(plan.day_of(work.above_us), clock.wall_ns() // 1000)
        return (HOUR_S if over else self._policy.rest_again_s) * random.uniform(0.75, 1.0)

    def _refused_by_database(self, work: Work) -> Step:
        """Let the hole wait with the others of its symbol that are refused."""
        work.refusals = work.refusals or 1
        work.why = _REFUSED
        return Step(self._refusals.wait_s(work.symbol))

    def _takes_again(self, symbol: str) -> None:
        """The database has taken a trade that it refused: it is offered all of them."""
        self._refusals.taken(symbol)
        for one in self._works_of(symbol):
            if one.refusals:
                one.refusals, one.not_before_s = 0, 0.0

    # ---- above the highest stored trade ------------------------------------------------------

    async def reach(self, reach: Reach) -> tuple[Step, tuple[HoleId, ...]]:
        """Store the page that ends at the venue's newest trade; return the hole that this opens."""
        bounds = (await self._store.bounds(reach.symbol)).get(reach.symbol)
        if bounds is None or bounds.last_id >= reach.last_id:
            return Step(pieces=[]), ()
        above = Span(bounds.last_id + 1, reach.last_id)
        reach.fruitless += 1
        if not reach.tried_newest:
            page = await trades.newest(self._client, reach.symbol)
        else:
            asked = plan.page_from_above(above)
            page = await trades.historical(self._client, reach.symbol, *asked)
            self.answered_s = clock.mono_ns() / 1e9
        low, high = page.rows["trade_id"].searchsorted((above.first_id, above.last_id + 1))
        rows = page.rows[low:high]
        if len(rows) == 0:
            # The id that was told may be wrong: ask by turns for it and for whatever is newest.
            reach.tried_newest = not reach.tried_newest
            return self._lags(reach), ()
        oldest_us = int(rows["trade_us"].min())
        if oldest_us < bounds.last_us - plan.SLACK_US:
            raise WrongReplyError(
                f"what {self._client.base_url} has of {reach.symbol} above {bounds.last_id} is not"
                " stored: it is older than that; correct BINANCE_REST_URL, or record a symbol that"
                " is listed anew in another database",
                delay_s=_misfit_delay_s(reach),
            )
        reach.tried_newest = True
        result = await self._write(reach.symbol, rows, "rest", reach.cause)
        self._stats.filled["rest"] += result.stored
        if result.parked and not result.stored:
            reach.refusals += 1
            reach.why = _REFUSED
            return Step(HOUR_S), ()
        return Step(), result.opened


def _misfit_delay_s(work: Work | Reach) -> float:
    """Trades of another venue stay so; a passing trouble of this one does not."""
    return min(60.0 * 2.0 ** min(work.failures, 6), HOUR_S)
