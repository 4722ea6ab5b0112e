"""Compares one minute of stored trades with the venue's kline of it. Pure: no database here.

What a kline of Binance Spot says: ids and number of its trades (`f`, `L`, `n`), prices in id
order, and sums. The venue rounds each price x quantity to 1e-8 by a rule that it does not tell, so
sums of quotes may be off by `n` such units; everything else is exact. A kline from REST has no ids.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple, get_args

Reason = Literal[
    "count",
    "ids",
    "time",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "quote_volume",
    "taker_base",
    "taker_quote",
    "hole",
    "tail",
    "kline",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Kline(NamedTuple):
    """A closed kline as the venue told it."""

    symbol: str
    first_id: int | None
    """None: unknown, or there were no trades."""
    last_id: int | None
    trades: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    quote_volume: Decimal
    taker_base: Decimal
    taker_quote: Decimal

    @property
    def span(self) -> int | None:
        """How many ids it spans; None when they are unknown."""
        if self.first_id is None or self.last_id is None:
            return None
        return self.last_id - self.first_id + 1


class Minute(NamedTuple):
    """What is stored with a time in the minute."""

    trades: int = 0
    first_id: int | None = None
    last_id: int | None = None
    id_sum: int = 0
    open: Decimal | None = None
    high: Decimal | None = None
    low: Decimal | None = None
    close: Decimal | None = None
    volume: Decimal = Decimal(0)
    quote_volume: Decimal = Decimal(0)
    taker_base: Decimal = Decimal(0)
    taker_quote: Decimal = Decimal(0)


class Known(NamedTuple):
    """What the ledger knows about the ids of a kline, or its minute where it has none."""

    min_id: int | None
    """Least stored id of the symbol; None: nothing is stored of it."""
    max_id: int | None
    covered: int
    """How many ids of the kline are stored."""
    absent: int
    """How many of them are proven not to exist."""
    first_us: int | None
    """Time of the first stored trade of the symbol."""
    last_us: int | None
    open_hole: bool
    """Whether an open hole may have trades of this minute."""


class Verdict(NamedTuple):
    """What is not as it should be."""

    state: Literal["waiting", "mismatch", "partial", "unready"]
    """waiting: ids are missing that will come. partial: before the capture began.
    unready: nothing is stored of the symbol yet."""
    reason: Reason
    detail: str
    fetch_id: int | None = None
    """Ids up to this one are missing, and no hole of the ledger says so."""
    reopen: bool = False
    """Ids of the kline are held absent, and it proves that they exist."""


class Mismatch(NamedTuple):
    """A minute of stored trades that is not what the venue says."""

    symbol: str
    open_us: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What one call found, and what is known in all. Times in microseconds since 1970."""

    checked: int
    """Minutes of symbols that this call looked at: matched, waiting, mismatching, or begun before
    the capture."""
    matched: int
    waiting: int
    """Of those checked: trades are missing, and it is known that they are."""
    mismatches: tuple[Mismatch, ...]
    """Those that were not known before: each is told once."""
    reopened: tuple[Mismatch, ...]
    """Minutes whose trades were held absent in part: those are open holes again."""
    tails: tuple[tuple[str, int], ...]
    """(symbol, id): the venue has trades up to this id, and no hole of the ledger says so."""
    proven_us: dict[str, int]
    """Every minute up to here is proven, since the proof of the symbol began."""
    unproven: int
    """Minutes that are not proven, of all that were ever looked at or passed over."""
    mismatching: int
    klines_missing: tuple[tuple[str, int, int], ...]
    """(symbol, first open time, last open time) of minutes without one, the newest first; some
    of each symbol. Minutes inside an open hole are left out."""
    late: int
    """Symbols that are not looked at up to the present, give or take three minutes."""
    more: bool
    """There is more to do at once: the call ended at its limits."""


