"""What bench/instructions.py counts: parse and encode, each as many times over as it is told."""

import sys
import tempfile
from pathlib import Path

from _workload import SYMBOLS, symbol_table, trade_frames, trade_rows

from tradecore._copyenc import encode_trades
from tradecore.capture import Capture, bench_ingest
from tradecore.conflator import Conflator
from tradecore.ring import Ring

ITEMS = 2048


def main(parse_rounds: int, encode_rounds: int) -> None:
    """Bring ITEMS frames into a ring, encode ITEMS rows; both at least once."""
    rows, symbols = trade_rows(ITEMS), symbol_table()
    frames = trade_frames(rows)
    with tempfile.TemporaryDirectory() as folder:
        ring = Ring(Path(folder) / "ring", ITEMS)
        for symbol in SYMBOLS:
            ring.intern(symbol)
        capture = Capture(ring, ring.symbols, Conflator(len(SYMBOLS)))
        _, pending = bench_ingest(capture, frames, parse_rounds)
        assert pending == ITEMS
    for _ in range(encode_rounds):
        slices = encode_trades(rows, symbols)
        for _ in slices:
            pass
        assert slices.encoded == ITEMS


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
