"""The connections of the side server: how many there may be, and how long each may take.

When all places are taken, a connection that waits for a request gives way to the next client: the
one that has waited longest, whether it has sent nothing or half a head. When all of them are busy,
the next client stands at the door until the first bytes of its request are there. What asks how the
daemon is gets an answer all the same, so that no crowd makes a supervisor kill it; everybody else
is told to come back. The last places are for peers that have few, so that no peer has all of them.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import payload, web
from aiohttp.abc import AbstractStreamWriter

from tradecore.http.access import PROBE_PATHS
from tradecore.http.counts import HttpCounts
from tradecore.http.peers import peer_of
from tradecore.http.security import API_PREFIX, HEADERS, error_answer
from tradecore.log import once_per

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 10.0
HEAD_LIMIT_S = 10.0
"""From the first byte of a head to its last."""
IDLE_LIMIT_S = 30.0
"""Longest wait for a (next) whole request on a connection."""
IDLE_LEAST_S = 1.0
"""A connection that waits no longer than that gives way to nobody: its request is on its way."""

CONNECTIONS_MAX = 256
"""Beside live streams, which have a limit of their own."""
KEPT_MAX = 32
"""So many of them are for peers that have no more than so many."""
PROBES_MAX = 64
"""So many more for those who ask how the daemon is."""
DOOR_MAX = 256
"""So many more that are about to be turned away."""
DOOR_LIMIT_S = 2.0
RETRY_AFTER_S = 1
UNSENT_MAX_BYTES = 8 << 20
"""So much of what clients do not read is kept for all of them together, beside 64 KiB for each."""
PIECE_BYTES = 32 << 10
"""A larger answer is sent in such pieces: whatever is unsent of one piece, all of it is kept."""
UNSENT_IN_KERNEL_BYTES = 128 << 10
"""So much of it the kernel takes of each, beside what is under way: else it may be 4 MiB."""
BACKLOG = 1024
"""So many may wait for us to take them up; of those beyond, the client asks again after 1 s."""

LINE_MAX_BYTES = 8190
"""A request line: lists of symbols are long."""
HEADER_MAX_BYTES = 4096
HEADERS_MAX = 64


def _raw_answer(status: HTTPStatus, path: str = "", **headers: str) -> bytes:
    body = error_answer(status, path=path).body
    assert isinstance(body, bytes)
    head = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
        **HEADERS,
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{k}: {v}" for k, v in head.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


_FULL, _FULL_API = (
    _raw_answer(HTTPStatus.SERVICE_UNAVAILABLE, path, Retry_After=str(RETRY_AFTER_S))
    for path in ("", API_PREFIX)
)


class Pieces(payload.Payload):
    """A body of which no more is copied for a client than it takes, and a little."""

    _value: bytes

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._size = len(body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return it as text."""
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write it, piece by piece."""
        for begin in range(0, len(self._value), PIECE_BYTES):
            await writer.write(self._value[begin : begin + PIECE_BYTES])
            await writer.drain()


class House:
    """Who has a place, and who stands at the door."""

    def __init__(self, streams: Callable[[], int], counts: HttpCounts) -> None:
        """`streams` tells how many of the connections are live streams."""
        self.counts = counts
        self._streams = streams
        self._inside: set[GuardedConnection] = set()
        self._of_peer: Counter[str] = Counter()
        self._ripe: list[GuardedConnection] = []
        self._none_before_s = 0.0
        # Those who came first stand first, in both.
        self._door: dict[GuardedConnection, None] = {}
        self._clogged: dict[GuardedConnection, None] = {}

    def enter(self, connection: "GuardedConnection", is_probe: bool = False) -> bool:
        """Give a connection a place, if need be that of one that waits; tell whether it has one."""
        least_free = 0 if self._of_peer[connection.peer] < KEPT_MAX else KEPT_MAX
        while self._excess() >= -least_free:
            waiting = self._longest_waiting(connection.now())
            if waiting is None or self._of_peer[waiting.peer] < self._of_peer[connection.peer]:
                break  # nobody gives way to a peer that has more places
            self._remove(waiting)
            waiting.force_close()
        if self._excess() >= (PROBES_MAX if is_probe else -least_free):
            return False
        self._door.pop(connection, None)
        self._inside.add(connection)
        self._of_peer[connection.peer] += 1
        return True

    def stand_at_door(self, connection: "GuardedConnection") -> None:
        """Let a connection wait that found no place; who stands there longest makes room for it."""
        once_per(log, "full").warning(
            "all HTTP connections are taken and busy", extra={"connections": CONNECTIONS_MAX}
        )
        if len(self._door) >= DOOR_MAX:
            first = next(iter(self._door))
            del self._door[first]
            first.give_up()
        self._door[connection] = None

    def clog(self, connection: "GuardedConnection") -> None:
        """Note that a client does not read as fast as it is sent; too much for all ends some.

        Of the peer with most connections, the one goes first that has been at it longest.
        """
        self._clogged[connection] = None
        unsent_bytes = sum(one.unsent_bytes for one in self._clogged)
        while unsent_bytes > UNSENT_MAX_BYTES and len(self._clogged) > 1:
            last = max(self._clogged, key=lambda one: self._of_peer[one.peer])
            unsent_bytes -= last.unsent_bytes
            del self._clogged[last]
            last.end_slow()

    def flow(self, connection: "GuardedConnection") -> None:
        """Note that a client has read what it was sent."""
        self._clogged.pop(connection, None)

    def leave(self, connection: "GuardedConnection") -> None:
        """Take the place back, or the one at the door."""
        self._remove(connection)
        self._door.pop(connection, None)
        self.flow(connection)

    def _remove(self, connection: "GuardedConnection") -> None:
        if connection in self._inside:
            self._inside.remove(connection)
            self._of_peer[connection.peer] -= 1
            if not self._of_peer[connection.peer]:
                del self._of_peer[connection.peer]

    def _excess(self) -> int:
        return len(self._inside) - self._streams() - CONNECTIONS_MAX

    def _longest_waiting(self, now_s: float) -> "GuardedConnection | None":
        """Return who gives way: of those with most connections, who has waited longest."""
        while self._ripe:
            if self._is_ripe(one := self._ripe.pop(), now_s):
                return one
        if now_s < self._none_before_s:
            return None
        # A flood must not have us look at all of them for each that comes.
        waiting = [one for one in self._inside if one.is_waiting]
        self._ripe = [one for one in waiting if self._is_ripe(one, now_s)]
        self._ripe.sort(key=lambda one: (-self._of_peer[one.peer], one.waits_since_s), reverse=True)
        if not self._ripe:
            since_s = min((one.waits_since_s for one in waiting), default=now_s)
            self._none_before_s = since_s + IDLE_LEAST_S
            return None
        return self._ripe.pop()

    def _is_ripe(self, one: "GuardedConnection", now_s: float) -> bool:
        return one in self._inside and one.is_waiting and now_s - one.waits_since_s >= IDLE_LEAST_S


class GuardedConnection(web.RequestHandler):
    """A client's connection: bounded in number and time, silent about the server."""

    def __init__(self, manager: web.Server, loop: asyncio.AbstractEventLoop, house: House) -> None:
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=IDLE_LIMIT_S,
            max_line_size=LINE_MAX_BYTES,
            max_field_size=HEADER_MAX_BYTES,
            max_headers=HEADERS_MAX,
            lingering_time=1.0,
            access_log=None,  # type: ignore[arg-type]  # None is what switches it off
            logger=log,
        )
        self._house = house
        self._failed: web.Response | None = None
        self._was_slow = False
        self.peer = ""
        self.waits_since_s = 0.0
        """When it began to wait for a request, by the clock of the loop."""
        # Of one at the door.
        self._outside: asyncio.Transport | None = None
        self._turned_away = False
        # Ends what takes too long: half a head, or to stand at the door.
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way and nothing of an answer is unsent."""
        return (
            self._waiter is not None
            and not self._waiter.done()
            and self.transport is not None
            and not self.unsent_bytes
        )

    @property
    def unsent_bytes(self) -> int:
        """What the client has not taken yet, the kernel's part left out."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def now(self) -> float:
        """Return what the clock of the loop shows."""
        return self._loop.time()

    def give_up(self) -> None:
        """Turn a client at the door away without waiting for what it wants."""
        if self._outside is not None:
            if not self._turned_away:
                self._turned_away = True
                self._house.counts.refused("crowd")
                self._outside.write(_FULL)
            self._outside.close()

    # ---- begin and end -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection if there is a place for it."""
        address = transport.get_extra_info("peername")
        self.peer = peer_of(address[0]) if address else ""
        # Closing waits until all is sent; the kernel ends the wait for a client that never reads.
        options = {
            socket.TCP_USER_TIMEOUT: int(ANSWER_LIMIT_S * 1000),
            socket.TCP_NOTSENT_LOWAT: UNSENT_IN_KERNEL_BYTES,
        }
        for option, value in options.items():
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, value)
        if self._house.enter(self):
            self._take(transport)
        else:
            self._house.stand_at_door(self)
            self._outside = transport  # type: ignore[assignment]  # see _abort
            self._end_after(DOOR_LIMIT_S)

    def _take(self, transport: asyncio.BaseTransport) -> None:
        self._outside = None
        self.waits_since_s = self.now()
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Free the place."""
        self._house.leave(self)
        self._outside = None
        self._stop_timer()
        super().connection_lost(exc)

    def _end_after(self, limit_s: float) -> None:
        self._timer = self._loop.call_later(limit_s, self._end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self._outside is not None:
            _abort(self._outside)
        elif self._waiter is not None and not self._waiter.done():
            self._house.counts.refused("slow")
            self.force_close()
        else:
            # The head of the next request is there in part, while one is answered.
            self._end_after(HEAD_LIMIT_S)

    # ---- what comes --------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._outside is not None:
            self._at_the_door(self._outside, data)
            return
        before = self._request_count
        super().data_received(data)
        if self._request_count != before or self._upgraded:
            self._stop_timer()
        elif data and self._timer is None and not self._force_close:
            self._end_after(HEAD_LIMIT_S)

    def _at_the_door(self, transport: asyncio.Transport, data: bytes) -> None:
        if self._turned_away:
            return
        path = _path_of(data)
        self._stop_timer()
        if self._house.enter(self, path in PROBE_PATHS):
            self._take(transport)
            self.data_received(data)
            return
        self._turned_away = True
        self._house.counts.refused("crowd")
        transport.write(_FULL_API if path.startswith(API_PREFIX) else _FULL)
        # What may still come is read until the client has seen the answer: else it would be lost.
        transport.write_eof()
        self._end_after(DOOR_LIMIT_S)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Note bytes that are no HTTP request, or too large a one; the connection ends."""
        if status == HTTPStatus.BAD_REQUEST:
            log.debug("HTTP request refused", extra={"peer": request.remote, "cause": repr(exc)})
            self._house.counts.refused("malformed")
        else:
            once_per(log, repr(type(exc))).error(
                "HTTP request failed outside of its handler, a bug", exc_info=exc
            )
        self._failed = error_answer(status)
        return self._failed

    def pause_writing(self) -> None:
        """More than 64 KiB wait for a client to read: wait, with all others who make us wait."""
        super().pause_writing()
        if not self._upgraded:  # streams drop what is not read, and count it
            self._house.clog(self)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._house.flow(self)

    def end_slow(self) -> None:
        """Drop what is unsent, and the connection."""
        if not self._was_slow:
            self._was_slow = True
            self._house.counts.refused("slow")
        _abort(self.transport)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer; a client that does not read it in time loses the connection."""
        if resp is self._failed:
            # There is no request, so no route, and no signal will set the headers.
            if self.transport is not None:
                self.transport.write(_raw_answer(HTTPStatus(resp.status)))
            return resp, True
        body = resp.body if isinstance(resp, web.Response) else None
        if isinstance(body, bytes) and len(body) > PIECE_BYTES:
            resp.body = Pieces(body)  # type: ignore[attr-defined]  # a web.Response, see above
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            self.end_slow()
            return resp, True
        finally:
            self.waits_since_s = self.now()


def _path_of(data: bytes) -> str:
    """Return the path of the request whose head begins with `data`, "" when it is not there yet."""
    method, _, rest = data[:LINE_MAX_BYTES].partition(b" ")
    target, blank, _ = rest.partition(b" ")
    if method not in (b"GET", b"HEAD") or not blank:
        return ""
    return target.partition(b"?")[0].decode("latin-1")


def _abort(transport: asyncio.BaseTransport | None) -> None:
    if transport is not None:
        # Those of uvloop are no subclasses of asyncio's.
        transport.abort()  # type: ignore[attr-defined]
