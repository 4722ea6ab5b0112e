"""One socket to the venue, from the first packet to the last: open, subscribe, watch, end.

The listener parses data frames on its own; it calls the session only when the socket opens or
closes, for replies to our requests, and for the venue's shutdown notice. It answers pings by
itself, at once, whatever else is going on.
"""

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Never, Protocol, cast

from picows import WSCloseCode, WSError, WSListener, WSMsgType, WSProtocolError, WSTransport

from tradecore import clock
from tradecore.errors import VenueError
from tradecore.feed import control, subscriptions
from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
from tradecore.feed.states import Machine, State
from tradecore.schema import STREAM_TICKER

log = logging.getLogger(__name__)

MAX_REFUSED_STREAMS = 16
"""When the venue refuses more single streams than this, the fault is not in the streams."""


class Reason(enum.StrEnum):
    """Why a session ended."""

    CONNECT_FAILED = "connect_failed"
    SUBSCRIBE_FAILED = "subscribe_failed"
    CLOSED_BY_VENUE = "closed_by_venue"
    LOST = "lost"
    SILENT = "silent"
    SERVER_SHUTDOWN = "server_shutdown"
    PROTOCOL_VIOLATION = "protocol_violation"
    UNEXPECTED = "unexpected"


class SessionOver(Exception):
    """The session is over; `retry_after_s` is the venue's own wish for the next attempt."""

    def __init__(self, reason: Reason, detail: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.retry_after_s = retry_after_s


class DataListener(Protocol):
    """What the session reads from its listener."""

    last_data_ns: int
    """Monotonic time of the last socket read that carried a data event; 0 before the first."""
    data_frames: int


ListenerFactory = Callable[["Session", int, int], WSListener]
"""(owner, line, epoch) -> a listener that is a DataListener too."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Limits and paces in seconds; tests shorten them."""

    connect_s: float = 10.0
    """Name, TCP, TLS and upgrade together."""
    reply_s: float = 10.0
    frame_gap_s: float = 0.5
    """Between our frames: the venue allows 5 a second, strictly, and our pongs count too."""
    silent_s: float = 30.0
    """Longest time without a data event when a ticker, which comes every second, is among them."""
    quiet_silent_s: float = 120.0
    """The same without any ticker: a thin symbol may honestly have no trade for a while."""
    settle_s: float = 10.0
    """Data for this long forgives all failures before it."""
    tick_s: float = 0.25
    close_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a connection carries, and where it gets it."""

    name: str
    line: int
    streams: tuple[str, ...]
    endpoint: Endpoint
    listener_factory: ListenerFactory
    timing: Timing = Timing()

    @property
    def silent_s(self) -> float:
        """The data watchdog's limit for these streams."""
        ticks = any(stream.endswith(f"@{STREAM_TICKER}") for stream in self.streams)
        return self.timing.silent_s if ticks else self.timing.quiet_silent_s


class Session:
    """One socket with its listener. It moves `machine` from CONNECTING up to LIVE or STALE.

    `reading` is cleared while the feed is paused: no data is taken, and no time limit runs.
    """

    def __init__(self, plan: Plan, epoch: int, machine: Machine, reading: asyncio.Event) -> None:
        self.epoch = epoch
        self.opened = False
        self.settled = False
        """Data has come for `settle_s` since the session went live."""
        self.refused: list[str] = []
        """Streams that the venue does not know."""
        self._plan = plan
        self._timing = plan.timing
        self._silent_s = plan.silent_s
        self._machine = machine
        self._reading = reading
        self._transport: WSTransport | None = None
        self._listener: DataListener | None = None
        self._over: SessionOver | None = None
        self._wake = asyncio.Event()  # set when the session is over or a reply is here
        self._gone = asyncio.Event()
        self._request_id = 0
        self._reply: control.Reply | None = None
        self._answers = True  # until the venue proves that it answers no request but sends data
        self._sent_ns = 0
        self._heard_ns = 0  # from when on silence counts, apart from data
        self._ticked_ns = 0

    @property
    def last_data_ns(self) -> int:
        """Monotonic time of the last data event; 0 before the first."""
        return self._listener.last_data_ns if self._listener is not None else 0

    # -- what the listener calls ---------------------------------------------------------------

    def on_connected(self, transport: WSTransport) -> None:
        """Take the open WebSocket; the data watchdog counts from here."""
        self._transport = transport
        self._heard_ns = self._ticked_ns = clock.mono_ns()
        if not self._reading.is_set():
            transport.underlying_transport.pause_reading()

    def on_disconnected(self, transport: WSTransport) -> None:
        """Note that the socket is gone; why is found out by the task."""
        if transport is self._transport:
            self._gone.set()
            self._end(SessionOver(Reason.LOST, "the socket was closed without a WebSocket close"))

    def on_control(self, payload: bytes) -> None:
        """Take a reply to the one request that is under way. Never raises."""
        reply = control.parse_reply(payload)
        if reply is None or (reply.id != self._request_id and (reply.id is not None)):
            log.debug(
                "message ignored", extra={"connection": self._plan.name, "head": payload[:80]}
            )
        elif reply.id is not None or reply.error is not None:
            self._reply = reply
            self._wake.set()

    def on_pong(self) -> None:
        """Take an answer to a ping of ours; none is sent yet."""

    def on_server_shutdown(self, event_us: int) -> None:
        """The venue is about to close this connection: replace it now.

        This is the seam for make-before-break: a successor would be opened here and this
        connection closed once the successor delivers.
        """
        self._end(SessionOver(Reason.SERVER_SHUTDOWN, f"announced at {event_us} us"))

    # -- what the connection calls -------------------------------------------------------------

    async def live(self) -> SessionOver:
        """Live until the end, whatever it is, and return why. Leaves the socket to drop()."""
        try:
            await self._open()
            await self._subscribe()
            await self._watch()
        except SessionOver as over:
            return await self._why() if over.reason is Reason.LOST else over
        except Exception as error:
            log.exception(
                "feed connection met an error that is a bug in tradecore, please report it",
                extra={"connection": self._plan.name},
            )
            return SessionOver(Reason.UNEXPECTED, repr(error))

    def pause_reading(self) -> None:
        """Leave data in the kernel and at the venue."""
        if self._transport is not None:
            self._transport.underlying_transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again; silence counts from now."""
        self._heard_ns = clock.mono_ns()
        if self._transport is not None:
            self._transport.underlying_transport.resume_reading()

    async def drain(self) -> None:
        """Send CLOSE and take what the venue had sent before, until its own CLOSE."""
        transport = self._transport
        if transport is None or self._gone.is_set():
            return
        transport.send_close(WSCloseCode.OK)
        deadline_ns = clock.mono_ns() + int(self._timing.close_s * 1e9)
        while self._reading.is_set() and not self._gone.is_set():
            if _close_received(transport) is not None or clock.mono_ns() > deadline_ns:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self._gone.wait()

    async def drop(self) -> None:
        """Cut the socket without ceremony."""
        transport = self._transport
        if transport is None:
            return
        transport.send_close(WSCloseCode.GOING_AWAY)  # nothing when one was sent before
        transport.disconnect(graceful=False)
        # The exception, if any, was told by _why(); here it only must not be left unread.
        with suppress(Exception):
            async with asyncio.timeout(self._timing.close_s):
                await transport.wait_disconnected()
        self._transport = None

    # -- the life of the socket ----------------------------------------------------------------

    async def _open(self) -> None:
        try:
            transport, listener = await self._plan.endpoint.open(
                lambda: self._plan.listener_factory(self, self._plan.line, self.epoch),
                self._timing.connect_s,
            )
        except UpgradeRefusedError as error:
            raise SessionOver(Reason.CONNECT_FAILED, str(error), error.retry_after_s) from error
        except (OSError, WSError, VenueError) as error:
            raise SessionOver(Reason.CONNECT_FAILED, str(error) or repr(error)) from error
        self._transport = transport
        self._listener = cast(DataListener, listener)
        self.opened = True
        self._machine.subscribe()

    async def _subscribe(self) -> None:
        """Ask for all streams, one request at a time, and leave out those the venue refuses."""
        todo = deque(subscriptions.batches(self._plan.streams))
        while todo:
            batch = todo.popleft()
            reply = await self._request("SUBSCRIBE", batch)
            if not self._answers or (reply is not None and reply.error is None):
                continue
            if reply is not None and reply.error and reply.error.code == control.INVALID_REQUEST:
                if len(batch) > 1:  # one wrong stream spoils the batch: look for it
                    middle = len(batch) // 2
                    todo.extendleft((batch[middle:], batch[:middle]))
                    continue
                self.refused.append(batch[0])
                log.error(
                    "the venue refuses a stream; check SUPPORTED_SYMBOLS and STREAMS",
                    extra={
                        "connection": self._plan.name,
                        "stream": batch[0],
                        "cause": str(reply.error),
                    },
                )
                if len(self.refused) <= min(MAX_REFUSED_STREAMS, len(self._plan.streams) - 1):
                    continue
            await self._check(batch, None if reply is None else str(reply.error))

    async def _check(self, batch: tuple[str, ...], error: str | None) -> None:
        """Ask which streams of a doubtful batch are subscribed; the session ends unless all are.

        Where no request is answered at all but data come, they are the better proof.
        """
        assert self._listener is not None
        cause = error or "no reply"
        listed = await self._request("LIST_SUBSCRIPTIONS", None)
        if error is None and listed is None and self._listener.data_frames:
            self._answers = False
            log.warning(
                "the venue answers no request but sends data; carrying on without replies",
                extra={"connection": self._plan.name, "streams": len(batch)},
            )
            return
        missing = set(batch) - set(listed.streams if listed is not None else ())
        log.warning(
            "SUBSCRIBE was not acknowledged" if missing else "a reply to SUBSCRIBE was lost",
            extra={
                "connection": self._plan.name,
                "cause": cause,
                "symbols": sorted({stream.partition("@")[0] for stream in missing or batch}),
            },
        )
        if missing:
            raise SessionOver(Reason.SUBSCRIBE_FAILED, cause)

    async def _request(self, method: str, streams: Sequence[str] | None) -> control.Reply | None:
        """Send one request, in pace, and return its reply; None when none came in time."""
        assert self._transport is not None
        gap_s = self._timing.frame_gap_s - (clock.mono_ns() - self._sent_ns) / 1e9
        await self._wait(gap_s if self._sent_ns else 0.0)
        self._request_id += 1
        self._reply = None
        self._transport.send(
            WSMsgType.TEXT, subscriptions.request(method, streams, self._request_id)
        )
        self._sent_ns = clock.mono_ns()
        if self._answers:
            await self._wait(self._timing.reply_s, for_reply=True)
        return self._reply

    async def _watch(self) -> Never:
        """See the first data event, then watch for silence; never returns."""
        assert self._listener is not None
        while True:
            last_ns = self._listener.last_data_ns
            if last_ns and self._machine.state is State.SUBSCRIBING:
                self._machine.go_live()
                log.info(
                    "connection is live",
                    extra={"connection": self._plan.name, "streams": len(self._plan.streams)},
                )
            elif not self.settled and self._machine.state is State.LIVE:
                self.settled = (last_ns - self._machine.since_ns) / 1e9 >= self._timing.settle_s
            await self._wait(self._timing.tick_s)

    async def _wait(self, limit_s: float, *, for_reply: bool = False) -> None:
        """Wait `limit_s` (time while reading is paused does not count), or for the reply.

        Raises SessionOver as soon as the session is over; all its waits pass through here.
        """
        while True:
            self._check_alive()
            if limit_s <= 0 or (for_reply and self._reply is not None):
                return
            self._wake.clear()
            before_ns = clock.mono_ns()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(limit_s, self._timing.tick_s)):
                    await self._wake.wait()
            if self._reading.is_set():
                limit_s -= (clock.mono_ns() - before_ns) / 1e9

    def _check_alive(self) -> None:
        assert self._transport is not None
        if self._over is not None:
            raise self._over
        if (closed := _close_received(self._transport)) is not None:
            raise closed  # the listener passes CLOSE frames by, picows only notes them
        now_ns = clock.mono_ns()
        if now_ns - self._ticked_ns > self._silent_s * 0.5e9:
            self._heard_ns = now_ns  # the process itself was asleep: read first, then judge
        self._ticked_ns = now_ns
        heard_ns = max(self._heard_ns, self._listener.last_data_ns if self._listener else 0)
        silence_s = (now_ns - heard_ns) / 1e9
        if silence_s > self._silent_s and self._reading.is_set():
            self._machine.go_stale()
            raise SessionOver(Reason.SILENT, f"no data event for {silence_s:.1f} s")

    def _end(self, over: SessionOver) -> None:
        if self._over is None:
            self._over = over
            self._wake.set()

    async def _why(self) -> SessionOver:
        """Find out why picows or the peer closed the socket."""
        transport = self._transport
        assert transport is not None
        try:
            async with asyncio.timeout(self._timing.close_s):
                await transport.wait_disconnected()
        except WSProtocolError as error:
            return SessionOver(Reason.PROTOCOL_VIOLATION, str(error))
        except TimeoutError:
            return SessionOver(Reason.LOST, "the socket does not close")
        except Exception as error:
            log.exception(
                "the frame listener met an error that is a bug in tradecore, please report it",
                extra={"connection": self._plan.name},
            )
            return SessionOver(Reason.UNEXPECTED, repr(error))
        return _close_received(transport) or self._over or SessionOver(Reason.LOST)


def _close_received(transport: WSTransport) -> SessionOver | None:
    """Return the venue's CLOSE, if one has come."""
    handshake = transport.close_handshake
    if handshake is None or handshake.recv is None:
        return None
    code, text = cast(int, handshake.recv.code), handshake.recv.reason
    return SessionOver(
        Reason.CLOSED_BY_VENUE, f"{f'{code:d}' if code else 'no code'} {text or ''}".strip()
    )
