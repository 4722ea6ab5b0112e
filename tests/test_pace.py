"""How long a symbol may be silent, learnt from itself."""

import itertools

import pytest

from tradecore.pace import MAX_LIMIT_S, MIN_LIMIT_S, UNKNOWN_LIMIT_S, Pace


def traded(every_s: float, until_s: float) -> Pace:
    """A symbol with a trade every so often, looked at once a second."""
    pace = Pace(0.0, 0)
    for second in range(1, int(until_s) + 1):
        pace.look(float(second), int(second / every_s))
    return pace


def test_a_symbol_that_never_traded_has_the_limit_of_the_unknown() -> None:
    pace = traded(1e9, 59)
    assert pace.limit_s == UNKNOWN_LIMIT_S
    assert not pace.is_late(59.0)
    assert pace.is_late(61.0)


@pytest.mark.parametrize(
    ("every_s", "limit_s"), [(0.01, 20.0), (1.0, 20.0), (3.0, 60.0), (10.0, 200.0), (60.0, 600.0)]
)
def test_the_limit_follows_the_pace(every_s: float, limit_s: float) -> None:
    assert traded(every_s, 1800).limit_s == pytest.approx(limit_s, rel=0.1)


def test_bursts_are_not_taken_for_a_steady_pace() -> None:
    pace = Pace(0.0, 0)
    for second in range(1, 1201):
        pace.look(float(second), second // 30 * 500)  # 500 trades at once, every half minute
    assert pace.limit_s == pytest.approx(600.0, rel=0.1)


def test_a_new_pace_is_learnt_and_the_old_one_forgotten() -> None:
    pace = traded(1.0, 1800)
    for second in range(1801, 1800 + 3600):
        pace.look(float(second), 1800 + second // 20)
    assert pace.limit_s == pytest.approx(400.0, rel=0.15)


def test_patience_doubles_and_ends_with_the_next_trade() -> None:
    pace = traded(1.0, 600)
    assert pace.limit_s == pytest.approx(20.0, rel=0.05)
    asked = []
    for second in range(601, 1800):
        pace.look(float(second), 600)
        if pace.is_late(float(second)):
            asked.append(second)
            pace.forgive(float(second))
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert 2 <= len(asked) <= 10
    assert gaps == sorted(gaps)
    assert max(gaps) <= MAX_LIMIT_S + 1
    pace.look(1800.0, 601)
    assert not pace.is_late(1800.0 + MIN_LIMIT_S)


def test_a_clock_that_stands_changes_nothing() -> None:
    pace = traded(1.0, 100)
    before = pace.limit_s
    pace.look(100.0, 500)
    assert pace.limit_s == before
