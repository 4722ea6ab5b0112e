"""States of symbols are read once, when somebody asks, in one go or in slices."""

from collections.abc import Iterator

import pytest

from tradecore.snapshot import SLICE_SYMBOLS, SymbolState, SymbolStates

COUNT = 2 * SLICE_SYMBOLS + 1


def states(read: list[str]) -> Iterator[SymbolState]:
    for number in range(COUNT):
        read.append(f"S{number}")
        yield SymbolState(read[-1], number, None, None)


def test_nobody_asks_and_nothing_is_read() -> None:
    read: list[str] = []
    SymbolStates(states(read))
    assert read == []


def test_slices_are_small_and_make_the_whole() -> None:
    read: list[str] = []
    symbols = SymbolStates(states(read))
    sizes = []
    for _ in symbols.read():
        sizes.append(len(read))
    assert sizes == [SLICE_SYMBOLS, 2 * SLICE_SYMBOLS, COUNT]
    assert [state.symbol for state in symbols] == read


@pytest.mark.parametrize("slices", [0, 1, 5])
def test_whoever_asks_gets_all_of_them_once(slices: int) -> None:
    read: list[str] = []
    symbols = SymbolStates(states(read))
    for _ in zip(range(slices), symbols.read(), strict=False):
        pass
    wanted = [f"S{number}" for number in range(COUNT)]
    for _ in range(2):
        assert [state.symbol for state in symbols] == wanted
        assert (len(symbols), symbols[-1].symbol, len(symbols[1:3])) == (COUNT, wanted[-1], 2)
    assert read == wanted


def test_what_was_broken_off_is_not_taken_for_all() -> None:
    def broken() -> Iterator[SymbolState]:
        yield SymbolState("A", 1, None, None)
        raise LookupError("it is gone")

    symbols = SymbolStates(broken())
    for _ in range(3):
        with pytest.raises(LookupError):
            list(symbols)
