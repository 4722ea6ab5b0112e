"""A side server over a snapshot, and clients that speak HTTP to it well or badly."""

import asyncio
import contextlib
import json

import aiohttp
from aiohttp import web
from snapshots import HEALTHY

from tradecore.http import security
from tradecore.http.server import SideServer

PATHS = ("/api", "/health", "/health/db", "/health/binance", "/ready", "/live", "/metrics")

HOST = "Host: localhost"
LIVE = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIVE_ONCE = LIVE.replace(b"Host", b"Connection: close\r\nHost")
API = b"GET /api/v3/ping HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(snapshot=HEALTHY, host="127.0.0.1", server_class=SideServer, **options):
    """Yield a started server whose snapshot is `snapshot`."""
    server = server_class(host, 0, lambda: snapshot, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def fetch(server, path, method="GET", **options):
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.request(method, path, **options) as response,
    ):
        return response, await response.read()


@contextlib.asynccontextmanager
async def connected(server, address="127.0.0.1"):
    """Yield a connection from an address of the loopback."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, local_addr=(address, 0)
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_connections(server, count):
    async with asyncio.timeout(20):
        while len(server._runner.server.connections) != count:
            await asyncio.sleep(0.005)


async def raw(server, request: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes."""
    answer = b""
    async with asyncio.timeout(20), connected(server) as (reader, writer):
        writer.write(request)
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
    return answer


def assert_secure(headers):
    for name, value in security.HEADERS.items():
        assert headers[name] == value
    assert "Server" not in headers


class Failing(SideServer):
    async def _health(self, _request):
        raise RuntimeError("secret detail")

    async def _ready(self, _request):
        await asyncio.sleep(60)
        return web.Response()

    async def _live(self, _request):
        return web.Response(body=b"x" * (64 << 20))


def refusal_in(answer: bytes) -> tuple[int, list[str], str]:
    """Return status, the headers that not every answer has, and the text of the error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    found = dict(line.split(": ", 1) for line in lines)
    assert_secure(found)
    assert found["Content-Type"].startswith("application/json")
    assert int(found["Content-Length"]) == len(body)
    known = {*security.HEADERS, "Content-Type", "Content-Length", "Date"}
    more = [line for line in lines if line.split(": ")[0] not in known]
    error = json.loads(body)
    assert set(error) in ({"error", "text"}, {"code", "msg"})
    return int(status.split()[1]), more, error.get("text") or error.get("msg")
