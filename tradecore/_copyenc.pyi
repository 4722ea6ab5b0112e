from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

_Rows: TypeAlias = npt.NDArray[Any]

RUN_DTYPE: np.dtype[Any]

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
def find_runs(
    rows: _Rows, symbol_count: int, keep: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[Any]: ...
def mask_rows(rows: _Rows, cuts: npt.NDArray[Any], keep: npt.NDArray[np.uint8]) -> int: ...
def observe_latency(
    rows: _Rows,
    commit_ns: int,
    bounds_ns: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> tuple[int, int, int]: ...
