"""Counts what each peer asked for in this minute, by the venue's weights.

The venue's page "LIMITS": every answer carries X-MBX-USED-WEIGHT-1M, and who uses up the limit of a
clock minute gets 429 with Retry-After. The weights are the venue's; the limit is ours, fifty times
as high, and `exchangeInfo` tells it. The capture is protected by how few connections read.
"""

from collections import OrderedDict
from collections.abc import Callable

from tradecore.clock import wall_ns
from tradecore.http.peers import PEERS_MAX

LIMIT = 300_000
_MINUTE_NS = 60 * 10**9


class Weights:
    """The weight that each peer has used in this clock minute."""

    def __init__(self, limit: int = LIMIT, now_ns: Callable[[], int] = wall_ns) -> None:
        self.limit = limit
        self._now_ns = now_ns
        self._minute = 0
        self._used: OrderedDict[str, int] = OrderedDict()

    def use(self, peer: str, weight: int) -> tuple[int, int]:
        """Count a request; return the weight used, and the seconds to wait when it is too much."""
        now_ns = self._now_ns()
        if now_ns // _MINUTE_NS != self._minute:
            self._minute = now_ns // _MINUTE_NS
            self._used.clear()
        used = self._used.get(peer, 0) + weight
        self._used[peer] = used
        self._used.move_to_end(peer)
        if len(self._used) > PEERS_MAX:
            self._used.popitem(last=False)
        left_ns = _MINUTE_NS - now_ns % _MINUTE_NS
        return used, -(-left_ns // 10**9) if used > self.limit else 0
