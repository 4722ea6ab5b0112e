"""Faults that are ordered while the exchange runs."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from fakes import SimulatedExchange, simulated_exchange

from tradecore.simulate.market import Market

CLOSE = aiohttp.WSMsgType.CLOSE
WAIT_S = 20.0
PATH = "/api/v3/historicalTrades"
MARKET: dict[str, Any] = {"rate": 400, "symbols": "BTCUSDT", "first_id": [1_000], "epoch": -5}


class Client:
    """A client of BTCUSDT's trades that notes what it gets."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.ids: list[int] = []
        self.others: list[Any] = []

    async def until(self, condition: Callable[["Client"], Any]) -> None:
        """Read on until the condition holds or the connection ends."""
        async with asyncio.timeout(WAIT_S):
            while not condition(self):
                message = await self.socket.receive()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    self.others.append(message)
                    if self.socket.closed:
                        return
                    continue
                try:
                    data = json.loads(message.data)["data"]
                    (self.ids if data["t"] < 10**14 else self.others).append(data["t"])
                except (ValueError, KeyError, TypeError):
                    self.others.append(message.data)

    async def more(self, count: int) -> None:
        """Read so many more trades."""
        wanted = len(self.ids) + count
        await self.until(lambda one: len(one.ids) >= wanted)


@asynccontextmanager
async def client(exchange: SimulatedExchange, symbol: str = "btcusdt") -> AsyncIterator[Client]:
    url = f"{exchange.ws}/stream?streams={symbol}@trade"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, autoping=False) as socket,
    ):
        yield Client(socket)


def jumps(ids: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairwise(ids) if b != a + 1]


async def test_an_unknown_fault_is_answered_with_the_list_of_all() -> None:
    async with simulated_exchange(**MARKET) as exchange, aiohttp.ClientSession() as session:
        for body in (
            b"cut",
            b"[]",
            b"{}",
            b'{"fault": "fire"}',
            b'{"fault": "rest", "mode": "slow"}',
            b'{"fault": "drop", "n": "many"}',
            b'{"fault": "close", "code": 7}',
            b'{"fault": "cut", "connections": "some"}',
            b'{"fault": "drop_stream"}',
        ):
            async with session.post(f"{exchange.rest}/sim/fault", data=body) as response:
                answer = await response.json()
                assert response.status == 400, body
                assert answer["error"]
                assert {"cut", "half_open", "rest", "pause"} <= answer["faults"].keys()


async def test_trades_are_left_out_doubled_swapped_and_garnished_on_demand() -> None:
    async with simulated_exchange(**MARKET) as exchange, client(exchange) as one:
        await one.more(20)
        assert jumps(one.ids) == []
        await exchange.fault("drop", n=3)
        await one.until(lambda c: jumps(c.ids))
        ((before, after),) = jumps(one.ids)
        assert after - before == 4
        one.ids.clear()
        await exchange.fault("duplicate", n=2)
        await one.until(lambda c: len(c.ids) - len(set(c.ids)) == 2)
        one.ids.clear()
        await exchange.fault("reorder", n=1)
        await one.until(lambda c: any(b < a for a, b in pairwise(c.ids)))
        await one.more(5)
        assert sorted(one.ids) == list(range(min(one.ids), max(one.ids) + 1))
        await exchange.fault("garbage", n=1)  # more would end this client: no UTF-8
        await one.until(lambda c: c.others)
        one.ids.clear()
        await one.more(20)
        assert jumps(one.ids) == []
        counts = (await exchange.state())["counts"]
        told = [counts[f"live {kind}"] for kind in ("drop", "duplicate", "garbage")]
        assert told == [3, 2, 1]


async def test_a_symbol_can_vanish_from_the_present_connections_only() -> None:
    async with simulated_exchange(**MARKET) as exchange:
        async with client(exchange) as one, client(exchange) as two:
            await one.more(1)
            await two.more(1)
            await exchange.fault("drop_stream", symbol="BTCUSDT", connections="one")
            await two.more(100)
            async with client(exchange) as three:
                await three.more(50)
        assert (await exchange.state())["counts"]["live muted"] > 50


