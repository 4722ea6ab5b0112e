"""Who a client is, as far as its address tells, and how often it may ask."""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

from tradecore.clock import mono_ns

RATE_PER_S = 50.0
RATE_BURST = 100
PEERS_MAX = 1024

_IPV6_PREFIX = 64
"""Whoever has one IPv6 address has all of such a network."""


def peer_of(address: str | None) -> str:
    """Return whom to count for an address: itself, or its network of IPv6; "" when it has none."""
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    if ip.is_loopback:
        return str(ip)
    return str(ipaddress.IPv6Network((ip.packed, _IPV6_PREFIX), strict=False))


class RateLimiter:
    """A token bucket for each peer; the peers that were silent longest are forgotten first."""

    def __init__(
        self,
        per_s: float = RATE_PER_S,
        burst: int = RATE_BURST,
        peers_max: int = PEERS_MAX,
        now_ns: Callable[[], int] = mono_ns,
    ) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._peers_max = peers_max
        self._now_ns = now_ns
        self._buckets: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def take(self, peer: str) -> float:
        """Take one token; return 0.0 when there was one, else the seconds until the next."""
        now_ns = self._now_ns()
        tokens, then_ns = self._buckets.pop(peer, (self._burst, now_ns))
        tokens = min(self._burst, tokens + (now_ns - then_ns) * 1e-9 * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[peer] = (tokens - allowed, now_ns)
        if len(self._buckets) > self._peers_max:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._per_s
