"""One client of live streams: its requests, its limits, its pings, its end."""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from aiohttp import WSCloseCode, WSMsgType, web

from tradecore import clock
from tradecore._broadcast import Broadcast, Key
from tradecore._reframe import COMBINED, MICRO
from tradecore.http import stream_words
from tradecore.http.stream_words import RefusedError, Request

log = logging.getLogger(__name__)

# It warns of each client that offers subprotocols.
logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)

PING_INTERVAL_S = 20.0
PONG_LIMIT_S = 60.0
REQUESTS_PER_S = 5
REPLIES_MAX_BYTES = 1 << 20
"""A client that leaves more unread gets no reply any more, but its end."""

CLOSE_LIMIT_S = 5.0
"""How long a client has for its part of the closing handshake."""


class Served(Protocol):
    """What a session asks of the whole."""

    def keys_of(self, names: Sequence[str]) -> list[Key]:
        """Raises RefusedError when one of them is not captured."""

    def changed(self) -> None:
        """Note that the streams of a client have changed."""


class Session:
    """Made by `open`; `serve` it to its end."""

    def __init__(
        self,
        response: web.WebSocketResponse,
        transport: asyncio.Transport,
        streams: Served,
        broadcast: Broadcast,
        mode: int,
    ) -> None:
        self.response = response
        self._transport = transport
        self._streams = streams
        self._client = broadcast.join(transport, self._give_up)
        self._mode = mode
        self._keys: dict[str, Key] = {}
        self._received: deque[float] = deque(maxlen=REQUESTS_PER_S)
        self._pings: dict[bytes, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._end: asyncio.Task[None] | None = None
        self._reason = "lost"
        self._peer = transport.get_extra_info("peername")

    @classmethod
    async def open(
        cls, request: web.Request, streams: Served, broadcast: Broadcast, micro: bool
    ) -> "Session":
        """Shake hands. Raises HTTPException when the request is none for a WebSocket."""
        response = web.WebSocketResponse(
            compress=False,
            autoping=False,
            timeout=CLOSE_LIMIT_S,
            max_msg_size=stream_words.REQUEST_MAX_BYTES,
        )
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        # The limit of plain answers would end a client that reads nothing for a few seconds.
        transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PONG_LIMIT_S * 1000)
        )
        mode = COMBINED * (request.path == "/stream") | MICRO * micro
        return cls(response, transport, streams, broadcast, mode)

    @property
    def subscriptions(self) -> list[str]:
        """The streams that the client gets."""
        return list(self._keys)

    @property
    def ending(self) -> bool:
        """Whether we have begun to close the connection."""
        return self._end is not None

    async def serve(self, keys: Sequence[Key]) -> str:
        """Serve the client until either side ends it; return why it ended."""
        self._keys = {key.name: key for key in keys}
        self._choose()
        self._ping_later()
        try:
            await self._read()
        finally:
            self._client.leave()
            if self._timer is not None:
                self._timer.cancel()
            if self._end is not None:
                await asyncio.wait({self._end})
                if self.response.close_code == WSCloseCode.ABNORMAL_CLOSURE:
                    # It did not take part: what it has not read must not keep the connection.
                    self.abort()
        return self._reason

    async def _read(self) -> None:
        while True:
            message = await self.response.receive()
            match message.type:
                case WSMsgType.TEXT if self._is_allowed():
                    self._answer(message.data)
                case WSMsgType.PING if self._is_allowed():
                    self._send(bytes(message.data), stream_words.PONG)
                case WSMsgType.PONG if self._is_allowed():
                    if bytes(message.data) in self._pings:
                        self._pings.clear()
                case WSMsgType.BINARY if self._is_allowed():
                    self.closing(WSCloseCode.UNSUPPORTED_DATA, "Requests are text", "message")
                case WSMsgType.CLOSE:
                    self._note("client")
                    return
                case WSMsgType.ERROR:
                    self._note("message")
                    return
                case WSMsgType.CLOSING | WSMsgType.CLOSED:
                    return
                case _:
                    pass  # too many: the end is under way

    def _is_allowed(self) -> bool:
        """Count a frame of the client; too many within a second are its end, as at the venue."""
        if self._end is not None:
            return False
        now_s = clock.mono_ns() / 1e9
        if len(self._received) == REQUESTS_PER_S and now_s - self._received[0] < 1.0:
            self.closing(WSCloseCode.POLICY_VIOLATION, "Too many requests", "requests")
            return False
        self._received.append(now_s)
        return True

    # ---- requests ----------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        try:
            request = stream_words.read_request(text)
            try:
                reply = stream_words.result(self._carry_out(request), request.request_id)
            except RefusedError as refusal:
                refusal.request_id = request.request_id
                raise
        except RefusedError as refusal:
            reply = stream_words.error(refusal)
        self._send(reply)

    def _carry_out(self, request: Request) -> list[str] | bool | None:
        match request.method:
            case "SUBSCRIBE":
                keys = {key.name: key for key in self._streams.keys_of(request.names)}
                if len(self._keys.keys() | keys.keys()) > stream_words.STREAMS_MAX:
                    raise RefusedError(stream_words.TOO_MANY, "Too many subscriptions")
                self._keys = {**self._keys, **keys}
            case "UNSUBSCRIBE":
                gone = set(request.names)
                self._keys = {name: key for name, key in self._keys.items() if name not in gone}
            case "LIST_SUBSCRIPTIONS":
                return self.subscriptions
            case "GET_PROPERTY":
                return bool(self._mode & COMBINED)
            case "SET_PROPERTY":
                self._mode = self._mode & ~COMBINED | COMBINED * request.value
        self._choose()
        return None

    def _choose(self) -> None:
        self._client.choose(self._keys.values(), self._mode)
        self._streams.changed()

    def _send(self, payload: bytes, opcode: int = stream_words.TEXT) -> None:
        if self._end is not None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > REPLIES_MAX_BYTES:
            self._give_up()
            return
        self._transport.write(stream_words.frame(payload, opcode))

    # ---- is it still there -------------------------------------------------------------------

    def _ping_later(self) -> None:
        now_s = clock.mono_ns() / 1e9
        oldest_s = min(self._pings.values(), default=now_s)
        wait_s = min(PING_INTERVAL_S, max(oldest_s + PONG_LIMIT_S - now_s, 0.001))
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._ping)

    def _ping(self) -> None:
        now_s = clock.mono_ns() / 1e9
        if self._pings and now_s - min(self._pings.values()) >= PONG_LIMIT_S:
            self.closing(WSCloseCode.POLICY_VIOLATION, "Pong timeout", "pong")
            return
        payload = str(clock.wall_ns() // 1_000_000).encode()
        self._pings.setdefault(payload, now_s)
        self._send(payload, stream_words.PING)
        self._ping_later()

    # ---- the end -----------------------------------------------------------------------------

    def _note(self, reason: str) -> None:
        if self._end is None:
            self._reason = reason

    def _give_up(self) -> None:
        log.warning("a slow reader of live streams is closed", extra={"peer": self._peer})
        self.closing(WSCloseCode.POLICY_VIOLATION, "Slow reader: too much is unread", "slow")

    def announce_shutdown(self) -> None:
        """Tell the client to connect anew."""
        divisor = 1000 if self._mode & MICRO else 1_000_000
        now = clock.wall_ns() // divisor
        self._send(stream_words.shutdown_event(now, bool(self._mode & COMBINED)))

    def closing(self, code: int, text: str, reason: str) -> "asyncio.Task[None]":
        """Begin to close the connection, if it is not done already; return the work."""
        if self._end is None:
            self._note(reason)
            self._client.leave()
            self._end = asyncio.create_task(self._close(code, text))
        return self._end

    async def _close(self, code: int, text: str) -> None:
        await self.response.close(code=code, message=text.encode(), drain=False)

    def abort(self) -> None:
        """End the connection without waiting for anything."""
        self._transport.abort()
