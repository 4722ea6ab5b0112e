"""Which hosts a line uses, in which order, and which of them to avoid for a while."""

from collections.abc import Callable, Sequence
from math import inf

from tradecore.feed.endpoint import Endpoint

LINE_NAMES = "AB"

DEFAULT_URL = "wss://stream.binance.com:9443"
_VENUE_URLS = (
    DEFAULT_URL,
    "wss://stream.binance.com:443",
    "wss://data-stream.binance.vision",
)
"""The venue's own ways to the same streams: the other port, and its host for market data only."""

AVOID_S = 600.0
"""How long an endpoint that failed twice in a row is passed over while another one is left."""

AWAY_S = 900.0
"""How long a session may stay at another host than the line's own before it goes home."""


def line_endpoints(urls: Sequence[str], line: int) -> tuple[Endpoint, ...]:
    """Return the endpoints of a line (0 or 1), the preferred one first.

    The second line begins at another host where there is one. Raises SettingsError.
    """
    first = 1 if line and len(urls) > 1 else 0
    if tuple(urls) == (DEFAULT_URL,):
        urls = _VENUE_URLS
        first = 2 if line else 0
    ordered = [*urls[first:], *urls[:first]]
    return tuple(dict.fromkeys(Endpoint.parse(url) for url in ordered))


def _never(_: Endpoint) -> float:
    return 0.0


class Alternates:
    """Choose among the endpoints of one connection; times are monotonic nanoseconds.

    The first one is preferred. One that failed twice in a row (the first retry comes at once and
    proves little) is avoided for `avoid_s`; when all are avoided, the one whose failure is oldest
    is next.
    """

    def __init__(self, endpoints: Sequence[Endpoint], avoid_s: float = AVOID_S) -> None:
        self._endpoints = tuple(endpoints)
        self._avoid_ns = int(avoid_s * 1e9)
        self._failures = dict.fromkeys(self._endpoints, 0)
        self._failed_ns = dict.fromkeys(self._endpoints, 0)

    def pick(self, now_ns: int, silent_s: Callable[[Endpoint], float] = _never) -> Endpoint:
        """Return the endpoint for the next attempt, one that may be asked if there is any.

        `silent_s` tells for how many seconds an endpoint must not be asked.
        """
        silent = {endpoint: silent_s(endpoint) for endpoint in self._endpoints}
        allowed = [endpoint for endpoint in self._endpoints if not silent[endpoint]]
        for endpoint in allowed:
            fresh = now_ns - self._failed_ns[endpoint] < self._avoid_ns
            if self._failures[endpoint] < 2 or not fresh:
                return endpoint
        if allowed:
            return min(allowed, key=self._failed_ns.__getitem__)
        return min(silent, key=silent.__getitem__)

    def stay_s(self, endpoint: Endpoint) -> float:
        """Return how long a session may stay there: at the line's own host, for ever.

        A line that took refuge at the other line's host shares its fate. The time doubles with
        each failure at home, since a host that never lets us in is no home.
        """
        home = self._endpoints[0]
        if endpoint.host == home.host:
            return inf
        return AWAY_S * 2.0 ** min(max(self._failures[home] - 2, 0), 20)

    def failed(self, endpoint: Endpoint, now_ns: int) -> None:
        """Note an attempt that led to nothing, or a session that ended before it settled."""
        self._failures[endpoint] += 1
        self._failed_ns[endpoint] = now_ns

    def worked(self, endpoint: Endpoint) -> None:
        """Note a session that has settled."""
        self._failures[endpoint] = 0
