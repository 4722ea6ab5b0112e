"""Hosts of the lines, and which endpoint comes next after failures."""

from math import inf

import pytest

from tradecore.errors import SettingsError
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.lines import AVOID_S, AWAY_S, DEFAULT_URL, Alternates, line_endpoints
from tradecore.settings import load

SECOND_NS = 1_000_000_000


def addresses(urls: tuple[str, ...], line: int) -> list[str]:
    return [endpoint.address for endpoint in line_endpoints(urls, line)]


def test_the_venue_itself_gives_two_hosts_and_two_ports() -> None:
    assert load({}).websocket_urls == (DEFAULT_URL,)
    assert addresses((DEFAULT_URL,), 0) == [
        "stream.binance.com:9443",
        "stream.binance.com:443",
        "data-stream.binance.vision:443",
    ]
    assert addresses((DEFAULT_URL,), 1) == [
        "data-stream.binance.vision:443",
        "stream.binance.com:9443",
        "stream.binance.com:443",
    ]


def test_given_urls_are_the_only_ones() -> None:
    one = ("wss://mirror.example",)
    assert addresses(one, 0) == addresses(one, 1) == ["mirror.example:443"]
    many = ("wss://a", "wss://b:9443", "wss://c")
    assert addresses(many, 0) == ["a:443", "b:9443", "c:443"]
    assert addresses(many, 1) == ["b:9443", "c:443", "a:443"]
    assert addresses(("wss://a", "wss://a"), 1) == ["a:443"]
    with pytest.raises(SettingsError):
        line_endpoints(("wss://a", "https://b"), 0)


A, B, C = (Endpoint.parse(f"wss://{host}") for host in "abc")


def test_the_second_failure_moves_on_and_the_first_is_preferred_again() -> None:
    alternates = Alternates((A, B, C), avoid_s=600)
    now_ns = 5 * SECOND_NS
    order = []
    for _ in range(7):
        order.append(alternates.pick(now_ns))
        alternates.failed(order[-1], now_ns)
        now_ns += SECOND_NS
    assert order == [A, A, B, B, C, C, A]  # then the one whose failure is oldest
    assert alternates.pick(now_ns) == B
    alternates.worked(B)
    assert alternates.pick(now_ns) == B  # not back to a host that is down
    assert alternates.pick(now_ns + 600 * SECOND_NS) == A


def test_endpoints_that_must_not_be_asked_are_passed_over() -> None:
    alternates = Alternates((A, B, C))
    silent = {A: 60.0, B: 0.0, C: 0.0}
    assert alternates.pick(1, silent.__getitem__) == B
    for _ in range(2):
        alternates.failed(B, 2)
        alternates.failed(C, 3)
    assert alternates.pick(4, silent.__getitem__) == B  # the oldest failure of those two
    silent.update({B: 20.0, C: 10.0})
    assert alternates.pick(4, silent.__getitem__) == C  # the first that may be asked again


def test_a_line_does_not_stay_with_the_others_host() -> None:
    """Line B, at home at the market data host, with the two ports of the other one behind it."""
    home, away, port = line_endpoints((DEFAULT_URL,), 1)
    alternates = Alternates((home, away, port))
    assert alternates.stay_s(home) == inf
    for _ in range(2):
        alternates.failed(home, 0)
    assert alternates.stay_s(away) == alternates.stay_s(port) == AWAY_S > AVOID_S
    # By then its own host is the next again.
    assert alternates.pick(int(0.8 * AWAY_S) * SECOND_NS) == home
    for _ in range(3):
        alternates.failed(home, 0)
    assert alternates.stay_s(away) == 8 * AWAY_S
    alternates.worked(home)
    assert alternates.stay_s(away) == AWAY_S


def test_another_port_is_as_good_as_home() -> None:
    first, second, _ = line_endpoints((DEFAULT_URL,), 0)
    assert Alternates((first, second)).stay_s(second) == inf


def test_a_single_endpoint_is_always_the_next() -> None:
    alternates = Alternates((A,))
    for now_ns in range(5):
        assert alternates.pick(now_ns) == A
        alternates.failed(A, now_ns)


def test_failures_far_apart_do_not_add_up_after_success() -> None:
    alternates = Alternates((A, B))
    for now_ns in range(10):
        alternates.failed(A, now_ns)
        alternates.worked(A)
    alternates.failed(A, 11)
    assert alternates.pick(12) == A
