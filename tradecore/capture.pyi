from collections.abc import Callable
from typing import NamedTuple

from tradecore._ring import RingBuffer
from tradecore._symbols import SymbolTable
from tradecore.conflator import Conflator

LATENCY_BOUNDS_US: tuple[int, ...]

class Track(NamedTuple):
    received: int
    first_id: int | None
    last_id: int | None
    last_trade_us: int
    last_recv_ns: int
    hole: tuple[int, int] | None

class Told(NamedTuple):
    last_id: int
    event_us: int
    recv_ns: int
    since_ns: int
    heard_ns: int

class LineUse(NamedTuple):
    first: int
    late: int
    missing: int
    lag_s_sum: float
    lag_count: int

class Capture:
    ring: RingBuffer
    conflator: Conflator
    symbols: SymbolTable
    def __init__(self, ring: RingBuffer, symbols: SymbolTable, conflator: Conflator) -> None: ...
    def grow(self) -> None: ...
    def seed(self, symbol: str, last_id: int, last_us: int) -> None: ...
    def track(self, symbol: str) -> Track: ...
    def told(self, symbol: str) -> Told: ...
    def lines(self) -> tuple[LineUse, LineUse]: ...
    def wake_when(self, rows: int, wake: Callable[[], object]) -> None: ...
    def watch_high_water(self, rows: int, on_high_water: Callable[[], object]) -> None: ...
    def below_high_water(self) -> None: ...
    @property
    def above_high_water(self) -> bool: ...
    def feed(self, frame: bytes, recv_ns: int = 0, line: int = 0, epoch: int = 0) -> int: ...
    def counters(self) -> dict[str, int]: ...
    def refused(self) -> dict[str, int]: ...
    def latency(self) -> tuple[list[int], int]: ...
    def received(self) -> dict[str, tuple[int, int | None, int]]: ...
