"""A connection kept up without end: retries, back-off, budget, close from every state."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import picows
import pytest
from aiohttp import web
from fake_venue import Peer, StubListener, Venue, eventually

from tradecore.backoff import AttemptBudget, Backoff
from tradecore.feed.connection import Connection
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.session import Plan, Session, Timing
from tradecore.feed.states import State

FAST = Timing(
    connect_s=2.0,
    reply_s=0.3,
    frame_gap_s=0.01,
    silent_s=0.3,
    quiet_silent_s=0.3,
    settle_s=0.1,
    tick_s=0.02,
    close_s=0.3,
)
STREAMS = ("btcusdt@trade", "btcusdt@ticker")


def connect(
    url: str,
    *,
    base_s: float = 0.01,
    cap_s: float = 0.05,
    budget: AttemptBudget | None = None,
    listener_factory: Callable[..., picows.WSListener] = StubListener,
    **timing: float,
) -> Connection:
    """A connection whose jitter always takes the longest delay."""
    return Connection(
        Plan("A0", 0, STREAMS, Endpoint.parse(url), listener_factory, replace(FAST, **timing)),
        Backoff(base_s, cap_s, uniform=lambda low, high: high),
        budget or AttemptBudget(10_000),
        itertools.count(1).__next__,
    )


class Running:
    """Run a connection for the length of a `with`, and close it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def __aenter__(self) -> Connection:
        self.task = asyncio.create_task(self.connection.run())
        return self.connection

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()
        async with asyncio.timeout(5):
            await self.task
        assert self.connection.state is State.CLOSED


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    await venue.start()
    yield venue
    await venue.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def test_it_goes_live_and_tells_about_itself(venue: Venue) -> None:
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        status = connection.describe()
        assert (status.name, status.line, status.state) == ("A0", 0, State.LIVE)
        assert (status.streams, status.refused, status.epoch) == (2, (), 1)
        assert (status.connects, status.attempts_failed, status.reconnects) == (1, 0, {})
        assert status.last_data_age_s is not None and 0 <= status.last_data_age_s < 1
        assert status.since_s < 5 and status.last_end is None
    await eventually(lambda: venue.last.close_code == 1000)


async def test_first_retry_at_once_then_doubled_up_to_the_cap(venue: Venue) -> None:
    """A venue that accepts and cuts at once is a failing venue: delays must grow."""

    async def cut(peer: Peer) -> None:
        peer.reset()

    venue.on_open = cut
    async with Running(connect(venue.url, base_s=0.1, cap_s=0.4)) as connection:
        await eventually(lambda: len(venue.upgrades) >= 6)
        gaps = [b - a for a, b in itertools.pairwise(venue.upgrades)]
        assert gaps[0] < 0.1
        for gap, expected in zip(gaps[1:5], (0.1, 0.2, 0.4, 0.4), strict=True):
            assert expected - 0.02 <= gap < expected + 0.3
        status = connection.describe()
        assert status.reconnects["lost"] == status.connects >= 5
        assert status.last_end is not None and status.last_end.startswith("lost")


async def test_data_for_a_while_forgives_failures(venue: Venue) -> None:
    async with Running(connect(venue.url, base_s=30, cap_s=30)) as connection:
        for lives in range(1, 5):
            await eventually(lambda lives=lives: len(venue.peers) == lives)
            await eventually(lambda: connection.state is State.LIVE)
            await eventually(lambda: connection._session and connection._session.settled)
            await venue.last.socket.close(code=1008, message=b"Pong timeout")
        assert connection.describe().reconnects == {"closed_by_venue": 3}


async def test_refused_attempts_until_the_venue_is_there() -> None:
    venue = Venue()
    venue.port = free_port()
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.describe().attempts_failed >= 3)
        assert connection.describe().reconnects == {}
        await venue.start()
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().connects == 1
        assert connection.describe().epoch > 3
    await venue.stop()


async def test_the_budget_of_attempts_is_shared_and_kept(venue: Venue) -> None:
    async def cut(peer: Peer) -> None:
        peer.reset()

    venue.on_open = cut
    budget = AttemptBudget(4, 0.5, margin=0)
    connections = [connect(venue.url, base_s=0.001, cap_s=0.001, budget=budget) for _ in range(2)]
    tasks = [asyncio.create_task(connection.run()) for connection in connections]
    await eventually(lambda: len(venue.upgrades) >= 12)
    for first, fifth in zip(venue.upgrades, venue.upgrades[4:], strict=False):
        assert fifth - first >= 0.45
    for connection in connections:
        await connection.close()
    await asyncio.wait(tasks, timeout=5)


