"""What the daemon tells systemd, heard on a socket of the test's own in place of PID 1's."""

import asyncio
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.daemon import Daemon, daemon, free_port
from tests.fakes import simulated_exchange
from tests.test_daemon import assert_exact, finished, venue
from tradecore import clock
from tradecore.flusher import FlushStats
from tradecore.notify import Notifier
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.watchdog import FEED_LIMIT_S, WRITER_LIMIT_S, Progress

WATCHDOG_S = 1.5

FAULTY = """
import asyncio, sys
from tradecore import cli, watchdog
from tradecore.feed.leg import Leg
from tradecore.store.store import Store

async def hang(*_, **__):
    await asyncio.Event().wait()

watchdog.WRITER_LIMIT_S = 3.0
watchdog.FEED_LIMIT_S = 3.0
{fault}
sys.exit(cli.main(["run"]))
"""
"""A daemon with one part that hangs as only a bug could make it, and short limits."""

LINE_B_HANGS = """
pause = Leg._pause

async def hang_in_b(leg, delay_s):
    await (hang() if leg._up.plan.line else pause(leg, delay_s))

Leg._pause = hang_in_b
"""


class Manager:
    """The receiving end of a notification socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.address = address
        self.heard: list[tuple[float, str]] = []

    def listen(self) -> list[str]:
        """Return all lines heard so far."""
        try:
            while True:
                text = self.socket.recv(65536).decode()
                self.heard += [(time.monotonic(), line) for line in text.splitlines()]
        except BlockingIOError:
            return [line for _, line in self.heard]

    def forget(self) -> None:
        self.listen()
        self.heard.clear()

    def times(self, line: str) -> list[float]:
        self.listen()
        return [at_s for at_s, heard in self.heard if heard == line]

    async def until(self, word: str, times: int = 1) -> str:
        """Wait until lines with this word have come so often; return the last of them."""
        deadline_s = time.monotonic() + 30
        while len(found := [line for line in self.listen() if word in line]) < times:
            assert time.monotonic() < deadline_s, f"{word} is not in {self.listen()[-20:]}"
            await asyncio.sleep(0.02)
        return found[-1]


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Manager]:
    path = str(short_dir / "notify")
    one = Manager(path if request.param == "path" else f"@{path}")
    yield one
    one.socket.close()


@pytest.fixture
def one_manager(short_dir: Path) -> Iterator[Manager]:
    one = Manager(str(short_dir / "notify"))
    yield one
    one.socket.close()


def told(manager: Manager) -> dict[str, str]:
    return {
        "NOTIFY_SOCKET": manager.address,
        "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
    }


# ---- the datagram ------------------------------------------------------------------------------


def test_lines_go_out_as_one_datagram(manager: Manager) -> None:
    environ = told(manager) | {"WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier(environ)
    assert environ == {"HOME": "/"}, "what we start must not speak for us"
    assert notifier.listens
    assert notifier.watchdog_s == WATCHDOG_S
    assert notifier.send("READY=1", "STATUS=币安")
    assert manager.socket.recv(100) == "READY=1\nSTATUS=币安".encode()


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.listens
    assert notifier.watchdog_s is None
    assert not notifier.send("READY=1")


def test_a_watchdog_of_another_process_is_not_ours(one_manager: Manager) -> None:
    assert Notifier(told(one_manager) | {"WATCHDOG_PID": "1"}).watchdog_s is None


def test_a_manager_that_is_gone_or_full_costs_only_the_message(one_manager: Manager) -> None:
    notifier = Notifier(told(one_manager))
    for _ in range(10_000):
        if not notifier.send("STATUS=" + "x" * 1000):
            break
    else:
        pytest.fail("the queue of a socket that nobody reads is never full")
    one_manager.forget()
    assert notifier.send("READY=1")
    Path(one_manager.address).unlink()
    assert not notifier.send("READY=1")


# ---- what stuck is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trades_s", "feed_s", "opening", "word"),
    [
        (0, [0], False, ""),
        (WRITER_LIMIT_S - 5, [30 + FEED_LIMIT_S - 5], False, ""),
        (WRITER_LIMIT_S + 5, [0], False, "a write of trades"),
        (WRITER_LIMIT_S + 5, [0], True, ""),
        (0, [0, 30 + FEED_LIMIT_S + 5], True, "connection X1"),
        (0, [], False, ""),
    ],
)
def test_stuck_is_a_loop_that_does_not_come_round(
    monkeypatch: pytest.MonkeyPatch,
    trades_s: float,
    feed_s: list[float],
    opening: bool,
    word: str,
) -> None:
    now_ns = 10**15
    monkeypatch.setattr(clock, "mono_ns", lambda: now_ns)
    flush = FlushStats()
    flush.turned_ns |= {"trades": now_ns - int(trades_s * 1e9), "tickers and klines": now_ns}
    connections = [
        SimpleNamespace(name=f"X{n}", moved_ns=now_ns - int(age_s * 1e9))
        for n, age_s in enumerate(feed_s)
    ]
    feed: Any = SimpleNamespace(connections=connections)
    stuck = Progress(flush, feed, lambda: opening, 30.0).stuck()
    assert word in stuck
    assert bool(word) == bool(stuck)


def test_a_writer_has_its_time_after_a_long_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    begun_ns = 10**15
    now_ns, opening = begun_ns, True
    monkeypatch.setattr(clock, "mono_ns", lambda: now_ns)
    flush = FlushStats()
    flush.turned_ns["trades"] = begun_ns
    feed: Any = SimpleNamespace(connections=[])
    progress = Progress(flush, feed, lambda: opening, 30.0)
    for _ in range(720):  # an hour
        now_ns += 5 * 10**9
        assert not progress.stuck()
    opening = False
    now_ns += int((WRITER_LIMIT_S - 5) * 1e9)
    assert not progress.stuck(), "its write has just begun"
    now_ns += 10 * 10**9
    assert "a write of trades" in progress.stuck()


# ---- the daemon --------------------------------------------------------------------------------


async def test_ready_comes_with_the_first_live_stream_and_signs_of_life_go_on(
    tmp_path: Path, migrated_database: str, one_manager: Manager
) -> None:
    port = free_port()
    address = {
        "BINANCE_WEBSOCKET_URL": f"ws://127.0.0.1:{port}",
        "BINANCE_REST_URL": f"http://127.0.0.1:{port}",
    }
    async with daemon(
        tmp_path,
        DATABASE_URL=migrated_database,
        SUPPORTED_SYMBOLS="BTCUSDT,ETHUSDT",
        **address,
        **told(one_manager),
    ) as one:
        await one_manager.until("EXTEND_TIMEOUT_USEC=30000000", 3)
        assert "no trade comes in" in await one_manager.until("STATUS=")
        assert not one_manager.times("READY=1"), (
            "the venue is away: not ready, and no reason to die"
        )
        assert not one_manager.times("WATCHDOG=1")
        async with simulated_exchange(
            port=port, rate=500, count=3000, symbols="BTCUSDT,ETHUSDT"
        ) as exchange:
            await one_manager.until("READY=1")
            assert (await one.get("/ready"))[0] == 200
            sent = await finished(exchange)
            await one.until_stored(3000)
            await one_manager.until("WATCHDOG=1", 4)
            status = await one_manager.until("stored 3,000")
            assert status.startswith("STATUS=")
            await exchange.kill()
            one_manager.forget()
            # The venue is away again: signs of life go on, and nothing is ready twice.
            await one_manager.until("WATCHDOG=1", 4)
            assert "no trade comes in" in await one_manager.until("STATUS=")
            assert not one_manager.times("READY=1")
            signs = one_manager.times("WATCHDOG=1")
            assert max(b - a for a, b in itertools.pairwise(signs)) < WATCHDOG_S
            assert await one.terminate() == 0
            assert one_manager.times("STOPPING=1")
            assert "NOTIFY_SOCKET" not in one.log
            await assert_exact(migrated_database, exchange, sent)


@pytest.mark.parametrize("away", ["venue", "database"])
async def test_one_that_shares_the_symbols_is_not_ready_before_it_captures_its_part(
    tmp_path: Path, pg_server: EmbeddedPostgres, one_manager: Manager, away: str
) -> None:
    port = free_port()
    environ = {
        "DATABASE_URL": pg_server.dsn,
        "BINANCE_WEBSOCKET_URL": f"ws://127.0.0.1:{port}",
        "BINANCE_REST_URL": f"http://127.0.0.1:{port}",
        "SUPPORTED_SYMBOLS": "BTCUSDT",
        "SHARDS": 1,
        **told(one_manager),
    }
    async with AsyncExitStack() as stack:
        exchange = simulated_exchange(port=port, rate=300, symbols="BTCUSDT")
        if away == "database":
            await stack.enter_async_context(exchange)
            await pg_server.stop()
        one = await stack.enter_async_context(daemon(tmp_path, **environ))
        await one_manager.until("EXTEND_TIMEOUT_USEC=30000000", 4)
        status, body = await one.get("/ready")
        assert status == 503
        code = {"venue": "no_live_stream", "database": "share_unknown"}[away]
        assert code in [reason["code"] for reason in body["reasons"]]
        assert not one_manager.times("READY=1")
        if away == "database":
            await pg_server.start()
        else:
            await stack.enter_async_context(exchange)
        await one_manager.until("READY=1")
        await one.until_stored(100)
        assert await one.terminate() == 0


async def test_a_database_that_is_away_is_no_reason_to_be_killed(
    tmp_path: Path, pg_server: EmbeddedPostgres, one_manager: Manager
) -> None:
    async with (
        simulated_exchange(rate=300, symbols="BTCUSDT") as exchange,
        daemon(
            tmp_path,
            DATABASE_URL=pg_server.dsn,
            **venue(exchange, SUPPORTED_SYMBOLS="BTCUSDT"),
            **told(one_manager),
        ) as one,
    ):
        await one_manager.until("READY=1")
        await one.until_stored(1)
        await pg_server.stop()
        await one_manager.until("database away")
        one_manager.forget()
        await one_manager.until("WATCHDOG=1", 5)
        await pg_server.start()
        await one.until(lambda health: health["database"]["reachable"])
        assert await one.terminate() == 0


@asynccontextmanager
async def faulty_daemon(folder: Path, fault: str, **environ: Any) -> AsyncIterator[Daemon]:
    """Run a daemon that has `fault` in it."""
    folder.mkdir(exist_ok=True)
    one = Daemon(folder, **environ)
    with one.log_file.open("ab") as log:
        one.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", FAULTY.format(fault=fault)),
            env={**Daemon.inherited(), **one.environ},
            stdout=log,
            stderr=log,
        )
    try:
        yield one
    finally:
        if one.process.returncode is None:
            await one.kill()


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("Store.write_trades = hang", "a write of trades"),
        (LINE_B_HANGS, "connection B0 was not kept"),
    ],
    ids=["writer", "line"],
)
async def test_a_part_that_hangs_while_the_loop_turns_ends_the_signs_of_life(
    tmp_path: Path, migrated_database: str, one_manager: Manager, fault: str, word: str
) -> None:
    async with (
        simulated_exchange(rate=300, symbols="BTCUSDT") as exchange,
        faulty_daemon(
            tmp_path,
            fault,
            **venue(exchange, DATABASE_URL=migrated_database, SUPPORTED_SYMBOLS="BTCUSDT"),
            FEED_LINES=2,
            **told(one_manager),
        ) as one,
    ):
        await one_manager.until("READY=1")
        await one.until(lambda health: health["counts"]["trades_received"] > 100)
        if "Leg" in fault:
            # After a break line B waits for ever, while line A tries again and again.
            await exchange.kill()
        stuck = await one_manager.until(word)
        assert stuck.startswith("STATUS=for ")
        one_manager.forget()
        await one_manager.until("STATUS=", 4)
        assert not one_manager.times("WATCHDOG=1")
        assert (await one.get("/live"))[0] == 200, "the loop turns"
        assert one.log.count("the capture is stuck") == 1, "said once"
        assert one.process is not None
        one.process.send_signal(signal.SIGABRT)  # as systemd does
        assert await one.ended() == -signal.SIGABRT
    # What waited in the ring is stored by the next start.
    if "Store" in fault:
        async with daemon(
            tmp_path,
            DATABASE_URL=migrated_database,
            SUPPORTED_SYMBOLS="BTCUSDT",
            BINANCE_WEBSOCKET_URL=exchange.ws,
            BINANCE_REST_URL=exchange.rest,
        ) as again:
            await again.until_stored(100)
            assert await again.terminate() == 0
