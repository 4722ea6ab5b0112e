"""What to ask the venue for a hole, and what its reply tells. Pure: no I/O, no clock.

    ids        first ─────────────── hole ─────────────── last
    page                                 from_id ──────── last     1,000 ids at most, from above
    probe   first-1 ─────────...                                   begins at the stored trade below

The rules of `historicalTrades` that this rests on: rows begin at the first id that the venue has
at or above `fromId`, ascend, and are `limit` unless the newest trade comes before that. A reply
that begins later than it was asked to therefore tells that the venue does not serve the ids before
it, either no longer or because there never were any; two rows of one reply with a jump between
them tell that it has nothing in between. A reply with fewer rows tells only that its database ends
there now.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tradecore.store.ledger import Span

PAGE_ROWS = 1000
"""The most that the venue gives for one request; its weight is the same for fewer."""

DUMP_PAGES = 50
"""Pages of a day that may come over REST; beyond, the day's dump is cheaper."""

MINUTE_US = 60_000_000

DAY_US = 86_400_000_000
_EPOCH = date(1970, 1, 1)

SLACK_US = 600_000_000
"""How far a trade's time may lie outside the times around its hole. A venue's clock may be set, by
seconds; the same id at another venue, or of another listing, is hours to years away."""


class Asked(NamedTuple):
    """The ids that a request is about: up to `limit` from `from_id` on."""

    from_id: int
    limit: int


class Jump(NamedTuple):
    """Ids of a hole that a reply passes over, and the ids of the two rows around them."""

    first_id: int
    last_id: int
    id_below: int
    id_above: int


class Hole(NamedTuple):
    """Ids that are missing, and the times of the stored trades around them."""

    first_id: int
    last_id: int
    below_us: int
    above_us: int


class Told(NamedTuple):
    """What a reply tells of a hole."""

    low: int
    """The rows low:high lie inside the hole."""
    high: int
    jumps: tuple[Jump, ...]
    """What it passes over, cut to the hole."""
    has_below: bool
    """It has a row below the hole: the venue still serves ids as old as these."""
    ends_early: bool
    """It ends before the hole does: the venue's database has nothing newer yet."""

    @property
    def inside(self) -> int:
        """How many rows lie inside the hole."""
        return self.high - self.low


def page_from_above(hole: Span, others: Iterable[Span] = ()) -> Asked:
    """Return the page that ends with the hole, so that the hole shrinks from above.

    It is as long as needed to have what fits of `others`, holes of the same symbol, as well.
    """
    lowest = max(0, hole.last_id - PAGE_ROWS + 1)
    from_id = max(hole.first_id, lowest)
    for other in others:
        if other.first_id < from_id and other.last_id >= lowest:
            from_id = max(other.first_id, lowest)
    return Asked(from_id, hole.last_id - from_id + 1)


