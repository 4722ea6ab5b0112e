"""What is in Redis: a real redis-server, looked at with redis-cli, and fed by a capture."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.plain_frames import TICKER, TRADE, compact
from tests.redis_desk import RedisServer, needs_redis, next_batch, redis_server
from tests.snapshots import HEALTHY
from tests.test_capture import Bench, trade
from tests.test_latest import now_us, ticker
from tradecore.redis import publisher as publishing
from tradecore.redis import wire as wires
from tradecore.redis.address import parse
from tradecore.redis.publisher import Publisher

WAIT_LIMIT_S = 20.0

pytestmark = needs_redis


def fresh(trade_id: int, symbol: str = "BTCUSDT") -> bytes:
    """A trade of now: what is older than a day is swept out."""
    return trade(trade_id, symbol, event_ms=now_us() // 1000)


class Desk(Bench):
    """A capture whose newest values are published while `running`."""

    def __init__(self, folder: Path, url: str, node: str = "here", **rest: Any) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder / f"ring-{node}", 1 << 12)
        self.publisher = Publisher(
            parse(url),
            self.capture,
            lambda: ("BTCUSDT", "ETHUSDT"),
            lambda: HEALTHY,
            node,
            **rest,
        )

    def feed(self, *ids: int, symbol: str = "BTCUSDT") -> None:
        for trade_id in ids:
            self.capture.feed(fresh(trade_id, symbol))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Desk"]:
        task = asyncio.create_task(self.publisher.run())
        try:
            yield self
            assert not task.done(), "it gives up"
        finally:
            await self.publisher.close()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, condition: Callable[[Any], Any]) -> None:
        async with asyncio.timeout(WAIT_LIMIT_S):
            while not condition(self.publisher.use()):
                await asyncio.sleep(0.01)

    async def until_failed(self, reason: str) -> str:
        """Wait until it has failed for this reason; return the error's text."""
        await self.until(lambda use: use.errors[reason])
        use = self.publisher.use()
        assert not use.up and use.last_error
        return str(use.last_error)


@pytest.fixture
async def redis(short_dir: Path) -> AsyncIterator[RedisServer]:
    async with redis_server(short_dir) as one:
        yield one


@pytest.fixture
def desk(tmp_path: Path, redis: RedisServer) -> Desk:
    return Desk(tmp_path, redis.url)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "INTERVAL_S", 0.02)
    monkeypatch.setattr(publishing, "_RETRY_CAP_S", 0.2)


# -- what is there ---------------------------------------------------------------------------------


async def test_the_newest_event_of_each_stream_is_there_as_the_venue_printed_it(
    desk: Desk, redis: RedisServer
) -> None:
    frames = [fresh(7), fresh(8), fresh(3, "ETHUSDT"), ticker(now_us())]
    async with redis.subscribed() as lines, desk.running():
        for frame in frames:
            desk.capture.feed(frame)
        found = await redis.until_last(lambda found: len(found) == 3)
        batch = await next_batch(lines)
    events = {json.loads(frame)["stream"]: json.loads(frame)["data"] for frame in frames}
    assert found == events
    assert found["btcusdt@trade"]["p"] == "8.25000000"
    raw = await redis.cli("HGET", "tradecore:last", "btcusdt@ticker")
    assert raw.encode() == compact(TICKER.replaced(E=events["btcusdt@ticker"]["E"],
                                                   c="64000.01000000"))  # fmt: skip
    assert all(event in batch for event in events.values())
    assert 0 < int(await redis.cli("TTL", "tradecore:last")) <= 86400


async def test_only_what_has_changed_is_published(desk: Desk, redis: RedisServer) -> None:
    async with redis.subscribed() as lines, desk.running():
        desk.feed(1)
        assert [event["t"] for event in await next_batch(lines)] == [1]
        desk.capture.feed(trade(9, "ETHUSDT"))
        assert [event["t"] for event in await next_batch(lines)] == [9]
        desk.feed(1)
        desk.feed(2)
        assert [event["t"] for event in await next_batch(lines)] == [2]