async def test_resets_closes_and_announcements() -> None:
    async with simulated_exchange(**MARKET) as exchange:
        async with client(exchange) as one:
            await one.more(1)
            assert (await exchange.fault("cut"))["connections"] == 1
            await one.until(lambda c: c.socket.closed)
        async with client(exchange) as one:
            await one.more(1)
            await exchange.fault("close", code=1001)
            await one.until(lambda c: c.socket.closed)
            (closing,) = [o for o in one.others if getattr(o, "type", None) is CLOSE]
            assert closing.data == 1001
        async with client(exchange) as one:
            await one.more(1)
            await exchange.fault("shutdown", seconds=0.5)
            await one.until(lambda c: any("serverShutdown" in str(o) for o in c.others))
            await one.until(lambda c: c.socket.closed)
        state = await exchange.state()
        assert state["connects"] == 3
        assert state["counts"]["reset"] == 1
        assert len(state["reconnect_s"]) == 2
        assert all(0 <= seconds < WAIT_S for seconds in state["reconnect_s"])


async def test_half_open_and_stop_pong() -> None:
    async with (
        simulated_exchange(**MARKET, ping_interval=0.1) as exchange,
        AsyncExitStack() as all_,
    ):
        silent, mute, whole = [await all_.enter_async_context(client(exchange)) for _ in "123"]
        for one in (silent, mute, whole):
            await one.more(1)
        await exchange.fault("half_open", connections="one")
        await whole.more(50)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await silent.more(100)
        assert not silent.socket.closed
        await exchange.fault("stop_pong")
        await mute.more(600)  # what was under way
        mute.others.clear()
        await mute.socket.ping(b"x")
        await mute.more(200)
        kinds = [getattr(o, "type", None) for o in mute.others]
        assert aiohttp.WSMsgType.PONG not in kinds
        assert aiohttp.WSMsgType.PING not in kinds


async def sorts(one: Client, seconds: float) -> list[str]:
    """Return what kinds of messages come meanwhile: an event's name, or that of a frame."""
    kinds: list[str] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                message = await one.socket.receive()
                if message.type is aiohttp.WSMsgType.TEXT:
                    body = json.loads(message.data)
                    kinds.append(body["data"]["e"] if "data" in body else next(iter(body)))
                else:
                    kinds.append(message.type.name)
    return kinds


async def test_connections_that_are_mute_or_without_trades_from_their_start() -> None:
    async with (
        simulated_exchange(**MARKET, ping_interval=0.1) as exchange,
        AsyncExitStack() as all_,
    ):
        await exchange.fault("mute", n=1)
        await exchange.fault("tradeless", n=2)
        both, tradeless, whole = [await all_.enter_async_context(client(exchange)) for _ in "123"]
        await whole.more(50)
        heard: dict[Client, list[str]] = {}
        for one in (both, tradeless):
            params = ["btcusdt@ticker"]
            await one.socket.send_json({"method": "SUBSCRIBE", "params": params, "id": 1})
            await one.socket.ping(b"x")
            heard[one] = await sorts(one, seconds=1.5)
        assert set(heard[both]) == {"PING", "PONG", "result"}
        assert set(heard[tradeless]) == {"PING", "PONG", "result", "24hrTicker"}
        await exchange.fault("tradeless", n=1)
        await exchange.fault("tradeless", n=0)
        async with client(exchange) as healed:
            await healed.more(1)
        counts = (await exchange.state())["counts"]
        assert (counts["born mute"], counts["born tradeless"]) == (1, 2)


async def test_refusals_and_slow_handshakes() -> None:
    async with simulated_exchange(**MARKET) as exchange:
        await exchange.fault("refuse", n=2)
        for _ in range(2):
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with client(exchange):
                    pass
        await exchange.fault("slow_handshake", n=1, seconds=0.7)
        begun = time.monotonic()
        async with client(exchange) as one:
            assert time.monotonic() - begun >= 0.7
            await one.more(1)
        state = await exchange.state()
        assert (state["connects"], state["refused"]) == (3, 2)


async def test_bans_of_upgrades_and_who_does_not_heed_them() -> None:
    async def refusal(exchange: SimulatedExchange) -> tuple[int, str | None]:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with client(exchange):
                pass
        assert caught.value.headers is not None
        return caught.value.status, caught.value.headers.get("Retry-After")

    async with simulated_exchange(**MARKET) as exchange:
        await exchange.fault("ban", seconds=2)
        begun = time.monotonic()
        assert await refusal(exchange) == (418, "2")
        assert await refusal(exchange) == (418, "2")
        assert (await exchange.state())["upgrades_while_banned"] == 0, "at the same moment"
        await asyncio.sleep(0.7)
        await refusal(exchange)
        assert (await exchange.state())["upgrades_while_banned"] == 1
        await asyncio.sleep(begun + 2.1 - time.monotonic())
        async with client(exchange) as one:
            await one.more(1)
        await exchange.fault("ban", status=429, seconds=30, retry_after=0)
        assert await refusal(exchange) == (429, None)
        await exchange.fault("ban", seconds=0)
        async with client(exchange) as one:
            await one.more(1)
        assert (await exchange.state())["upgrades_while_banned"] == 1


