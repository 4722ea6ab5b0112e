"""Counts what the side server has answered and refused."""

from collections import Counter

from tradecore.snapshot import HttpUse

REFUSALS = (
    "malformed",
    "crowd",
    "slow",
    "host",
    "rate",
    "method",
    "body",
    "token_missing",
    "token_wrong",
    "token_rate",
    "closed",
)
"""Why: no HTTP; all places taken; too slow to ask or to read; its Host; too often; its method;
a body; no token, a wrong one, too many wrong ones; an address that is closed without a token."""


class HttpCounts:
    """What only grows, from zero at start."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str]] = Counter()
        self._refused: Counter[str] = Counter(dict.fromkeys(REFUSALS, 0))

    def answered(self, route: str, status: int) -> None:
        """Count an answer; `route` is one of the server's own, never what a client wrote."""
        self._requests[route, f"{status // 100}xx"] += 1

    def refused(self, reason: str) -> None:
        """Count a refusal, one of `REFUSALS`."""
        self._refused[reason] += 1

    def use(self) -> HttpUse:
        """Return what metrics show."""
        return HttpUse(requests=dict(self._requests), refused=dict(self._refused))
