"""One socket: subscribing in pace, every way to end, and the watchdog, against a real server."""

import asyncio
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fake_venue import Peer, StubListener, Venue, eventually

from tradecore.errors import VenueError
from tradecore.feed import subscriptions
from tradecore.feed.addresses import AddressBook
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.plan import Cause, Plan, Reason, SessionOver, Timing
from tradecore.feed.session import Session
from tradecore.feed.states import Machine, State
from tradecore.feed.subscriber import MAX_REFUSED_STREAMS
from tradecore.feed.subscriptions import Share

FAST = Timing(
    connect_s=2.0,
    reply_s=0.3,
    frame_gap_s=0.01,
    silent_s=0.4,
    quiet_silent_s=0.8,
    settle_s=0.1,
    suspicious_s=0.2,
    ping_s=0.1,
    confirm_s=0.3,
    tick_s=0.02,
    close_s=0.5,
)
SHARE = Share(("BTCUSDT", "ETHUSDT"), ("trade", "ticker"))
STREAMS = ("btcusdt@trade", "btcusdt@ticker", "ethusdt@trade", "ethusdt@ticker")


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    await venue.start()
    yield venue
    await venue.stop()


class Rig:
    """A session with what a connection would give it."""

    def __init__(self, venue: Venue, share: Share = SHARE, **timing: float) -> None:
        self.machine = Machine()
        self.reading = asyncio.Event()
        self.reading.set()
        self.asked: list[tuple[str, ...]] = []
        self.quiet: set[str] | Exception | None = set()
        """What the venue's REST interface tells; None for no answer."""
        self._ids: dict[str, int] = {}
        endpoint = Endpoint.parse(venue.url)
        plan = Plan(
            "A0",
            0,
            (endpoint,),
            StubListener,
            lambda symbol: self._ids.setdefault(symbol, len(self._ids)),
            self.confirm,
            3600.0,
            AddressBook(),
            replace(FAST, **timing),
        )
        self.session = Session(plan, share, 7, endpoint, self.machine, self.reading)
        self.task = asyncio.create_task(self.session.live())

    async def confirm(self, symbols: Sequence[str]) -> set[str]:
        self.asked.append(tuple(symbols))
        if self.quiet is None:
            await asyncio.sleep(60)
        if isinstance(self.quiet, Exception):
            raise self.quiet
        return set(self.quiet or ())

    @property
    def state(self) -> State:
        return self.machine.state

    def pause(self) -> None:
        self.reading.clear()
        self.session.pause_reading()

    def resume(self) -> None:
        self.reading.set()
        self.session.resume_reading()

    async def over(self) -> SessionOver:
        async with asyncio.timeout(10):
            over = await self.task
            await self.session.drop()
        return over

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        await self.session.drop()


async def test_live_after_replies_and_first_data(venue: Venue) -> None:
    venue.data_every_s = None
    rig = Rig(venue, silent_s=5.0)
    await eventually(lambda: venue.peers and venue.last.subscribed)
    assert venue.last.subscribed == list(SHARE.streams)
    await asyncio.sleep(3 * FAST.tick_s)
    assert rig.state is State.SUBSCRIBING  # an acknowledgement alone proves nothing
    venue.data_every_s = 0.01
    await eventually(lambda: rig.state is State.LIVE)
    assert not rig.session.settled
    await eventually(lambda: rig.session.settled)
    await rig.end()


async def test_whole_market_is_subscribed_in_pace_and_in_small_requests(venue: Venue) -> None:
    symbols = [f"SYMBOL{number}USDT" for number in range(1400)]
    shares = subscriptions.spread(symbols, ("trade", "ticker", "kline_1m"))
    rigs = [Rig(venue, share, frame_gap_s=0.1, silent_s=5.0) for share in shares]
    await eventually(lambda: all(rig.state is State.LIVE for rig in rigs))
    assert sorted(stream for peer in venue.peers for stream in peer.subscribed) == sorted(
        stream for share in shares for stream in share.streams
    )
    assert len(venue.peers) == 5
    for peer in venue.peers:
        assert len(peer.subscribed) <= 1024
        assert all(size <= 3500 for _, size, _ in peer.requests)
        sent = [at for at, _, _ in peer.requests]
        assert len(sent) > 3
        # By the venue's clock: one of them may be seen late, all of them not.
        assert sent[-1] - sent[0] >= 0.1 * (len(sent) - 1) - 0.1
        ids = [request["id"] for _, _, request in peer.requests]
        assert len(set(ids)) == len(ids)
    for rig in rigs:
        await rig.end()


