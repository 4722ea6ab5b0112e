"""The WebSocket side: connections, their limits, pings, and the faults of a whole connection."""

import asyncio
import logging
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from aiohttp import WSMsgType, web
from aiohttp.abc import AbstractStreamWriter

from tradecore import clock
from tradecore.simulate.control import MAX_STREAMS, TooManyStreams, answer, is_stream_name
from tradecore.simulate.edits import Edits
from tradecore.simulate.frames import PING, PONG, frame, stamp, wrap
from tradecore.simulate.hub import Hub
from tradecore.simulate.limits import UpgradeBan
from tradecore.simulate.options import Options

log = logging.getLogger(__name__)

_FRAMES_PER_S = 5
_CONNECT_WINDOW_S = 300.0
_HIGH_WATER_BYTES = 1 << 20
_MAX_BACKLOG_BYTES = 64 << 20
_DRAIN_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 2.0
_POLICY_VIOLATION = 1008
_numbers = count()

BORN = ("mute", "tradeless")
"""What a connection can be from its start: without data, or without trades only."""


class Connection:
    """One client. Data frames go straight to the transport; aiohttp reads what the client sends."""

    def __init__(
        self,
        hub: Hub,
        options: Options,
        response: web.WebSocketResponse,
        transport: asyncio.Transport,
        writer: AbstractStreamWriter,
        combined: bool,
        micro: bool,
    ) -> None:
        self.streams: dict[str, None] = {}
        self.combined = combined
        self.micro = micro
        self.edits = Edits()
        self.number = next(_numbers)
        """Rises with each new connection."""
        self.answers_pings = True
        """False: neither answers pings nor sends any; data still flow."""
        self.mute = False
        """True: answers pings and requests as ever, and sends no data."""
        self._hub = hub
        self._options = options
        self._response = response
        self._transport = transport
        self._writer = writer
        self._silent = False
        self._received: deque[float] = deque(maxlen=_FRAMES_PER_S)
        self._unanswered: dict[bytes, float] = {}
        self._timers: list[asyncio.TimerHandle] = []
        self._tasks: set[asyncio.Task[None]] = set()
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def write(self, data: bytes) -> None:
        """Send whole data frames; a client that leaves 64 MiB unread is cut off."""
        if not self.mute:
            self._send(data)

    def _send(self, data: bytes) -> None:
        if self._silent or self._transport.is_closing():
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > _MAX_BACKLOG_BYTES:
            self._cut("slow reader")

    async def drain(self) -> None:
        """Wait until the client has read enough; after 30 s it is cut off."""
        if self._silent or self._transport.is_closing():
            return
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError:
            self._cut("slow reader")
        except ConnectionError:
            self._transport.abort()

    async def serve(self, streams: list[str]) -> None:
        """Serve the client until either side ends the connection."""
        if len(streams) > MAX_STREAMS:
            await self._close("Invalid request")
            return
        self.streams.update(dict.fromkeys(streams))
        self._hub.connections.add(self)
        self._hub.changed()
        self._start_timers()
        try:
            async for message in self._response:
                await self._on_message(message.type, message.data)
        finally:
            for timer in self._timers:
                timer.cancel()
            self._hub.connections.discard(self)
            self._hub.changed()

    async def _on_message(self, kind: WSMsgType, data: Any) -> None:
        if self._silent:
            return
        now = asyncio.get_running_loop().time()
        full = len(self._received) == _FRAMES_PER_S
        if full and now - self._received[0] < 1.0:
            self._hub.counts["closed too many requests"] += 1
            await self._close("Too many requests")
            return
        self._received.append(now)
        if kind is WSMsgType.PING and self.answers_pings:
            self._send(frame(bytes(data), PONG))
        elif kind is WSMsgType.PONG:
            if bytes(data) in self._unanswered:  # answering the newest ping is enough
                self._unanswered.clear()
        elif kind is WSMsgType.TEXT:
            await self._on_request(data)

    async def _on_request(self, text: str) -> None:
        before = (tuple(self.streams), self.combined)
        try:
            reply = answer(self, text, self._options.nested_errors)
        except TooManyStreams:
            await self._close("Invalid request")
            return
        if reply is None:
            self._hub.counts["request ignored for its size"] += 1
            return
        self._send(frame(reply.encode("utf-8")))
        if before != (tuple(self.streams), self.combined):
            self._hub.changed()

    def _start_timers(self) -> None:
        options = self._options
        self._later(options.ping_interval, self._ping)
        for age_s, action in (
            (options.cut_after, lambda: self._cut("cut")),
            (options.shutdown_after, self.announce_shutdown),
            (options.half_open_after, self.go_silent),
        ):
            if age_s:
                self._later(age_s, action)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        now = asyncio.get_running_loop().time()
        self._timers = [t for t in self._timers if not t.cancelled() and t.when() > now]
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, action))

    def _ping(self) -> None:
        now = asyncio.get_running_loop().time()
        oldest = min(self._unanswered.values(), default=now)
        if not self._options.no_pong_check and now - oldest >= self._options.pong_timeout:
            self._hub.counts["closed pong timeout"] += 1
            self._in_background(self._close("Pong timeout"))
            return
        payload = str(clock.wall_ns() // 1_000_000).encode()
        if not self._silent and self.answers_pings:
            self._unanswered.setdefault(payload, now)
            self._send(frame(payload, PING))
        deadline = min(self._unanswered.values(), default=now) + self._options.pong_timeout
        wait_s = self._options.ping_interval
        if not self._options.no_pong_check:
            wait_s = min(wait_s, max(deadline - now, 0.001))
        self._later(wait_s, self._ping)

    def announce_shutdown(self, cut_after_s: float = 0.0) -> None:
        """Say serverShutdown, and cut the connection so many seconds later (0 = never)."""
        self._hub.counts["server shutdown"] += 1
        event_time = stamp(clock.wall_ns() // 1000, self.micro)
        payload = f'{{"e":"serverShutdown","E":{event_time}}}'
        self._send(frame(wrap("!serverShutdown", payload, self.combined).encode()))
        if cut_after_s:
            self._later(cut_after_s, lambda: self._cut("cut"))

    def go_silent(self) -> None:
        """Say nothing any more and hear nothing, with the connection open."""
        self._hub.counts["half open"] += 1
        self._silent = True

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        link = self._transport.get_extra_info("socket")
        if link is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._cut("reset")

    def close(self, code: int) -> None:
        """Send a close frame with this code, and end the connection."""
        self._hub.counts[f"closed {code}"] += 1
        self._in_background(self._close("Going away", code))

    def _cut(self, reason: str) -> None:
        self._hub.counts[reason] += 1
        self._hub.note_lost()
        self._transport.abort()

    async def _close(self, reason: str, code: int = _POLICY_VIOLATION) -> None:
        log.info("connection closed", extra={"cause": reason})
        self._silent = True  # nothing may follow the close frame
        self._hub.note_lost()
        await self._response.close(code=code, message=reason.encode())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class StreamServer:
    """Accepts stream connections: `/ws`, `/ws/<stream>`, `/stream`, `/stream?streams=<a>/<b>`."""

    def __init__(self, hub: Hub, options: Options) -> None:
        self._hub = hub
        self._options = options
        self.to_refuse = options.refuse_connects
        """So many of the next connections are refused."""
        self.ban = UpgradeBan()
        self.to_delay = 0
        """So many of the next handshakes take `delay_s` seconds."""
        self.delay_s = 0.0
        self.born: Counter[str] = Counter()
        """How many of the next connections are to be so for their whole life, by word of BORN."""
        self.open: set[Connection] = set()
        self.connects = 0
        self.refused = 0
        self._connects: deque[float] = deque()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Put the paths of the streams on a router."""
        for path in ("/ws", "/ws/{streams:.*}", "/stream"):
            router.add_get(path, self._accept)

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        self.connects += 1
        if refusal := self._refusal():
            self.refused += 1
            return refusal
        if self.to_delay > 0:
            self.to_delay -= 1
            self._hub.counts["slow handshake"] += 1
            await asyncio.sleep(self.delay_s)
        combined = request.path == "/stream"
        listed = request.query.get("streams", "") if combined else request.match_info.get("streams")
        streams = [name for name in (listed or "").split("/") if name]
        unit = request.query.get("timeUnit", "MILLISECOND").upper()
        if unit not in ("MILLISECOND", "MICROSECOND") or not all(map(is_stream_name, streams)):
            return web.Response(status=400, text="Invalid request")
        response = web.WebSocketResponse(
            autoping=False, compress=False, timeout=_CLOSE_TIMEOUT_S, max_msg_size=1 << 20
        )
        writer = await response.prepare(request)
        transport = request.transport
        if writer is None or transport is None:
            return response
        micro = unit == "MICROSECOND"
        connection = Connection(
            self._hub, self._options, response, transport, writer, combined, micro
        )
        self._afflict(connection)
        self.open.add(connection)
        self._hub.note_accepted()
        try:
            await connection.serve(streams)
        finally:
            self.open.discard(connection)
        return response

    def _afflict(self, connection: Connection) -> None:
        for kind in BORN:
            if self.born[kind] > 0:
                self.born[kind] -= 1
                self._hub.counts[f"born {kind}"] += 1
                connection.mute = connection.mute or kind == "mute"
                connection.edits.tradeless = connection.edits.tradeless or kind == "tradeless"

    def _refusal(self) -> web.Response | None:
        """Return the refusal of a connection attempt, if it is one too many."""
        now = asyncio.get_running_loop().time()
        self._connects.append(now)
        while self._connects[0] < now - _CONNECT_WINDOW_S:
            self._connects.popleft()
        if self.to_refuse > 0:
            self.to_refuse -= 1
            self._hub.counts["refused connect"] += 1
            return web.Response(status=503, text="Service Unavailable")
        if (headers := self.ban.refuse()) is not None:
            self._hub.counts[f"refused connect {self.ban.status}"] += 1
            return web.Response(status=self.ban.status, headers=headers)
        if len(self._connects) > self._options.connect_limit:
            self._hub.counts["refused connect over limit"] += 1
            return web.Response(status=429, headers={"Retry-After": "300"})
        return None
