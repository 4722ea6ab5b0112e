"""The simulated exchange's streams over real sockets: contents, control protocol, limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType
from fakes import SimulatedExchange, simulated_exchange

from tradecore.simulate.frames import lower
from tradecore.simulate.market import Market
from tradecore.simulate.words import E8, MINUTE_US, Candle, Trade

WAIT_S = 30.0
CHINESE = "币安人生USDT"


@asynccontextmanager
async def connected(
    exchange: SimulatedExchange, path: str, **options: Any
) -> AsyncIterator[ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(exchange.ws + path, **options) as socket,
    ):
        yield socket


async def receive(
    socket: ClientWebSocketResponse, wanted: Callable[[dict[str, Any]], bool] = bool
) -> dict[str, Any]:
    """Return the next message that the condition likes."""
    async with asyncio.timeout(WAIT_S):
        while True:
            message: dict[str, Any] = json.loads(await socket.receive_str())
            if wanted(message):
                return message


async def request(
    socket: ClientWebSocketResponse, method: str | None = None, *params: Any, **more: Any
) -> dict[str, Any]:
    """Send a control request and return its reply."""
    body: dict[str, Any] = {"method": method, "params": list(params), "id": 7, **more}
    await socket.send_str(json.dumps(body, ensure_ascii=False))
    return await receive(socket, lambda m: "result" in m or "error" in m or "code" in m)


async def closing(socket: ClientWebSocketResponse) -> tuple[int, str]:
    """Return code and reason of the server's close frame."""
    async with asyncio.timeout(WAIT_S):
        while True:
            message = await socket.receive()
            if message.type is WSMsgType.CLOSE:
                return message.data, message.extra
            assert message.type in (WSMsgType.TEXT, WSMsgType.PING)


def trade_of(event: dict[str, Any], unit_us: int = 1000) -> Trade:
    """Read a trade event."""
    assert list(event) == ["e", "E", "s", "t", "p", "q", "T", "m", "M"]
    assert event["e"] == "trade"
    assert event["M"] is True
    assert event["E"] >= event["T"]
    price, quantity = (Decimal(event[key]) * E8 for key in "pq")
    return Trade(
        event["s"], event["t"], int(price), int(quantity), event["T"] * unit_us, event["m"]
    )


