"""Trade ids that the venue itself does not have: on no stream, in no REST page, in no dump."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt


class Absences:
    """Which ids are absent: ranges by symbol, and every n-th position of each symbol.

    Positions count from 0 at a symbol's first trade; `every` = n takes n-1, 2n-1, ... 0 = none.
    """

    def __init__(
        self, ranges: Mapping[str, Sequence[Sequence[int]]] | None = None, every: int = 0
    ) -> None:
        self.ranges = {
            s: [(int(a), int(b)) for a, b in spans] for s, spans in (ranges or {}).items()
        }
        self.every = every

    def present(
        self, symbol: str, base_id: int, first_id: int, count: int
    ) -> npt.NDArray[np.bool_] | None:
        """Tell for each of `count` ids whether the venue has it; None = it has them all."""
        mask: npt.NDArray[np.bool_] = np.ones(count, dtype=np.bool_)
        if self.every:
            skip = (base_id - 1 - first_id) % self.every
            mask[skip :: self.every] = False
        for first, last in self.ranges.get(symbol, ()):
            lo, hi = max(first - first_id, 0), min(last + 1 - first_id, count)
            if lo < hi:
                mask[lo:hi] = False
        return None if mask.all() else mask
