"""The holes that the back-fill knows: those that have turns, and those that wait for long."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from heapq import nlargest
from itertools import chain

from tradecore.backfill.work import FillPolicy, Reach, UnderWay, Work
from tradecore.backoff import Backoff
from tradecore.store.holes import OpenHole
from tradecore.store.ledger import Span

MAX_HOLES = 2000
"""Holes that have turns; the others are found again when these are done."""

MAX_LATER = 20_000
"""Holes that wait for longer than a look; those that can be filled are looked for past them."""

_SHOWN = 20


class Table:
    """Holes by symbol and first id; each is in one of `active` and `later`."""

    def __init__(self, policy: FillPolicy, busy: Mapping[str, Work | Reach]) -> None:
        """`busy`: what has its turn now, by symbol; it is neither changed nor dropped by a look."""
        self.active: dict[tuple[str, int], Work] = {}
        self.later: dict[tuple[str, int], Work] = {}
        self._policy = policy
        self._busy = busy

    def __bool__(self) -> bool:
        return bool(self.active or self.later)

    def __iter__(self) -> Iterator[Work]:
        return chain(self.active.values(), self.later.values())

    def __contains__(self, work: Work) -> bool:
        return (self.active.get(work.key) or self.later.get(work.key)) is work

    def of(self, symbol: str) -> list[Work]:
        """Return all holes of a symbol."""
        return [work for work in self if work.symbol == symbol]

    def add(self, symbol: str, first_id: int, last_id: int, now_us: int) -> None:
        """Add a hole that has just been opened."""
        lag, trouble = backoffs(self._policy)
        self._add(Work(symbol, first_id, last_id, now_us, None, now_us, lag, trouble))

    def add_open(self, hole: OpenHole) -> None:
        """Add a hole that the ledger shows, or learn what has become of it."""
        key = hole.symbol, hole.first_id
        known = self.active.get(key) or self.later.get(key)
        if known is None:
            times = hole.above_us, hole.below_us, hole.detected_us
            self._add(Work(*key, hole.last_id, *times, *backoffs(self._policy)))
        elif hole.symbol not in self._busy:
            known.last_id, known.above_us = hole.last_id, hole.above_us
            known.below_us = hole.below_us

    def drop(self, work: Work) -> None:
        """Forget a hole."""
        self.active.pop(work.key, None)
        self.later.pop(work.key, None)

    def replace(self, work: Work, pieces: Iterable[Span]) -> None:
        """Put what is left of a hole in its place."""
        self.drop(work)
        for piece in pieces:
            lag, trouble = backoffs(self._policy)
            part = replace(
                work,
                first_id=piece.first_id,
                last_id=piece.last_id,
                lag=lag,
                trouble=trouble,
                filled=work.filled if piece.first_id == work.first_id else 0,
                days=None if work.days is None else [*work.days],
                without={*work.without},
            )
            self._add(part)

    def park(self, work: Work) -> None:
        """Let a hole wait until a look finds that its turn is near."""
        if self.active.get(work.key) is work:
            self.later[work.key] = self.active.pop(work.key)

    @property
    def look_limit(self) -> int:
        """How many of the newest holes a look has to read."""
        return MAX_HOLES + min(len(self.later), MAX_LATER)

    def choose(self, holes: Iterable[OpenHole], *, soon_s: float, began_us: int) -> list[Work]:
        """Take up the newest of `holes`, which come newest first; return those that are forgotten.

        `soon_s`: what waits until then, of the monotonic clock, has a turn before the next look.
        `began_us`: holes that were seen first after this may be missing in `holes`.
        """
        room = MAX_HOLES
        chosen = {work.key for work in self._busy.values()}
        for hole in holes:
            key = hole.symbol, hole.first_id
            work = self.later.get(key)
            if work is None or work.not_before_s <= soon_s:
                if not room:
                    continue
                room -= 1
                if work is not None:
                    self.active[key] = self.later.pop(key)
            chosen.add(key)
            self.add_open(hole)
        gone = [work for work in self if work.key not in chosen and work.since_us < began_us]
        for work in gone:
            self.drop(work)
        return gone

    def under_way(self) -> tuple[UnderWay, ...]:
        """Return the newest holes of which something was asked."""
        begun = (one for one in self if one.symbol in self._busy or one.filled or one.requests)
        return tuple(
            UnderWay(work.symbol, work.first_id, work.last_id, work.filled, work.why)
            for work in nlargest(_SHOWN, begun, key=age_order)
        )

    def _add(self, work: Work) -> None:
        if work.key not in self.later:
            self.active.setdefault(work.key, work)


def age_order(work: Work | Reach) -> tuple[int, int]:
    """Order by time; until the first step those told of by their ids have that of being told."""
    return work.above_us, work.last_id


def backoffs(policy: FillPolicy) -> tuple[Backoff, Backoff]:
    """Return the delays for a database that lags, and for errors."""
    return (
        Backoff(policy.lag_base_s, policy.lag_cap_s),
        Backoff(policy.trouble_base_s, policy.trouble_cap_s),
    )
