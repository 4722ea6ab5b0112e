"""Dead streams of single symbols, told from lost trades and from lines that are slower."""

from tradecore.feed.behind import Behind

LIMIT_S = 5.0


def looks(*found: list[tuple[int, int, int]]) -> list[list[int]]:
    behind = Behind(LIMIT_S)
    return [behind.look(1.0, one) for one in found]


def test_a_symbol_that_only_others_bring_is_dead() -> None:
    steps = looks(*([(7, 100, 101 + i), (8, -1, 5)] for i in range(8)))
    assert steps == [[]] * 6 + [[7]] * 2


def test_one_lost_trade_is_no_dead_stream() -> None:
    assert looks(*[[(7, 100, 101)]] * 20) == [[]] * 20


def test_a_slower_line_is_not_dead() -> None:
    assert looks(*([(7, 100 + i, 150 + i)] for i in range(20))) == [[]] * 20


def test_who_has_caught_up_begins_anew() -> None:
    going = [[(7, 100, 101 + i)] for i in range(5)]
    assert looks(*going, [], *going) == [[]] * 11


def test_time_without_reading_does_not_count() -> None:
    behind = Behind(LIMIT_S)
    assert not any(behind.look(0.0, [(7, 100, 101 + i)]) for i in range(20))
