"""URLs, TLS and sockets, against real listeners on loopback."""

import asyncio
import base64
import hashlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import picows
import pytest
import uvloop
from aiohttp import web
from fake_venue import Venue, eventually, make_certificate, server_tls

from tradecore import clock
from tradecore.errors import SettingsError, VenueError
from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
from tradecore.tls import tls_context

QUERY = "?timeUnit=MICROSECOND"


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    yield venue
    await venue.stop()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path)


@pytest.fixture
def fresh_tls_context() -> Iterator[None]:
    tls_context.cache_clear()
    yield
    tls_context.cache_clear()


@pytest.mark.parametrize("suffix", ["", "/", "/ws", "/ws/", "/stream", "/stream/"])
@pytest.mark.parametrize(
    "base",
    [
        "wss://stream.binance.com:9443",
        "wss://data-stream.binance.vision",
        "ws://127.0.0.1:8080",
        "ws://[::1]:8080",
        "ws://localhost",
    ],
)
def test_url(base: str, suffix: str) -> None:
    assert Endpoint.parse(base + suffix).url == f"{base}/stream{QUERY}"


def test_default_ports_and_a_path_before_the_suffix() -> None:
    assert Endpoint.parse("wss://host:443/ws").url == f"wss://host/stream{QUERY}"
    assert Endpoint.parse("WSS://Host/gate/stream/").url == f"wss://host/gate/stream{QUERY}"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "stream.binance.com",
        "https://stream.binance.com",
        "wss://",
        "wss://host:port",
        "wss://host:99999",
        "wss://[::1",
        "wss://user:secret@host",
        "wss://host/stream?streams=x",
        "wss://host/#x",
        "ws://stream.binance.com:9443",
        "ws://127.0.0.1.example.com",
        "ws://10.0.0.1",
        "ws://[fe80::1]",
    ],
)
def test_wrong_url_is_one_problem_without_secrets(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Endpoint.parse(url)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("BINANCE_WEBSOCKET_URL")
    assert "secret" not in str(caught.value)


def test_tls_context_verifies() -> None:
    context = tls_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


async def test_upgrade_offers_no_extension_and_asks_for_microseconds(venue: Venue) -> None:
    await venue.start()
    transport, listener = await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert isinstance(listener, picows.WSListener)
    await eventually(lambda: venue.peers)
    assert venue.last.query == QUERY[1:]
    assert "Sec-WebSocket-Extensions" not in venue.last.headers
    sock = transport.underlying_transport.get_extra_info("socket")
    # Linux doubles what is asked for and caps it at net.core.rmem_max
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= 2 << 20
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    transport.disconnect(graceful=False)
    await transport.wait_disconnected()


@pytest.mark.usefixtures("fresh_tls_context")
async def test_self_signed_certificate_is_refused(venue: Venue, certificate: Path) -> None:
    await venue.start(server_tls(certificate))
    with pytest.raises(ssl.SSLCertVerificationError):
        await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert not venue.upgrades


@pytest.mark.usefixtures("fresh_tls_context")
async def test_trusted_certificate_is_taken_for_its_own_name_only(
    venue: Venue, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    await venue.start(server_tls(certificate))
    transport, _ = await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert transport.is_secure
    transport.disconnect(graceful=False)
    await transport.wait_disconnected()
    with pytest.raises(ssl.SSLCertVerificationError):
        await Endpoint.parse(f"wss://localhost:{venue.port}").open(picows.WSListener, 5)


@pytest.mark.usefixtures("fresh_tls_context")
async def test_old_tls_is_refused(
    venue: Venue, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = server_tls(certificate)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    await venue.start(context)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert not venue.upgrades


@pytest.mark.parametrize("plain", [True, False])
async def test_name_that_points_elsewhere(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ws` trusts the resolved address, not the name."""

    async def resolve(*_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 9))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    if plain:
        with pytest.raises(VenueError, match=r"192\.0\.2\.1"):
            await Endpoint.parse("ws://localhost:9").open(picows.WSListener, 0.3)
    else:  # an address that swallows packets, or has no route
        with pytest.raises(OSError):
            await Endpoint.parse("wss://localhost:9").open(picows.WSListener, 0.3)


async def test_slow_name_service_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> list[object]:
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    with pytest.raises(TimeoutError, match="name localhost was not resolved"):
        await Endpoint.parse("ws://localhost:9").open(picows.WSListener, 0.1)


async def test_second_address_is_tried(venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    await venue.start()

    async def resolve(*_: object, **__: object) -> list[object]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (host, venue.port)) for host in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    transport, _ = await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    transport.disconnect(graceful=False)
    await transport.wait_disconnected()


async def test_refused_connection() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    sock.close()
    with pytest.raises(ConnectionRefusedError):
        await Endpoint.parse(f"ws://127.0.0.1:{port}").open(picows.WSListener, 5)


@pytest.mark.parametrize(
    ("status", "retry_after", "wish_s"),
    [
        (429, "7", 7.0),
        (418, "120", 120.0),
        (451, "", 0.0),
        (503, "soon", 0.0),
        (404, "-1", 0.0),
        (418, "Fri, 15 Jan 2100 10:00:00 GMT", 259200.0),
    ],
)
async def test_refused_upgrade(venue: Venue, status: int, retry_after: str, wish_s: float) -> None:
    await venue.start()
    venue.refuse = web.Response(status=status, headers={"Retry-After": retry_after})
    with pytest.raises(UpgradeRefusedError, match=f"HTTP {status}") as caught:
        await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert (caught.value.status, caught.value.retry_after_s) == (status, wish_s)


async def test_a_ban_that_only_the_body_tells_is_understood(venue: Venue) -> None:
    await venue.start()
    until_ms = clock.wall_ns() // 1_000_000 + 5_000_000
    body = f'{{"code":-1003,"msg":"Way too much; IP banned until {until_ms}."}}'
    venue.refuse = web.Response(status=418, text=body)
    with pytest.raises(UpgradeRefusedError) as caught:
        await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert caught.value.retry_after_s == pytest.approx(5000, abs=3)


async def test_redirect_is_not_followed(venue: Venue) -> None:
    await venue.start()
    venue.refuse = web.Response(status=302, headers={"Location": f"{venue.url}/stream"})
    with pytest.raises(UpgradeRefusedError, match="HTTP 302"):
        await Endpoint.parse(venue.url).open(picows.WSListener, 5)
    assert len(venue.upgrades) == 1


RESPONSES = {
    "hangs up": (b"", True, ConnectionResetError),
    "silent": (b"", False, TimeoutError),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", False, VenueError),
    "endless header": (b"HTTP/1.1 101 x\r\nA: " + b"a" * 20_000, False, VenueError),
    "wrong accept": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: x\r\n\r\n",
        False,
        VenueError,
    ),
}


@pytest.mark.parametrize("case", RESPONSES)
async def test_wrong_upgrade(case: str) -> None:
    response, hang_up, expected = RESPONSES[case]
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()
        if not hang_up:
            await reader.read()  # until the client hangs up
        writer.close()
        ended.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(expected):
            await Endpoint.parse(f"ws://127.0.0.1:{port}").open(picows.WSListener, 0.5)
        async with asyncio.timeout(5):
            await ended.wait()  # nothing stays open


async def test_unasked_extension_is_refused() -> None:
    async def serve(request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse()
        ws.headers["Sec-WebSocket-Extensions"] = "permessage-deflate"
        await ws.prepare(request)
        await ws.receive()
        return ws

    app = web.Application()
    app.router.add_get("/stream", serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    with pytest.raises(VenueError, match="permessage-deflate"):
        await Endpoint.parse(f"ws://127.0.0.1:{runner.addresses[0][1]}").open(picows.WSListener, 5)
    await runner.cleanup()


async def test_cancelled_attempt_leaves_nothing_behind() -> None:
    """The upgrade's answer arrives just after the attempt was given up."""
    listeners: list[picows.WSListener] = []
    asked, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        writer.close()
        ended.set()

    def make() -> picows.WSListener:
        listeners.append(picows.WSListener())
        return listeners[-1]

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        attempt = asyncio.create_task(Endpoint.parse(f"ws://127.0.0.1:{port}").open(make, 5))
        async with asyncio.timeout(5):
            await asked.wait()
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            await ended.wait()
    assert not listeners


@pytest.mark.usefixtures("fresh_tls_context")
def test_the_same_on_uvloop(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon runs on uvloop: TLS and plain, good and bad."""

    async def check() -> None:
        venue = Venue()
        await venue.start()
        transport, _ = await Endpoint.parse(venue.url).open(picows.WSListener, 5)
        transport.disconnect(graceful=False)
        await transport.wait_disconnected()
        await venue.stop()
        with pytest.raises(ConnectionRefusedError):
            await Endpoint.parse(venue.url).open(picows.WSListener, 5)
        secure = Venue()
        await secure.start(server_tls(certificate))
        with pytest.raises(ssl.SSLCertVerificationError):
            await Endpoint.parse(secure.url).open(picows.WSListener, 5)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        tls_context.cache_clear()
        transport, _ = await Endpoint.parse(secure.url).open(picows.WSListener, 5)
        transport.disconnect(graceful=False)
        await transport.wait_disconnected()
        await secure.stop()

    uvloop.run(check())


def test_reset_behind_a_burst_is_seen_at_once_and_loses_nothing() -> None:
    """What the kernel holds when the RST comes is read to its end, and then the end is noticed.

    libuv stops polling a socket with an error, so whoever reads once per poll event (as the
    transports of aiofastnet do) would neither read on nor ever hear of the reset.
    """
    sizes: list[int] = []

    class Listener(picows.WSListener):
        def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
            sizes.append(len(frame.get_payload_as_bytes()))

    async def check() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            endpoint = Endpoint.parse(f"ws://127.0.0.1:{server.getsockname()[1]}")
            attempt = asyncio.create_task(endpoint.open(Listener, 5))
            peer, _ = await loop.sock_accept(server)
        peer.setblocking(False)
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", await loop.sock_recv(peer, 65536))
        assert key
        guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key[1] + guid).digest())
        await loop.sock_sendall(
            peer,
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n",
        )
        transport, _ = await attempt
        # No await in between: one turn of the loop meets the burst and the reset together.
        burst = (b"\x81\x7e" + struct.pack(">H", 1000) + bytes(1000)) * 300
        assert peer.send(burst) == len(burst)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        async with asyncio.timeout(5):
            with suppress(ConnectionResetError):
                await transport.wait_disconnected()

    uvloop.run(check())
    assert sizes == [1000] * 300