def probe_from_below(hole: Span, *, wide: bool = False) -> Asked:
    """Return the page that begins right below the hole and ends above it.

    `wide`: the venue has no trade right below, so begin further down.
    """
    if wide:
        return Asked(max(0, hole.first_id - PAGE_ROWS // 2), PAGE_ROWS)
    return Asked(hole.first_id - 1, min(PAGE_ROWS, hole.rows + 2))


def judge(ids: npt.NDArray[Any], hole: Span, asked: Asked) -> Told:
    """Tell what the reply with `ids` says of `hole`.

    Raises ValueError, in words, for a reply that does not answer what was asked.
    """
    if len(ids) == 0:
        return Told(0, 0, (), has_below=False, ends_early=True)
    if int(ids[0]) < asked.from_id:
        raise ValueError(f"it begins at {int(ids[0])}, below the {asked.from_id} asked for")
    if len(ids) > asked.limit:
        raise ValueError(f"it has {len(ids)} rows where {asked.limit} were asked for")
    steps = np.diff(ids)
    if len(steps) and int(steps.min()) < 1:
        raise ValueError(f"its ids do not ascend after {int(ids[int(steps.argmin())])}")
    low, high = (int(i) for i in np.searchsorted(ids, (hole.first_id, hole.last_id + 1)))
    return Told(
        low,
        high,
        tuple(jumps(ids, hole)),
        has_below=int(ids[0]) < hole.first_id,
        ends_early=len(ids) < asked.limit and int(ids[-1]) < hole.last_id,
    )


def jumps(ids: npt.NDArray[Any], hole: Span | Hole) -> list[Jump]:
    """Return what the ascending `ids` pass over of `hole`."""
    found = []
    for i in np.flatnonzero(np.diff(ids) > 1).tolist():
        below, above = int(ids[i]), int(ids[i + 1])
        first_id, last_id = max(below + 1, hole.first_id), min(above - 1, hole.last_id)
        if first_id <= last_id:
            found.append(Jump(first_id, last_id, below, above))
    return found


def around(ids: npt.NDArray[Any], hole: Span | Hole) -> slice:
    """Return which of the ascending `ids` are of a hole, and the next one on each side."""
    low, high = np.searchsorted(ids, (hole.first_id, hole.last_id + 1))
    return slice(max(int(low) - 1, 0), int(high) + 1)


def hold_against_times(rows: npt.NDArray[Any], hole: Hole) -> None:
    """Raise ValueError, in words, when `rows` (TRADE_DTYPE, by id) cannot be of a hole's symbol.

    What has the hole's ids or greater ones is not older than the trade below it, and what has
    them or lesser ones not newer than the trade above it, give or take SLACK_US.
    """
    rows = rows[around(rows["trade_id"], hole)]
    ids, times = rows["trade_id"], rows["trade_us"]
    early = (ids >= hole.first_id) & (times < hole.below_us - SLACK_US)
    late = (ids <= hole.last_id) & (times > hole.above_us + SLACK_US)
    for i in np.flatnonzero(early | late)[:1].tolist():
        raise ValueError(
            f"trade {int(ids[i])} is of {shown(int(times[i]))}, but the trades around"
            f" {hole.first_id}..{hole.last_id} are of {shown(hole.below_us)} and"
            f" {shown(hole.above_us)}: it is another venue's, or another listing's"
        )


def missing(hole: Span, stored: Iterable[tuple[int, int]]) -> list[Span]:
    """Return what of `hole` is not in the ranges `stored`, from below."""
    pieces = []
    next_id = hole.first_id
    for first_id, last_id in sorted(stored):
        if last_id < next_id:
            continue
        if first_id > hole.last_id:
            break
        if first_id > next_id:
            pieces.append(Span(next_id, first_id - 1))
        next_id = last_id + 1
    if next_id <= hole.last_id:
        pieces.append(Span(next_id, hole.last_id))
    return pieces


def overlapping(holes: Sequence[Hole], first_id: int, last_id: int) -> Sequence[Hole]:
    """Return which of `holes`, disjoint and ascending, have ids in first_id..last_id."""
    low = bisect_left(holes, first_id, key=lambda hole: hole.last_id)
    return holes[low : bisect_right(holes, last_id, key=lambda hole: hole.first_id)]


def select(ids: npt.NDArray[Any], spans: Iterable[Span | Hole]) -> npt.NDArray[np.bool_]:
    """Return which of the ascending `ids` lie in one of `spans`."""
    chosen = np.zeros(len(ids), np.bool_)
    for span in spans:
        low, high = np.searchsorted(ids, (span.first_id, span.last_id + 1))
        chosen[low:high] = True
    return chosen


def days_between(below_us: int, above_us: int) -> list[date]:
    """Return the UTC days whose dumps may hold trades between two times, the newest first.

    Times of trades need not rise with their ids: a day begins or ends a second early or late.
    """
    slack_us = 1_000_000
    first, last = (below_us - slack_us) // DAY_US, (above_us + slack_us) // DAY_US
    return [_EPOCH + timedelta(days=day) for day in range(last, first - 1, -1)]


def long_day(hole: Hole, now_us: int) -> date | None:
    """Return the hole's newest day when it is over and its dump is cheaper than its pages."""
    day = day_of(hole.above_us - 1_000_000)
    begin_us = max(hole.below_us, day_start_us(day))
    share = (hole.above_us - begin_us) / max(hole.above_us - hole.below_us, 1)
    pages = (hole.last_id - hole.first_id + 1) * share / PAGE_ROWS
    return day if is_over(day, now_us) and pages > DUMP_PAGES else None


def day_start_us(day: date) -> int:
    """Return the first instant of a UTC day in microseconds since 1970."""
    return (day - _EPOCH).days * DAY_US


def day_of(time_us: int) -> date:
    """Return the UTC day of a time."""
    return _EPOCH + timedelta(days=time_us // DAY_US)


def shown(time_us: int) -> str:
    """Return a time as an operator reads it: UTC, to the second."""
    return f"{datetime.fromtimestamp(time_us // 1_000_000, UTC):%Y-%m-%d %H:%M:%S}Z"


def is_over(day: date, now_us: int) -> bool:
    """Tell whether a UTC day has ended, so that its dump can be there."""
    return day_start_us(day) + DAY_US <= now_us
