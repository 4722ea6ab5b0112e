"""The whole feed over real sockets, with the stand-in and with the compiled listener."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import picows
import pytest
import uvloop
from fake_venue import Peer, StubListener, Venue, eventually, make_certificate, server_tls
from fakes import simulated_exchange

from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.feed._listener import FrameListener
from tradecore.feed.feed import Feed
from tradecore.feed.plan import Confirm, ListenerFactory, Timing
from tradecore.feed.states import State
from tradecore.ring import Ring
from tradecore.settings import Settings, load
from tradecore.tls import tls_context

FAST = Timing(connect_s=5.0, reply_s=2.0, frame_gap_s=0.02, settle_s=0.1, tick_s=0.02, close_s=0.5)


def settings(venue: Venue, **changes: Any) -> Settings:
    defaults = load({"RECONNECT_DELAY": "10", "MAX_RECONNECT_DELAY": "50"})
    return replace(defaults, **({"websocket_urls": (venue.url,)} | changes))


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    await venue.start()
    yield venue
    await venue.stop()


async def nobody_to_ask(symbols: Sequence[str]) -> set[str]:
    raise AssertionError(f"REST was asked for {symbols}")


def make_feed(
    settings: Settings,
    factory: ListenerFactory = StubListener,
    *,
    timing: Timing = FAST,
    confirm: Confirm = nobody_to_ask,
    symbol_id: Callable[[str], int] = len,
) -> Feed:
    return Feed(settings, factory, symbol_id=symbol_id, confirm=confirm, timing=timing)


class Running:
    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    async def __aenter__(self) -> Feed:
        self.task = asyncio.create_task(self.feed.run())
        return self.feed

    async def __aexit__(self, *_: object) -> None:
        await self.feed.close()
        async with asyncio.timeout(5):
            await self.task
        assert {status.state for status in self.feed.describe()} == {State.CLOSED}
        assert self.feed.live == 0


async def test_default_settings_are_one_connection(venue: Venue) -> None:
    async with Running(make_feed(settings(venue))) as feed:
        assert feed.live == 0
        await eventually(lambda: feed.live == 1)
        (status,) = feed.describe()
        assert (status.name, status.line, status.streams) == ("A0", 0, 21)
        assert len(venue.last.subscribed) == 21


async def test_whole_market(venue: Venue) -> None:
    symbols = tuple(f"SYM{number}USDT" for number in range(1400))
    epochs: list[int] = []

    def factory(owner: Any, line: int, epoch: int) -> picows.WSListener:
        epochs.append(epoch)
        return StubListener(owner, line, epoch)

    async with Running(make_feed(settings(venue, symbols=symbols), factory)) as feed:
        await eventually(lambda: feed.live == 5)
        assert [status.name for status in feed.describe()] == ["A0", "A1", "A2", "A3", "A4"]
        subscribed = [stream for peer in venue.peers for stream in peer.subscribed]
        assert len(subscribed) == len(set(subscribed)) == 4200
        assert sorted(epochs) == [1, 2, 3, 4, 5]  # one generation number over all connections
        venue.peers[0].reset()
        await eventually(lambda: len(epochs) == 6 and feed.live == 5)
        assert sum(sum(status.reconnects.values()) for status in feed.describe()) == 1


async def test_pause_and_resume_hold_for_all(venue: Venue) -> None:
    listeners: list[StubListener] = []

    def factory(owner: Any, line: int, epoch: int) -> picows.WSListener:
        listeners.append(StubListener(owner, line, epoch))
        return listeners[-1]

    symbols = tuple(f"SYM{number}USDT" for number in range(400))
    async with Running(make_feed(settings(venue, symbols=symbols), factory)) as feed:
        await eventually(lambda: feed.live == 2)
        feed.pause_reading()
        before = [listener.data_frames for listener in listeners]
        await asyncio.sleep(0.1)
        assert [listener.data_frames for listener in listeners] == before
        feed.resume_reading()
        await eventually(
            lambda: all(now.data_frames > was for now, was in zip(listeners, before, strict=True))
        )


# -- two lines ----------------------------------------------------------------------------------


async def test_two_lines_carry_every_stream_over_different_hosts(venue: Venue) -> None:
    other = Venue()
    await other.start()
    here = settings(venue, feed_lines=2, websocket_urls=(venue.url, other.url))
    async with Running(make_feed(here)) as feed:
        await eventually(lambda: feed.live == 2)
        assert [(one.name, one.line) for one in feed.describe()] == [("A0", 0), ("B0", 1)]
        assert len(venue.peers) == len(other.peers) == 1
        assert venue.last.subscribed == other.last.subscribed
        assert feed.describe()[1].endpoint == f"127.0.0.1:{other.port}"
        await other.stop()  # one host is gone: its line moves to the other
        await eventually(lambda: len(venue.peers) == 2 and feed.live == 2)
        assert feed.describe()[1].endpoint == f"127.0.0.1:{venue.port}"


# -- subscriptions at run time -------------------------------------------------------------------


def held(venue: Venue) -> list[set[str]]:
    """Return the streams of each open connection."""
    return [set(peer.subscribed) for peer in venue.peers if not peer.gone]


async def test_symbols_come_and_go_without_touching_those_that_stay(venue: Venue) -> None:
    symbols = tuple(f"SYM{number}USDT" for number in range(341))
    quick = replace(FAST, frame_gap_s=0.001)
    async with Running(make_feed(settings(venue, symbols=symbols), timing=quick)) as feed:
        await eventually(lambda: feed.live == 1)
        asked = len(venue.last.requests)
        await feed.apply((*symbols[1:], "NEWUSDT"), ("trade", "ticker", "kline_1m"))
        assert len(venue.peers) == 1 and len(venue.last.requests) == asked + 2
        assert "newusdt@trade" in venue.last.subscribed and len(venue.last.subscribed) == 1023
        # one more does not fit
        await feed.apply((*symbols, "NEWUSDT"), ("trade", "ticker", "kline_1m"))
        await eventually(lambda: feed.live == 2)
        assert [one.name for one in feed.describe()] == ["A0", "A1"]
        assert venue.peers[1].subscribed == [
            "sym0usdt@trade",
            "sym0usdt@kline_1m",
            "sym0usdt@ticker",
        ]
        assert not feed.rolling("NEWUSDT")
        venue.peers[1].reset()
        await eventually(lambda: feed.live == 2 and len(venue.peers) == 3)
        # and a connection left with nothing is closed
        await feed.apply(symbols[1:], ("trade", "ticker", "kline_1m"))
        assert [one.name for one in feed.describe()] == ["A0"]
        await eventually(lambda: venue.peers[2].close_code == 1000)
        assert venue.peers[0].close_code is None and len(venue.peers) == 3
        assert feed.reconnects() == {"A": 1}, "a counter never falls"


async def test_symbols_move_before_they_are_given_up(venue: Venue) -> None:
    """More kinds of streams do not fit: what moves is seen at its new place first."""
    symbols = tuple(f"SYM{number}USDT" for number in range(1000))
    missing: list[str] = []

    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if request["method"] == "UNSUBSCRIBE":
            elsewhere = {s for one in venue.peers if one is not peer for s in one.subscribed}
            missing.extend(set(request["params"]) - elsewhere)
        return ...

    venue.answer = answer
    quick = replace(FAST, frame_gap_s=0.001)
    here = settings(venue, symbols=symbols, streams=("trade",))
    async with Running(make_feed(here, timing=quick)) as feed:
        await eventually(lambda: feed.live == 1)
        await feed.apply(symbols, ("trade", "ticker"))
        assert not missing
        await eventually(lambda: feed.live == 2)
        first, second = held(venue)
        assert len(first) == 1024 and len(second) == 976 and not first & second
        assert len(venue.peers) == 2


async def test_changes_are_made_one_after_the_other(venue: Venue) -> None:
    async with Running(make_feed(settings(venue, symbols=("A",), streams=("trade",)))) as feed:
        await eventually(lambda: feed.live == 1)
        await asyncio.gather(
            *(feed.apply((f"S{number}",), ("trade",)) for number in range(5)),
            feed.apply(("LASTUSDT",), ("trade",)),
        )
        assert held(venue) == [{"lastusdt@trade"}]


async def test_a_change_before_run_and_after_close(venue: Venue) -> None:
    feed = make_feed(settings(venue))
    await feed.apply(("BTCUSDT",), ("trade",))
    async with Running(feed):
        await eventually(lambda: feed.live == 1)
        assert venue.last.subscribed == ["btcusdt@trade"]
    await feed.apply(("ETHUSDT",), ("trade",))
    await feed.run()
    assert len(venue.peers) == 1


async def test_new_connections_of_a_paused_feed_are_paused(venue: Venue) -> None:
    symbols = tuple(f"SYM{number}USDT" for number in range(342))
    async with Running(make_feed(settings(venue, symbols=symbols[:341]))) as feed:
        await eventually(lambda: feed.live == 1)
        feed.pause_reading()
        changing = asyncio.create_task(feed.apply(symbols, ("trade", "ticker", "kline_1m")))
        await eventually(lambda: len(venue.peers) == 2)
        await asyncio.sleep(0.2)
        assert feed.live == 1
        feed.resume_reading()
        await changing
        await eventually(lambda: feed.live == 2)


async def test_replace_is_for_the_connections_of_the_symbols(venue: Venue) -> None:
    symbols = tuple(f"SYM{number}USDT" for number in range(342))
    async with Running(make_feed(settings(venue, symbols=symbols))) as feed:
        await eventually(lambda: feed.live == 2)
        feed.replace(["SYM1USDT", "OTHERUSDT"], "no trade for long")
        await eventually(lambda: feed.describe()[1].rollovers["stale"] == 1)
        assert feed.describe()[0].rollovers["stale"] == 0


async def test_a_bug_ends_the_feed_loudly(venue: Venue, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = make_feed(settings(venue))

    def fail() -> int:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(feed.connections[0]._up, "next_epoch", fail)
    with pytest.raises(ExceptionGroup) as caught:
        await feed.run()
    assert caught.group_contains(ZeroDivisionError)
    await feed.close()


def make_capture(folder: Path, capacity: int) -> Capture:
    ring = Ring(folder / "ring", capacity)
    ring.intern("BTCUSDT")
    return Capture(ring, ring.symbols, Conflator(1))


async def check_capture(folder: Path, tls: ssl.SSLContext | None) -> None:
    """The compiled listener: rows in the ring, pongs, a cut, the notice, back-pressure."""
    venue = Venue()
    await venue.start(tls)
    capture = make_capture(folder, 1024)
    intern = capture.ring.intern  # type: ignore[attr-defined]

    def factory(owner: Any, line: int, epoch: int) -> picows.WSListener:
        return FrameListener(capture, owner, line, epoch)

    feed = make_feed(settings(venue, symbols=("BTCUSDT",)), factory, symbol_id=intern)
    capture.watch_high_water(512, feed.pause_reading)
    async with Running(feed):
        await eventually(lambda: feed.live == 1 and capture.ring.pending > 3)
        await venue.last.socket.ping(b"1770123456789")
        await eventually(lambda: venue.last.pongs == [b"1770123456789"])
        await venue.last.send(
            '{"stream":"!serverShutdown","data":{"e":"serverShutdown","E":1770123456789000}}'
        )
        await eventually(lambda: feed.describe()[0].rollovers["server_shutdown"] == 1)
        await eventually(lambda: not feed.rolling("BTCUSDT"))
        await venue.last.socket.close(code=1008, message=b"Too many requests")
        await eventually(lambda: len(venue.peers) == 3 and feed.live == 1)
        (status,) = feed.describe()
        assert status.reconnects == {"closed_by_venue": 1}
        assert status.rollovers["server_shutdown"] == 1
        venue.data_every_s = 0.0001
        await eventually(lambda: capture.above_high_water)
        await asyncio.sleep(0.1)
        assert feed.live == 1
        pending = capture.ring.pending
        assert pending <= 1024
        await asyncio.sleep(0.1)
        assert capture.ring.pending == pending  # paused
    ring = capture.ring
    assert isinstance(ring, Ring)
    rows = ring.peek(1024)
    assert set(np.unique(rows["epoch"]).tolist()) <= {1, 2, 3}
    await venue.stop()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_with_the_compiled_listener(
    runner: Callable[..., Any], secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = None
    if secure:
        certificate = make_certificate(tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        tls = server_tls(certificate)
    tls_context.cache_clear()
    runner(check_capture(tmp_path, tls))
    tls_context.cache_clear()


async def test_against_the_simulated_exchange(tmp_path: Path) -> None:
    """The venue's strict limits, pings, a cut and an unlisted symbol; every row is a true trade."""
    listed = ("BTCUSDT", "币安人生USDT", *(f"SYM{number}USDT" for number in range(150)))
    wanted = (*listed, "NOSUCHUSDT")
    options: dict[str, Any] = {"ping_interval": 1, "pong_timeout": 2, "cut_after": 4}
    async with simulated_exchange(symbols=",".join(listed), rate=500, **options) as exchange:
        ring = Ring(tmp_path / "ring", 1 << 14)
        for symbol in wanted:
            ring.intern(symbol)
        capture = Capture(ring, ring.symbols, Conflator(len(wanted)))

        def factory(owner: Any, line: int, epoch: int) -> picows.WSListener:
            return FrameListener(capture, owner, line, epoch)

        here = replace(settings(Venue()), websocket_urls=(exchange.ws,), symbols=wanted)
        slow = replace(FAST, frame_gap_s=0.5)
        async with Running(make_feed(here, factory, timing=slow, symbol_id=ring.intern)) as feed:
            await eventually(lambda: feed.live == 1, 20)
            await eventually(lambda: feed.describe()[0].connects >= 2, 20)
            await eventually(lambda: feed.live == 1, 20)
            (status,) = feed.describe()
            assert set(status.reconnects) == {"lost"}
        rows = ring.peek(1 << 14)
        assert len(rows) > 500
        assert capture.refused() == dict.fromkeys(capture.refused(), 0)
        for row in rows:
            trade = exchange.truth.trade(ring.symbols.name(int(row["symbol_id"])), row["trade_id"])
            assert (row["price_e8"], row["quantity_e8"], row["trade_us"]) == trade[2:5]
