"""One socket to the venue, from the first packet to the last: open, subscribe, watch, end.

The listener parses data frames on its own; it calls the session only when the socket opens or
closes, for replies to our requests, for pongs, and for the venue's shutdown notice. It answers
pings by itself, at once, whatever else is going on.

A session that is about to be useless says so (`trouble`) and lives on: the connection opens a
successor and ends it when nothing can be lost any more.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Never, cast

from picows import WSCloseCode, WSError, WSMsgType, WSProtocolError, WSTransport

from tradecore import clock
from tradecore.errors import VenueError
from tradecore.feed.behind import Behind
from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
from tradecore.feed.plan import (
    Cause,
    DataListener,
    Plan,
    Reason,
    SessionOver,
    Trouble,
)
from tradecore.feed.pulse import Pulse
from tradecore.feed.states import Machine, State
from tradecore.feed.subscriber import Subscriber
from tradecore.feed.subscriptions import Share, stream_name
from tradecore.schema import STREAM_TRADE

log = logging.getLogger(__name__)


class Session:
    """One socket with its listener. It moves `machine` from CONNECTING up to LIVE or STALE.

    `reading` is cleared while the feed is paused: no data is taken, and no time limit runs.
    """

    def __init__(
        self,
        plan: Plan,
        share: Share,
        epoch: int,
        endpoint: Endpoint,
        machine: Machine,
        reading: asyncio.Event,
        pulse: Pulse | None = None,
    ) -> None:
        """`pulse`: what sessions before it have learnt of the pace of these streams."""
        self.epoch = epoch
        self.endpoint = endpoint
        self.machine = machine
        self.opened = False
        self.opened_ns = 0
        self.settled = False
        """Data has come for `settle_s` since the session went live."""
        self.connect_s = plan.timing.connect_s
        """The limit on opening the socket."""
        self.trouble: Trouble | None = None
        """Why a successor is wanted, if one is."""
        self.dead: frozenset[int] = frozenset()
        """Symbol ids of which trades are printed and do not come."""
        self._plan = plan
        self._share = share
        self._timing = plan.timing
        self._reading = reading
        self._subscriber = Subscriber(plan.name, self, share.streams)
        self._transport: WSTransport | None = None
        self._listener: DataListener | None = None
        self._over: SessionOver | None = None
        self._wake = asyncio.Event()  # set when what somebody may wait for has come
        self._gone = asyncio.Event()
        self._pulse = pulse or Pulse()
        self._behind = Behind(plan.timing.behind_s)
        self._looked_ns = 0
        self._unable = False  # to change the subscriptions
        self._mark_due_ns = 0  # when the mark of what is owed is set for good; 0: it is
        self._frames = 0
        self._pongs = 0
        self._sent_ns = 0
        self.ticked_ns = 0
        """Monotonic time of its last look at whether it is still alive; 0 before it is open."""

    @property
    def last_data_ns(self) -> int:
        """Monotonic time of the last data event; 0 before the first."""
        return self._listener.last_data_ns if self._listener is not None else 0

    @property
    def data_came(self) -> bool:
        """Whether any data event has come."""
        return self.last_data_ns > 0

    @property
    def refused(self) -> list[str]:
        """Streams that the venue does not know."""
        return self._subscriber.refused

    @property
    def traded(self) -> tuple[str, ...]:
        """The symbols whose trades should come, those that the venue refuses left out."""
        refused = set(self._subscriber.refused)
        return tuple(
            symbol
            for symbol in self._share.traded
            if not refused or stream_name(symbol, STREAM_TRADE) not in refused
        )

    @property
    def deaf(self) -> bool:
        """Whether the socket is open and nothing comes any more, by the last look into it."""
        return self.machine.state is State.STALE

    @property
    def in_step(self) -> bool:
        """Whether the socket is open and subscribed to all that is wanted."""
        return self.opened and self._subscriber.in_step

    def unconfirmed(self, symbol_ids: Sequence[int]) -> list[int]:
        """Return those symbols whose trades this session was not yet seen to continue."""
        return (
            list(symbol_ids) if self._listener is None else self._listener.unconfirmed(symbol_ids)
        )

    def left_out(self, symbol_ids: Sequence[int]) -> list[int]:
        """Return those symbols that moved since this session was subscribed, but not on it."""
        return [] if self._listener is None else self._listener.left_out(symbol_ids)

    # -- what the listener calls ---------------------------------------------------------------

    def on_connected(self, transport: WSTransport) -> None:
        """Take the open WebSocket; silence counts from here."""
        self._transport = transport
        self.ticked_ns = clock.mono_ns()
        if not self._reading.is_set():
            transport.underlying_transport.pause_reading()

    def on_disconnected(self, transport: WSTransport) -> None:
        """Note that the socket is gone; why is found out by the task."""
        if transport is self._transport:
            self._gone.set()
            self.end(SessionOver(Reason.LOST, "the socket was closed without a WebSocket close"))

    def on_control(self, payload: bytes) -> None:
        """Take a reply to the one request that is under way. Never raises."""
        if self._subscriber.take(payload):
            self._wake.set()

    def on_pong(self) -> None:
        """Note that the venue answered our PING, or sent a PONG of its own accord."""
        self._pongs += 1
        self._wake.set()

    def on_server_shutdown(self, event_us: int) -> None:
        """The venue is about to close this connection."""
        self._worry(Trouble(Cause.SERVER_SHUTDOWN, f"announced at {event_us} us"))

    # -- what the connection calls -------------------------------------------------------------

    async def live(self) -> SessionOver:
        """Live until the end, whatever it is, and return why. Leaves the socket to drop()."""
        try:
            await self._open()
            await self._subscriber.reconcile()
            self._mark(self._timing.lag_s)
            await self._watch()
        except SessionOver as over:
            return await self._why() if over.reason is Reason.LOST else over
        except Exception as error:
            log.exception(
                "feed connection met an error that is a bug in tradecore, please report it",
                extra={"connection": self._plan.name},
            )
            return SessionOver(Reason.UNEXPECTED, repr(error))

    def want(self, share: Share) -> None:
        """Change the subscriptions of the open socket; `in_step` tells when that is done."""
        self._share = share
        self._subscriber.want(share.streams)
        self._wake.set()

    def end(self, over: SessionOver) -> None:
        """Let live() return this; the first word counts."""
        if self._over is None:
            self._over = over
            self._wake.set()

    def pause_reading(self) -> None:
        """Leave data in the kernel and at the venue."""
        if self._transport is not None:
            self._transport.underlying_transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again; silence counts from now."""
        self._pulse.forgive()
        if self._transport is not None:
            self._transport.underlying_transport.resume_reading()

    async def drain(self) -> None:
        """Send CLOSE and take what the venue had sent before, until its own CLOSE."""
        transport = self._transport
        if transport is None or self._gone.is_set():
            return
        _send_close(transport, WSCloseCode.OK)
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
        _send_close(transport, WSCloseCode.GOING_AWAY)  # nothing when one was sent before
        with suppress(RuntimeError):
            transport.disconnect(graceful=False)
        # The exception, if any, was told by _why(); here it only must not be left unread.
        with suppress(Exception):
            async with asyncio.timeout(self._timing.close_s):
                await transport.wait_disconnected()
        self._transport = None

    # -- what the subscriber calls -------------------------------------------------------------

    async def send_text(self, payload: bytes) -> None:
        """Send one text frame, in pace."""
        await self._pace()
        assert self._transport is not None
        self._transport.send(WSMsgType.TEXT, payload)

    async def wait_for_reply(self) -> None:
        """Wait until a reply has come, or for as long as one may take."""
        await self._wait(self._timing.reply_s, lambda: self._subscriber.reply is not None)

    # -- the life of the socket ----------------------------------------------------------------

    async def _open(self) -> None:
        try:
            transport, listener = await self.endpoint.open(
                lambda: self._plan.listener_factory(self, self._plan.line, self.epoch),
                self.connect_s,
                self._plan.addresses,
            )
        except UpgradeRefusedError as error:
            raise SessionOver(Reason.CONNECT_FAILED, str(error), error) from error
        except (OSError, WSError, VenueError) as error:
            raise SessionOver(Reason.CONNECT_FAILED, str(error) or repr(error)) from error
        self._transport = transport
        self._listener = cast(DataListener, listener)
        self.opened = True
        self.opened_ns = clock.mono_ns()
        self.machine.subscribe()

    async def _watch(self) -> Never:
        """See the first data event, follow changed wishes, look into silence; never returns."""
        while True:
            last_ns = self.last_data_ns
            if last_ns and self.machine.state is State.SUBSCRIBING:
                self.machine.go_live()
                log.info(
                    "connection is live",
                    extra={
                        "connection": self._plan.name,
                        "streams": len(self._share.streams),
                        "endpoint": self.endpoint.address,
                    },
                )
            elif not self.settled and self.machine.state is State.LIVE:
                self.settled = (last_ns - self.machine.since_ns) / 1e9 >= self._timing.settle_s
            if self.deaf:
                if last_ns > self.machine.since_ns:
                    self.machine.go_live()  # not dead after all; the successor comes anyway
            else:
                await self._follow_wishes()
                self._look_at_others()
                await self._look_into_silence()
            opening = self.machine.state is State.SUBSCRIBING
            await self._wait(self._timing.tick_s / 5 if opening else self._timing.tick_s)

    async def _follow_wishes(self) -> None:
        """Change subscriptions at run time; what stays must not suffer when that fails."""
        if self._unable:
            return  # the successor does it
        self._subscriber.retry_refused()
        if self._subscriber.in_step:
            return
        try:
            await self._subscriber.reconcile()
            self._mark(self._timing.lag_s)
        except SessionOver as over:
            if over.reason is not Reason.SUBSCRIBE_FAILED:
                raise
            self._unable = True
            self._worry(Trouble(Cause.STALE, f"subscriptions could not be changed: {over}"))

    def _mark(self, again_s: float = 0.0) -> None:
        """Owe what moves from now on, or from `again_s` later: until then come trades from before
        the subscription on other connections."""
        assert self._listener is not None
        self._listener.mark()
        self._mark_due_ns = clock.mono_ns() + int(again_s * 1e9) if again_s else 0

    def _look_at_others(self) -> None:
        """Find out whether trades are told of, or brought by others, that should come here too."""
        assert self._listener is not None
        if self._mark_due_ns and clock.mono_ns() >= self._mark_due_ns:
            self._mark()
        passed_s, self._looked_ns = self._awake_s(self._looked_ns), clock.mono_ns()
        behind = self._listener.behind(self._traded_ids())
        self.dead = frozenset(self._behind.look(passed_s, behind))

    def _traded_ids(self) -> list[int]:
        return [self._plan.symbol_id(symbol) for symbol in self.traded]

    def _known(self) -> dict[int, int]:
        """Return the newest id known of those symbols that are behind here."""
        assert self._listener is not None
        return {i: newest_id for i, _, newest_id in self._listener.behind(self._traded_ids())}

    async def _look_into_silence(self) -> None:
        """Find out whether the socket, its data or the market is quiet, when data have stopped."""
        silence_s = self._pulse.silence_s
        cap_s = self._plan.silent_s(self._share)
        if self._share.ticks and not self.data_came:
            cap_s = min(cap_s, self._timing.first_data_s)
        if silence_s <= self._pulse.limit_s(self._timing.suspicious_s, cap_s):
            return
        heard_ns, pongs, known = self.last_data_ns, self._pongs, self._known()

        def resumed() -> bool:
            return self.last_data_ns != heard_ns

        await self._pace()
        assert self._transport is not None
        self._transport.send_ping(b"")
        await self._wait(self._timing.ping_s, lambda: resumed() or self._pongs != pongs)
        silence_s += self._timing.ping_s
        if resumed():
            return
        if self._pongs == pongs:
            detail = f"no data event for {silence_s:.1f} s and no answer to a ping"
            self._go_stale(Trouble(Cause.SILENT, detail))
            return
        # What has come elsewhere may be on its way still, and so may what REST tells of then.
        await self._wait(self._timing.ping_s / 2, resumed)
        if resumed():
            return
        if any(known.get(symbol_id) != newest for symbol_id, newest in self._known().items()):
            detail = f"no data event for {silence_s:.1f} s while other connections bring trades"
            self._go_stale(Trouble(Cause.STALE, detail))
            return
        moved = set(self.traded) - await self._ask_which_are_quiet()
        await self._wait(self._timing.ping_s / 2, resumed)
        if resumed():
            return
        if self.traded and not moved:
            log.info(
                "no data come because nothing happens at the venue; the connection is kept",
                extra={"connection": self._plan.name, "silence_s": round(silence_s, 1)},
            )
            self._pulse.be_patient()
        elif self.traded or silence_s > cap_s:
            detail = (
                f"no data event for {silence_s:.1f} s while {len(moved)} symbols may have moved"
            )
            self._go_stale(Trouble(Cause.STALE, detail))

    async def _ask_which_are_quiet(self) -> set[str]:
        """Return the symbols of which the venue has nothing newer; empty when it cannot tell."""
        if not self.traded:
            return set()
        asking = asyncio.ensure_future(self._plan.confirm(self.traded))
        asking.add_done_callback(lambda _: self._wake.set())
        try:
            await self._wait(self._timing.confirm_s, asking.done)
            return asking.result() if asking.done() else set()
        except VenueError as error:
            log.warning(
                "the venue could not be asked whether a silence is honest",
                extra={"connection": self._plan.name, "cause": str(error)},
            )
            return set()
        finally:
            asking.cancel()

    def _go_stale(self, trouble: Trouble) -> None:
        self.machine.go_stale()
        self._worry(trouble)

    def _worry(self, trouble: Trouble) -> None:
        """Keep what is worst: that it is about to be closed is less than that data are missing."""
        if self.trouble is None or self.trouble.cause is Cause.SERVER_SHUTDOWN:
            self.trouble = trouble

    async def _pace(self) -> None:
        """Wait until one more frame of ours may go out, and count it."""
        gap_s = self._timing.frame_gap_s - (clock.mono_ns() - self._sent_ns) / 1e9
        await self._wait(gap_s if self._sent_ns else 0.0)
        self._sent_ns = clock.mono_ns()

    async def _wait(self, limit_s: float, until: Callable[[], bool] | None = None) -> None:
        """Wait `limit_s`, or until the condition holds, checked when something came.

        Time while reading is paused, or while the process itself slept, does not count. Raises
        SessionOver as soon as the session is over; all its waits pass through here.
        """
        while True:
            self._check_alive()
            if limit_s <= 0 or (until is not None and until()):
                return
            self._wake.clear()
            before_ns = clock.mono_ns()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(limit_s, self._timing.tick_s)):
                    await self._wake.wait()
            limit_s -= self._awake_s(before_ns)

    def _awake_s(self, since_ns: int) -> float:
        """Return the seconds since then in which data could be read."""
        if not self._reading.is_set():
            return 0.0
        return min((clock.mono_ns() - since_ns) / 1e9, 2 * self._timing.tick_s)

    def _check_alive(self) -> None:
        assert self._transport is not None
        if self._over is not None:
            raise self._over
        if (closed := _close_received(self._transport)) is not None:
            raise closed  # the listener passes CLOSE frames by, picows only notes them
        frames = self._listener.data_frames if self._listener is not None else 0
        self._pulse.beat(self._awake_s(self.ticked_ns), frames - self._frames)
        self._frames = frames
        self.ticked_ns = clock.mono_ns()
        silence_s = self._pulse.silence_s
        if (
            self.machine.state is State.SUBSCRIBING
            and not self._subscriber.in_step
            and silence_s > self._plan.silent_s(self._share)
        ):
            self.machine.go_stale()
            raise SessionOver(Reason.SILENT, f"no data event for {silence_s:.1f} s")

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


def _send_close(transport: WSTransport, code: WSCloseCode) -> None:
    # The loop may have closed the socket already, and picows not know it yet.
    with suppress(RuntimeError):
        transport.send_close(code)


def _close_received(transport: WSTransport) -> SessionOver | None:
    """Return the venue's CLOSE, if one has come."""
    handshake = transport.close_handshake
    if handshake is None or handshake.recv is None:
        return None
    code, text = cast(int, handshake.recv.code), handshake.recv.reason
    return SessionOver(
        Reason.CLOSED_BY_VENUE, f"{f'{code:d}' if code else 'no code'} {text or ''}".strip()
    )
