"""Where candles begin: intervals of the venue, the tables that have them, and time zones.

Times and lengths are microseconds, times since 1970. The venue's rule ("Kline/Candlestick data" in
its REST documents): candles begin at multiples of their length since 1970 in UTC, weeks on Monday,
months on their first day; with a time zone, by the clock of that zone.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tradecore.store.candles import EPOCH, WIDTHS

_SECOND = 1_000_000
_DAY = 86_400 * _SECOND
_MONDAY = 4 * _DAY
"""1970 began on a Thursday."""

LAST_US = 253_370_764_800_000_000
"""The begin of the year 9999: later times are taken for this one."""

TABLES = {name: width // timedelta(microseconds=1) for name, width in WIDTHS.items()}
"""Length of the candles of each table."""

INTERVALS = {
    **TABLES,
    "3m": 180 * _SECOND,
    "30m": 1800 * _SECOND,
    "2h": 7200 * _SECOND,
    "6h": 21_600 * _SECOND,
    "8h": 28_800 * _SECOND,
    "12h": 43_200 * _SECOND,
    "1w": 7 * _DAY,
    "1M": 0,
}
"""Length of each interval; 0 is a calendar month."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The candles of one interval by the clock of one time zone.

    `table` is the widest one whose candles fit into these without rest.
    """

    interval: str
    width_us: int
    """0: months."""
    offset_us: int
    """By how much the zone's clock is ahead of UTC."""
    origin_us: int
    """The begin of one of the candles, the first after 1970; of months, that of January 1970."""
    table: str

    @property
    def stored(self) -> bool:
        """Whether the candles are in the table as they are."""
        return TABLES[self.table] == self.width_us

    def floor(self, us: int) -> int:
        """Return the begin of the candle that holds a time."""
        if self.width_us:
            return (us - self.origin_us) // self.width_us * self.width_us + self.origin_us
        return self._month(self._number(us))

    def ceil(self, us: int) -> int:
        """Return the begin of the first candle that begins at a time or later."""
        below = self.floor(us)
        return below if below == us else self.step(below, 1)

    def step(self, begin_us: int, candles: int) -> int:
        """Return the begin of the candle so many after (or before, if negative) another."""
        if self.width_us:
            return begin_us + candles * self.width_us
        return self._month(self._number(begin_us) + candles)

    def _number(self, us: int) -> int:
        local = EPOCH + timedelta(microseconds=us + self.offset_us)
        return local.year * 12 + local.month - 1

    def _month(self, number: int) -> int:
        first = datetime(min(max(number // 12, 1), 9999), number % 12 + 1, 1, tzinfo=UTC)
        return (first - EPOCH) // timedelta(microseconds=1) - self.offset_us


def grid(interval: str, offset_us: int = 0) -> Grid:
    """Return the grid of an interval of INTERVALS; `offset_us` is a whole number of minutes."""
    width = INTERVALS[interval]
    origin = (_MONDAY if interval == "1w" else 0) - offset_us
    origin = origin % width if width else origin
    table = max(
        (name for name, own in TABLES.items() if width % own == 0 and origin % own == 0),
        key=TABLES.__getitem__,
    )
    return Grid(interval, width, offset_us, origin, table)
