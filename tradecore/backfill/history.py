"""Trades from before the first captured one, downwards.

Page by page over REST, or by the whole day's dump when that is cheaper or REST has no more. What is
written adjoins the oldest stored range from below; where a day has no dump the next one below goes
on, and what lies between is a hole like any other. However this ends, the ledger is whole.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tradecore import clock
from tradecore.backfill import plan
from tradecore.backfill.dumps import Dumps, DumpTrouble, blocks
from tradecore.backfill.plan import PAGE_ROWS, Asked
from tradecore.backfill.work import HOUR_S, WrongReplyError
from tradecore.backoff import Backoff
from tradecore.rest import trades
from tradecore.rest.budget import RestError
from tradecore.rest.client import RestClient
from tradecore.rest.dump import BLOCK_ROWS, DumpError, on_disk
from tradecore.schema import TRADE_DTYPE
from tradecore.store.ledger import Span
from tradecore.store.sink import WriteResult

log = logging.getLogger(__name__)

Rows = npt.NDArray[Any]

CAUSE = "history"
"""Of a hole that the venue's own history has."""

_LAG_TRIES = 20


class Begin(NamedTuple):
    """Where the stored history of a symbol begins now."""

    first_id: int
    first_us: int
    why: str = ""
    """Why not earlier; "" when it begins where it was to begin."""
    is_all: bool = True
    """The venue has, as far as it says, no trade between there and the time asked for."""


