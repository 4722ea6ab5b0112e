"""What the parts of the back-fill hand to each other: policy, figures, holes, outcomes of steps."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import NamedTuple

from tradecore.backfill.plan import Hole
from tradecore.backoff import Backoff
from tradecore.store.ledger import Span

HOUR_S = 3600.0
"""Between tries of what will hardly be different soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillPolicy:
    """How holes are filled; the defaults are those of the daemon."""

    max_age_s: float
    """Age of the oldest trade that is fetched; 0 = none, inf = all."""
    dump_url: str
    """Where the daily dumps are."""
    folder: Path
    """In a folder of its own in here a dump lies while it is read."""
    source: str = "auto"
    """"rest" or "dump": from there alone."""
    workers: int = 4
    """Holes, of different symbols, that are filled at the same time."""
    confirm_s: float = 5.0
    """Between the two replies that prove that the venue has no such trades."""
    dump_confirm_s: float = 4 * HOUR_S
    """Between two looks at a dump that prove it, when no kline does."""
    look_s: float = 20.0
    """Between two looks at all open holes."""
    lag_base_s: float = 0.2
    lag_cap_s: float = 10.0
    trouble_base_s: float = 0.5
    trouble_cap_s: float = 60.0
    host_cap_s: float = 4.0
    """Between two questions to a venue that gives nothing of use for any hole."""
    rest_again_s: float = 60.0
    """Before REST is asked again for what it did not give, while no dump can have it."""
    dump_retry_s: float = 1800.0
    """Before a dump that was not there is asked for again; doubled up to an hour."""
    refused_base_s: float = 60.0
    """Before trades of a symbol that the database refused are fetched again; doubled up to:"""
    refused_cap_s: float = HOUR_S


REASONS = (
    "lag",
    "banned",
    "limited",
    "refused",
    "unreachable",
    "broken",
    "dump",
    "database",
)
"""Why something has to be asked for or written again."""


class UnderWay(NamedTuple):
    """A hole of which something was asked."""

    symbol: str
    first_id: int
    last_id: int
    filled: int
    """Trades of it stored so far."""
    why: str
    """Why it is still open."""


@dataclass(slots=True)
class FillStats:
    """What has been done, in plain numbers."""

    filled: Counter[str] = field(default_factory=lambda: Counter({"rest": 0, "dump": 0}))
    """Trades stored, by source."""
    retries: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    """Requests that have to be made again, by reason."""
    holes_filled: int = 0
    holes_absent: int = 0
    ids_absent: int = 0
    last_error: str | None = None
    tell_under_way: Callable[[], tuple[UnderWay, ...]] = tuple

    @property
    def under_way(self) -> tuple[UnderWay, ...]:
        """Holes that have been asked for, the newest first; twenty at most."""
        return self.tell_under_way()


@dataclass(slots=True)
class Work:
    """A hole that is being filled; `last_id` and `above_us` fall as it shrinks."""

    symbol: str
    first_id: int
    last_id: int
    above_us: int
    """Time of the trade right above; while `below_us` is None, when we heard of the hole."""
    below_us: int | None
    """Time of the trade right below; None while it has not been looked up."""
    since_us: int
    """When the hole was seen first, by the host clock."""
    lag: Backoff
    trouble: Backoff
    not_before_s: float = 0.0
    """By the monotonic clock."""
    failed_s: float = 0.0
    """When the venue last gave nothing of use for it, by the monotonic clock; 0 = never."""
    failures: int = 0
    """Since trades of it were stored."""
    requests: int = 0
    filled: int = 0
    fruitless: int = 0
    """Requests since the last one that brought a trade."""
    refusals: int = 0
    """Above 0: the database refuses all of these trades, and has done so about as often."""
    tried_newest: bool = False
    probing: bool = False
    late_s: float = 0.0
    """When a reply first began above the hole, 0 = none did since the last that was better."""
    lost: str = ""
    """Why REST does not give the ids."""
    rest_due_s: float = 0.0
    """When REST is asked again for ids that it has lost."""
    dump_due_s: float = 0.0
    """When the dumps are looked through again."""
    days: list[date] | None = None
    """Dumps that are still to be read, the newest last."""
    without: set[date] = field(default_factory=set)
    """Days whose dump was taken instead of their pages, or was not to be had."""
    missing_dumps: int = 0
    """How many of the days so far have no dump."""
    is_dump_bad: bool = False
    """In this round one was spoilt on its way, or did not match its checksum."""
    bad_rounds: int = 0
    """Such rounds in a row."""
    dump_rounds: int = 0
    """How often all days have been through."""
    why: str = "not asked yet"
    """Why it is still open."""

    @property
    def span(self) -> Span:
        return Span(self.first_id, self.last_id)

    @property
    def hole(self) -> Hole:
        """The hole with its times, which are known from the first step on."""
        assert self.below_us is not None
        return Hole(self.first_id, self.last_id, self.below_us, self.above_us)

    @property
    def key(self) -> tuple[str, int]:
        return self.symbol, self.first_id

    def __str__(self) -> str:
        return f"{self.symbol} {self.first_id}..{self.last_id}"


@dataclass(slots=True)
class Reach:
    """Trades above the highest stored one, up to the venue's newest."""

    symbol: str
    last_id: int
    cause: str
    since_us: int
    lag: Backoff
    trouble: Backoff
    not_before_s: float = 0.0
    failed_s: float = 0.0
    failures: int = 0
    fruitless: int = 0
    refusals: int = 0
    """Above 0: the database took nothing of the page that ends at `last_id`."""
    tried_newest: bool = False
    why: str = ""

    @property
    def above_us(self) -> int:
        """Later than any hole: it comes first."""
        return 2**62

    @property
    def key(self) -> tuple[str, int]:
        return self.symbol, -1

    def __str__(self) -> str:
        return f"{self.symbol} up to {self.last_id}"


class Step(NamedTuple):
    """What comes after a step."""

    delay_s: float = 0.0
    pieces: list[Span] | None = None
    """What is left when that is not the hole as it was; empty: nothing."""
    absent: tuple[Span, ...] = ()
    """Ids of this and other holes of the symbol that have been closed as absent."""


class WrongReplyError(Exception):
    """The venue's reply does not answer what was asked. `delay_s`: ask again after so long."""

    def __init__(self, message: str, *, delay_s: float = 0.0) -> None:
        super().__init__(message)
        self.delay_s = delay_s
