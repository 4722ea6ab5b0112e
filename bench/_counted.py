"""What bench/instructions.py counts: parse and encode, each as many times over as it is told."""

import sys
import tempfile
from pathlib import Path

from _workload import SYMBOLS, symbol_table, trade_frames, trade_rows

from tradecore import _bench
from tradecore._bench import Frames
from tradecore._copyenc import encode_trades
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.ring import Ring

ITEMS = 2048


def main(parse_rounds: int, encode_rounds: int) -> None:
    """Bring ITEMS frames into a ring, encode ITEMS rows; both at least once."""
    rows, symbols = trade_rows(ITEMS), symbol_table()
    frames = Frames(trade_frames(rows))
    with tempfile.TemporaryDirectory() as folder:
        ring = Ring(Path(folder) / "ring", ITEMS)
        for symbol in SYMBOLS:
            ring.intern(symbol)
        capture = Capture(ring, ring.symbols, Conflator(len(SYMBOLS)))
        for _ in range(parse_rounds):
            assert _bench.ingest(capture, frames) == ITEMS
    for _ in range(encode_rounds):
        slices = encode_trades(rows, symbols)
        for _ in slices:
            pass
        assert slices.encoded == ITEMS


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