class History:
    """Extends one symbol after another."""

    def __init__(
        self,
        client: RestClient,
        dumps: Dumps,
        write: Callable[[str, Rows, str, str | None], Awaitable[WriteResult]],
        *,
        source: str = "auto",
        on_stored: Callable[[str, int], None] = lambda source, rows: None,
    ) -> None:
        """`write` takes symbol, rows, source and cause; `on_stored` hears of each write."""
        self._client = client
        self._dumps = dumps
        self._write = write
        self._source = source
        self._on_stored = on_stored

    async def extend(self, symbol: str, first_id: int, first_us: int, from_us: int) -> Begin:
        """Store what lies between `from_us` and the oldest stored trade; say how far that went.

        Raises RestError, WrongReplyError, one of DumpTrouble, TransientStoreError: what was stored
        until then stays, and the next call goes on below it.
        """
        at = _Place(first_id, first_us, done=first_us <= from_us, pages_left=0.0)
        rest_ended = self._source == "dump"
        without: set[date] = set()  # days whose dump is of no use
        read: set[date] = set()  # days whose dump has given all that it has
        end: _End | None = None
        while not at.done and at.first_id > 0:
            day = plan.day_of(at.first_us)
            if rest_ended:
                end = end or await self._find_end(symbol, at, from_us)
                if at.first_us < end.proven_us:
                    return Begin(at.first_id, at.first_us, "the venue has nothing older")
                lower = None
                if self._source != "rest":
                    lower = await self._next_day(symbol, at, from_us, end.lowest, read)
                if lower is None:
                    why = self._why(day, end.lowest)
                    return Begin(at.first_id, at.first_us, why, is_all=False)
                at = lower
            elif at.pages_left > plan.DUMP_PAGES and day not in without and self._source == "auto":
                lower = await self._day(symbol, at, from_us, day, adjoining=True)
                if lower is None:
                    without.add(day)
                else:
                    at = lower
            else:
                lower = await self._page(symbol, at, from_us)
                rest_ended = lower.first_id == at.first_id and not lower.done
                at = lower
        return Begin(at.first_id, at.first_us)

    def _why(self, day: date, lowest: date) -> str:
        rest = "the venue's REST has nothing older"
        dumps = f"no dump from {lowest} to {day} has anything older"
        return {"rest": rest, "dump": dumps}.get(self._source, f"{rest}, and {dumps}")

    async def _find_end(self, symbol: str, at: "_Place", from_us: int) -> "_End":
        """Tell how far down trades can be, by the venue's klines if they are to be had."""
        # A dump that has nothing but what is older than `from_us` proves it as well.
        unknown = _End(plan.day_of(from_us) - timedelta(days=1), 0)
        if self._source == "dump":
            return unknown
        begin_us, minute_us = (
            us // plan.MINUTE_US * plan.MINUTE_US for us in (from_us, at.first_us)
        )
        try:
            found = await trades.first_traded_us(self._client, symbol, begin_us, minute_us)
        except RestError as error:
            log.warning("the venue does not tell since when it has %s: %s", symbol, error)
            return unknown
        first_us = minute_us if found is None else found
        return _End(plan.day_of(first_us), first_us + plan.MINUTE_US)

    # ---- over REST ---------------------------------------------------------------------------

    async def _page(self, symbol: str, at: "_Place", from_us: int) -> "_Place":
        """Store the page right below; the same place when there is none."""
        from_id = max(0, at.first_id - PAGE_ROWS)
        asked = Asked(from_id, at.first_id - from_id)
        span = Span(from_id, at.first_id - 1)
        pause = Backoff(0.2, 10.0)
        while True:
            page = await trades.historical(self._client, symbol, *asked)
            try:
                told = plan.judge(page.rows["trade_id"], span, asked)
            except ValueError as error:
                raise WrongReplyError(
                    f"the venue's reply for {symbol} from {from_id} is not usable: {error}"
                ) from None
            if not told.ends_early:
                break
            # Its database does not have yet what it sent us over the stream.
            if pause.attempts >= _LAG_TRIES:
                raise WrongReplyError(
                    f"the venue's database lags behind its stream at {symbol} {at.first_id};"
                    " try again later"
                )
            await asyncio.sleep(max(pause.next_delay_s(), 0.1))
        rows = page.rows[told.low : told.high]
        if len(rows) == 0:
            return at
        if later := _later(rows, at):
            raise WrongReplyError(
                f"what {self._client.base_url} has of {symbol} is not stored: {later};"
                " correct BINANCE_REST_URL, or record a symbol that is listed anew in another"
                " database",
                delay_s=HOUR_S,
            )
        wanted = np.flatnonzero(rows["trade_us"] >= from_us)
        if len(wanted) == 0:
            return at._replace(done=True)
        done = int(wanted[0]) > 0
        rows = rows[wanted[0] :]
        first_us, last_us = int(rows["trade_us"][0]), int(rows["trade_us"][-1])
        await self._store(symbol, rows, "rest")
        left_us = first_us - max(from_us, plan.day_start_us(plan.day_of(first_us)))
        over = plan.is_over(plan.day_of(first_us), clock.wall_ns() // 1000)
        pages_left = left_us / max(last_us - first_us, 1) if over else 0.0
        return _Place(int(rows["trade_id"][0]), first_us, done, pages_left)

    # ---- from dumps --------------------------------------------------------------------------

    async def _next_day(
        self, symbol: str, at: "_Place", from_us: int, lowest: date, read: set[date]
    ) -> "_Place | None":
        """Store what lies below in the next dump that has something; None: none down to `lowest`.

        Days without a dump, or with a bad one, are passed over: a hole is there then.
        """
        day = plan.day_of(at.first_us)
        while day >= lowest:
            if day not in read:
                lower = await self._day(symbol, at, from_us, day, adjoining=False)
                if lower is not None and (lower.done or lower.first_id < at.first_id):
                    read.add(day)
                    return lower
            day -= timedelta(days=1)
        return None

    async def _day(
        self, symbol: str, at: "_Place", from_us: int, day: date, *, adjoining: bool
    ) -> "_Place | None":
        """Store what lies below in the dump of a day; None when there is no such dump.

        `adjoining`: pages do as well. None also for a dump that ends too early, then, and for one
        that is bad.
        """
        if not plan.is_over(day, clock.wall_ns() // 1000):
            return None
        try:
            return await self._read_day(symbol, at, from_us, day, adjoining)
        except DumpTrouble as error:
            if not adjoining and self._dumps.silent_s:
                raise  # it is not this day's alone
            instead = "page by page" if adjoining else "the day before"
            log.warning("a dump is not to be had; %s instead: %s", instead, error)
            return None

    async def _read_day(
        self, symbol: str, at: "_Place", from_us: int, day: date, adjoining: bool
    ) -> "_Place | None":
        async with self._dumps.fetched(symbol, day) as path:
            if path is None:
                return None
            spool = path.with_name(f"{path.name}.rows")
            try:
                return await self._store_dump(symbol, at, from_us, path, spool, adjoining)
            finally:
                with suppress(OSError):
                    spool.unlink()

    async def _store_dump(
        self, symbol: str, at: "_Place", from_us: int, path: Path, spool: Path, adjoining: bool
    ) -> "_Place | None":
        """Store a dump from its end: what is written adjoins what is stored."""
        done, last_id = False, -1
        with on_disk(spool), spool.open("wb") as file:
            async for rows in blocks(path, symbol, proven=True):
                below = rows[rows["trade_id"] < at.first_id]
                if later := _later(below, at):
                    raise DumpError(f"what {path.name} has is not stored: {later}")
                late = below["trade_us"] >= from_us
                if not late.all():
                    done = True
                    below = below[late]
                if len(below):
                    last_id = int(below["trade_id"][-1])
                    file.write(below.tobytes())
                if int(rows["trade_id"][-1]) >= at.first_id:
                    break
        if last_id < 0:
            return at._replace(done=True) if done else None
        if adjoining and last_id != at.first_id - 1:
            return None
        with on_disk(spool):
            stored = np.memmap(spool, TRADE_DTYPE, "r")
        for end in range(len(stored), 0, -BLOCK_ROWS):
            await self._store(symbol, np.array(stored[max(0, end - BLOCK_ROWS) : end]), "dump")
        first = stored[0]
        return _Place(int(first["trade_id"]), int(first["trade_us"]), done, 0.0)

    async def _store(self, symbol: str, rows: Rows, source: str) -> None:
        result = await self._write(symbol, rows, source, CAUSE)
        self._on_stored(source, result.stored)


def _later(rows: Rows, at: "_Place") -> str:
    """Say which of `rows`, whose ids are less than that of `at`, is of a later time; "" if none."""
    for i in np.flatnonzero(rows["trade_us"] > at.first_us + plan.SLACK_US)[:1].tolist():
        row = rows[i]
        return (
            f"trade {int(row['trade_id'])} is of {plan.shown(int(row['trade_us']))}, but"
            f" {at.first_id} is of {plan.shown(at.first_us)}: it is another venue's, or another"
            " listing's"
        )
    return ""


class _End(NamedTuple):
    """Where the history of a symbol ends, downwards."""

    lowest: date
    """Earlier dumps are not asked for."""
    proven_us: int
    """A history that begins before this is whole, by the venue's klines; 0 = they do not tell."""


class _Place(NamedTuple):
    """How far down the history of a symbol is stored."""

    first_id: int
    first_us: int
    done: bool
    """There is nothing of it that is wanted below."""
    pages_left: float
    """Pages to the beginning of a day that is over, at the rate of the last page."""
