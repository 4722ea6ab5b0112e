"""What a side server meets on a bad day: a process for bench_abuse.

Each kind has addresses of its own, so that no rate limit of one hides what another costs.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

SCRAPERS = 10
SCRAPE_S = 0.1
FLOODS = 4
"""Clients of each kind of wrong request."""
FLOOD_S = 0.05
IDLERS = 1500
SLOW = 300
DRIP_S = 1.0
ASKERS = 12
ASK_S = 0.02
"""As often as one peer may."""
DEAF = 250
DEAF_BYTES = 4096
"""What the kernel of one that does not read takes for it."""
LIMIT_S = 10.0

HOST = b"Host: localhost\r\n"
REQUESTS = {
    "wrong token": b"GET /api HTTP/1.1\r\n" + HOST + b"Authorization: Bearer wrong\r\n\r\n",
    "no token": b"GET /api/v3/klines HTTP/1.1\r\n" + HOST + b"\r\n",
    "forged host": b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "huge header": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 60_000 + b"\r\n\r\n",
    "huge line": b"GET /?" + b"a=b&" * 15_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "unknown method": b"BREW /coffee HTTP/1.1\r\n" + HOST + b"\r\n",
    "wrong method": b"POST /live HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n",
    "unknown path": b"GET /wp-login.php HTTP/1.1\r\n" + HOST + b"\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",
}
SCRAPE = b"GET /metrics HTTP/1.1\r\n" + HOST + b"Accept-Encoding: gzip\r\n\r\n"
ASK = b"GET /health/binance HTTP/1.1\r\n" + HOST + b"\r\n"


class Crowd:
    """All who abuse one port; `counts` tells what they did and what they got."""

    def __init__(self, port: int) -> None:
        self.counts: Counter[str] = Counter()
        self._port = port

    async def run(self, kind: str, seconds: float) -> None:
        """Go on for so long, with "scrapes", "requests", "connections", "askers" or "deaf"."""
        work: list[Callable[[str], Awaitable[None]]] = []
        if kind == "scrapes":
            work += [self._scrape] * SCRAPERS
        elif kind == "requests":
            for name, request in REQUESTS.items():
                work += [self._flood(name, request)] * FLOODS
        elif kind == "askers":
            work += [self._asks] * ASKERS
        elif kind == "deaf":
            work += [self._deaf] * DEAF
        else:
            work += [self._idle] * IDLERS + [self._drip] * SLOW
        tasks = set()
        for number, one in enumerate(work):
            address = f"127.{len(kind)}.{number // 250}.{1 + number % 250}"
            tasks.add(asyncio.create_task(self._again(one, address)))
        await asyncio.sleep(seconds)

    async def _again(self, work: Callable[[str], Awaitable[None]], address: str) -> None:
        while True:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                await work(address)
            await asyncio.sleep(FLOOD_S)

    @asynccontextmanager
    async def _connected(
        self, address: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        self.counts["connections"] += 1
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self._port, local_addr=(address, 0)
            )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _answer(self, kind: str, reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(LIMIT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(size)
        self.counts[f"{kind}: {head.split()[1].decode()}"] += 1

    async def _scrape(self, address: str) -> None:
        await self._every(SCRAPE_S, "scrape", SCRAPE, address)

    async def _asks(self, address: str) -> None:
        await self._every(ASK_S, "/health/binance", ASK, address)

    async def _every(self, pause_s: float, kind: str, request: bytes, address: str) -> None:
        async with self._connected(address) as (reader, writer):
            while True:
                begin = time.monotonic()
                writer.write(request)
                await self._answer(kind, reader)
                await asyncio.sleep(max(0.0, pause_s - (time.monotonic() - begin)))

    async def _deaf(self, address: str) -> None:
        """Ask and read nothing, until the connection is closed."""
        async with self._connected(address) as (_, writer):
            taken = writer.get_extra_info("socket")
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DEAF_BYTES)
            writer.transport.pause_reading()
            while not writer.transport.is_closing():
                writer.write(ASK)
                await asyncio.sleep(DRIP_S)

    def _flood(self, kind: str, request: bytes) -> Callable[[str], Awaitable[None]]:
        async def once(address: str) -> None:
            async with self._connected(address) as (reader, writer):
                writer.write(request)
                await self._answer(kind, reader)

        return once

    async def _idle(self, address: str) -> None:
        async with self._connected(address) as (reader, _):
            await reader.read()

    async def _drip(self, address: str) -> None:
        """Send a head byte by byte."""
        async with self._connected(address) as (reader, writer):
            for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 1000:
                writer.write(bytes([byte]))
                with suppress(TimeoutError):
                    async with asyncio.timeout(DRIP_S):
                        await reader.read(1)
                    return  # it is closed


async def main() -> None:
    """Abuse the port of the command line in one way for its seconds; print what was done."""
    port, kind, seconds = sys.argv[1:]
    crowd = Crowd(int(port))
    await crowd.run(kind, float(seconds))
    print(json.dumps(crowd.counts), flush=True)
    os._exit(0)  # to end 2,000 tasks in order is not worth the wait


if __name__ == "__main__":
    asyncio.run(main())
