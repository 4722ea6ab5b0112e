"""Parse: one combined trade frame, alone, and from the socket's bytes into its published ring slot.

The figures of tradecore are the daemon's own code called from C. `parse`: scan, exact decimals,
symbol lookup. `ingest`: that and duplicate check, line, ring slot, checksum, latency histogram. The
baselines only parse and store; the floor finds the end of each frame by memchr.
"""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import orjson
from _harness import Case, Prepared, main_small
from _workload import SYMBOLS, symbol_table, trade_frames, trade_rows
from numpy.typing import NDArray

from tradecore import _bench
from tradecore._bench import Frames
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.ring import Ring
from tradecore.schema import TRADE_DTYPE

COUNT = 16_384
PARSE = "tradecore, parse alone, from C"
ORJSON = "orjson.loads, exact int, numpy row"
COMPARED = ["trade_id", "price_e8", "quantity_e8", "trade_us", "symbol_id", "flags"]
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}


def new_capture(folder: Path) -> Capture:
    """Return a capture over a fresh ring of COUNT rows."""
    path = folder / "ring"
    path.unlink(missing_ok=True)
    ring = Ring(path, COUNT)
    for symbol in SYMBOLS:
        ring.intern(symbol)
    return Capture(ring, ring.symbols, Conflator(len(SYMBOLS)))


def parsed(_folder: Path) -> Prepared:
    """Prepare the loop in C over the parser."""
    frames, symbols = Frames(trade_frames(trade_rows(COUNT))), symbol_table()
    assert _bench.parse(frames, symbols) == COUNT  # from_c compares the values
    return lambda: None, lambda: _bench.parse(frames, symbols)


def scanned(_folder: Path) -> Prepared:
    """Prepare the floor: memchr over the same bytes."""
    frames = Frames(trade_frames(trade_rows(COUNT)))
    assert _bench.scan(frames) == COUNT
    return lambda: None, lambda: _bench.scan(frames)


def from_c(folder: Path) -> Prepared:
    """Prepare the loop in C over `Capture.ingest`."""
    rows = trade_rows(COUNT)
    frames, capture = Frames(trade_frames(rows)), new_capture(folder)
    _bench.ingest(capture, frames)
    assert_equal(capture.ring.peek(COUNT), rows)  # type: ignore[attr-defined]
    return lambda: None, lambda: _bench.ingest(capture, frames)


def from_python(folder: Path) -> Prepared:
    """Prepare one Python call a frame."""
    rows = trade_rows(COUNT)
    frames = trade_frames(rows)
    capture = new_capture(folder)

    def setup() -> None:
        nonlocal capture
        capture = new_capture(folder)

    def work() -> None:
        feed = capture.feed
        for frame in frames:
            feed(frame, 1)

    work()
    assert_equal(capture.ring.peek(COUNT), rows)  # type: ignore[attr-defined]
    return setup, work


def with_orjson(_folder: Path) -> Prepared:
    """Prepare the best that Python can do and stay exact; it relies on eight decimals."""
    rows, found = trade_rows(COUNT), np.zeros(COUNT, TRADE_DTYPE)
    frames = trade_frames(rows)

    def work() -> None:
        loads, ids = orjson.loads, IDS
        for i, frame in enumerate(frames):
            data = loads(frame)["data"]
            found[i] = (
                i + 1,
                data["t"],
                int(data["p"].replace(".", "")),
                int(data["q"].replace(".", "")),
                data["T"] * 1000,
                1,
                ids[data["s"]],
                data["m"],
                0,
                0,
                0,
            )

    work()
    assert_equal(found, rows)
    return lambda: None, work


def with_json(_folder: Path) -> Prepared:
    """Prepare the usual script: json.loads, Decimal, a list of tuples."""
    frames = trade_frames(trade_rows(COUNT))

    def work() -> None:
        found = []
        for frame in frames:
            data = json.loads(frame)["data"]
            found.append(
                (data["T"], data["s"], Decimal(data["p"]), Decimal(data["q"]), data["m"], data["t"])
            )

    return lambda: None, work


def assert_equal(found: NDArray[np.void], wanted: NDArray[np.void]) -> None:
    """Assert that both hold the same trades."""
    assert len(found) == len(wanted)
    for name in COMPARED:
        assert np.array_equal(found[name], wanted[name]), name


def cases() -> list[Case]:
    """Return the cases of this bench."""
    unit = "ns/trade"
    return [
        Case(
            bench="parse",
            subject=PARSE,
            items=COUNT,
            unit=unit,
            prepare=parsed,
            baseline=ORJSON,
            limit=45,
            ratio_least=30,
            repeats=200,
        ),
        Case(
            bench="parse",
            subject="memchr over the same bytes (floor)",
            items=COUNT,
            unit=unit,
            prepare=scanned,
            baseline=PARSE,
            repeats=200,
        ),
        Case(
            bench="parse",
            subject="tradecore, into its ring slot, from C",
            items=COUNT,
            unit=unit,
            prepare=from_c,
            baseline=ORJSON,
            limit=90,
            repeats=200,
        ),
        Case(
            bench="parse",
            subject="tradecore, a Python call a frame",
            items=COUNT,
            unit=unit,
            prepare=from_python,
            baseline=ORJSON,
        ),
        Case(bench="parse", subject=ORJSON, items=COUNT, unit=unit, prepare=with_orjson),
        Case(
            bench="parse",
            subject="json.loads, Decimal, tuple",
            items=COUNT,
            unit=unit,
            prepare=with_json,
            baseline=ORJSON,
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main_small("parse", __doc__))
