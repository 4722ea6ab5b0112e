"""What bench/instructions.py counts: three loops, each as many times over as it is told."""

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

LOOPS = ("parse a trade frame", "the same, into the ring", "encode a row")
ITEMS = 2048


def main(parse_rounds: int, ingest_rounds: int, encode_rounds: int) -> None:
    """Run each of LOOPS over ITEMS frames or rows."""
    rows, symbols = trade_rows(ITEMS), symbol_table()
    frames = Frames(trade_frames(rows))
    for _ in range(parse_rounds):
        assert _bench.parse(frames, symbols) == ITEMS
    with tempfile.TemporaryDirectory() as folder:
        ring = Ring(Path(folder) / "ring", ITEMS)
        for symbol in SYMBOLS:
            ring.intern(symbol)
        capture = Capture(ring, ring.symbols, Conflator(len(SYMBOLS)))
        for _ in range(ingest_rounds):
            assert _bench.ingest(capture, frames) == ITEMS
    for _ in range(encode_rounds):
        slices = encode_trades(rows, symbols)
        for _ in slices:
            pass
        assert slices.encoded == ITEMS


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