async def test_many_symbols_go_in_several_commands(
    tmp_path: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BATCH_VALUES", 4)
    desk = Desk(tmp_path, redis.url)
    names = [f"S{n}USDT" for n in range(19)]
    for name in names:
        desk.ring.intern(name)
    desk.capture.grow()
    for number, name in enumerate(names):
        desk.capture.feed(fresh(number, name))
    async with desk.running():
        found = await redis.until_last(lambda found: len(found) == 19)
        assert desk.publisher.use().batches == 5
    assert {name: event["t"] for name, event in found.items()} == {
        f"{name.lower()}@trade": number for number, name in enumerate(names)
    }


async def test_a_status_tells_who_writes_and_ends_with_them(desk: Desk, redis: RedisServer) -> None:
    async with desk.running():
        await desk.until(lambda use: use.up)
        status = json.loads(await redis.cli("GET", "tradecore:status:here"))
        assert status["node"] == "here" and status["ready"] is True and status["symbols"] == 2
        assert abs(status["time_us"] - now_us()) < 5_000_000
        assert 0 < int(await redis.cli("TTL", "tradecore:status:here")) <= 5
    assert await redis.cli("EXISTS", "tradecore:status:here") == "0"


async def test_all_trades_are_in_the_stream_once_and_in_order(
    tmp_path: Path, redis: RedisServer
) -> None:
    desk = Desk(tmp_path, redis.url, trades_kept=1000)
    async with desk.running():
        for first in range(1, 2000, 500):
            desk.feed(*range(first, first + 500))
            desk.feed(first)
            await asyncio.sleep(0)
        await desk.until(lambda use: use.trades == 2000)
        assert desk.publisher.use().trades_dropped == 0
    lines = (await redis.cli("XRANGE", "tradecore:trades", "-", "+")).splitlines()
    packed = [json.loads(line) for line in lines if line.startswith("[")]
    assert [event["t"] for entry in packed for event in entry] == list(range(1, 2001))
    assert [str(len(entry)) for entry in packed] == lines[2::5]


async def test_the_stream_is_capped(tmp_path: Path, redis: RedisServer) -> None:
    desk = Desk(tmp_path, redis.url, trades_kept=1)
    async with desk.running():
        for trade_id in range(1, 600):
            desk.feed(trade_id)
            if trade_id % 60 == 0:
                await desk.until(lambda use, sent=trade_id: use.trades == sent)
    assert int(await redis.cli("XLEN", "tradecore:trades")) <= 100  # by whole nodes of 100


async def test_a_stop_sends_what_is_news(desk: Desk, redis: RedisServer) -> None:
    async with desk.running():
        await desk.until(lambda use: use.up)
        desk.feed(77)
    assert (await redis.last())["btcusdt@trade"]["t"] == 77


# -- never back ------------------------------------------------------------------------------------


async def test_two_daemons_never_take_a_value_back_nor_publish_it_twice(
    tmp_path: Path, redis: RedisServer
) -> None:
    one, two = Desk(tmp_path, redis.url, "one"), Desk(tmp_path, redis.url, "two")
    seen: list[int] = []
    async with redis.subscribed() as lines, one.running(), two.running():
        for first in range(1, 400, 10):
            ahead, behind = (one, two) if first % 20 == 1 else (two, one)
            behind.feed(*range(max(1, first - 4), first + 3))
            ahead.feed(*range(first, first + 10))
            await asyncio.sleep(0.005)
        one.feed(1000)
        while not seen or seen[-1] != 1000:
            seen += [event["t"] for event in await next_batch(lines)]
        two.feed(500)  # no news at all
        two.capture.feed(fresh(1, "ETHUSDT"))
        assert [event["s"] for event in await next_batch(lines)] == ["ETHUSDT"]
    assert seen == sorted(set(seen))
    assert (await redis.last())["btcusdt@trade"]["t"] == 1000


async def test_a_restart_that_knows_less_takes_nothing_back(
    tmp_path: Path, redis: RedisServer
) -> None:
    event_us = now_us()
    async with Desk(tmp_path, redis.url, "before").running() as before:
        before.capture.feed(fresh(50))
        before.capture.feed(ticker(event_us, last="2.00000000"))
        await redis.until_last(lambda found: len(found) == 2)
    async with Desk(tmp_path, redis.url, "after").running() as after:
        after.feed(49)
        after.capture.feed(ticker(event_us - 1, last="1.00000000"))
        after.capture.feed(fresh(1, "ETHUSDT"))
        found = await redis.until_last(lambda found: "ethusdt@trade" in found)
    assert found["btcusdt@trade"]["t"] == 50
    assert found["btcusdt@ticker"]["c"] == "2.00000000"


async def test_what_is_old_or_of_the_far_future_is_swept_out(
    desk: Desk, redis: RedisServer
) -> None:
    day_us = 86_400_000_000
    for symbol, time_us in (("OLD", now_us() - day_us - 1), ("AHEAD", now_us() + 2 * day_us)):
        event = compact(TRADE.replaced(E=time_us)).decode()
        await redis.cli("HSET", "tradecore:last", f"{symbol.lower()}@trade", event)
    await redis.cli("HSET", "tradecore:last", "no json", "nothing of ours")
    await redis.cli("HSET", "tradecore:last", "btcusdt@trade", "nothing of ours")
    desk.feed(1)
    async with desk.running():
        async with asyncio.timeout(WAIT_LIMIT_S):
            while await redis.cli("HKEYS", "tradecore:last") != "btcusdt@trade":
                await asyncio.sleep(0.02)
        assert (await redis.last())["btcusdt@trade"]["t"] == 1


# -- what goes wrong -------------------------------------------------------------------------------


async def test_a_server_that_hangs_is_left_and_gets_everything_later(
    desk: Desk, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "ANSWER_LIMIT_S", 0.3)
    async with desk.running():
        desk.feed(1)
        await redis.until_last(lambda found: found)
        redis.hang()
        desk.feed(2)
        await desk.until_failed("timeout")
        desk.feed(3, 4)
        redis.go_on()
        desk.feed(5)
        assert await redis.until_last(lambda found: found["btcusdt@trade"]["t"] >= 5)
        await desk.until(lambda use: use.up)
        assert desk.publisher.use().reconnects >= 1


async def test_a_server_that_comes_back_empty_gets_the_whole_state(
    desk: Desk, redis: RedisServer
) -> None:
    async with desk.running():
        desk.feed(1)
        desk.capture.feed(fresh(2, "ETHUSDT"))
        await redis.until_last(lambda found: len(found) == 2)
        await redis.kill()
        await desk.until_failed("closed")
        await desk.until_failed("unreachable")
        await redis.start()
        found = await redis.until_last(lambda found: len(found) == 2)
        assert {event["s"]: event["t"] for event in found.values()} == {"BTCUSDT": 1, "ETHUSDT": 2}


@pytest.mark.parametrize(
    ("reason", "spoil", "mend", "says"),
    [
        ("auth", "CONFIG SET requirepass x", "CONFIG SET requirepass", "give user and password"),
        ("readonly", "REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "name the primary"),
        ("memory", "CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "raise its maxmemory"),
    ],
)
async def test_a_refusal_is_told_and_outlived(
    desk: Desk, redis: RedisServer, reason: str, spoil: str, mend: str, says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    async with desk.running():
        desk.feed(1)
        await redis.until_last(lambda found: found)
        await redis.cli(*spoil.split())
        if reason == "auth":
            redis.login = ("--no-auth-warning", "-a", "x")
            await redis.cli("CLIENT", "KILL", "TYPE", "normal")
        desk.feed(2)
        assert says in await desk.until_failed(reason)
        away_s = desk.publisher.use().away_s or 0.0
        await desk.until(lambda use: use.errors[reason] >= 3 and use.away_s > away_s + 0.1)
        await redis.cli(*mend.split(), *([""] if reason == "auth" else []))
        redis.login = ()
        desk.feed(3)
        await redis.until_last(lambda found: found and found["btcusdt@trade"]["t"] == 3)
        await desk.until(lambda use: use.up and use.last_error is None)


async def test_what_is_refused_for_long_is_logged_once(
    tmp_path: Path, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.cli("CONFIG", "SET", "requirepass", "hunter2-right")
    desk = Desk(tmp_path, redis.url.replace("//", "//:hunter2-wrong@"))
    with caplog.at_level(logging.WARNING):
        async with desk.running():
            await desk.until(lambda use: use.errors["auth"] >= 4)
    assert len(caplog.records) <= 1  # none if another test of this process was told of lately
    assert "hunter2" not in caplog.text + str(desk.publisher.use())


async def test_trades_that_redis_refused_are_counted(tmp_path: Path, redis: RedisServer) -> None:
    await redis.cli("SET", "tradecore:trades", "no stream")
    desk = Desk(tmp_path, redis.url, trades_kept=10)
    async with desk.running():
        desk.feed(1, 2, 3)
        await desk.until(lambda use: use.trades_dropped == 3)
        assert desk.publisher.use().errors["refused"] and not desk.publisher.use().trades
        await redis.cli("DEL", "tradecore:trades")
        desk.feed(4, 5)
        await desk.until(lambda use: use.trades == 2)
        assert desk.publisher.use().trades_dropped == 3
    lines = (await redis.cli("XRANGE", "tradecore:trades", "-", "+")).splitlines()
    assert [[event["t"] for event in json.loads(one)] for one in lines if one[0] == "["] == [[4, 5]]
