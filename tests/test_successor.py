"""Make before break: a connection whose session is replaced by a successor."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Any

import picows
import pytest
from aiohttp import web
from connection_desk import SHARE, Running, connect, free_port
from connection_desk import venue as venue
from fake_venue import Peer, StubListener, Venue, eventually

from tradecore.backoff import AttemptBudget
from tradecore.errors import VenueError
from tradecore.feed import lines
from tradecore.feed.session import Session
from tradecore.feed.states import State
from tradecore.feed.subscriptions import Share


class Factory:
    """Makes listeners, keeps them, and lets some symbols be unseen at first."""

    def __init__(self, doubtful: set[int] | None = None) -> None:
        self.made: list[StubListener] = []
        self.doubtful = doubtful or set()
        self.passed_by: set[int] = set()

    def __call__(self, owner: Session, line: int, epoch: int) -> StubListener:
        self.made.append(StubListener(owner, line, epoch))
        self.made[-1].doubtful |= self.doubtful
        self.made[-1].passed_by |= self.passed_by
        return self.made[-1]


NOTICE = '{"stream":"!x","data":{"e":"serverShutdown","E":1770123456789}}'


async def test_shutdown_notice_brings_a_successor_before_the_old_one_goes(venue: Venue) -> None:
    factory = Factory({0})
    async with Running(
        connect(venue.url, listener_factory=factory, grace_s=9, rollover_s=9, base_s=30, cap_s=30)
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        await venue.last.send(NOTICE)
        await eventually(lambda: len(factory.made) == 2)
        old, new = factory.made
        await eventually(lambda: new.data_frames > 3)
        assert connection.rolling and connection.state is State.LIVE
        was = old.data_frames
        await eventually(lambda: old.data_frames > was)  # not a moment without
        assert connection.describe().epoch == 1 and connection.describe().connects == 2
        assert not venue.peers[0].gone
        new.doubtful.clear()
        await eventually(lambda: venue.peers[0].gone and not connection.rolling)
        assert venue.peers[0].close_code == 1000
        status = connection.describe()
        assert status.rollovers["server_shutdown"] == 1 and status.reconnects == {}
        assert (status.epoch, status.connects) == (2, 2)


async def test_what_the_old_session_had_sent_is_taken(venue: Venue) -> None:
    factory = Factory()
    venue.last_words = 1000
    async with Running(connect(venue.url, listener_factory=factory)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        await venue.last.send(NOTICE)
        await eventually(lambda: connection.describe().rollovers["server_shutdown"])
        await eventually(lambda: not connection.rolling)
        assert factory.made[0].data_frames >= 1000


async def test_sessions_are_replaced_by_age(venue: Venue) -> None:
    async with Running(connect(venue.url, max_age_s=0.5)) as connection:
        await eventually(lambda: connection.describe().rollovers["age"] == 3)
        assert len(venue.peers) >= 4 and connection.describe().reconnects == {}
        assert connection._present is not None
        old = connection._present._before
        assert old is not None
        await eventually(lambda: old._before is None)  # those before it are not kept
        assert connection.describe().age_s < 1.0
        for first, second in itertools.pairwise(venue.upgrades):
            assert second - first >= 0.35  # 80 % of the age, and the time to open


async def test_quiet_symbols_are_asked_for_after_a_grace_only(venue: Venue) -> None:
    asked: list[tuple[str, ...]] = []

    async def confirm(symbols: Sequence[str]) -> set[str]:
        asked.append(tuple(symbols))
        if len(asked) == 1:
            raise VenueError("HTTP 418")
        return set(symbols)

    factory = Factory({1, 2})
    share = Share(("BUSY", "QUIET", "SLOW"), ("trade", "ticker"))
    async with Running(
        connect(venue.url, listener_factory=factory, share=share, confirm=confirm, rollover_s=9)
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        assert not asked
        connection.replace("a test")
        await eventually(lambda: len(asked) == 1)
        assert asked == [("QUIET", "SLOW")]
        factory.made[1].doubtful.discard(2)
        await eventually(lambda: not connection.rolling)
        assert asked[1:] == [("QUIET",)]
        assert connection.describe().rollovers["stale"] == 1


async def test_symbols_that_cannot_be_confirmed_do_not_hold_it_up_for_ever(venue: Venue) -> None:
    async def confirm(symbols: Sequence[str]) -> set[str]:
        await asyncio.sleep(60)
        return set()

    async with Running(
        connect(venue.url, listener_factory=Factory({0}), confirm=confirm)
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.replace("a test")
        await eventually(lambda: connection.describe().rollovers["stale"] == 1)
        await eventually(lambda: venue.peers[0].gone)


async def test_a_quiet_market_does_not_stop_a_rollover(venue: Venue) -> None:
    """No data come at all; REST knows that there are none."""
    told: set[str] = set()

    async def confirm(symbols: Sequence[str]) -> set[str]:
        return told & set(symbols)

    venue.pong = True
    share = Share(("THIN", "THINNER"), ("trade",))
    async with Running(
        connect(
            venue.url,
            listener_factory=Factory({0, 1}),
            share=share,
            confirm=confirm,
            quiet_silent_s=30.0,
            rollover_s=0.1,
        )
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.data_every_s = None
        connection.replace("a test")
        await eventually(lambda: len(venue.peers) == 2 and venue.last.subscribed)
        await asyncio.sleep(0.5)  # the time limit alone closes nothing
        assert connection.rolling and not venue.peers[0].gone
        told = {"THIN", "THINNER"}
        await eventually(lambda: connection.describe().rollovers["stale"] == 1)


async def test_a_successor_that_brings_less_than_others_is_not_taken(venue: Venue) -> None:
    """It acknowledges, and it sends; what the old session brings of a symbol, it does not.

    Tickers and REST find nothing newer than what has come, since the old session brings it.
    """
    asked: list[tuple[str, ...]] = []

    async def confirm(symbols: Sequence[str]) -> set[str]:
        asked.append(tuple(symbols))
        return set(symbols)

    factory = Factory()
    async with Running(
        connect(
            venue.url,
            listener_factory=factory,
            confirm=confirm,
            behind_s=0.2,
            rollover_s=5.0,
            base_s=0.1,
            cap_s=0.1,
        )
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        factory.passed_by = {0}
        connection.replace("a test")
        await eventually(lambda: len(factory.made) >= 4)
        assert not venue.peers[0].gone and not asked
        assert connection.describe().rollovers["stale"] == 0
        # That it is about to be closed as well changes nothing.
        await venue.last.send(NOTICE)
        made = len(factory.made)
        await eventually(lambda: len(factory.made) > made)
        was = factory.made[0].data_frames
        await eventually(lambda: factory.made[0].data_frames > was)
        factory.passed_by = set()
        await eventually(lambda: connection.describe().rollovers["stale"] == 1)
        await eventually(lambda: venue.peers[0].gone)


async def test_a_symbol_that_nobody_brings_does_not_stop_rollovers(
    venue: Venue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tickers tell of its trades and none comes, on no connection: listed anew, or refused."""
    monkeypatch.setattr("tradecore.feed.connection.DEAD_AGAIN_S", 0.2)
    factory = Factory()
    factory.passed_by = {1}
    share = Share(("BTCUSDT", "ODDUSDT"), ("trade", "ticker"))
    async with Running(
        connect(
            venue.url, listener_factory=factory, share=share, behind_s=0.1, base_s=0.1, cap_s=0.1
        )
    ) as connection:
        await eventually(lambda: connection.describe().rollovers["stale"] == 2)
        status = connection.describe()
        assert status.reconnects == {} and status.attempts_failed == 0
        await asyncio.sleep(2)
        assert connection.describe().rollovers["stale"] <= 5, "less and less often"
        wider = Share(("BTCUSDT", "ODDUSDT", "NEWUSDT"), ("trade", "ticker"))
        assert await connection.apply(wider, 5.0)