def compare(kline: Kline, minute: Minute) -> Verdict | None:
    """Return the first difference; None when the stored trades are those of the kline.

    Fewer ids than the kline spans are right as long as its own count says so: the venue left some
    out. Any difference of ids or count may have a good reason yet, see `explain`.
    """
    if kline.trades != minute.trades:
        return _mismatch("count", kline.trades, minute.trades)
    if kline.trades == 0:
        sums = ("volume", "quote_volume", "taker_base", "taker_quote")
        return next((v for v in (_sum(kline, minute, s, 0) for s in sums) if v), None)
    span = kline.span
    if span is not None:
        assert kline.first_id is not None and kline.last_id is not None
        assert minute.first_id is not None and minute.last_id is not None
        venue, ours = (kline.first_id, kline.last_id), (minute.first_id, minute.last_id)
        whole = span == kline.trades
        if (
            span < kline.trades
            or not (venue[0] <= ours[0] <= ours[1] <= venue[1])
            or (whole and venue != ours)
        ):
            return _mismatch("ids", f"{venue[0]}..{venue[1]}", f"{ours[0]}..{ours[1]}")
        if whole and 2 * minute.id_sum != span * (venue[0] + venue[1]):
            return Verdict("mismatch", "ids", "the stored ids are not each there once")
    for name in ("open", "high", "low", "close"):
        if getattr(kline, name) != getattr(minute, name):
            return _mismatch(name, getattr(kline, name), getattr(minute, name))
    for name, units in (
        ("volume", 0),
        ("quote_volume", kline.trades),
        ("taker_base", 0),
        ("taker_quote", kline.trades),
    ):
        if verdict := _sum(kline, minute, name, units):
            return verdict
    return None


def explain(
    kline: Kline,
    minute: Minute,
    found: Verdict,
    known: Known,
    open_us: int,
    *,
    started: bool,
    reopened: bool,
) -> Verdict:
    """Return what a difference of ids or count (`found`) means, seen what is known to be missing.

    `started`: an earlier minute of the symbol was whole; before that, trades from before the first
    captured one are nobody's loss. `reopened`: what is held absent of it was opened again before;
    who closed it once more found nothing.
    """
    if found.reason not in ("count", "ids") or minute.trades > kline.trades:
        return found
    if known.min_id is None or known.max_id is None:
        state: Literal["waiting", "unready"] = "waiting" if started else "unready"
        return Verdict(state, "tail", "nothing is stored of the symbol", kline.last_id)
    if kline.span is None:
        return _explain_by_time(minute, kline, found, known, open_us, started=started)
    assert kline.first_id is not None and kline.last_id is not None
    missing = kline.span - known.covered - known.absent
    if missing <= 0:
        if known.absent and kline.span == kline.trades and not reopened:
            ids = f"{known.absent} of the ids {kline.first_id}..{kline.last_id} were held absent"
            return Verdict("waiting", "hole", f"{ids}, and the venue counts them", reopen=True)
        return found
    ids = f"{missing} of the ids {kline.first_id}..{kline.last_id} are not stored"
    if kline.first_id < known.min_id:
        if not started:
            return Verdict("partial", "ids", ids)
        below = min(kline.last_id, known.min_id - 1)
        return Verdict("mismatch", "ids", f"{ids}, and no hole is known there", below)
    if kline.last_id > known.max_id:
        return Verdict("waiting", "tail", ids, kline.last_id)
    return Verdict("waiting", "hole", ids)


def _explain_by_time(
    minute: Minute, kline: Kline, found: Verdict, known: Known, open_us: int, *, started: bool
) -> Verdict:
    assert known.first_us is not None and known.last_us is not None
    detail = f"{kline.trades - minute.trades} trades are not stored"
    if not started and known.first_us >= open_us:
        return Verdict("partial", "count", detail)
    if known.last_us < open_us + 60_000_000:
        return Verdict("waiting", "tail", detail)
    if known.open_hole:
        return Verdict("waiting", "hole", detail)
    return found


def _sum(kline: Kline, minute: Minute, name: str, units: int) -> Verdict | None:
    venue, ours = getattr(kline, name), getattr(minute, name)
    if venue is not None and abs(venue - ours) <= Decimal(units).scaleb(-8):
        return None
    return _mismatch(name, venue, ours)


def _mismatch(name: str, venue: object, ours: object) -> Verdict:
    reason: Reason = name  # type: ignore[assignment]
    return Verdict("mismatch", reason, f"{name}: the venue says {venue}, stored is {ours}")
