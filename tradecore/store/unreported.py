"""What calls that failed may have committed all the same: the next call tells it as its own."""

from collections.abc import Iterable, Mapping, Sequence

from tradecore.store import ledger
from tradecore.store.ledger import HoleId, Range, Span

_MAX_RANGES = 10_000

ByName = Mapping[str, Sequence[Range]]
"""Ids by symbol."""


class Unreported:
    """Rows and holes of transactions of which nobody knows whether they were committed.

    It only serves the counts: rows that such a transaction stored are no duplicates when they are
    offered again, and holes that it opened are told. The ledger does not need it.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, list[Range]] = {}
        self._opened: set[HoleId] = set()

    def note(self, pieces: ByName, opened: Iterable[HoleId]) -> None:
        """Remember what a call that failed has given to the server."""
        for name, found in pieces.items():
            self._pieces[name] = ledger.join([*self._pieces.get(name, ()), *found])
        self._opened.update(opened)
        if len(self._opened) + sum(map(len, self._pieces.values())) > _MAX_RANGES:
            # Whoever gave up these rows does not ask for them any more.
            self._pieces.clear()
            self._opened.clear()

    def count(self, symbol: str, spans: Sequence[Span]) -> int:
        """Return how many ids of `spans` such a call has brought."""
        return sum(span.rows for span in ledger.overlaps(self._pieces.get(symbol, ()), spans))

    def take(self, offered: ByName) -> list[HoleId]:
        """Forget what a call has told now that offered these ids; return the holes beside them."""
        if not self._pieces:
            return []
        for name, found in offered.items():
            if name in self._pieces:
                left = [part for piece in self._pieces[name] for part in _without(piece, found)]
                self._pieces[name] = left
                if not left:
                    del self._pieces[name]
        opened = [hole for hole in self._opened if _borders(hole, offered.get(hole.symbol, ()))]
        self._opened.difference_update(opened)
        return sorted(opened)


def _without(piece: Range, spans: Sequence[Range]) -> list[Range]:
    parts: list[Range] = []
    begin = piece.first_id
    for span in ledger.overlaps([piece], spans):
        if begin < span.first_id:
            parts.append(piece._replace(first_id=begin, last_id=span.first_id - 1))
        begin = span.last_id + 1
    if begin <= piece.last_id:
        parts.append(piece._replace(first_id=begin))
    return parts


def _borders(hole: HoleId, spans: Sequence[Range]) -> bool:
    """Tell whether the trade right below or right above the hole is in `spans`."""
    ends = [Span(hole.first_id - 1, hole.first_id - 1), Span(hole.last_id + 1, hole.last_id + 1)]
    return bool(ledger.overlaps(ends, spans))