async def test_a_refused_stream_is_asked_for_again(
    venue: Venue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tradecore.feed.subscriber.RETRY_REFUSED_S", 0.2)
    refusals = 3

    def answer(peer: Peer, request: dict[str, Any]) -> object:
        nonlocal refusals
        if "ethusdt@trade" in request["params"] and refusals:
            refusals -= 1
            return error_reply(request, 2, nested=False, with_id=True)
        return ...

    venue.answer = answer
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    await eventually(lambda: set(venue.last.subscribed) == set(SHARE.streams))
    assert rig.session.refused == [] and not refusals
    await rig.end()


def error_reply(request: dict[str, Any], code: int, nested: bool, with_id: bool) -> dict[str, Any]:
    error = {"code": code, "msg": "Invalid request: invalid stream"}
    reply: dict[str, Any] = {"error": error} if nested else error
    return reply | ({"id": request["id"]} if with_id else {})


@pytest.mark.parametrize("with_id", [True, False])
@pytest.mark.parametrize("nested", [True, False])
async def test_a_refused_stream_does_not_stop_the_others(
    venue: Venue, nested: bool, with_id: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if "bad@trade" in request["params"]:
            return error_reply(request, 2, nested, with_id)
        return ...

    venue.answer = answer
    share = Share((*SHARE.symbols, "BAD", "BNBUSDT"), SHARE.kinds)
    rig = Rig(venue, share)
    await eventually(lambda: rig.state is State.LIVE)
    assert rig.session.refused == ["bad@trade"]
    assert set(venue.last.subscribed) == set(share.streams) - {"bad@trade"}
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.__dict__["stream"] for record in errors] == ["bad@trade"]
    await rig.end()


async def test_when_all_streams_are_refused_it_is_not_the_streams(venue: Venue) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        return error_reply(request, 2, False, True) if "params" in request else ...

    venue.answer = answer
    share = Share(tuple(f"S{number}" for number in range(64)), ("ticker",))
    rig = Rig(venue, share, silent_s=5, frame_gap_s=0.001)
    over = await rig.over()
    assert over.reason is Reason.SUBSCRIBE_FAILED
    assert len(rig.session.refused) == MAX_REFUSED_STREAMS + 1
    assert venue.last.requests[-1][2]["method"] == "LIST_SUBSCRIPTIONS"


@pytest.mark.parametrize("nested", [True, False])
async def test_other_errors_end_the_session_with_the_symbols_in_the_log(
    venue: Venue, nested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        return error_reply(request, 4, nested, True) if "params" in request else ...

    venue.answer = answer
    over = await Rig(venue).over()
    assert over.reason is Reason.SUBSCRIBE_FAILED
    methods = [request["method"] for _, _, request in venue.last.requests]
    assert methods == ["SUBSCRIBE", "LIST_SUBSCRIPTIONS"]
    (record,) = [r for r in caplog.records if "symbols" in r.__dict__]
    assert record.__dict__["symbols"] == ["btcusdt", "ethusdt"]


async def test_missing_reply_ends_the_session(venue: Venue) -> None:
    venue.answer = lambda peer, request: None
    over = await Rig(venue, silent_s=5.0).over()
    assert over.reason is Reason.SUBSCRIBE_FAILED
    methods = [request["method"] for _, _, request in venue.last.requests]
    assert methods == ["SUBSCRIBE", "LIST_SUBSCRIPTIONS"]


async def test_a_venue_that_answers_nothing_but_sends_data_is_taken(venue: Venue) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        peer.subscribed += request.get("params") or []
        return None

    venue.answer = answer
    rig = Rig(venue, silent_s=5.0)
    await eventually(lambda: rig.state is State.LIVE)
    methods = [request["method"] for _, _, request in venue.last.requests]
    assert methods == ["SUBSCRIBE", "LIST_SUBSCRIPTIONS"]
    await rig.end()


async def test_lost_reply_is_harmless_when_the_listing_is_complete(venue: Venue) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if request["method"] == "SUBSCRIBE":
            peer.subscribed += request["params"]
            return None
        return ...

    venue.answer = answer
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    await rig.end()


async def test_odd_messages_are_not_taken_for_the_reply(venue: Venue) -> None:
    async def chatter(peer: Peer) -> None:
        for text in ('{"result":null,"id":99}', '{"result":null}', "nonsense", "{}", '{"id":1}'):
            await peer.send(text)

    venue.on_open = chatter
    venue.answer = lambda peer, request: None
    over = await Rig(venue, silent_s=5.0).over()
    assert over.reason is Reason.SUBSCRIBE_FAILED


async def test_close_by_the_venue(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    await venue.last.socket.close(code=1008, message=b"Too many requests")
    over = await rig.over()
    assert over.reason is Reason.CLOSED_BY_VENUE
    assert "1008 Too many requests" in str(over)


@pytest.mark.parametrize("code", [1000, 1001, 1013, 3000, 4999])
async def test_any_close_code(venue: Venue, code: int) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    await venue.last.socket.close(code=code)
    over = await rig.over()
    assert over.reason is Reason.CLOSED_BY_VENUE
    assert str(code) in str(over)


async def test_tcp_reset(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.last.reset()
    assert (await rig.over()).reason is Reason.LOST


async def test_tcp_reset_while_subscribing(venue: Venue) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        peer.reset()
        return None

    venue.answer = answer
    began = time.monotonic()
    assert (await Rig(venue, reply_s=30.0, silent_s=30.0).over()).reason is Reason.LOST
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x83\x00",  # reserved opcode
        b"\x81\x80\x00\x00\x00\x00",  # a server must not mask
        b"\x09\x00",  # fragmented ping
        b"\x89\x7e\x00\x80",  # ping that is too long
        b"\x82\x7f" + (1 << 30).to_bytes(8, "big"),  # beyond any sane size
    ],
)
async def test_protocol_violation(venue: Venue, garbage: bytes) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.data_every_s = None
    venue.last.raw(garbage)
    assert (await rig.over()).reason is Reason.PROTOCOL_VIOLATION


async def test_bug_in_the_listener_is_logged_and_ends_the_session(
    venue: Venue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(StubListener, "on_ws_frame", fail)
    over = await rig.over()
    assert over.reason is Reason.UNEXPECTED and "boom" in str(over)
    assert any(record.exc_info for record in caplog.records if record.name.startswith("tradecore"))


async def test_silence_from_the_start(venue: Venue) -> None:
    """It is watched from connect; the venue's replies and pings are not data."""
    venue.data_every_s = None

    async def ping(peer: Peer) -> None:
        async def forever() -> None:
            while not peer.socket.closed:
                await peer.socket.ping(b"1")
                await asyncio.sleep(0.05)

        background.append(asyncio.create_task(forever()))

    background: list[asyncio.Task[None]] = []
    venue.on_open = ping
    began = time.monotonic()
    rig = Rig(venue)
    await eventually(lambda: rig.session.trouble)
    assert rig.session.trouble is not None
    assert rig.session.trouble.cause is Cause.SILENT
    assert rig.state is State.STALE
    assert FAST.silent_s + FAST.ping_s <= time.monotonic() - began < 4
    assert venue.last.pongs and venue.last.pings == 1
    assert not rig.asked
    background[0].cancel()
    await rig.end()


async def test_half_open_after_data(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.last.deaf = True
    await eventually(lambda: rig.session.trouble)
    assert rig.session.trouble is not None and rig.session.trouble.cause is Cause.SILENT
    assert rig.state is State.STALE
    venue.last.deaf = False  # it was a storm on the way, not the end
    await eventually(lambda: rig.state is State.LIVE)
    await rig.end()


async def test_the_limit_of_silence_is_learnt(venue: Venue) -> None:
    rig = Rig(venue, silent_s=60.0)
    await eventually(lambda: rig.state is State.LIVE)
    await eventually(lambda: rig.session._pulse.limit_s(0.0, 60.0) < 3.0)
    stopped = time.monotonic()
    venue.last.deaf = True
    await eventually(lambda: rig.session.trouble)
    assert time.monotonic() - stopped < 4.5  # long before the cap
    await rig.end()


async def test_no_answer_to_a_ping_is_fine_while_data_come(venue: Venue) -> None:
    rig = Rig(venue, silent_s=0.05, suspicious_s=0.05, ping_s=0.5)
    venue.data_every_s = 0.3
    await eventually(lambda: venue.peers and venue.last.pings >= 3)
    assert rig.session.trouble is None and rig.state is State.LIVE
    sent = [at for at, _, _ in venue.last.requests]
    assert sent
    await rig.end()


async def test_a_quiet_market_is_no_dead_connection(venue: Venue) -> None:
    venue.pong = True
    rig = Rig(venue, silent_s=0.2)
    await eventually(lambda: rig.state is State.LIVE)
    rig.quiet = set(SHARE.symbols)
    venue.last.mute = True
    await eventually(lambda: len(rig.asked) == 2)
    began = time.monotonic()
    assert rig.asked == [SHARE.symbols] * 2
    await eventually(lambda: len(rig.asked) == 3)
    assert time.monotonic() - began >= 4 * 0.2  # doubled each time
    assert rig.state is State.LIVE and rig.session.trouble is None
    await rig.end()


@pytest.mark.parametrize(
    "quiet", [{"BTCUSDT"}, VenueError("banned"), None], ids=["moved", "refused", "no answer"]
)
async def test_pongs_without_data_while_symbols_move(
    venue: Venue, quiet: set[str] | Exception | None
) -> None:
    venue.pong = True
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    rig.quiet = quiet
    venue.last.mute = True
    await eventually(lambda: rig.session.trouble)
    assert rig.session.trouble is not None and rig.session.trouble.cause is Cause.STALE
    assert rig.state is State.STALE and len(rig.asked) == 1
    await rig.end()


async def test_refused_symbols_are_not_asked_for(venue: Venue) -> None:
    venue.pong = True

    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if "ethusdt@trade" in request.get("params", ()):
            return error_reply(request, 2, False, True)
        return ...

    venue.answer = answer
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    rig.quiet = {"BTCUSDT"}
    venue.last.mute = True
    await eventually(lambda: len(rig.asked) == 2)
    assert rig.asked == [("BTCUSDT",)] * 2 and rig.session.trouble is None
    await rig.end()


async def test_half_open_after_the_notice_is_seen_too(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    await venue.last.send('{"stream":"!x","data":{"e":"serverShutdown","E":1770123456789}}')
    await eventually(lambda: rig.session.trouble)
    venue.last.deaf = True
    await eventually(lambda: rig.session.deaf)
    assert rig.session.trouble is not None
    assert rig.session.trouble.cause is Cause.SILENT  # which is worse
    await rig.end()


async def test_an_end_while_rest_is_asked_is_seen_at_once(venue: Venue) -> None:
    venue.pong = True
    rig = Rig(venue, confirm_s=30.0)
    await eventually(lambda: rig.state is State.LIVE)
    rig.quiet = None
    venue.last.mute = True
    await eventually(lambda: rig.asked)
    venue.last.reset()
    async with asyncio.timeout(1):
        assert (await rig.over()).reason is Reason.LOST


async def test_tickers_alone_have_nothing_to_ask_rest_for(venue: Venue) -> None:
    venue.pong = True
    rig = Rig(venue, Share(("BTCUSDT",), ("ticker",)))
    await eventually(lambda: rig.state is State.LIVE)
    venue.last.mute = True
    await eventually(lambda: rig.session.trouble)
    assert rig.session.trouble is not None and rig.session.trouble.cause is Cause.STALE
    assert not rig.asked
    await rig.end()


async def test_streams_without_a_ticker_may_be_silent_for_longer(venue: Venue) -> None:
    venue.data_every_s = None
    began = time.monotonic()
    rig = Rig(venue, Share(("THINUSDT",), ("trade", "kline_1m")))
    await eventually(lambda: rig.session.trouble)
    assert time.monotonic() - began >= FAST.quiet_silent_s
    await rig.end()


async def test_a_process_that_slept_is_not_silence(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    time.sleep(2 * FAST.silent_s)  # noqa: ASYNC251 - as a suspended machine does
    await asyncio.sleep(3 * FAST.tick_s)
    assert rig.state is State.LIVE
    assert not venue.last.pings
    await rig.end()


async def test_server_shutdown_notice(venue: Venue) -> None:
    """The session asks for a successor and lives on."""
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    notice = {"e": "serverShutdown", "E": 1770123456789000}
    await venue.last.send(json.dumps({"stream": "!serverShutdown", "data": notice}))
    await eventually(lambda: rig.session.trouble)
    assert rig.session.trouble is not None
    assert rig.session.trouble.cause is Cause.SERVER_SHUTDOWN
    assert "1770123456789000" in rig.session.trouble.detail
    before_ns = rig.session.last_data_ns
    await eventually(lambda: rig.session.last_data_ns > before_ns)
    assert rig.state is State.LIVE
    await rig.end()


# -- subscriptions at run time -------------------------------------------------------------------


def methods(peer: Peer) -> list[tuple[str, list[str]]]:
    return [(r["method"], r.get("params", [])) for _, _, r in peer.requests]


async def test_subscriptions_change_on_the_open_socket(venue: Venue) -> None:
    rig = Rig(venue, frame_gap_s=0.1)
    await eventually(lambda: rig.state is State.LIVE)
    rig.session.want(Share(("ETHUSDT", "BNBUSDT"), SHARE.kinds))
    assert not rig.session.in_step
    await eventually(lambda: rig.session.in_step)
    assert methods(venue.last)[1:] == [
        ("UNSUBSCRIBE", ["btcusdt@trade", "btcusdt@ticker"]),
        ("SUBSCRIBE", ["bnbusdt@trade", "bnbusdt@ticker"]),
    ]
    sent = [at for at, _, _ in venue.last.requests]
    assert all(b - a >= 0.08 for a, b in itertools.pairwise(sent))
    assert len(venue.peers) == 1 and rig.state is State.LIVE
    await rig.end()


async def test_a_refused_change_hurts_nothing_that_stays(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)

    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if "bad@trade" in request.get("params", ()):
            return error_reply(request, 2, False, True)
        return ...

    venue.answer = answer
    rig.session.want(Share((*SHARE.symbols, "BAD", "BNBUSDT"), SHARE.kinds))
    await eventually(lambda: rig.session.in_step)
    assert rig.session.refused == ["bad@trade"]
    rig.session.want(SHARE)
    await eventually(lambda: rig.session.in_step)
    assert rig.session.refused == []
    assert venue.last.subscribed == list(SHARE.streams)
    await rig.end()


async def test_a_change_that_is_not_done_asks_for_a_successor(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.answer = lambda peer, request: error_reply(request, 4, False, True)
    rig.session.want(Share((*SHARE.symbols, "BNBUSDT"), SHARE.kinds))
    await eventually(lambda: rig.session.trouble)
    assert rig.session.trouble is not None
    assert rig.session.trouble.cause is Cause.STALE
    before_ns = rig.session.last_data_ns
    await eventually(lambda: rig.session.last_data_ns > before_ns)
    assert rig.state is State.LIVE
    await rig.end()


async def test_streams_that_the_venue_keeps_sending_are_left_alone(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.answer = lambda peer, request: None if request["method"] == "UNSUBSCRIBE" else ...
    rig.session.want(Share(("BTCUSDT",), SHARE.kinds))
    await eventually(lambda: rig.session.in_step)
    assert [method for method, _ in methods(venue.last)][1:] == [
        "UNSUBSCRIBE",
        "LIST_SUBSCRIPTIONS",
    ]
    rig.session.want(SHARE)  # they are still there
    assert rig.session.in_step
    assert rig.state is State.LIVE and rig.session.trouble is None
    await rig.end()


# -- pausing and the end -------------------------------------------------------------------------


async def test_pause_stops_data_and_every_time_limit(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    rig.pause()
    before_ns = rig.session.last_data_ns
    await asyncio.sleep(2 * FAST.silent_s)
    assert rig.session.last_data_ns == before_ns
    assert rig.state is State.LIVE
    rig.resume()
    await eventually(lambda: rig.session.last_data_ns > before_ns)
    await rig.end()


async def test_pause_while_subscribing(venue: Venue) -> None:
    replies: list[object] = []

    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if not replies:
            rig.pause()
        replies.append(request)
        return ...

    venue.answer = answer
    rig = Rig(venue)
    await eventually(lambda: replies)
    await asyncio.sleep(2 * FAST.reply_s)
    assert rig.state is State.SUBSCRIBING
    assert len(replies) == 1
    rig.resume()
    await eventually(lambda: rig.state is State.LIVE)
    await rig.end()


async def test_paused_before_the_socket_is_open(venue: Venue) -> None:
    rig = Rig(venue)
    rig.pause()
    await eventually(lambda: venue.peers and venue.last.requests)
    await asyncio.sleep(2 * FAST.reply_s)
    assert rig.state is State.SUBSCRIBING
    rig.resume()
    await eventually(lambda: rig.state is State.LIVE)
    await rig.end()


async def test_pings_are_answered_at_once_under_load(venue: Venue) -> None:
    venue.data_every_s = 0.0005
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    for number in range(20):
        await venue.last.socket.ping(b"%d" % number)
    await eventually(lambda: len(venue.last.pongs) == 20)
    assert venue.last.pongs == [b"%d" % number for number in range(20)]
    assert rig.state is State.LIVE
    await rig.end()


async def test_drain_says_goodbye_and_takes_what_was_sent_before(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.data_every_s = None
    await asyncio.sleep(0.05)
    venue.last_words = 1000
    listener = rig.session._listener
    assert listener is not None
    before = listener.data_frames
    rig.machine.drain()
    rig.task.cancel()
    await asyncio.wait({rig.task})
    await rig.session.drain()
    await rig.session.drop()
    await eventually(lambda: venue.last.gone)
    assert venue.last.close_code == 1000
    assert listener.data_frames == before + 1000
