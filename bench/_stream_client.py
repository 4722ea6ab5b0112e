"""Many clients of the live streams in one process, for the bench of the fan-out.

Each counts the frames that come and checks at the end that no trade was left out; the first one
also notes when each trade came. Prints a line when data flow, and leaves the result in a file.
"""

import argparse
import asyncio
import json
import re
import resource
import time
from pathlib import Path

import uvloop

TRADE = re.compile(rb'"E":(\d+),"s":"([A-Z]+)","t":(\d+)')
REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Client(asyncio.Protocol):
    """Reads without parsing frames: what is inside a trade is enough to know it by."""

    def __init__(self, path: str, noting: bool) -> None:
        self._path = path
        self._noting = noting
        self._rest = b""
        self.flowing = asyncio.Event()
        self.trades = 0
        self.notes: list[tuple[str, int, int, int]] = []
        """Symbol, id, when it came, the venue's event time as it was sent."""
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Of uvloop, whose transports are no subclasses of asyncio's.
        transport.write(  # type: ignore[attr-defined]
            REQUEST.format(path=self._path).encode()
        )

    def data_received(self, data: bytes) -> None:
        now_us = time.time_ns() // 1000
        if self._noting:
            # What is cut by the end of a read is looked at with the next one.
            data = self._rest + data
            end = data.rfind(b"}") + 1
            self._rest = data[end:]
            for event_time, symbol, number in TRADE.findall(data, 0, end):
                name, trade_id = symbol.decode(), int(number)
                self.notes.append((name, trade_id, now_us, int(event_time)))
                self.first.setdefault(name, trade_id)
                self.last[name] = trade_id
                self.trades += 1
        else:
            self.trades += data.count(b'"M":true')
        self.flowing.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True


async def run(host: str, port: int, path: str, count: int, seconds: float) -> dict[str, object]:
    """Return what `count` clients got in so many seconds after all of them had data."""
    loop = asyncio.get_running_loop()
    clients = [Client(path, number == 0) for number in range(count)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, host, port)
    for client in clients:
        await client.flowing.wait()
    print("flowing", flush=True)
    clients[0].notes.clear()
    before = [client.trades for client in clients]
    cpu_s = time.process_time()
    await asyncio.sleep(seconds)
    noting = clients[0]
    expected = sum(noting.last[name] - noting.first[name] + 1 for name in noting.last)
    return {
        "trades": [client.trades - was for client, was in zip(clients, before, strict=True)],
        "left_out": expected - noting.trades,
        "closed": sum(client.closed for client in clients),
        "notes": noting.notes,
        "cpu_s": time.process_time() - cpu_s,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("count", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    work = run("127.0.0.1", options.port, options.path, options.count, options.seconds)
    options.result.write_text(json.dumps(uvloop.run(work)))
