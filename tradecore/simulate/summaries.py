"""Candles and 24 h statistics at a moment, for the streams and for REST alike."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tradecore.simulate.frames import day_statistics
from tradecore.simulate.profiles import Profile
from tradecore.simulate.words import DAY_US, MINUTE_US, Candle, Trade

INTERVALS_US = {
    "1s": 1_000_000,
    **{f"{n}m": n * MINUTE_US for n in (1, 3, 5, 15, 30)},
    **{f"{n}h": n * 60 * MINUTE_US for n in (1, 2, 4, 6, 8, 12)},
    "1d": DAY_US,
    "3d": 3 * DAY_US,
}
"""Length of each candle interval that the exchange serves."""
_LOOK_AHEAD = 16


class Source(Protocol):
    """Where trades come from: the simulated market's tape, or a recording."""

    @property
    def symbols(self) -> Iterable[str]:
        """Symbols that are listed."""
        ...

    def knows(self, symbol: str) -> bool:
        """Tell whether the symbol exists."""
        ...

    def profile(self, symbol: str) -> Profile:
        """Return the fixed properties of the symbol."""
        ...

    def first_id(self, symbol: str) -> int:
        """Return the oldest id."""
        ...

    def next_id(self, symbol: str, at_us: int) -> int:
        """Return the id after the last trade up to `at_us`."""
        ...

    def trades(self, symbol: str, first_id: int, end_id: int) -> list[Trade]:
        """Return the trades `first_id` .. `end_id - 1` that exist."""
        ...

    def candle(self, symbol: str, first_id: int, end_id: int) -> Candle | None:
        """Return the sums over the trades `first_id` .. `end_id - 1`."""
        ...


@dataclass(frozen=True)
class Day:
    """The 24 h statistics of a symbol: texts by stream key, window in us, ids (-1 -1 0 if none)."""

    statistics: dict[str, str]
    window_us: tuple[int, int]
    ids: tuple[int, int, int]


def candle_at(
    source: Source, symbol: str, open_us: int, length_us: int, at_us: int
) -> tuple[Candle | None, int]:
    """Return a candle as of `at_us`, and the price that an empty one shows."""
    first = source.next_id(symbol, open_us - 1)
    end = source.next_id(symbol, min(at_us, open_us + length_us - 1))
    candle = source.candle(symbol, first, end)
    return candle, candle.open_e8 if candle else _price_before(source, symbol, first, at_us)


def day_at(source: Source, symbol: str, at_us: int) -> Day:
    """Return the rolling 24 h statistics as of `at_us`."""
    window_us = (at_us - DAY_US, at_us)
    first, end = source.next_id(symbol, window_us[0]), source.next_id(symbol, at_us)
    candle = source.candle(symbol, first, end)
    last = _last_before(source, symbol, end) if candle else None
    quantity = last.quantity_e8 if last else 0
    previous = _price_before(source, symbol, first, at_us) if candle else 0
    statistics = day_statistics(source.profile(symbol), candle, previous, quantity)
    ids = (candle.first_id, candle.last_id, candle.trade_count) if candle else (-1, -1, 0)
    return Day(statistics, window_us, ids)


def _price_before(source: Source, symbol: str, trade_id: int, at_us: int) -> int:
    """Return the price of the trade before `trade_id`, or of the very first one, or 0."""
    oldest = source.first_id(symbol)
    if source.next_id(symbol, at_us) <= oldest:
        return 0
    trade = _last_before(source, symbol, max(trade_id, oldest + 1))
    return trade.price_e8 if trade else 0


def _last_before(source: Source, symbol: str, end_id: int) -> Trade | None:
    found = downward(source, symbol, source.first_id(symbol), end_id, 1)
    return found[0] if found else None


def upward(source: Source, symbol: str, first_id: int, end_id: int, limit: int) -> list[Trade]:
    """Return the first `limit` trades that exist from `first_id` up to `end_id - 1`."""
    found: list[Trade] = []
    while first_id < end_id and len(found) < limit:
        until = min(end_id, first_id + max(_LOOK_AHEAD, limit - len(found)))
        found += source.trades(symbol, first_id, until)
        first_id = until
    return found[:limit]


def downward(source: Source, symbol: str, first_id: int, end_id: int, limit: int) -> list[Trade]:
    """Return the last `limit` trades that exist from `first_id` up to `end_id - 1`."""
    found: list[Trade] = []
    while end_id > first_id and len(found) < limit:
        start = max(first_id, end_id - limit + len(found))
        found = source.trades(symbol, start, end_id) + found
        end_id = start
    return found