async def ask(exchange: SimulatedExchange, path: str = PATH) -> tuple[int, str, dict[str, str]]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(exchange.rest + path, params={"symbol": "BTCUSDT", "limit": 5}) as response,
    ):
        return response.status, await response.text(), dict(response.headers)


async def test_rest_fails_in_every_way_for_a_while() -> None:
    async with simulated_exchange(**MARKET) as exchange:
        await exchange.fault("rest", mode="500", seconds=30)
        assert (await ask(exchange))[0] == 500
        await exchange.fault("rest", mode="429", seconds=1)
        status, _, headers = await ask(exchange)
        assert (status, headers["Retry-After"]) == (429, "1")
        assert (await exchange.state())["rest_while_limited"] == 0
        await ask(exchange)
        assert (await exchange.state())["rest_while_limited"] == 1
        await exchange.fault("rest", mode="lag", seconds=30, lag=3)
        rows = json.loads((await ask(exchange))[1])
        newest = json.loads((await ask(exchange, "/api/v3/trades"))[1])
        assert newest[-1]["time"] - rows[-1]["time"] > 2_500
        await exchange.fault("rest", mode="garbage", seconds=30)
        answers = [await ask(exchange) for _ in range(5)]
        assert {status for status, *_ in answers} == {200}
        assert len({text[:1] + text[-1:] for _, text, _ in answers}) > 1
        await exchange.fault("rest", mode="garbage", seconds=30, endpoint="klines")
        assert len(json.loads((await ask(exchange))[1])) == 5
        await exchange.fault("rest", mode="hang", seconds=0.6)
        begun = time.monotonic()
        assert (await ask(exchange))[0] == 200
        assert time.monotonic() - begun > 0.4
        state = await exchange.state()
        assert state["rest"]["historicalTrades"] == 11
        assert state["rest_while_banned"] == 0


async def test_requests_of_the_banned_are_counted() -> None:
    async with simulated_exchange(**MARKET) as exchange:
        await exchange.fault("rest", mode="418", seconds=1)
        status, text, headers = await ask(exchange)
        assert (status, headers["Retry-After"]) == (418, "1")
        assert "banned until" in text
        assert (await exchange.state())["rest_while_banned"] == 0
        assert (await ask(exchange))[0] == 418
        assert (await exchange.state())["rest_while_banned"] == 1
        async with asyncio.timeout(WAIT_S):
            while (await ask(exchange))[0] != 200:
                await asyncio.sleep(0.1)


async def test_a_pause_shifts_what_comes_and_changes_no_id() -> None:
    async with simulated_exchange(**MARKET) as exchange, client(exchange) as one:
        await one.more(10)
        await exchange.fault("pause")
        paused_us = (await exchange.state())["now_us"]
        await asyncio.sleep(0)
        rows = json.loads((await ask(exchange))[1])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await one.until(lambda c: c.ids[-1] > rows[-1]["id"])
        assert one.ids[-1] == rows[-1]["id"]
        await exchange.fault("resume")
        await one.more(50)
        assert jumps(one.ids) == []
        truth = await exchange.truth_now()
        assert truth.trade_us("BTCUSDT", rows[-1]["id"]) <= paused_us
        assert truth.trade_us("BTCUSDT", rows[-1]["id"] + 1) >= paused_us + 500_000
        plain = exchange.truth.trades("BTCUSDT", one.ids[0], one.ids[-1] + 1)
        moved = truth.trades("BTCUSDT", one.ids[0], one.ids[-1] + 1)
        assert [t._replace(trade_us=0) for t in moved] == [t._replace(trade_us=0) for t in plain]


async def test_two_processes_with_equal_arguments_serve_the_same_market() -> None:
    """As two hosts of the venue do; faults of one of them leave the other alone."""
    options = {**MARKET, "epoch": 1_767_225_600, "seed": 5, "absent_every": 50}
    async with simulated_exchange(**options) as a, simulated_exchange(**options) as b:
        assert a.port != b.port
        assert (await a.state())["market"] == (await b.state())["market"]
        rows = [await one.get(PATH, symbol="BTCUSDT", fromId=2_000) for one in (a, b)]
        assert rows[0] == rows[1]
        async with client(a) as one, client(b) as two:
            await one.more(1)
            await two.more(1)
            await a.fault("cut")
            await one.until(lambda c: c.socket.closed)
            await two.more(100)
        market: Market = a.truth
        assert all(market.has("BTCUSDT", trade_id) for trade_id in two.ids)
