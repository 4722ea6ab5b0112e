"""What is told of calls that failed, against an oracle that keeps every id."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.store.ledger import HoleId, Range, Span
from tradecore.store.unreported import Unreported

SPANS = st.builds(lambda first, rows: (first, first + rows), st.integers(0, 40), st.integers(0, 8))
NAMES = st.sampled_from(["BTCUSDT", "ETHUSDT"])


def pieces(name: str, span: tuple[int, int]) -> dict[str, list[Range]]:
    return {name: [Range(*span, 0, 0)]}


def ids_of(name: str, span: tuple[int, int]) -> set[tuple[str, int]]:
    return {(name, i) for i in range(span[0], span[1] + 1)}


@given(st.lists(st.tuples(st.booleans(), NAMES, SPANS), max_size=12), NAMES, SPANS)
def test_each_id_is_counted_until_it_is_told(
    steps: list[tuple[bool, str, tuple[int, int]]], name: str, asked: tuple[int, int]
) -> None:
    unreported = Unreported()
    waiting: set[tuple[str, int]] = set()
    for fails, symbol, span in steps:
        if fails:
            unreported.note(pieces(symbol, span), ())
            waiting |= ids_of(symbol, span)
        else:
            unreported.take(pieces(symbol, span))
            waiting -= ids_of(symbol, span)
    assert unreported.count(name, [Span(*asked)]) == len(waiting & ids_of(name, asked))


def test_a_hole_is_told_once_to_who_brings_its_neighbour() -> None:
    unreported = Unreported()
    hole, other = HoleId("BTCUSDT", 11, 19), HoleId("BTCUSDT", 31, 39)
    unreported.note(pieces("BTCUSDT", (20, 30)), [hole])
    unreported.note(pieces("BTCUSDT", (40, 50)), [other])
    assert unreported.take(pieces("ETHUSDT", (20, 30))) == []
    assert unreported.take(pieces("BTCUSDT", (1, 5))) == []
    assert unreported.take(pieces("BTCUSDT", (20, 25))) == [hole]
    assert unreported.take(pieces("BTCUSDT", (20, 60))) == [other]
    assert unreported.take(pieces("BTCUSDT", (1, 60))) == []


def test_what_nobody_offers_again_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tradecore.store.unreported._MAX_RANGES", 50)
    unreported = Unreported()
    for number in range(200):
        unreported.note(pieces(f"S{number}", (1, 2)), [HoleId("BTCUSDT", number, number)])
        kept = sum(unreported.count(f"S{n}", [Span(1, 2)]) for n in range(200))
        assert kept <= 2 * 50
    assert kept
