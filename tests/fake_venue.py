"""A scripted exchange on loopback sockets, for tests of the venue side.

It answers control requests, records what it was asked and when, and misbehaves on demand. The
`StubListener` stands in for the frame listener: it tells data, replies and notices apart.
"""

import asyncio
import json
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import picows
from aiohttp import WSMessage, WSMsgType, web

from tradecore import clock

TRADE = (
    '{"stream":"btcusdt@trade","data":{"e":"trade","E":1700000000000000,"s":"BTCUSDT","t":%d,'
    '"p":"1.00000000","q":"2.00000000","T":1700000000000000,"m":true,"M":true}}'
)


@dataclass
class Peer:
    """One connection as the venue sees it."""

    socket: web.WebSocketResponse
    query: str
    headers: dict[str, str]
    requests: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    """(time, payload bytes, request)"""
    subscribed: list[str] = field(default_factory=list)
    pongs: list[bytes] = field(default_factory=list)
    pings: int = 0
    deaf: bool = False
    """Sends no more data, no replies and no pongs: half-open."""
    mute: bool = False
    """Sends no more data, but answers."""
    close_code: int | None = None
    """What the client sent as CLOSE; None while it has not."""
    gone: bool = False

    async def send(self, text: str) -> None:
        if not self.deaf:
            with suppress(ConnectionError):
                await self.socket.send_str(text)

    def raw(self, data: bytes) -> None:
        """Write bytes past the WebSocket framing."""
        assert self.socket._req is not None and self.socket._req.transport is not None
        self.socket._req.transport.write(data)

    def reset(self) -> None:
        """Send a TCP RST."""
        assert self.socket._req is not None
        transport = self.socket._req.transport
        assert transport is not None
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


Answer = Callable[[Peer, dict[str, Any]], object]
"""(peer, request) -> the reply as an object; None for silence; `...` for the usual reply."""


class Venue:
    """Listen on a free port of 127.0.0.1 and serve `/stream`."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.port = 0
        self.data_every_s: float | None = 0.01
        """Pace of trade frames to subscribed peers; None for silence."""
        self.answer: Answer = lambda peer, request: ...
        self.on_open: Callable[[Peer], Awaitable[None]] | None = None
        self.last_words = 0
        """Data events still sent after the client's CLOSE has come."""
        self.farewell_s = 0.0
        """How long it takes to answer the client's CLOSE."""
        self.refuse: web.Response | None = None
        self.pong = False
        """Whether pings are answered."""
        self.scheme = "ws"
        self.upgrades: list[float] = []
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def last(self) -> Peer:
        return self.peers[-1]

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        app = web.Application()
        app.router.add_get("/stream", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.scheme = "wss" if tls else "ws"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.upgrades.append(time.monotonic())
        if self.refuse is not None:
            return web.Response(
                status=self.refuse.status, headers=self.refuse.headers, body=self.refuse.body
            )
        ws = web.WebSocketResponse(autoping=False, autoclose=False, timeout=0.2)
        await ws.prepare(request)
        peer = Peer(ws, request.query_string, dict(request.headers))
        self.peers.append(peer)
        data = asyncio.create_task(self._send_data(peer))
        try:
            if self.on_open is not None:
                await self.on_open(peer)
            async for message in ws:
                await self._take(peer, message)
            peer.close_code = ws.close_code
            for number in range(self.last_words):
                text = (TRADE % number).encode()
                peer.raw(b"\x81\x7e" + len(text).to_bytes(2, "big") + text)
            await asyncio.sleep(self.farewell_s)
            await ws.close()
        finally:
            peer.gone = True
            data.cancel()
            with suppress(asyncio.CancelledError):
                await data
        return ws

    async def _take(self, peer: Peer, message: WSMessage) -> None:
        if message.type is WSMsgType.PONG:
            peer.pongs.append(bytes(message.data))
        elif message.type is WSMsgType.PING:
            peer.pings += 1
            if self.pong and not peer.deaf:
                await peer.socket.pong(message.data)
        elif message.type is WSMsgType.TEXT:
            request = json.loads(message.data)
            size = len(message.data.encode())
            peer.requests.append((time.monotonic(), size, request))
            reply = self.answer(peer, request)
            if reply is ...:
                if request["method"] == "SUBSCRIBE":
                    peer.subscribed += request["params"]
                    reply = {"result": None, "id": request["id"]}
                elif request["method"] == "UNSUBSCRIBE":
                    for stream in request["params"]:
                        peer.subscribed.remove(stream)
                    reply = {"result": None, "id": request["id"]}
                else:
                    reply = {"result": peer.subscribed, "id": request["id"]}
            if reply is not None:
                await peer.send(json.dumps(reply, separators=(",", ":")))

    async def _send_data(self, peer: Peer) -> None:
        trade_id = 0
        while not peer.socket.closed:
            if self.data_every_s is not None and peer.subscribed and not peer.mute:
                trade_id += 1
                await peer.send(TRADE % trade_id)
            await asyncio.sleep(self.data_every_s or 0.01)


class StubListener(picows.WSListener):
    """Counts data events and hands the rest to its owner, as the real one does."""

    def __init__(self, owner: Any, line: int, epoch: int) -> None:
        self.owner = owner
        self.line = line
        self.epoch = epoch
        self.last_data_ns = 0
        self.data_frames = 0
        self.doubtful: set[int] = set()
        """Symbols that are not seen to continue."""
        self.passed_by: set[int] = set()
        """Symbols that others bring and this connection does not."""
        self.marks = 0

    def unconfirmed(self, symbol_ids: Sequence[int]) -> list[int]:
        return [i for i in symbol_ids if i in self.doubtful | self.passed_by]

    def mark(self) -> None:
        self.marks += 1

    def left_out(self, symbol_ids: Sequence[int]) -> list[int]:
        return [symbol_id for symbol_id in symbol_ids if symbol_id in self.passed_by]

    def behind(self, symbol_ids: Sequence[int]) -> list[tuple[int, int, int]]:
        # Others go on all the time.
        now = clock.mono_ns()
        return [(symbol_id, 7, now) for symbol_id in symbol_ids if symbol_id in self.passed_by]

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.owner.on_connected(transport)

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.owner.on_disconnected(transport)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())
        elif frame.msg_type == picows.WSMsgType.PONG:
            self.owner.on_pong()
        if frame.msg_type != picows.WSMsgType.TEXT:
            return
        payload = frame.get_payload_as_bytes()
        if b'"serverShutdown"' in payload:
            self.owner.on_server_shutdown(json.loads(payload)["data"]["E"])
        elif payload.startswith(b'{"stream"'):
            self.last_data_ns = clock.mono_ns()
            self.data_frames += 1
        else:
            self.owner.on_control(payload)


async def eventually(condition: Callable[[], object], limit_s: float = 5.0) -> None:
    """Wait until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        await asyncio.sleep(0.005)


def make_certificate(folder: Path) -> Path:
    """Make a self-signed certificate for 127.0.0.1, with its key in the same file."""
    path, public = folder / "venue.pem", folder / "public.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=venue"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", public),
        ],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + public.read_bytes())
    return path


def server_tls(certificate: Path) -> ssl.SSLContext:
    """Return a server's context with this certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context
