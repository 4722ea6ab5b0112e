"""Receive and parse: own CPU of a trade on a saturated socket, from the kernel into the ring.

The exchange sends as fast as it is read. tradecore's figure is the daemon's socket, its listener
and its capture, without a flusher: the rows are taken out and compared with what was sent, and that
time is left out. The baseline parses each frame with orjson and keeps nothing; the floor reads the
same bytes and looks at none.
"""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import uvloop
from _harness import Figure, arguments, figure, report
from _processes import exchange
from _workload import SYMBOLS
from bench_e2e import LIST, STREAMS, saturated_by
from numpy.typing import NDArray
from picows import WSFrame, WSListener, WSMsgType, WSTransport

from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.feed._listener import FrameListener
from tradecore.feed.endpoint import Endpoint
from tradecore.ring import Ring
from tradecore.simulate.market import Market

TRADES = 600_000
REPEATS = 3
TAKEN_ROWS = 8192
LIMIT_S = 60.0
LIMIT_US = 0.12
OURS = "picows, our listener and capture"
WITH_ORJSON = "picows, Python callback, orjson.loads"
FLOOR = "reading the bytes (floor)"
SUBSCRIBE = json.dumps({"method": "SUBSCRIBE", "params": STREAMS.split("/"), "id": 1}).encode()
PATH = f"/stream?streams={STREAMS}&timeUnit=MICROSECOND"


class Taker:
    """Takes rows out of the ring, as a flusher would, and keeps them."""

    def __init__(self, folder: Path) -> None:
        self.ring = Ring(folder / "ring", 1 << 20)
        for symbol in SYMBOLS:
            self.ring.intern(symbol)
        self.capture = Capture(self.ring, self.ring.symbols, Conflator(len(SYMBOLS)))
        self.rows: list[NDArray[np.void]] = []
        self.count = 0
        self.taking_s = 0.0
        self.all = asyncio.Event()
        self.take()

    def take(self) -> None:
        """Empty the ring."""
        began_s = time.process_time()
        self.rows.append(self.ring.peek(1 << 20).copy())
        self.ring.release(len(self.rows[-1]))
        self.count += len(self.rows[-1])
        self.capture.wake_when(min(TAKEN_ROWS, max(TRADES - self.count, 1)), self.take)
        if self.count == TRADES:
            self.all.set()
        self.taking_s += time.process_time() - began_s

    def compare(self, state: dict[str, Any]) -> None:
        """Assert that the rows are what was sent, in every value."""
        market, rows = Market(**state["market"]), np.concatenate(self.rows)
        for number, symbol in enumerate(SYMBOLS):
            found = rows[rows["symbol_id"] == number]
            ids = state["symbols"][symbol]
            sent = market.trades(symbol, ids["first_id"], ids["last_id"] + 1)
            for name in ("trade_id", "price_e8", "quantity_e8", "trade_us"):
                assert found[name].tolist() == [getattr(trade, name) for trade in sent], name
            sells = [trade.side == "SELL" for trade in sent]
            assert (found["flags"] & 1 != 0).tolist() == sells


class Loader(WSListener):
    """Parses each frame and keeps nothing."""

    def __init__(self) -> None:
        self.count = -1  # the reply to the subscription
        self.all = asyncio.Event()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        orjson.loads(frame.get_payload_as_memoryview())
        self.count += 1
        if self.count == TRADES:
            self.all.set()


class Reader(asyncio.BufferedProtocol):
    """Reads bytes into one buffer, over and over."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(1 << 16))
        self.count = 0

    def get_buffer(self, _hint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.count += count


async def received(subject: str, folder: Path) -> float:
    """Return the CPU in us a trade."""
    async with exchange("--symbols", LIST, *saturated_by(TRADES)) as (venue, ws):
        if subject == FLOOR:
            host, _, port = ws.removeprefix("ws://").partition(":")
            loop, reader = asyncio.get_running_loop(), Reader()
            transport, _ = await loop.create_connection(lambda: reader, host, int(port))
            began_s = time.process_time()
            transport.write(
                f"GET {PATH} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n"
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
            )
            assert venue.process.stdout is not None
            done = json.loads(await venue.process.stdout.readline())
            assert done["trades"] == TRADES
            assert reader.count > 0.9 * TRADES * 160
            transport.abort()
            return (time.process_time() - began_s) * 1e6 / TRADES
        taker = Taker(folder)
        nobody = SimpleNamespace(on_connected=id, on_disconnected=id, on_control=id)
        listener = (
            Loader() if subject == WITH_ORJSON else FrameListener(taker.capture, nobody, 0, 1)
        )
        consumer: Any = listener if subject == WITH_ORJSON else taker
        wire, _ = await Endpoint.parse(ws).open(lambda: listener, LIMIT_S)
        began_s, taker.taking_s = time.process_time(), 0.0
        wire.send(WSMsgType.TEXT, SUBSCRIBE)
        async with asyncio.timeout(LIMIT_S):
            await consumer.all.wait()
        cpu_s = time.process_time() - began_s - taker.taking_s
        if subject == OURS:
            taker.compare(json.loads(await venue.get("/sim/state")))
        wire.disconnect(graceful=False)
        return cpu_s * 1e6 / TRADES


async def measure() -> list[Figure]:
    """Return the figures; the ways take turns."""
    found: dict[str, list[float]] = {OURS: [], WITH_ORJSON: [], FLOOR: []}
    for _ in range(REPEATS):
        for subject, values in found.items():
            with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder:
                values.append(await received(subject, Path(folder)))
    unit = "us/trade"
    return [
        figure("receive", OURS, found[OURS], unit, baseline=WITH_ORJSON, limit=LIMIT_US),
        figure("receive", WITH_ORJSON, found[WITH_ORJSON], unit),
        figure("receive", FLOOR, found[FLOOR], unit, baseline=OURS),
    ]


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(uvloop.run(measure()), options.json))