async def test_a_wish_from_during_a_rollover_is_met_by_it(venue: Venue) -> None:
    venue.farewell_s = 0.3
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.replace("a test")
        await eventually(lambda: connection.rolling)
        while connection.rolling:
            connection.replace("again")
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert connection.describe().rollovers["stale"] == 1 and len(venue.peers) == 2


async def test_a_session_without_data_grows_old_too(venue: Venue) -> None:
    """A quiet market, as REST knows; the venue cuts at its age all the same."""
    venue.data_every_s = None
    venue.pong = True

    async def confirm(symbols: Sequence[str]) -> set[str]:
        return set(symbols)

    share = Share(("THIN",), ("trade",))
    async with Running(
        connect(
            venue.url,
            listener_factory=Factory({0}),
            share=share,
            confirm=confirm,
            max_age_s=0.5,
            quiet_silent_s=30.0,
        )
    ) as connection:
        await eventually(lambda: connection.describe().rollovers["age"] == 2)
        assert connection.state is State.SUBSCRIBING


async def test_refused_symbols_need_no_proof(venue: Venue) -> None:
    def answer(peer: Peer, request: dict[str, Any]) -> object:
        if "bad@trade" in request.get("params", ()):
            return {"code": 2, "msg": "Invalid request", "id": request["id"]}
        return ...

    venue.answer = answer
    share = Share(("BTCUSDT", "BAD"), ("trade", "ticker"))
    async with Running(
        connect(venue.url, listener_factory=Factory({1}), share=share)
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.replace("a test")
        await eventually(lambda: connection.describe().rollovers["stale"] == 1)


async def test_a_successor_that_fails_is_tried_again_while_the_old_one_lives(venue: Venue) -> None:
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.refuse = web.Response(status=503)
        await venue.last.send(NOTICE)
        await eventually(lambda: connection.describe().attempts_failed >= 4)
        assert connection.state is State.LIVE and len(venue.peers) == 1
        venue.refuse = None
        await eventually(lambda: connection.describe().rollovers["server_shutdown"] == 1)
        assert len(venue.peers) == 2


async def test_the_successor_takes_over_when_the_old_one_dies_first(venue: Venue) -> None:
    async with Running(
        connect(venue.url, listener_factory=Factory({0}), grace_s=9, rollover_s=9)
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        await venue.last.send(NOTICE)
        await eventually(lambda: len(venue.peers) == 2 and len(connection.sessions) == 2)
        venue.peers[0].reset()
        await eventually(lambda: not connection.rolling)
        await eventually(lambda: connection.state is State.LIVE)
        assert len(venue.peers) == 2  # no third one
        status = connection.describe()
        assert status.rollovers["server_shutdown"] == 1 and status.reconnects == {"lost": 1}
        assert status.epoch == 2


async def test_a_death_ends_the_back_off_of_the_successor(venue: Venue) -> None:
    """While the old session lives there is no hurry; then there is."""
    async with Running(connect(venue.url, base_s=30, cap_s=30)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.refuse = web.Response(status=503)
        await venue.last.send(NOTICE)
        await eventually(lambda: connection.describe().attempts_failed)
        venue.refuse = None
        venue.last.reset()
        await eventually(lambda: connection.state is State.LIVE and not connection.rolling, 2.0)


async def test_the_old_one_dies_while_no_successor_can_be_opened(venue: Venue) -> None:
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.refuse = web.Response(status=503)
        await venue.last.send(NOTICE)
        await eventually(lambda: connection.describe().attempts_failed)
        venue.last.reset()
        down = (State.BACKING_OFF, State.CONNECTING)
        await eventually(lambda: not connection.rolling and connection.state in down)
        venue.refuse = None
        await eventually(lambda: connection.state is State.LIVE)
        assert len(venue.peers) == 2


async def test_a_venue_that_always_announces_its_end_is_not_stormed(venue: Venue) -> None:
    async def announce(peer: Peer) -> None:
        await peer.send(NOTICE)

    venue.on_open = announce
    async with Running(connect(venue.url, base_s=0.4, cap_s=0.4, steady_s=9)) as connection:
        await eventually(lambda: connection.describe().rollovers["server_shutdown"] >= 3)
        gaps = [b - a for a, b in itertools.pairwise(venue.upgrades)]
        assert all(gap >= 0.38 for gap in gaps[1:])
        assert connection.describe().reconnects == {}


async def test_notices_to_sessions_that_bring_data_do_not_use_up_the_attempts(
    venue: Venue,
) -> None:
    """They settle, and are told to go, again and again: each is as young as the one before."""
    async with Running(connect(venue.url, base_s=0.5, cap_s=9, steady_s=60)) as connection:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            await asyncio.sleep(0.15)
            if venue.peers and not venue.last.gone:
                await venue.last.send(NOTICE)
        assert 3 <= len(venue.upgrades) <= 5  # at about 0.2, 0.7, 1.7 and 3.7 s
        assert connection.describe().reconnects == {}
        peers = len(venue.peers)
        await eventually(lambda: connection.state is State.LIVE and connection.sessions[0].settled)
        venue.last.reset()  # a break is another matter
        await eventually(lambda: len(venue.peers) > peers and connection.state is State.LIVE, 0.5)


async def test_planned_rollovers_leave_attempts_to_breaks(venue: Venue) -> None:
    budget = AttemptBudget(7, 3600, margin=0)
    async with Running(connect(venue.url, budget=budget)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        for number in range(1, 3):
            connection.replace("a test")
            await eventually(lambda n=number: connection.describe().rollovers["stale"] == n)
            await eventually(lambda: not connection.rolling)
        connection.replace("a test")
        await eventually(lambda: connection.rolling)
        await asyncio.sleep(0.4)
        assert len(venue.peers) == 3 and connection.rolling
        venue.last.reset()
        await eventually(lambda: len(venue.peers) == 4 and connection.state is State.LIVE)


async def test_failures_of_long_ago_do_not_delay_a_successor(venue: Venue) -> None:
    """The first retry comes at once, whatever it took to get the old session up."""
    venue.refuse = web.Response(status=503)
    async with Running(connect(venue.url, base_s=0.02, cap_s=0.02)) as connection:
        await eventually(lambda: connection.describe().attempts_failed >= 3)
        venue.refuse = None
        await eventually(lambda: any(session.settled for session in connection.sessions))
        venue.refuse = web.Response(status=503)
        backoff = connection._up.backoff
        connection.replace("a test")
        await eventually(lambda: connection.rolling)
        assert backoff.attempts <= 2
        venue.refuse = None
        await eventually(lambda: connection.describe().rollovers["stale"] == 1)


async def test_nothing_rolls_over_while_paused(venue: Venue) -> None:
    async with Running(connect(venue.url, max_age_s=0.2)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.pause_reading()
        await eventually(lambda: not connection.rolling)
        upgrades = len(venue.upgrades)
        await asyncio.sleep(0.4)
        assert len(venue.upgrades) == upgrades and not connection.rolling
        connection.resume_reading()
        await eventually(lambda: len(venue.upgrades) > upgrades)


async def test_never_more_than_two_sockets(venue: Venue) -> None:
    most = 0

    async def count(peer: Peer) -> None:
        nonlocal most
        most = max(most, sum(not one.gone for one in venue.peers))

    venue.on_open = count
    venue.farewell_s = 0.1
    async with Running(connect(venue.url, max_age_s=0.1)) as connection:
        for _ in range(5):
            done = connection.describe().rollovers["age"]
            await eventually(lambda done=done: connection.describe().rollovers["age"] > done)
            connection.replace("a test")
    assert most == 2


@pytest.mark.parametrize("by_cancel", [False, True])
async def test_close_during_a_rollover(venue: Venue, by_cancel: bool) -> None:
    connection = connect(venue.url, listener_factory=Factory({0}), grace_s=9, rollover_s=9)
    task = asyncio.create_task(connection.run())
    await eventually(lambda: connection.state is State.LIVE)
    connection.replace("a test")
    await eventually(lambda: [one.opened for one in connection.sessions] == [True, True])
    if by_cancel:
        task.cancel()
    else:
        await connection.close()
    await asyncio.wait({task}, timeout=5)
    assert connection.state is State.CLOSED
    await eventually(lambda: all(peer.gone for peer in venue.peers))
    assert [peer.close_code for peer in venue.peers] == [1001 if by_cancel else 1000] * 2


async def test_close_while_the_old_session_says_goodbye(venue: Venue) -> None:
    venue.farewell_s = 0.2
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.replace("a test")
        await eventually(lambda: connection._retiring)
    await eventually(lambda: all(peer.gone for peer in venue.peers))


async def test_pause_and_resume_hold_for_both_sessions(venue: Venue) -> None:
    factory = Factory({0})
    async with Running(
        connect(venue.url, listener_factory=factory, grace_s=0.2, rollover_s=0.4)
    ) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.replace("a test")
        await eventually(lambda: len(factory.made) == 2 and factory.made[1].data_frames)
        connection.pause_reading()
        await asyncio.sleep(0.05)
        before = [listener.data_frames for listener in factory.made]
        await asyncio.sleep(0.8)
        assert [listener.data_frames for listener in factory.made] == before
        assert connection.rolling  # nobody can be confirmed while nothing is read
        factory.made[1].doubtful.clear()
        connection.resume_reading()
        await eventually(lambda: connection.describe().rollovers["stale"] == 1)


async def test_new_subscriptions_reach_both_sessions(venue: Venue) -> None:
    factory = Factory({0})
    wider = Share(("BTCUSDT", "ETHUSDT"), SHARE.kinds)
    async with Running(
        connect(venue.url, listener_factory=factory, share=wider, grace_s=9, rollover_s=9)
    ) as connection:
        assert await connection.apply(SHARE, 1.0)
        await eventually(lambda: connection.state is State.LIVE)
        assert venue.last.subscribed == list(SHARE.streams)
        connection.replace("a test")
        await eventually(lambda: len(venue.peers) == 2 and venue.last.subscribed)
        assert await connection.apply(wider, 1.0)
        assert [sorted(peer.subscribed) for peer in venue.peers] == [sorted(wider.streams)] * 2
        venue.peers[0].reset()
        venue.peers[1].reset()
        await eventually(lambda: len(venue.peers) == 3 and connection.state is State.LIVE)
        assert venue.last.subscribed == list(wider.streams)
        venue.answer = lambda peer, request: None
        assert not await connection.apply(SHARE, 0.1)


async def test_a_handshake_that_hangs_gets_less_time_than_one_that_is_always_slow() -> None:
    asked: list[float] = []
    ended: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(asyncio.get_running_loop().time())
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()  # until the client gives up
        ended.append(asyncio.get_running_loop().time())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Running(connect(f"ws://127.0.0.1:{port}", connect_s=0.8)):
            await eventually(lambda: len(ended) >= 4, 10)
    took = [b - a for a, b in zip(asked, ended, strict=False)][:4]
    for taken, expected in zip(took, (0.2, 0.4, 0.8, 0.8), strict=True):
        assert 0.75 * expected < taken < expected + 0.3


async def test_alternates_are_tried_after_the_first_retry(venue: Venue) -> None:
    """The other port, another host: whatever the line may use."""
    dead = f"ws://127.0.0.1:{free_port()}"
    async with Running(connect(dead, venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        status = connection.describe()
        assert status.attempts_failed == 2
        assert status.endpoint == f"127.0.0.1:{venue.port}"


async def test_a_line_that_took_refuge_goes_home(
    venue: Venue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "AWAY_S", 0.5)
    home = Venue()
    home.port = free_port()
    connection = connect(f"ws://localhost:{home.port}", venue.url)
    connection._up.alternates = lines.Alternates(connection.plan.endpoints, avoid_s=0.3)
    async with Running(connection):
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().endpoint == f"127.0.0.1:{venue.port}"
        await home.start()
        await eventually(lambda: connection.describe().endpoint == f"localhost:{home.port}")
        await eventually(lambda: connection.describe().rollovers["age"] == 1)
        await asyncio.sleep(0.7)
        assert connection.describe().rollovers["age"] == 1 and len(home.peers) == 1
    await home.stop()


async def test_a_bug_is_told_and_outlived(venue: Venue, caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []

    def factory(owner: Session, line: int, epoch: int) -> picows.WSListener:
        made.append(epoch)
        if len(made) < 4:
            raise ZeroDivisionError("boom")
        return StubListener(owner, line, epoch)

    async with Running(connect(venue.url, listener_factory=factory)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().reconnects == {"unexpected": 3}
    told = [record for record in caplog.records if record.exc_info]
    assert len([record for record in told if record.name.startswith("tradecore")]) == 3
    assert made == [1, 2, 3, 4]


async def test_a_bug_outside_a_session_is_not_swallowed(
    venue: Venue, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = connect(venue.url)

    def fail() -> int:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(connection._up, "next_epoch", fail)
    with pytest.raises(ZeroDivisionError):
        await connection.run()
    assert connection.state is State.CLOSED
    await connection.close()


async def test_nothing_reconnects_while_paused(venue: Venue) -> None:
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.refuse = web.Response(status=503)
        venue.last.reset()
        await eventually(lambda: connection.describe().attempts_failed)
        connection.pause_reading()
        await eventually(lambda: connection.state is State.BACKING_OFF)
        venue.refuse = None
        await asyncio.sleep(0.2)
        assert connection.state is State.BACKING_OFF
        age_s = connection.describe().last_data_age_s
        assert age_s is not None and age_s >= 0.2  # still known without a session
        peers = len(venue.peers)
        connection.resume_reading()
        connection.resume_reading()
        await eventually(lambda: connection.state is State.LIVE)
        assert len(venue.peers) == peers + 1
