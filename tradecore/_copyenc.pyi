from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

_Rows: TypeAlias = npt.NDArray[Any]

class _Symbols(Protocol):
    def __len__(self) -> int: ...
    def utf8(self, symbol_id: int) -> bytes: ...

class CopySlices(Iterator[memoryview]):
    @property
    def encoded(self) -> int: ...
    def __next__(self) -> memoryview: ...

def encode_trades(
    rows: _Rows, symbols: _Symbols, keep: npt.NDArray[np.uint8] | None = None
) -> CopySlices: ...
def encode_tickers(
    rows: _Rows, symbols: _Symbols, keep: npt.NDArray[np.uint8] | None = None
) -> CopySlices: ...
def encode_klines(
    rows: _Rows, symbols: _Symbols, keep: npt.NDArray[np.uint8] | None = None
) -> CopySlices: ...