async def test_the_venues_own_wish_for_a_retry_is_respected(venue: Venue) -> None:
    venue.refuse = web.Response(status=429, headers={"Retry-After": "1"})
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: len(venue.upgrades) == 2)
        assert venue.upgrades[1] - venue.upgrades[0] >= 0.95
        venue.refuse = None
        await eventually(lambda: connection.state is State.LIVE)


async def test_silence_is_answered_by_a_new_socket_without_delay(venue: Venue) -> None:
    venue.data_every_s = None
    async with Running(connect(venue.url, base_s=30, cap_s=30)) as connection:
        await eventually(lambda: len(venue.peers) == 3)
        venue.data_every_s = 0.01
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().reconnects == {"silent": 2}
        await eventually(lambda: venue.peers[0].gone and venue.peers[1].gone)


async def test_shutdown_notice_replaces_the_socket(venue: Venue) -> None:
    async with Running(connect(venue.url, base_s=30, cap_s=30)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        await venue.last.send('{"stream":"!x","data":{"e":"serverShutdown","E":1770123456789}}')
        await eventually(lambda: len(venue.peers) == 2 and connection.state is State.LIVE)
        assert connection.describe().reconnects == {"server_shutdown": 1}
        assert connection.describe().epoch == 2


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

    monkeypatch.setattr(connection, "_next_epoch", fail)
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


# -- close ---------------------------------------------------------------------------------------


async def hold_connecting(connection: Connection, _: Venue) -> None:
    await eventually(lambda: connection.state is State.CONNECTING and connection.describe().epoch)


async def hold_subscribing(connection: Connection, venue: Venue) -> None:
    await eventually(lambda: connection.state is State.SUBSCRIBING and venue.last.requests)


async def hold_live(connection: Connection, _: Venue) -> None:
    await eventually(lambda: connection.state is State.LIVE)


async def hold_stale(connection: Connection, _: Venue) -> None:
    await eventually(lambda: connection.state is State.STALE)


async def hold_backing_off(connection: Connection, _: Venue) -> None:
    await eventually(lambda: connection.state is State.BACKING_OFF)


async def hold_draining(connection: Connection, venue: Venue) -> None:
    venue.farewell_s = 0.1
    await hold_live(connection, venue)
    closing.append(asyncio.create_task(connection.close()))
    await eventually(lambda: connection.state is State.DRAINING)


closing: list[asyncio.Task[None]] = []
HOLDS = {
    State.CONNECTING: hold_connecting,
    State.SUBSCRIBING: hold_subscribing,
    State.LIVE: hold_live,
    State.STALE: hold_stale,
    State.BACKING_OFF: hold_backing_off,
    State.DRAINING: hold_draining,
}


@pytest.mark.parametrize("by_cancel", [False, True])
@pytest.mark.parametrize("state", HOLDS)
async def test_close_in_every_state(
    venue: Venue, state: State, by_cancel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = asyncio.Event()
    if state is State.CONNECTING:

        async def open_never(*_: object) -> Any:
            await never.wait()

        monkeypatch.setattr(Endpoint, "open", open_never)
    if state is State.SUBSCRIBING:
        venue.answer = lambda peer, request: None
    if state is State.STALE:
        venue.data_every_s = None
        drop = Session.drop
        held: list[Session] = []

        async def drop_late(session: Session) -> None:
            if not held:
                held.append(session)
                await never.wait()
            await drop(session)

        monkeypatch.setattr(Session, "drop", drop_late)
    if state is State.BACKING_OFF:
        venue.refuse = web.Response(status=503)
    timing: dict[str, float] = {} if state is State.STALE else {"reply_s": 9, "silent_s": 9}
    connection = connect(venue.url, base_s=60, cap_s=60, **timing)
    task = asyncio.create_task(connection.run())
    await HOLDS[state](connection, venue)
    assert connection.state is state
    if by_cancel:
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()
    else:
        await connection.close()
        async with asyncio.timeout(5):
            await task
    assert connection.state is State.CLOSED
    await connection.close()  # idempotent
    for earlier in closing:
        await earlier
    closing.clear()
    await eventually(lambda: all(peer.gone for peer in venue.peers))
    upgrades = len(venue.upgrades)
    await connection.run()  # a closed connection cannot be revived
    assert connection.state is State.CLOSED
    assert len(venue.upgrades) == upgrades


async def test_close_before_run(venue: Venue) -> None:
    connection = connect(venue.url)
    await connection.close()
    assert connection.state is State.CLOSED
    await connection.run()
    assert not venue.upgrades


async def test_close_does_not_wait_for_a_venue_that_never_answers() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection = connect(f"ws://127.0.0.1:{port}", connect_s=60.0)
        task = asyncio.create_task(connection.run())
        await asyncio.sleep(0.1)
        await connection.close()
        await task
        assert connection.state is State.CLOSED


async def test_close_while_paused(venue: Venue) -> None:
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        connection.pause_reading()
    await eventually(lambda: venue.last.gone)
