"""A connection kept up without end: retries, back-off, budget, close from every state."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from connection_desk import Running, connect, free_port
from connection_desk import venue as venue
from fake_venue import Peer, Venue, eventually

from tradecore.backoff import AttemptBudget
from tradecore.feed.connection import Connection
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.gate import Gate
from tradecore.feed.states import State


async def test_it_goes_live_and_tells_about_itself(venue: Venue) -> None:
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        status = connection.describe()
        assert (status.name, status.line, status.state) == ("A0", 0, State.LIVE)
        assert (status.streams, status.refused, status.epoch) == (2, (), 1)
        assert (status.connects, status.attempts_failed, status.reconnects) == (1, 0, {})
        assert status.last_data_age_s is not None and 0 <= status.last_data_age_s < 1
        assert status.since_s < 5 and status.last_end is None
        assert status.rollovers == {"age": 0, "server_shutdown": 0, "silent": 0, "stale": 0}
        assert status.endpoint == f"127.0.0.1:{venue.port}" and 0 < status.age_s < 5
    await eventually(lambda: venue.last.close_code == 1000)


async def test_first_retry_at_once_then_doubled_up_to_the_cap(venue: Venue) -> None:
    """A venue that accepts and cuts at once is a failing venue: delays must grow."""

    async def cut(peer: Peer) -> None:
        peer.reset()

    venue.on_open = cut
    async with Running(connect(venue.url, base_s=0.1, cap_s=0.4)) as connection:
        await eventually(lambda: len(venue.upgrades) >= 6)
        gaps = [b - a for a, b in itertools.pairwise(venue.upgrades)]
        assert gaps[0] < 0.5
        for gap, expected in zip(gaps[1:5], (0.1, 0.2, 0.4, 0.4), strict=True):
            assert expected - 0.02 <= gap < expected + 1.0
        status = connection.describe()
        assert 5 <= status.connects <= status.reconnects["lost"] + 1  # the last may be open yet
        assert status.last_end is not None and status.last_end.startswith("lost")
        assert status.last_end_age_s is not None and 0.0 <= status.last_end_age_s < 5.0
        assert status.endpoint == f"127.0.0.1:{venue.port}"


async def test_data_for_a_while_forgives_failures(venue: Venue) -> None:
    async with Running(connect(venue.url, base_s=30, cap_s=30)) as connection:
        for lives in range(1, 5):
            await eventually(lambda lives=lives: len(venue.peers) == lives)
            await eventually(lambda: connection.state is State.LIVE)
            await eventually(lambda: any(one.settled for one in connection.sessions))
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


async def test_nobody_asks_while_a_ban_runs(
    venue: Venue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the other connections of the feed, nor a rollover, nor the next run."""
    gate = Gate(tmp_path)
    url = venue.url
    async with Running(connect(url, gate=gate)) as old:
        await eventually(lambda: old.state is State.LIVE)
        venue.refuse = web.Response(status=418)
        async with Running(connect(url, f"{url}/other", gate=gate)):
            await eventually(lambda: len(venue.upgrades) == 2)
            old.replace("a test")
            async with Running(connect(url, gate=gate)):
                await asyncio.sleep(0.5)
        assert old.state is State.LIVE and old.rolling
    async with Running(connect(url, gate=Gate(tmp_path))) as late:
        await asyncio.sleep(0.3)
        assert late.state is State.CONNECTING
    assert len(venue.upgrades) == 2
    assert "all hosts are not asked for one for 121 s" in caplog.text


async def test_another_host_is_asked_while_one_refuses(venue: Venue) -> None:
    other = Venue()
    await other.start()
    venue.refuse = web.Response(status=429)
    there = f"ws://localhost:{other.port}"
    async with Running(connect(venue.url, there)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().endpoint == f"localhost:{other.port}"
        assert connection.describe().attempts_failed == 1 == len(venue.upgrades)
    await other.stop()


async def test_an_overloaded_endpoint_is_left_alone_as_it_wishes(venue: Venue) -> None:
    other = Venue()
    await other.start()
    venue.refuse = web.Response(status=503, headers={"Retry-After": "600"})
    async with Running(connect(venue.url, other.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        assert len(venue.upgrades) == 1
    await other.stop()


async def test_a_half_open_socket_is_replaced_without_delay(venue: Venue) -> None:
    async with Running(connect(venue.url, base_s=30, cap_s=30)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.last.deaf = True
        await eventually(lambda: connection.state is State.STALE)
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().rollovers["silent"] == 1
        assert connection.describe().reconnects == {}
        await eventually(lambda: venue.peers[0].gone)
        assert len(venue.peers) == 2


async def test_attempts_go_on_while_the_venue_is_silent(venue: Venue) -> None:
    venue.data_every_s = None
    async with Running(connect(venue.url, base_s=0.1, cap_s=0.1)) as connection:
        await eventually(lambda: len(venue.peers) == 4)
        assert sum(not peer.gone for peer in venue.peers) <= 2
        venue.data_every_s = 0.01
        await eventually(lambda: connection.state is State.LIVE)
        assert connection.describe().reconnects["silent"] >= 2
        await eventually(lambda: sum(not peer.gone for peer in venue.peers) == 1)


async def test_a_slow_start_after_silence_keeps_the_old_socket_that_revives(venue: Venue) -> None:
    """It was a storm on the way: the old session delivers again before the new one does."""
    async with Running(connect(venue.url)) as connection:
        await eventually(lambda: connection.state is State.LIVE)
        venue.refuse = web.Response(status=503)
        venue.last.deaf = True
        await eventually(lambda: connection.state is State.STALE and len(venue.upgrades) > 2)
        venue.last.deaf = False
        await eventually(lambda: connection.state is State.LIVE)
        venue.refuse = None
        await eventually(lambda: connection.describe().rollovers["silent"] == 1)
        await eventually(lambda: venue.peers[0].gone)
        assert connection.describe().reconnects == {}


# -- close ---------------------------------------------------------------------------------------


async def hold_connecting(connection: Connection, _: Venue) -> None:
    await eventually(lambda: connection.state is State.CONNECTING and connection.describe().epoch)


async def hold_subscribing(connection: Connection, venue: Venue) -> None:
    await eventually(lambda: connection.state is State.SUBSCRIBING and venue.last.requests)


async def hold_live(connection: Connection, _: Venue) -> None:
    await eventually(lambda: connection.state is State.LIVE)


async def hold_stale(connection: Connection, venue: Venue) -> None:
    await hold_live(connection, venue)
    venue.refuse = web.Response(status=503)
    venue.last.deaf = True
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
