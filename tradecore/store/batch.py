"""Looks at the rows of a batch before the database does: what is in it, and on which days."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

import asyncpg
import numpy as np
import numpy.typing as npt

from tradecore._walks import RUN_DTYPE, Survey, find_runs, survey
from tradecore.schema import FLAG_FAR_BELOW, FLAG_VOID
from tradecore.store import ledger
from tradecore.store.refused import Refusal
from tradecore.store.statements import TRADES, Target

Rows = npt.NDArray[Any]
Keep = npt.NDArray[np.uint8]
"""One per row; 0: not to be stored."""
Pieces = dict[int, list[ledger.Range]]
"""By symbol id."""

FAR_BELOW = (
    "its id is far below the newest one of the symbol: an old trade, or one of a new listing whose"
    " ids began anew; compare it with the venue. Trades of a new listing need a database of their"
    " own"
)
"""Why rows with FLAG_FAR_BELOW are parked: nobody guesses which trades they are."""

_MINUTE_US, _MINUTE = 60_000_000, timedelta(minutes=1)
_DAY_US = 86_400_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
# The year 2200. Times in the ledger's SQL are exact below 2^53 us, the year 2255.
_END_US = 7_258_118_400_000_000


class Symbols(Protocol):
    """What the store needs of a SymbolTable."""

    def __len__(self) -> int: ...
    def name(self, symbol_id: int) -> str: ...
    def utf8(self, symbol_id: int) -> bytes: ...


@dataclass(slots=True)
class TradeBatch:
    """Trades of one transaction, before the ledger was asked."""

    rows: Rows
    seen: Survey
    keep: Keep
    pieces: Pieces
    """Ids and times of the rows to keep."""
    names: dict[int, str]
    """Symbols of the pieces by symbol id."""
    repeats: int
    """Rows whose id the batch has before."""
    refusals: list[Refusal]


def look_at_trades(rows: Rows, symbols: Symbols) -> TradeBatch:
    """Find the id ranges of the batch; leave out doubled ids and rows that nobody can store."""
    seen = survey(rows)
    if (
        seen.symbols <= len(symbols)
        and 0 <= seen.first_us <= seen.last_us < _END_US
        and not seen.flags & (FLAG_FAR_BELOW | FLAG_VOID)
    ):
        keep, refusals = np.ones(len(rows), np.uint8), list[Refusal]()
    else:
        keep, refusals = mask_impossible(rows, TRADES, symbols)
    runs = find_runs(rows, len(symbols), keep if refusals else None)
    pieces, repeated = ledger.join_runs(runs)
    repeats = 0
    if repeated:
        repeats = ledger.mask_repeats(rows, keep)
        pieces = find_pieces(rows, keep, symbols)
    names = {symbol_id: symbols.name(symbol_id) for symbol_id in pieces}
    return TradeBatch(rows, seen, keep, pieces, names, repeats, refusals)


def find_pieces(rows: Rows, keep: Keep, symbols: Symbols) -> Pieces:
    """Return the id ranges of the rows to keep; none of their ids comes twice."""
    return ledger.join_runs(find_runs(rows, len(symbols), keep))[0]


def mask_impossible(rows: Rows, target: Target, symbols: Symbols) -> tuple[Keep, list[Refusal]]:
    """Return which rows a server can be asked to store, and why not the others."""
    keep = np.ones(len(rows), np.uint8)
    times = rows[target.time_field]
    checks = [
        (rows["symbol_id"] >= len(symbols), "its symbol id is unknown"),
        ((times < 0) | (times >= _END_US), "its time is absurd"),
    ]
    if target is TRADES:
        checks.append(((rows["flags"] & FLAG_FAR_BELOW) != 0, FAR_BELOW))
    if not any(mask.any() for mask, _ in checks):
        return keep, []
    live = live_rows(rows, target)
    refusals: list[Refusal] = []
    for mask, reason in checks:
        found = np.flatnonzero(mask & live & (keep != 0))
        refusals += [Refusal(row, None, reason) for row in found.tolist()]
        keep[found] = 0
    return keep, sorted(refusals)


def live_rows(rows: Rows, target: Target) -> npt.NDArray[np.bool_]:
    """Return which rows hold anything."""
    if target is not TRADES:
        return np.ones(len(rows), np.bool_)
    return (rows["flags"] & FLAG_VOID) == 0  # type: ignore[no-any-return]


def days_of(rows: Rows, target: Target, keep: Keep) -> set[date]:
    """Return the UTC days of the rows to keep."""
    days = rows[target.time_field][(keep != 0) & live_rows(rows, target)] // _DAY_US
    # np.unique would import numpy.ma: 10 ms of the loop, and 1.6 MiB.
    return {date.fromordinal(_EPOCH_DAY + day) for day in set(days.tolist())}


def days_of_batch(batch: TradeBatch, from_us: int | None) -> set[date]:
    """Return the UTC days of the rows to keep, without those before `from_us`, a midnight.

    A day too many when all are of one and none is kept.
    """
    first = max(from_us or 0, 0) // _DAY_US
    day = batch.seen.first_us // _DAY_US
    if day == batch.seen.last_us // _DAY_US:
        return {date.fromordinal(_EPOCH_DAY + day)} if first <= day < _END_US // _DAY_US else set()
    floor = date.fromordinal(_EPOCH_DAY + first)
    return {day for day in days_of(batch.rows, TRADES, batch.keep) if day >= floor}


def mask_older(batch: TradeBatch, from_us: int | None) -> int:
    """Take trades before `from_us` out of the rows to keep; return how many."""
    rows, keep = batch.rows, batch.keep
    if from_us is None or batch.seen.first_us >= from_us:
        return 0
    older = (rows["trade_us"] < from_us) & (keep != 0) & live_rows(rows, TRADES)
    count = int(np.count_nonzero(older))
    if count:
        keep[older] = 0
    return count


def minutes_before(batch: TradeBatch, end_us: int | None) -> list["asyncpg.Range[datetime]"] | None:
    """Return the minutes of the rows to keep that begin before `end_us`, adjacent ones as one.

    None when there are none, which is the rule.
    """
    rows = batch.rows
    if end_us is None or len(rows) == 0 or batch.seen.first_us >= end_us:
        return None
    times = rows["trade_us"][(batch.keep != 0) & live_rows(rows, TRADES)]
    minutes = np.sort(times[times < end_us] // _MINUTE_US)
    if len(minutes) == 0:
        return None
    breaks = np.flatnonzero(np.diff(minutes) > 1)
    firsts = [minutes[0], *minutes[breaks + 1]]
    lasts = [*minutes[breaks], minutes[-1]]
    return [
        asyncpg.Range(_EPOCH + int(first) * _MINUTE, _EPOCH + (int(last) + 1) * _MINUTE)
        for first, last in zip(firsts, lasts, strict=True)
    ]


def as_cuts(spans: Mapping[int, Sequence[ledger.Span]]) -> npt.NDArray[Any]:
    """Return `spans` by symbol id as `mask_rows` takes them."""
    ordered = [(*span, symbol_id) for symbol_id in sorted(spans) for span in spans[symbol_id]]
    cuts = np.zeros(len(ordered), RUN_DTYPE)
    cuts["first_id"], cuts["last_id"], cuts["symbol_id"] = zip(*ordered, strict=True)
    return cuts


def names_of(rows: Rows, refusals: Sequence[Refusal], symbols: Symbols) -> list[str]:
    """Return the symbols of refused rows, "#7" for an unknown symbol id 7."""
    ids = [int(rows["symbol_id"][refusal.row]) for refusal in refusals]
    return [symbols.name(i) if i < len(symbols) else f"#{i}" for i in ids]
