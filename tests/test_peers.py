"""Whom an address stands for, and how often it may ask."""

import pytest

from tradecore.http.peers import RateLimiter, peer_of


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:aaaa::7", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::8", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::8", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("", ""),
        (None, ""),
        ("unix", ""),
    ],
)
def test_who_has_one_address_of_ipv6_has_its_network(address, peer):
    assert peer_of(address) == peer


def test_bucket_fills_with_time():
    now_ns = 0
    limiter = RateLimiter(per_s=2.0, burst=3, now_ns=lambda: now_ns)
    assert [limiter.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert limiter.take("b") == 0.0
    now_ns = 250_000_000
    assert limiter.take("a") == 0.25
    now_ns = 500_000_000
    assert [limiter.take("a") for _ in range(2)] == [0.0, 0.5]
    now_ns = 3_600_000_000_000
    assert [limiter.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_bucket_memory_is_bounded():
    limiter = RateLimiter(burst=1, peers_max=100, now_ns=lambda: 0)
    limiter.take("often")
    for i in range(10_000):
        limiter.take(f"peer{i}")
        assert limiter.take("often") > 0.0
    assert len(limiter._buckets) == 100


def test_a_refusal_takes_nothing_and_tells_the_wait():
    now_ns = 0
    limiter = RateLimiter(per_s=2.0, burst=1, now_ns=lambda: now_ns)
    assert limiter.take("a") == 0.0
    assert [limiter.take("a") for _ in range(3)] == [0.5] * 3
    now_ns = 400_000_000
    assert limiter.take("a") == pytest.approx(0.1)
    assert limiter.take("b") == 0.0
