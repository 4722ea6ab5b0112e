"""Answers that are made no more often than the loop can afford."""

import pytest

from tradecore.http.ration import AGE_LIMIT_S, Ration

MS = 10**6


class Desk:
    """A clock, and work that takes `cost_ms` of it."""

    def __init__(self):
        self.now_ns = MS
        self.cost_ms = 2
        self.made = 0
        self.ration = Ration(lambda: self.now_ns)

    def get(self, key):
        def make():
            self.now_ns += self.cost_ms * MS
            self.made += 1
            return self.made

        return self.ration.get(key, make)


def test_making_takes_a_tenth_of_the_time_at_most():
    desk = Desk()
    for _ in range(1000):
        desk.get("a")
        desk.now_ns += MS
    assert desk.made > 50
    assert desk.made * desk.cost_ms <= desk.now_ns / MS / 10 + desk.cost_ms


def test_what_costs_nothing_is_always_fresh():
    desk = Desk()
    desk.cost_ms = 0
    assert [desk.get("a") for _ in range(3)] == [1, 2, 3]


def test_several_share_the_tenth_and_nothing_grows_old():
    desk = Desk()
    assert (desk.get("a"), desk.get("b"), desk.get("a"), desk.get("b")) == (1, 2, 1, 2)
    desk.now_ns += int(AGE_LIMIT_S * 1e9) - 10 * MS
    assert (desk.get("a"), desk.get("b")) == (3, 2)  # of b, what is left of its second
    desk.now_ns += 10 * MS
    assert desk.get("b") == 4


def test_a_failure_is_not_kept():
    ration = Ration()

    def broken():
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            ration.get("a", broken)
    assert ration.get("a", lambda: 1) == 1
