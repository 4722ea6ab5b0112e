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

from tradecore.feed import subscriptions
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.session import (
    MAX_REFUSED_STREAMS,
    Plan,
    Reason,
    Session,
    SessionOver,
    Timing,
)
from tradecore.feed.states import Machine, State

FAST = Timing(
    connect_s=2.0,
    reply_s=0.3,
    frame_gap_s=0.01,
    silent_s=0.4,
    quiet_silent_s=0.8,
    settle_s=0.1,
    tick_s=0.02,
    close_s=0.5,
)
STREAMS = ("btcusdt@trade", "btcusdt@ticker", "ethusdt@trade", "ethusdt@ticker")


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    await venue.start()
    yield venue
    await venue.stop()


class Rig:
    """A session with what a connection would give it."""

    def __init__(self, venue: Venue, streams: Sequence[str] = STREAMS, **timing: float) -> None:
        self.machine = Machine()
        self.reading = asyncio.Event()
        self.reading.set()
        plan = Plan(
            "A0",
            0,
            tuple(streams),
            Endpoint.parse(venue.url),
            StubListener,
            replace(FAST, **timing),
        )
        self.session = Session(plan, 7, self.machine, self.reading)
        self.task = asyncio.create_task(self.session.live())

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
    assert venue.last.subscribed == list(STREAMS)
    await asyncio.sleep(3 * FAST.tick_s)
    assert rig.state is State.SUBSCRIBING  # an acknowledgement alone proves nothing
    venue.data_every_s = 0.01
    await eventually(lambda: rig.state is State.LIVE)
    assert not rig.session.settled
    await eventually(lambda: rig.session.settled)
    await rig.end()


async def test_whole_market_is_subscribed_in_pace_and_in_small_requests(venue: Venue) -> None:
    symbols = [f"SYMBOL{number}USDT" for number in range(1400)]
    plans = subscriptions.spread(symbols, ("trade", "ticker", "kline_1m"))
    rigs = [Rig(venue, streams, frame_gap_s=0.1, silent_s=5.0) for streams in plans]
    await eventually(lambda: all(rig.state is State.LIVE for rig in rigs))
    assert sorted(stream for peer in venue.peers for stream in peer.subscribed) == sorted(
        stream for streams in plans for stream in streams
    )
    assert len(venue.peers) == 5
    for peer in venue.peers:
        assert len(peer.subscribed) <= 1024
        assert all(size <= 3500 for _, size, _ in peer.requests)
        sent = [at for at, _, _ in peer.requests]
        assert len(sent) > 3
        # the venue's clock: give the loop's lateness some slack
        assert all(b - a >= 0.08 for a, b in itertools.pairwise(sent))
        ids = [request["id"] for _, _, request in peer.requests]
        assert len(set(ids)) == len(ids)
    for rig in rigs:
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
    streams = (*STREAMS, "bad@trade", "bnbusdt@trade", "bnbusdt@ticker")
    rig = Rig(venue, streams)
    await eventually(lambda: rig.state is State.LIVE)
    assert rig.session.refused == ["bad@trade"]
    assert set(venue.last.subscribed) == set(streams) - {"bad@trade"}
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.__dict__["stream"] for record in errors] == ["bad@trade"]
    await rig.end()


async def test_when_all_streams_are_refused_it_is_not_the_streams(venue: Venue) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        return error_reply(request, 2, False, True) if "params" in request else ...

    venue.answer = answer
    rig = Rig(venue, [f"s{number}@ticker" for number in range(64)], silent_s=5, frame_gap_s=0.001)
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
    """The watchdog is armed from connect; replies, pings and pongs are not data."""
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
    over = await rig.over()
    assert over.reason is Reason.SILENT
    assert rig.state is State.STALE
    assert FAST.silent_s <= time.monotonic() - began < 4
    assert venue.last.pongs
    background[0].cancel()


async def test_silence_after_data(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    venue.data_every_s = None
    over = await rig.over()
    assert over.reason is Reason.SILENT
    assert rig.state is State.STALE


async def test_streams_without_a_ticker_may_be_silent_for_longer(venue: Venue) -> None:
    venue.data_every_s = None
    began = time.monotonic()
    over = await Rig(venue, ("thinusdt@trade", "thinusdt@kline_1m")).over()
    assert over.reason is Reason.SILENT
    assert time.monotonic() - began >= FAST.quiet_silent_s


async def test_a_process_that_slept_is_not_silence(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    time.sleep(2 * FAST.silent_s)  # noqa: ASYNC251 - as a suspended machine does
    await asyncio.sleep(3 * FAST.tick_s)
    assert rig.state is State.LIVE
    await rig.end()


async def test_server_shutdown_notice(venue: Venue) -> None:
    rig = Rig(venue)
    await eventually(lambda: rig.state is State.LIVE)
    notice = {"e": "serverShutdown", "E": 1770123456789000}
    await venue.last.send(json.dumps({"stream": "!serverShutdown", "data": notice}))
    over = await rig.over()
    assert over.reason is Reason.SERVER_SHUTDOWN and "1770123456789000" in str(over)


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
