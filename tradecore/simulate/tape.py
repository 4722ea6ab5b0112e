"""What the streams have sent: cursors over the market, the count limit, first and last ids."""

from collections.abc import Iterable
from heapq import heappop, heappush
from operator import itemgetter

from tradecore.simulate.faults import Faults
from tradecore.simulate.market import Market
from tradecore.simulate.profiles import Profile
from tradecore.simulate.words import Candle, Trade

Due = list[tuple[str, int, int]]
"""Runs of trades that are to be sent now: (symbol, first id, end id)."""


class Tape:
    """The market as the streams show it: it moves on in time and may stop after `count` trades.

    It is also what REST serves, so that both agree on which trade is the last one.
    """

    def __init__(self, market: Market, faults: Faults, count: int | None = None) -> None:
        self.market = market
        self.faults = faults
        self.sent: dict[str, tuple[int, int]] = {}
        """Symbol -> first and last id that went to at least one subscriber."""
        self.total = 0
        self.stopped_us: int | None = None
        """Time of the last trade of all, once `count` is reached."""
        self._count = count
        self._ends: dict[str, int] = {}
        self._next: dict[str, int] = {}
        self._heap: list[tuple[int, str, int]] = []

    @property
    def symbols(self) -> Iterable[str]:
        """The listed symbols and those that were asked for besides."""
        return dict.fromkeys((*self.market.symbols, *self.sent))

    def knows(self, symbol: str) -> bool:
        """Tell whether REST answers for this symbol."""
        return True

    def profile(self, symbol: str) -> Profile:
        """Return the fixed properties of the symbol."""
        return self.market.profile(symbol)

    def first_id(self, symbol: str) -> int:
        """Return the id of the symbol's first trade."""
        return self.market.first_id(symbol)

    def next_id(self, symbol: str, at_us: int) -> int:
        """Return the id after the last trade up to `at_us` or up to the end of the tape."""
        found = self.market.next_id(symbol, at_us)
        if self.stopped_us is None:
            return found
        if symbol not in self._ends:
            self._ends[symbol] = self.market.next_id(symbol, self.stopped_us)
        return min(found, self._ends[symbol])

    def trades(self, symbol: str, first_id: int, end_id: int) -> list[Trade]:
        """Return the trades `first_id` .. `end_id - 1`."""
        return self.market.trades(symbol, first_id, end_id)

    def candle(self, symbol: str, first_id: int, end_id: int) -> Candle | None:
        """Return the sums over the trades `first_id` .. `end_id - 1`."""
        return self.market.candle(symbol, first_id, end_id)

    def follow(self, symbols: set[str], at_us: int) -> None:
        """Make these the symbols that `advance` reports; new ones begin after `at_us`."""
        for symbol in self._next.keys() - symbols:
            del self._next[symbol]
        for symbol in sorted(symbols - self._next.keys()):
            self._schedule(symbol, self.market.next_id(symbol, at_us))

    def advance(self, end_us: int) -> Due:
        """Return the trades up to `end_us` that were not reported yet, and note them as sent."""
        due: Due = []
        heap = self._heap
        while heap and heap[0][0] <= end_us:
            _, symbol, first = heappop(heap)
            if self._next.get(symbol) != first:
                continue  # unfollowed since, or moved on by `jump`
            end = self.market.next_id(symbol, end_us)
            due.append((symbol, first, end))
            self._schedule(symbol, end)
        if self.stopped_us is not None:
            return []
        if self._count is not None:
            due = self._cut(due, self._count - self.total)
        self._note(due)
        return due

    def jump(self, due: Due) -> bool:
        """Move over trades that were rendered beforehand; False if they are not what comes next."""
        size = self._size(due)
        if self.stopped_us is not None or any(self._next.get(s) != first for s, first, _ in due):
            return False
        if self._count is not None and self.total + size >= self._count:
            return False  # the limit lies inside: `advance` finds the place
        self._next.update((symbol, end) for symbol, _, end in due)
        self._note(due)
        return True

    def resume(self) -> None:
        """Schedule anew: after `jump`, before `advance`, and when the market's pauses change."""
        self._heap.clear()
        for symbol, next_id in self._next.items():
            self._schedule(symbol, next_id)

    @property
    def followed(self) -> frozenset[str]:
        """The symbols that `advance` reports."""
        return frozenset(self._next)

    def _schedule(self, symbol: str, next_id: int) -> None:
        self._next[symbol] = next_id
        heappush(self._heap, (self.market.trade_us(symbol, next_id), symbol, next_id))

    def _cut(self, due: Due, left: int) -> Due:
        """Keep the first `left` trades in order of time; stop the tape there."""
        if self._size(due) < left:
            return due
        order = [
            (trade.trade_us, symbol, trade.trade_id)
            for symbol, first, end in due
            for trade in self.market.trades(symbol, first, end)
        ]
        order.sort(key=itemgetter(0))
        kept: dict[str, int] = {}
        for _, symbol, trade_id in order[:left]:
            kept[symbol] = trade_id + 1
        self.stopped_us = order[left - 1][0]
        self._ends = {symbol: kept.get(symbol, first) for symbol, first, _ in due}
        return [(symbol, first, kept[symbol]) for symbol, first, _ in due if symbol in kept]

    def _size(self, due: Due) -> int:
        return sum(self.market.count(*run) for run in due)

    def _note(self, due: Due) -> None:
        market = self.market
        self.total += self._size(due)
        for symbol, first, end in due:
            base = market.first_id(symbol)
            last = end - 1
            while last >= first and (
                self.faults.silent(last - base) or not market.has(symbol, last)
            ):
                last -= 1
            while first <= last and (
                self.faults.dropped(first - base) or not market.has(symbol, first)
            ):
                first += 1
            if symbol not in self.sent and first > base and self.faults.delayed(first - 1 - base):
                first -= 1  # held back before anybody listened, so it comes after its follower
            if first <= last:
                self.sent[symbol] = (self.sent.get(symbol, (first, 0))[0], last)
