"""Live streams for clients on this host, under the venue's paths and in the venue's protocol.

aiohttp shakes hands and reads what clients send; data go straight to the transport, prepared by
the fan-out. That is imported with the first client, so a daemon without any pays nothing.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import WSCloseCode, web

from tradecore import clock
from tradecore.capture import Capture
from tradecore.http import security, stream_words
from tradecore.schema import STREAM_KLINE, STREAM_TICKER, STREAM_TRADE
from tradecore.snapshot import FanOut
from tradecore.store.holes import HoleFate

if TYPE_CHECKING:
    from tradecore._broadcast import Broadcast, Key
    from tradecore.http.stream_session import Session

log = logging.getLogger(__name__)

CLIENTS_MAX = 256

KINDS = (STREAM_TRADE, STREAM_TICKER, STREAM_KLINE, stream_words.HOLE)
"""What may stand behind the @ of a name, in the order of the fan-out's kinds."""

REASONS = ("client", "lost", "slow", "requests", "pong", "message", "shutdown")
"""Why a client's connection ended; the last five are our doing."""

_CLOSE_LIMIT_S = 1.0


class Captured(NamedTuple):
    """What is captured now."""

    symbols: Sequence[str]
    kinds: Sequence[str]


class Streams:
    """All clients of live streams; `accept` is the handler of their paths."""

    def __init__(
        self,
        capture: Capture,
        captured: Callable[[], Captured],
        origins: Collection[str] = (),
    ) -> None:
        """`origins` are those of web pages, beside our own, that may open streams."""
        self.closed: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.holes_wanted = asyncio.Event()
        """Set while a client wants to hear of holes."""
        self._capture = capture
        self._captured = captured
        self._origins = frozenset(origins)
        self._names: tuple[Captured, dict[str, str]] | None = None
        self.sessions: set[Session] = set()
        self._open = 0
        self._broadcast: Broadcast | None = None
        self._closing = False

    @property
    def open(self) -> int:
        """Connections that are, or are about to be, streams."""
        return self._open

    def use(self) -> FanOut:
        """Return what metrics show."""
        zeros = [0] * len(KINDS)
        fan = self._broadcast
        conflated = fan.conflated if fan else zeros
        return FanOut(
            clients=len(self.sessions),
            events=dict(zip(KINDS, fan.events if fan else zeros, strict=True)),
            conflated=dict(zip(KINDS[1:3], conflated[1:3], strict=True)),
            closed=dict(self.closed),
        )

    def keys_of(self, names: Sequence[str]) -> list["Key"]:
        """Return what streams these are. Raises RefusedError when one of them is not captured."""
        from tradecore._broadcast import Key

        captured = self._captured()
        if self._names is None or self._names[0].symbols is not captured.symbols:
            self._names = captured, {stream_words.lower(one): one for one in captured.symbols}
        keys = []
        for name in names:
            symbol, _, kind = name.rpartition("@")
            if name == stream_words.ALL_HOLES:
                keys.append(Key(name, KINDS.index(stream_words.HOLE), 0))
                continue
            spelt = self._names[1].get(symbol)
            if spelt is None or kind not in (*captured.kinds, stream_words.HOLE):
                raise stream_words.not_captured([name])
            symbol_id = self._capture.symbols.get(spelt)
            assert symbol_id is not None
            keys.append(Key(name, KINDS.index(kind), symbol_id))
        return keys

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """Serve one client from its handshake to its end."""
        if self._closing or self._open >= CLIENTS_MAX:
            return security.error_answer(503, "Too many streams are open, or the daemon stops.")
        if not security.may_open_stream(request, self._origins):
            return security.error_answer(403, "Pages of other origins are not served.")
        from tradecore._broadcast import Broadcast
        from tradecore.http.stream_session import Session

        listed = request.match_info.get("streams", "")
        names = stream_words.names_in_url(request.path, request.query, listed)
        try:
            micro = stream_words.is_micro(request.query)
            keys = self.keys_of(names)
        except (ValueError, stream_words.RefusedError) as error:
            return security.error_answer(400, str(error))
        if len(keys) > stream_words.STREAMS_MAX:
            return security.error_answer(400, "Too many streams.")
        if self._broadcast is None:
            self._broadcast = Broadcast(self._capture)
        self._open += 1
        try:
            try:
                session = await Session.open(request, self, self._broadcast, micro)
            except OSError:
                return security.error_answer(400, "The client is gone.")
            self.sessions.add(session)
            try:
                self.closed[await session.serve(keys)] += 1
            finally:
                self.sessions.discard(session)
                self.changed()
        finally:
            self._open -= 1
        return session.response

    def changed(self) -> None:
        """Note that the streams of a client have changed."""
        if self._broadcast is not None and self._broadcast.is_wanted(
            KINDS.index(stream_words.HOLE)
        ):
            self.holes_wanted.set()
        else:
            self.holes_wanted.clear()

    def tell_hole(self, hole: HoleFate) -> None:
        """Tell those who want to know what has become of a hole."""
        if self._broadcast is None:
            return
        now_us = clock.wall_ns() // 1000
        names = f"{stream_words.lower(hole.symbol)}@{stream_words.HOLE}", stream_words.ALL_HOLES
        self._broadcast.announce(
            names,
            stream_words.hole_event(now_us // 1000, *hole),
            stream_words.hole_event(now_us, *hole),
        )

    def announce_shutdown(self) -> None:
        """Tell all clients to connect anew."""
        self._closing = True
        for session in self.sessions:
            session.announce_shutdown()

    async def close(self) -> None:
        """Close all clients' connections; within a second or so."""
        if not self._closing:
            self.announce_shutdown()
        closing = [
            session.closing(WSCloseCode.GOING_AWAY, "Going away", "shutdown")
            for session in self.sessions
        ]
        if closing:
            await asyncio.wait(closing, timeout=_CLOSE_LIMIT_S)
        for session in list(self.sessions):
            session.abort()
        if self._broadcast is not None:
            self._broadcast.close()
