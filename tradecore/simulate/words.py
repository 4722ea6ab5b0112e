"""The words that the simulated exchange's parts share: a trade, a candle, a printable row."""

from collections.abc import Sequence
from typing import NamedTuple

E8 = 10**8
MINUTE_US = 60_000_000
DAY_US = 86_400_000_000

Row = tuple[int, int, str, str, str]
"""A trade ready for printing: time in us, id, price, quantity, "true" if the buyer is the maker."""


class Trade(NamedTuple):
    """One trade, exact; `trade_us` in microseconds since 1970."""

    symbol: str
    trade_id: int
    price_e8: int
    quantity_e8: int
    trade_us: int
    buyer_is_maker: bool

    @property
    def quote_e8(self) -> int:
        """Price times quantity."""
        return self.price_e8 * self.quantity_e8 // E8

    @property
    def side(self) -> str:
        """The taker's side."""
        return "SELL" if self.buyer_is_maker else "BUY"


class Candle(NamedTuple):
    """The sums over a run of trades; every price and volume is an integer at scale 1e-8."""

    first_id: int
    last_id: int
    open_e8: int
    high_e8: int
    low_e8: int
    close_e8: int
    volume_e8: int
    quote_volume_e8: int
    taker_base_e8: int
    taker_quote_e8: int
    absent: int = 0
    """So many ids between first and last do not exist."""

    @property
    def trade_count(self) -> int:
        """Number of trades."""
        return self.last_id - self.first_id + 1 - self.absent if self.last_id >= 0 else 0


def merge(parts: Sequence[Candle]) -> Candle:
    """Join candles of adjacent runs, in order."""
    return Candle(
        parts[0].first_id,
        parts[-1].last_id,
        parts[0].open_e8,
        max(c.high_e8 for c in parts),
        min(c.low_e8 for c in parts),
        parts[-1].close_e8,
        sum(c.volume_e8 for c in parts),
        sum(c.quote_volume_e8 for c in parts),
        sum(c.taker_base_e8 for c in parts),
        sum(c.taker_quote_e8 for c in parts),
        parts[-1].last_id - parts[0].first_id + 1 - sum(c.trade_count for c in parts),
    )


def candle_of(trades: Sequence[Trade]) -> Candle:
    """Sum trades one by one: the plain definition of a candle."""
    bought = [t for t in trades if not t.buyer_is_maker]
    prices = [t.price_e8 for t in trades]
    return Candle(
        trades[0].trade_id,
        trades[-1].trade_id,
        prices[0],
        max(prices),
        min(prices),
        prices[-1],
        sum(t.quantity_e8 for t in trades),
        sum(t.quote_e8 for t in trades),
        sum(t.quantity_e8 for t in bought),
        sum(t.quote_e8 for t in bought),
        trades[-1].trade_id - trades[0].trade_id + 1 - len(trades),
    )
