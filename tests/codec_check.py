"""Holds the three ways through the codec against the oracle, one frame at a time."""

from collections.abc import Mapping
from typing import Literal

import oracle
from plain_frames import SYMBOLS

from tradecore._fastparse import FrameError, parse_event
from tradecore._symbols import SymbolTable

Path = Literal["auto", "fast", "slow"]
PATHS: tuple[Path, ...] = ("slow", "auto", "fast")

Outcome = oracle.Event | None
"""The event, or None for a frame that is refused."""


def make_table(symbols: tuple[str, ...] = SYMBOLS) -> SymbolTable:
    table = SymbolTable()
    for symbol in symbols:
        table.add(symbol)
    return table


class Check:
    """Compares codec and oracle over one set of symbols."""

    def __init__(self, symbols: tuple[str, ...] = SYMBOLS) -> None:
        self.table = make_table(symbols)
        self.ids: Mapping[str, int] = {name: number for number, name in enumerate(symbols)}

    def __call__(self, payload: bytes) -> Outcome:
        """Return what every path and the oracle agree upon; AssertionError if they do not."""
        wanted, oracle_cause = self._oracle(payload)
        for path in PATHS:
            found, cause = self._codec(payload, path)
            if path == "fast" and cause == "not_fast":
                continue
            assert _exact(found) == _exact(wanted), (
                f"{payload!r}\n oracle: {wanted or oracle_cause}\n {path}: {found or cause}"
            )
        return wanted

    def _oracle(self, payload: bytes) -> tuple[Outcome, str]:
        try:
            return oracle.read_event(payload, self.ids), ""
        except oracle.Refused as refusal:
            return None, refusal.cause

    def _codec(self, payload: bytes, path: Path) -> tuple[Outcome, str]:
        try:
            return parse_event(payload, self.table, path), ""
        except FrameError as error:
            return None, error.cause


def _exact(outcome: Outcome) -> object:
    """Make True and 1 differ."""
    if outcome is None:
        return None
    kind, fields = outcome
    return kind, {name: (type(value), value) for name, value in fields.items()}
