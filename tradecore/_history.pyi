from typing import Any

from numpy.typing import NDArray

PADDING: int

def trade_rows(page: list[Any]) -> NDArray[Any]: ...
def kline_rows(page: list[Any], now_us: int) -> NDArray[Any]: ...
def time_us(value: Any) -> int: ...

class LineReader:
    line: int
    last_id: int
    def read(self, text: bytes, start: int, rows: NDArray[Any]) -> tuple[int, int]: ...
