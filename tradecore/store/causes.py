"""Tells why a batch of trades opens a hole."""

from collections.abc import Sequence
from functools import cached_property

from tradecore._walks import find_runs
from tradecore.schema import FLAG_AFTER_REFUSED, FLAG_FIRST_OF_EPOCH, FLAG_FIRST_OF_RUN
from tradecore.store.batch import Keep, Rows
from tradecore.store.ledger import Span
from tradecore.store.refused import Refusal

_BY_FLAG = (
    (FLAG_AFTER_REFUSED, "overload"),
    (FLAG_FIRST_OF_RUN, "restart"),
    (FLAG_FIRST_OF_EPOCH, "disconnect"),
)


class HoleCauses:
    """Tells it for each hole by itself.

    `refused`: the database refused every row of the hole. Else `given`, what the caller says. Else
    what capture noted on the row right behind the hole: `overload`, the ring had refused trades;
    `restart`, it is the first row of this run; `disconnect`, another connection brought it than the
    row before. A row that came late has no such note: then the first that came of the unbroken ids
    behind the hole, which is the one that jumped. Else `unknown`.
    """

    def __init__(
        self,
        rows: Rows,
        keep: Keep,
        symbol_count: int,
        refusals: Sequence[Refusal],
        given: str | None,
    ) -> None:
        """Take the rows as they are stored; nothing is computed before the first hole."""
        self._rows = rows
        self._keep = keep
        self._symbol_count = symbol_count
        self._refusals = refusals
        self._given = given

    def of(self, symbol_id: int, hole: Span) -> str:
        # Longer than all refused rows: no need to look at each id of what may be millions.
        if hole.rows <= len(self._refusals) and all(
            (symbol_id, i) in self._refused for i in range(hole.first_id, hole.last_id + 1)
        ):
            return "refused"
        if self._given is not None:
            return self._given
        for row in self._starts.get((symbol_id, hole.last_id + 1), ()):
            flags = int(self._rows["flags"][row])
            for flag, cause in _BY_FLAG:
                if flags & flag:
                    return cause
        return "unknown"

    @cached_property
    def _starts(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Where unbroken ids begin, by symbol id and trade id: that row, and the first to come."""
        runs = find_runs(self._rows, self._symbol_count, self._keep)
        names = ("symbol_id", "first_id", "last_id", "first_row")
        found = sorted(zip(*(runs[name].tolist() for name in names), strict=True))
        starts: dict[tuple[int, int], tuple[int, int]] = {}
        begin, reached = (-1, 0), 0
        for symbol_id, first_id, last_id, row in found:
            if symbol_id == begin[0] and first_id == reached + 1:
                starts[begin] = (starts[begin][0], min(starts[begin][1], row))
            else:
                begin = (symbol_id, first_id)
                starts[begin] = (row, row)
            reached = last_id
        return starts

    @cached_property
    def _refused(self) -> set[tuple[int, int]]:
        rows = self._rows[[refusal.row for refusal in self._refusals]]
        return set(zip(rows["symbol_id"].tolist(), rows["trade_id"].tolist(), strict=True))
