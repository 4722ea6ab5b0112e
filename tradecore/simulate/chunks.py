"""The bytes of one step: the due trades of a set of symbols, as one kind of client gets them."""

from collections import Counter
from operator import itemgetter
from typing import NamedTuple

from tradecore.simulate.faults import Faults, render_trade
from tradecore.simulate.frames import trade_frames
from tradecore.simulate.market import Market
from tradecore.simulate.tape import Due
from tradecore.simulate.words import Row

Variant = tuple[frozenset[str], bool, bool]
"""Symbols, combined mode, microseconds: connections that agree in these get the same bytes."""


class Chunk(NamedTuple):
    """The frames of one step for one variant, and the faults in them."""

    data: bytes
    counts: Counter[str]


class Piece(NamedTuple):
    """One trade of a step and the frames in its place; none when it is left out."""

    symbol: str
    row: Row
    frames: bytes


def render_chunk(
    market: Market, faults: Faults, due: Due, variant: Variant, event_us: int
) -> Chunk:
    """Render the due trades of the variant's symbols, in order of time across symbols."""
    wanted, combined, micro = variant
    runs = [run for run in due if run[0] in wanted]
    counts: Counter[str] = Counter()
    if faults.active:
        pieces = _pieces(market, faults, runs, variant, event_us, counts)
        return Chunk(b"".join([piece.frames for piece in pieces]), counts)
    pairs: list[tuple[int, str]] = []
    for symbol, first, end in runs:
        rows = market.rows(symbol, first, end)
        pairs += trade_frames(symbol, rows, event_us, combined, micro)
    if len(runs) > 1:
        pairs.sort(key=itemgetter(0))
    return Chunk("".join([text for _, text in pairs]).encode("latin-1"), counts)


def render_pieces(
    market: Market,
    faults: Faults,
    due: Due,
    variant: Variant,
    event_us: int,
    counts: Counter[str],
) -> list[Piece]:
    """Render as `render_chunk` does, trade by trade; the faults are added to `counts`."""
    runs = [run for run in due if run[0] in variant[0]]
    return _pieces(market, faults, runs, variant, event_us, counts)


def _pieces(
    market: Market,
    faults: Faults,
    runs: Due,
    variant: Variant,
    event_us: int,
    counts: Counter[str],
) -> list[Piece]:
    held: dict[str, Row] = {}
    entries: list[tuple[int, str, Row]] = []
    for symbol, first, end in runs:
        before = first - 1 - market.first_id(symbol)
        if before >= 0 and faults.delayed(before):
            held.update((symbol, row) for row in market.rows(symbol, first - 1, first))
        entries += [(row[0], symbol, row) for row in market.rows(symbol, first, end)]
    entries.sort(key=itemgetter(0))
    out: list[Piece] = []
    _, combined, micro = variant

    def render(symbol: str, row: Row) -> None:
        position = row[1] - market.first_id(symbol)
        found = render_trade(faults, symbol, position, row, event_us, combined, micro, counts)
        out.append(Piece(symbol, row, b"".join(found)))

    for _, symbol, row in entries:
        late = held.pop(symbol, None)
        if faults.delayed(row[1] - market.first_id(symbol)):
            held[symbol] = row
            counts["reorder"] += 1
        else:
            render(symbol, row)
        if late:
            render(symbol, late)
    return out
