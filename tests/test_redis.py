"""What is published in Redis: a real redis-server, looked at with redis-cli, and fed by a capture;
and everything that may answer in its place.
"""

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import free_port
from tests.plain_frames import TICKER, TRADE, compact
from tests.redis_desk import RedisServer, needs_redis, next_batch, redis_server
from tests.snapshots import HEALTHY
from tests.test_capture import Bench, trade
from tests.test_latest import now_us, ticker
from tradecore.redis import publisher as publishing
from tradecore.redis import wire as wires
from tradecore.redis.address import parse
from tradecore.redis.publisher import Publisher
from tradecore.redis.wire import RedisError, Wire

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
        await redis.until_last(lambda found: [*found] == ["btcusdt@trade"])


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


@asynccontextmanager
async def impostor(answer: bytes, *, closes: bool = False) -> AsyncIterator[str]:
    """Something that listens and answers with these bytes; yield its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(100)
            writer.write(answer)
            await writer.drain()
            if not closes:
                await reader.read()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "closes", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False, "protocol"),
        (b"\x00\xff" * 50 + b"\n", False, "protocol"),
        (b"x" * 100_000, False, "protocol"),
        (b"$99999999999\r\n", False, "protocol"),
        (b"*3\r\n", False, "protocol"),
        (b":\r\n", False, "protocol"),
        (b"+OK\n", False, "protocol"),
        (b"", True, "closed"),
        (b"+O", True, "closed"),
        (b"$5\r\nab", True, "closed"),
        (b"-MOVED 1 127.0.0.1:7001\r\n", False, "refused"),
        (b"-ERR unknown\r\n", False, "refused"),
        (b"", False, "timeout"),
    ],
)
async def test_whatever_answers_in_its_place(
    answer: bytes, closes: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "ANSWER_LIMIT_S", 0.2)
    async with impostor(answer, closes=closes) as url:
        with pytest.raises(RedisError) as caught:
            await Wire.open(parse(url))
    assert caught.value.reason == reason, caught.value


async def test_nobody_there(tmp_path: Path) -> None:
    for url in ("redis://127.0.0.1:1", f"unix://{tmp_path}/none", "redis://no-such-host.invalid"):
        with pytest.raises(RedisError) as caught:
            await Wire.open(parse(url))
        assert caught.value.reason == "unreachable"


async def test_user_password_database_and_socket(tmp_path: Path, short_dir: Path) -> None:
    async with redis_server(short_dir) as redis:
        await redis.cli(
            *("ACL", "SETUSER", "writer", "on", ">p@ss word", "~tradecore:*", "&tradecore:*"),
            *("+@all", "-@dangerous"),
        )
        login = "writer:p%40ss%20word@"
        for url in (
            redis.url.replace("//", f"//{login}").replace("/0", "/3"),
            f"unix://{login}{redis.socket}?db=3",
        ):
            wire = await Wire.open(parse(url))
            assert await wire.call([wires.command("SET", "tradecore:x", "1")]) == [b"OK"]
            wire.close()
        assert await redis.cli("-n", "3", "GET", "tradecore:x") == "1"
        with pytest.raises(RedisError, match="give the user") as caught:
            wire = await Wire.open(parse(redis.url.replace("//", f"//{login}")))
            await wire.call([wires.command("SET", "other", "1")])
        wire.close()
        assert caught.value.reason == "auth"
        desk = Desk(tmp_path, redis.url.replace("//", f"//{login}"), trades_kept=10)
        async with desk.running():
            desk.feed(1)
            await redis.until_last(lambda found: found)
            await desk.until(lambda use: use.trades == 1)
        assert not sum(desk.publisher.use().errors.values())


async def test_tls_with_a_certificate_that_is_believed_and_one_that_is_not(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, cert = short_dir / "key.pem", short_dir / "cert.pem"
    openssl = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await openssl.wait() == 0
    port = free_port()
    options = ("--tls-port", str(port), "--tls-auth-clients", "no")
    async with redis_server(
        short_dir, *options, "--tls-cert-file", str(cert), "--tls-key-file", str(key)
    ):
        address = parse(f"rediss://localhost:{port}")
        with pytest.raises(RedisError) as caught:
            await Wire.open(address)
        assert caught.value.reason == "tls"
        trusting = ssl.create_default_context(cafile=str(cert))
        monkeypatch.setattr(wires, "tls_context", lambda: trusting)
        wire = await Wire.open(address)
        assert await wire.call([wires.command("PING")]) == [b"PONG"]
        wire.close()


# -- the address -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text", "clear"),
    [
        ("redis://127.0.0.1", "redis://127.0.0.1:6379/0", False),
        ("redis://:pw@cache.example:6380/2", "redis://cache.example:6380/2", True),
        ("rediss://u:p%2Fw@[2001:db8::1]", "rediss://[2001:db8::1]:6379/0", False),
        ("unix:///run/redis/redis.sock?db=1", "unix:///run/redis/redis.sock?db=1", False),
        ("redis://localhost/?db=7", "redis://localhost:6379/7", False),
    ],
)
def test_addresses(url: str, text: str, clear: bool) -> None:
    assert str(parse(url)) == text
    assert parse(url).in_the_clear is clear


@pytest.mark.parametrize(
    "url",
    [
        "memcached://h",
        "redis:h",
        "redis://",
        "redis://h:port",
        "redis://h:70000",
        "redis://h/one",
        "redis://h/-1",
        "redis://user@h",
        "redis://h?ssl=1",
        "redis://h?db=1&db=2",
        "redis://h#x",
        "redis://[::1",
        "unix://host/run/x",
        "unix://",
        "unix:///" + "x" * 120,
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="give"):
        parse(url)
