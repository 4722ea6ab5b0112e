import asyncio
import contextlib
import json
import socket

import aiohttp
import pytest
from aiohttp import web
from http_desk import (
    API,
    LIVE,
    LIVE_ONCE,
    Failing,
    assert_secure,
    connected,
    fetch,
    raw,
    serving,
    until_connections,
)

from tradecore.http import connections, security
from tradecore.http.counts import HttpCounts
from tradecore.http.server import SideServer


async def read_to_end(reader):
    """Return how much comes until the end, however that comes."""
    size = 0
    with contextlib.suppress(ConnectionError):
        while some := await reader.read(1 << 20):
            size += len(some)
    return size


async def test_a_slow_handler_is_cut_off(monkeypatch):
    monkeypatch.setattr(security, "HANDLER_LIMIT_S", 0.05)
    async with serving(server_class=Failing) as server:
        response, body = await fetch(server, "/ready")
    assert (response.status, json.loads(body)["text"]) == (503, "The answer took too long.")
    assert_secure(response.headers)


async def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(connections, "ANSWER_LIMIT_S", 0.2)
    async with serving(server_class=Failing) as server, connected(server) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.transport.pause_reading()
        await until_connections(server, 0)


async def test_half_a_request_is_cut_off(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_LIMIT_S", 0.1)
    async with serving() as server:
        assert await raw(server, b"GET /live HTTP/1.1\r\nHost: loc") == b""


async def test_half_a_head_ends_however_often_some_of_it_comes(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.2)
    counts = HttpCounts()
    async with serving(counts=counts) as server, connected(server) as (reader, writer):
        writer.write(LIVE)
        assert await reader.readuntil(b"true}\n")
        await asyncio.sleep(0.3)  # no limit of heads for one that has not begun
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: ")
        end = asyncio.create_task(read_to_end(reader))
        async with asyncio.timeout(20):
            while not end.done():
                writer.write(b"y")
                await asyncio.sleep(0.02)
        assert await end == 0
    assert (counts.use().refused["slow"], counts.use().refused["malformed"]) == (1, 0)


async def test_a_head_may_come_in_pieces_and_behind_another():
    async with serving() as server, connected(server) as (reader, writer):
        await until_connections(server, 1)
        (ours,) = server._runner.server.connections
        for _ in range(3):
            for piece in (LIVE[:5], LIVE[5:30], LIVE[30:] + LIVE[:7], LIVE[7:]):
                writer.write(piece)
                await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            for _ in range(6):
                assert (await reader.readuntil(b"true}\n")).startswith(b"HTTP/1.1 200")
        assert ours._timer is None, "with the last head its limit ends"


class Closing(SideServer):
    """A server whose index ends when the client takes no more, a little of it unsent."""

    async def _index(self, request):
        response = web.StreamResponse()
        await response.prepare(request)
        while not request.transport.get_write_buffer_size():
            await response.write(bytes(32_000))
        return response


async def test_the_kernel_ends_what_is_closed_and_never_read(monkeypatch):
    monkeypatch.setattr(connections, "ANSWER_LIMIT_S", 0.5)
    counts = HttpCounts()
    async with (
        serving(server_class=Closing, counts=counts) as server,
        connected(server) as (_, writer),
    ):
        writer.transport.pause_reading()
        writer.write(b"GET /api HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await until_connections(server, 1)
        await until_connections(server, 0)
    assert counts.use().refused["slow"] == 0, "it was not the loop that did it"


class Waiting(SideServer):
    """A server whose index is answered when the test says so."""

    def __init__(self, *rest, **options):
        self.go = asyncio.Event()
        super().__init__(*rest, **options)

    async def _index(self, _request):
        await self.go.wait()
        return web.Response(body=b"done")


HEAVY_BYTES = 8_000_000
"""More than the kernel takes of one answer."""


class Heavy(SideServer):
    """A server with a large index."""

    async def _index(self, _request):
        return web.Response(body=bytes(HEAVY_BYTES))


async def test_what_is_not_read_is_bounded_for_all_together(monkeypatch):
    monkeypatch.setattr(connections, "UNSENT_MAX_BYTES", 300_000)
    counts = HttpCounts()
    async with (
        serving(server_class=Heavy, counts=counts) as server,
        contextlib.AsyncExitStack() as stack,
    ):

        async def ask(address):
            reader, writer = await stack.enter_async_context(connected(server, address))
            socket_ = writer.get_extra_info("socket")
            socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            writer.write(b"GET /api HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            await reader.read(1)  # the rest waits for us
            return reader

        alone = await ask("127.0.0.2")
        crowd = [await ask("127.0.0.1") for _ in range(9)]
        for one in (one for one in server._runner.server.connections if one.transport):
            taken = one.transport.get_extra_info("socket")
            kept = taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            assert kept == connections.UNSENT_IN_KERNEL_BYTES
        unsent = [one.unsent_bytes for one in server._runner.server.connections]
        assert max(unsent) < 100_000, "a piece or three of each"
        assert 100_000 < sum(unsent) <= 300_000
        ended = counts.use().refused["slow"]
        assert 0 < ended < 9
        async with asyncio.timeout(20):
            # The crowd has given way to itself: its latest and who came alone are served whole.
            for reader in (alone, crowd[-1]):
                assert await read_to_end(reader) > HEAVY_BYTES
            assert await read_to_end(crowd[0]) < HEAVY_BYTES
        assert counts.use().refused["slow"] == ended
        assert (await fetch(server, "/live"))[0].status == 200


@contextlib.asynccontextmanager
async def busy(server, count):
    """Keep so many connections busy; yield their answers."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(connected(server)) for _ in range(count)]
        await until_connections(server, count)
        for _, writer in pairs:
            writer.write(b"GET /api HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(20):
            while not all(one._request_in_progress for one in server._runner.server.connections):
                await asyncio.sleep(0.005)
        yield pairs


async def test_who_has_waited_longest_gives_way(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 0.0)
    async with serving() as server, contextlib.AsyncExitStack() as stack:
        silent, half, asked = [await stack.enter_async_context(connected(server)) for _ in range(3)]
        await until_connections(server, 3)
        half[1].write(LIVE[:20])
        asked[1].write(LIVE)
        await asked[0].readuntil(b"true}\n")
        for gone in (silent, half, asked):
            reader, writer = await stack.enter_async_context(connected(server))
            writer.write(LIVE)
            async with asyncio.timeout(20):
                assert await reader.readuntil(b"true}\n")
                with contextlib.suppress(ConnectionError):
                    assert await gone[0].read() == b""
            await until_connections(server, 3)


async def test_who_has_just_come_gives_way_to_nobody(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 60.0)
    async with serving() as server, connected(server) as (reader, writer):
        await until_connections(server, 1)
        head, _, body = (await raw(server, API)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert json.loads(body)["code"] == -1000
        writer.write(LIVE)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_when_all_are_busy_others_are_told_so_and_probes_are_served(monkeypatch, pieces):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 2)
    async with serving(server_class=Waiting) as server:
        async with busy(server, 2) as pairs:
            async with connected(server) as (reader, writer):
                writer.write(b"GET /x HTTP/1.1\r\n")
                if pieces == 2:
                    await asyncio.sleep(0.05)
                writer.write(b"Host: localhost\r\nX: " + b"y" * 3000 + b"\r\n\r\n")
                async with asyncio.timeout(20):
                    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            assert status == "HTTP/1.1 503 Service Unavailable"
            assert (headers["Retry-After"], headers["Connection"]) == ("1", "close")
            assert_secure(headers)
            assert set(json.loads(body)) == {"error", "text"}
            for path in ("/live", "/ready", "/metrics", "/health?x=1"):
                for method in ("GET", "HEAD"):
                    response, _ = await fetch(server, path, method)
                    assert response.status == 200
            server.go.set()
            for reader, _ in pairs:
                assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
        await until_connections(server, 0)
        assert (await fetch(server, "/api"))[0].status == 200


async def test_places_for_probes_and_at_the_door_are_bounded(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(connections, "PROBES_MAX", 1)
    monkeypatch.setattr(connections, "DOOR_MAX", 2)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 60.0)
    async with (
        serving(server_class=Waiting) as server,
        busy(server, 1),
        connected(server) as (reader, writer),
    ):
        writer.write(LIVE)
        assert (await reader.readuntil(b"true}\n")).startswith(b"HTTP/1.1 200")
        assert (await raw(server, LIVE)).startswith(b"HTTP/1.1 503 ")
        async with connected(server) as first, connected(server), connected(server):
            async with asyncio.timeout(1):
                assert (await first[0].read()).startswith(b"HTTP/1.1 503 ")
            writer.write(LIVE)
            assert await reader.readuntil(b"true}\n")
        server.go.set()


async def test_nobody_stands_at_the_door_for_long(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 0)
    monkeypatch.setattr(connections, "DOOR_LIMIT_S", 0.05)
    async with serving() as server:
        assert await raw(server, b"") == b""
        async with connected(server) as (reader, writer):
            writer.write(API)
            async with asyncio.timeout(20):
                assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
                with pytest.raises(ConnectionError):
                    while True:
                        writer.write(b"x")
                        await writer.drain()
                        await asyncio.sleep(0.01)


async def test_a_pool_of_a_hundred_and_a_crowd_of_idlers_leave_room_for_others():
    async with serving() as server, contextlib.AsyncExitStack() as stack:
        session = aiohttp.ClientSession(f"http://127.0.0.1:{server.port}")
        await stack.enter_async_context(session)

        async def status(path):
            async with session.get(path) as response:
                await response.read()
                return response.status

        assert await asyncio.gather(*(status("/live") for _ in range(100))) == [200] * 100
        for number in range(200):
            _, writer = await stack.enter_async_context(connected(server))
            writer.write(LIVE if number % 3 == 0 else LIVE[:20])
        async with asyncio.timeout(2):
            for _ in range(20):
                assert (await fetch(server, "/live"))[0].status == 200
        assert await asyncio.gather(*(status("/live") for _ in range(100))) == [200] * 100


async def test_the_last_places_are_for_those_who_have_few(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 6)
    monkeypatch.setattr(connections, "KEPT_MAX", 2)
    counts = HttpCounts()
    async with serving(server_class=Waiting, counts=counts) as server, busy(server, 4):
        assert (await raw(server, API)).startswith(b"HTTP/1.1 503 ")  # they have 4, and 2 are kept
        assert (await raw(server, LIVE_ONCE)).startswith(b"HTTP/1.1 200 ")  # but for probes
        for _ in range(2):
            async with connected(server, "127.0.0.2") as (reader, writer):
                writer.write(API)
                assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
        server.go.set()
    assert counts.use().refused["crowd"] == 1


async def test_nobody_gives_way_to_a_peer_that_has_more(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 4)
    monkeypatch.setattr(connections, "KEPT_MAX", 1)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 0.0)
    async with serving() as server, contextlib.AsyncExitStack() as stack:

        async def come(address):
            reader, writer = await stack.enter_async_context(connected(server, address))
            writer.write(LIVE)
            async with asyncio.timeout(20):
                await reader.readuntil(b"true}\n")
            return reader, writer

        alone = await come("127.0.0.2")
        crowd = [await come("127.0.0.1") for _ in range(6)]
        async with asyncio.timeout(20):
            alone[1].write(LIVE)
            assert await alone[0].readuntil(b"true}\n")
            for reader, _ in crowd[:4]:  # the crowd has given way to itself
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        await come("127.0.0.3")
        alone[1].write(LIVE)
        assert await alone[0].readuntil(b"true}\n")


async def test_what_is_cut_off_is_counted(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.05)
    monkeypatch.setattr(connections, "ANSWER_LIMIT_S", 0.05)
    counts = HttpCounts()
    async with serving(server_class=Failing, counts=counts) as server:
        assert await raw(server, LIVE[:20]) == b""
        assert counts.use().refused["slow"] == 1
        async with connected(server) as (reader, writer):
            writer.write(LIVE)
            await reader.readline()
            writer.transport.pause_reading()
            await until_connections(server, 0)
    assert counts.use().refused["slow"] == 2