def true_trade(market: Market, trade: Trade, unit_us: int = 1000) -> Trade:
    """Return the market's trade, its time cut to the unit of the stream."""
    truth = market.trade(trade.symbol, trade.trade_id)
    return truth._replace(trade_us=truth.trade_us // unit_us * unit_us)


def candle_of_event(kline: dict[str, Any]) -> Candle:
    """Read the sums of a kline event."""
    sums = (int(Decimal(kline[key]) * E8) for key in ("o", "h", "l", "c", "v", "q", "V", "Q"))
    return Candle(kline["f"], kline["L"], *sums)


async def test_combined_trades_equal_the_market() -> None:
    symbols = ("BTCUSDT", "PEPEUSDT", "LUNCUSDT", "BTCIDRT", CHINESE)
    async with simulated_exchange(rate=0, count=5_000, virtual_rate=10_000) as exchange:
        streams = "/".join(f"{lower(s)}@trade" for s in symbols)
        seen: dict[str, list[Trade]] = {s: [] for s in symbols}
        async with connected(exchange, f"/stream?streams={streams}") as socket:
            for _ in range(5_000):
                message = await receive(socket)
                assert list(message) == ["stream", "data"]
                trade = trade_of(message["data"])
                assert message["stream"] == f"{lower(trade.symbol)}@trade"
                assert trade == true_trade(exchange.truth, trade)
                seen[trade.symbol].append(trade)
        assert await exchange.next_event() == {"event": "done", "trades": 5_000}
        state = await exchange.state()
        for symbol, trades in seen.items():
            ids = [t.trade_id for t in trades]
            sent = state["symbols"][symbol]
            assert ids == list(range(sent["first_id"], sent["last_id"] + 1))
            assert ids[0] == exchange.truth.first_id(symbol)
        assert state["trades"] == 5_000


async def test_raw_and_microseconds() -> None:
    async with simulated_exchange(rate=2_000) as exchange:
        path = "/ws/btcusdt@trade?timeUnit=microsecond"
        async with connected(exchange, path) as socket:
            for _ in range(50):
                trade = trade_of(await receive(socket), unit_us=1)
                assert trade == exchange.truth.trade("BTCUSDT", trade.trade_id)


async def test_frames_are_compact_raw_utf8() -> None:
    async with simulated_exchange(rate=500, symbols=CHINESE) as exchange:
        async with connected(exchange, "/ws") as socket:
            assert await request(socket, "SUBSCRIBE", f"{lower(CHINESE)}@trade") == {
                "result": None,
                "id": 7,
            }
            text = await socket.receive_str()
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
        assert f'"s":"{CHINESE}"' in text


async def test_a_restarted_exchange_goes_on_where_the_clock_says() -> None:
    options: dict[str, Any] = {"rate": 1_000, "seed": 5, "first_id": ["BTCUSDT=6720000000"]}
    async with simulated_exchange(**options) as first:
        async with connected(first, "/ws/btcusdt@trade") as socket:
            last = trade_of(await receive(socket))
        await first.kill()
        async with simulated_exchange(**options, port=first.port, epoch=first.epoch_us) as second:
            assert second.market is not None
            assert second.truth.arguments() == first.truth.arguments()
            async with connected(second, "/ws/btcusdt@trade") as socket:
                trade = trade_of(await receive(socket))
            assert trade.trade_id > last.trade_id > 6_720_000_000
            assert trade == true_trade(first.truth, trade)
            rows = await second.get(
                "/api/v3/historicalTrades", symbol="BTCUSDT", fromId=last.trade_id + 1, limit=1000
            )
            assert rows[0]["id"] == last.trade_id + 1
            assert rows[-1]["id"] >= trade.trade_id or len(rows) == 1000


async def test_klines_equal_the_trades_of_their_minutes() -> None:
    options: dict[str, Any] = {"rate": 0, "virtual_rate": 30, "symbols": "BTCUSDT,QUIETUSDT"}
    async with simulated_exchange(**options, epoch=1_767_225_590, count=20_000) as exchange:
        names = ("btcusdt@trade", "btcusdt@kline_1m", "quietusdt@kline_1m", "btcusdt@ticker")
        closed: dict[str, list[dict[str, Any]]] = {"BTCUSDT": [], "QUIETUSDT": []}
        updates: list[int] = []
        tickers: list[dict[str, Any]] = []
        traded: list[Trade] = []
        async with connected(exchange, "/stream?streams=" + "/".join(names)) as socket:
            while len(closed["QUIETUSDT"]) < 9:
                event = (await receive(socket))["data"]
                if event["e"] == "trade":
                    traded.append(trade_of(event))
                elif event["e"] == "24hrTicker":
                    tickers.append(event)
                elif event["k"]["x"]:
                    closed[event["s"]].append(event)
                elif event["s"] == "BTCUSDT":
                    updates.append(event["E"])
        for symbol, events in closed.items():
            opens = [event["k"]["t"] * 1000 for event in events]
            assert opens == list(range(opens[0], opens[-1] + 1, MINUTE_US))
            for event in events:
                assert_kline_is_true(exchange.truth, symbol, event["k"])
        assert any(event["k"]["n"] == 0 for event in closed["QUIETUSDT"])
        assert all(b - a >= 2_000 for a, b in pairwise(updates))
        assert_tickers_are_true(exchange.truth, tickers, traded)


def assert_kline_is_true(market: Market, symbol: str, kline: dict[str, Any]) -> None:
    """Compare a closing kline with the market's trades of that minute."""
    assert list(kline) == list("tTsifLochlvnxqVQB")
    open_us = kline["t"] * 1000
    assert kline["T"] == kline["t"] + 59_999
    truth = market.minute(symbol, open_us)
    if truth is None:
        assert (kline["f"], kline["L"], kline["n"]) == (-1, -1, 0)
        assert {Decimal(kline[key]) for key in "vqVQ"} == {0}
        assert len({kline[key] for key in "ochl"}) == 1
        return
    assert candle_of_event(kline) == truth
    assert kline["n"] == truth.trade_count
    for trade_id, inside in ((truth.first_id, True), (truth.last_id + 1, False)):
        assert (market.trade_us(symbol, trade_id) // MINUTE_US * MINUTE_US == open_us) is inside


def assert_tickers_are_true(
    market: Market, tickers: list[dict[str, Any]], traded: list[Trade]
) -> None:
    """Compare tickers with the sums over all trades so far (the window is longer)."""
    keys = "e E s p P w x c Q b B a A o h l v q O C F L n"
    assert len(tickers) > 100
    for ticker in tickers:
        assert list(ticker) == keys.split()
        if ticker["n"] == 0:
            assert (ticker["F"], ticker["L"], Decimal(ticker["c"])) == (-1, -1, 0)
            continue
        truth = market.candle("BTCUSDT", market.first_id("BTCUSDT"), ticker["L"] + 1)
        assert truth is not None
        assert (ticker["F"], ticker["n"]) == (truth.first_id, truth.trade_count)
        assert tuple(int(Decimal(ticker[k]) * E8) for k in "ohlcvq") == truth[2:8]
        assert Decimal(ticker["p"]) == Decimal(ticker["c"]) - Decimal(ticker["o"])
        assert ticker["C"] - ticker["O"] == 86_400_000
    assert all(b["E"] - a["E"] >= 990 for a, b in pairwise(tickers))
    assert traded[-1].trade_id >= tickers[-1]["L"]


async def test_control_requests() -> None:
    async with simulated_exchange(rate=0.001) as exchange, connected(exchange, "/stream") as socket:
        assert await request(socket, "SUBSCRIBE", "btcusdt@trade", "ethusdt@trade") == {
            "result": None,
            "id": 7,
        }
        assert (await request(socket, "UNSUBSCRIBE", "ethusdt@trade"))["result"] is None
        assert await request(socket, "LIST_SUBSCRIPTIONS", id="a1") == {
            "result": ["btcusdt@trade"],
            "id": "a1",
        }
        await asyncio.sleep(1)  # five frames a second are allowed, this is the limit's window
        assert (await request(socket, "GET_PROPERTY", "combined"))["result"] is True
        assert (await request(socket, "SET_PROPERTY", "combined", False))["result"] is None
        assert (await request(socket, "GET_PROPERTY", "combined"))["result"] is False


@pytest.mark.parametrize("nested", [False, True])
async def test_refused_requests(nested: bool) -> None:
    options = {"nested_errors": True} if nested else {}
    cases: list[tuple[dict[str, Any], int]] = [
        ({"method": "GET_PROPERTY", "params": ["nothing"]}, 0),
        ({"method": "SET_PROPERTY", "params": ["combined", "yes"]}, 1),
        ({"method": "DANCE"}, 2),
        ({"method": "SUBSCRIBE", "params": ["nonsense"]}, 2),
        ({"method": "LIST_SUBSCRIPTIONS", "id": "x" * 37}, 2),
    ]
    async with simulated_exchange(rate=0.001, **options) as exchange:
        for case, code in cases:
            async with connected(exchange, "/ws") as socket:
                await socket.send_str(json.dumps({"id": 3, **case}))
                reply = await receive(socket)
                error = reply["error"] if nested else reply
                assert error["code"] == code
                assert error["msg"]
                assert reply["id"] == (None if "x" in str(case.get("id")) else 3)
        async with connected(exchange, "/ws") as socket:
            await socket.send_str("{nonsense")
            reply = await receive(socket)
            assert (reply["error"] if nested else reply)["code"] == 3


async def test_oversized_subscribe_is_ignored_and_1024_streams_are_the_limit() -> None:
    names = [f"{n:04d}@trade" for n in range(1_025)]
    async with simulated_exchange(rate=0.001) as exchange:
        async with connected(exchange, "/ws") as socket:
            await socket.send_str(json.dumps({"method": "SUBSCRIBE", "params": names, "id": 1}))
            assert (await request(socket, "LIST_SUBSCRIPTIONS"))["result"] == []
        state = await exchange.state()
        assert state["counts"]["request ignored for its size"] == 1
        path = "/stream?streams=" + "/".join(names[:700])
        async with connected(exchange, path) as socket:
            assert (await request(socket, "SUBSCRIBE", *names[700:900]))["result"] is None
            assert (await request(socket, "SUBSCRIBE", *names[900:1_024]))["result"] is None
            assert (await request(socket, "LIST_SUBSCRIPTIONS"))["result"] == names[:1_024]
            await socket.send_str(json.dumps({"method": "SUBSCRIBE", "params": names[-1:]}))
            assert await closing(socket) == (1008, "Invalid request")


async def test_a_sixth_frame_in_a_second_closes() -> None:
    async with simulated_exchange(rate=0.001) as exchange, connected(exchange, "/ws") as socket:
        for _ in range(3):
            assert "result" in await request(socket, "LIST_SUBSCRIPTIONS")
        for _ in range(3):
            await socket.pong()
        assert await closing(socket) == (1008, "Too many requests")


async def test_pings_carry_the_time_and_want_their_pong() -> None:
    options = {"rate": 0.001, "ping_interval": 0.3, "pong_timeout": 1.0}
    async with simulated_exchange(**options) as exchange:
        async with connected(exchange, "/ws", autoping=False) as socket:
            message = await socket.receive(WAIT_S)
            assert message.type is WSMsgType.PING
            assert abs(int(message.data) - exchange.epoch_us // 1000) < 60_000
            await socket.pong()  # empty: unsolicited, does not count
            assert await closing(socket) == (1008, "Pong timeout")
        async with connected(exchange, "/ws", autoping=False) as socket:
            for _ in range(7):
                message = await socket.receive(WAIT_S)
                assert message.type is WSMsgType.PING
                await socket.pong(message.data)
            await socket.ping(b"hello")
            while message.type is WSMsgType.PING:
                message = await socket.receive(WAIT_S)
            assert (message.type, bytes(message.data)) == (WSMsgType.PONG, b"hello")
    async with (
        simulated_exchange(**options, no_pong_check=True) as lenient,
        connected(lenient, "/ws", autoping=False) as socket,
    ):
        for _ in range(7):
            assert (await socket.receive(WAIT_S)).type is WSMsgType.PING


async def test_unknown_and_upper_case_streams_are_acknowledged_and_silent() -> None:
    async with simulated_exchange(rate=1_000) as exchange, connected(exchange, "/ws") as socket:
        names = ["BTCUSDT@trade", "btcusdt@bookTicker", "btcusdt@aggTrade"]
        assert (await request(socket, "SUBSCRIBE", *names))["result"] is None
        assert (await request(socket, "SUBSCRIBE", "neverlistedusdt@trade"))["result"] is None
        event = await receive(socket)
        assert trade_of(event).symbol == "NEVERLISTEDUSDT"


async def test_an_unreadable_time_unit_is_refused() -> None:
    async with simulated_exchange(rate=1) as exchange:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            async with connected(exchange, "/ws/btcusdt@trade?timeUnit=HOURS"):
                pass
        assert refusal.value.status == 400
