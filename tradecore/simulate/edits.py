"""What is done by hand to the next trades of one connection."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tradecore.simulate.chunks import Piece, Variant
from tradecore.simulate.faults import junk_frame

KINDS = ("drop", "duplicate", "reorder", "garbage")


@dataclass
class Edits:
    """How many of the next trades are still to be changed, by kind; symbols that are cut out."""

    left: Counter[str] = field(default_factory=Counter)
    """Kind of KINDS -> so many of the next trades. One trade has one kind, in that order."""
    muted: set[str] = field(default_factory=set)
    """Symbols whose trades this connection does not get any more."""
    tradeless: bool = False
    """True: it gets no trades at all."""
    _held: dict[str, bytes] = field(default_factory=dict)
    _turn: int = 0

    @property
    def active(self) -> bool:
        """Tell whether anything is to be changed."""
        return bool(self.tradeless or self._held or self.muted or self.left.total())

    def apply(
        self, pieces: Sequence[Piece], variant: Variant, event_us: int, counts: Counter[str]
    ) -> bytes:
        """Return the frames of a step with the changes in them, and count those."""
        out: list[bytes] = []
        for piece in pieces:
            if self.tradeless or piece.symbol in self.muted:
                counts["live muted"] += 1
                continue
            kind = next((name for name in KINDS if self.left[name] > 0), None)
            if kind:
                self.left[kind] -= 1
                counts[f"live {kind}"] += 1
            if kind == "reorder" and piece.symbol not in self._held:
                self._held[piece.symbol] = piece.frames  # comes right behind the next one
                continue
            if kind != "drop":
                out.append(piece.frames)
            if kind == "duplicate":
                out.append(piece.frames)
            if kind == "garbage":
                _, combined, micro = variant
                out.append(
                    junk_frame(self._turn, piece.symbol, piece.row, event_us, combined, micro)
                )
                self._turn += 1
            if piece.symbol in self._held:
                out.append(self._held.pop(piece.symbol))
        return b"".join(out)
