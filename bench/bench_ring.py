"""Ring: publish a row, show it to the consumer, release it; and recovery after a crash.

The baseline is what a script has between socket and database: an asyncio.Queue of tuples, which
neither survives the process nor has a bound in bytes.
"""

import asyncio
from pathlib import Path

from _harness import Case, Prepared, main_small
from _workload import trade_rows

from tradecore.ring import Ring

COUNT = 16_384
RECOVERED = 262_144
QUEUE = "asyncio.Queue of tuples"


def through_ring(folder: Path) -> Prepared:
    """Prepare append, peek and release on the mapped file."""
    rows = trade_rows(COUNT)
    ring = Ring(folder / "ring", COUNT)

    def work() -> None:
        ring.append(rows)
        ring.release(len(ring.peek(COUNT)))

    ring.append(rows)
    assert (ring.peek(COUNT)["trade_id"] == rows["trade_id"]).all()
    ring.release(COUNT)
    return lambda: None, work


def through_queue(_folder: Path) -> Prepared:
    """Prepare put and get of ready tuples, without any waiting."""
    records = trade_rows(COUNT).tolist()
    queue: asyncio.Queue[object] = asyncio.Queue(COUNT)

    def work() -> None:
        put, get = queue.put_nowait, queue.get_nowait
        for record in records:
            put(record)
        for _ in records:
            get()

    return lambda: None, work


def recovery(folder: Path) -> Prepared:
    """Prepare a ring whose rows a start has to check."""
    path = folder / "ring"
    ring = Ring(path, RECOVERED)
    rows = trade_rows(RECOVERED)
    rows["symbol_id"] = 0
    ring.intern("BTCUSDT")
    ring.append(rows)

    def work() -> None:
        assert Ring(path, RECOVERED).recovered == RECOVERED

    return lambda: None, work


def cases() -> list[Case]:
    """Return the cases of this bench."""
    unit = "ns/trade"
    return [
        Case(
            bench="ring",
            subject="tradecore, publish and release",
            items=COUNT,
            unit=unit,
            prepare=through_ring,
            baseline=QUEUE,
            repeats=200,
        ),
        Case(bench="ring", subject=QUEUE, items=COUNT, unit=unit, prepare=through_queue),
        Case(
            bench="ring",
            subject="tradecore, recovery at start",
            items=RECOVERED,
            unit=unit,
            prepare=recovery,
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main_small("ring", __doc__))
