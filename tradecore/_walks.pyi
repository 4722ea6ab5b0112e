from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_Rows: TypeAlias = npt.NDArray[Any]

RUN_DTYPE: np.dtype[Any]

class Survey(NamedTuple):
    first_us: int
    last_us: int
    flags: int
    symbols: int

def survey(rows: _Rows) -> Survey: ...
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
