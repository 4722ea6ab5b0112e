"""Live streams over real sockets: protocol, limits and ends, on a server of the test's own."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from snapshots import HEALTHY

from tests.plain_frames import TICKER, compact, in_microseconds, wrapped
from tests.test_capture import Bench, trade
from tests.ws_frames import payloads
from tradecore.http import connections, security, stream_session, stream_words, streams
from tradecore.http.server import SideServer
from tradecore.http.streams import Captured, Streams
from tradecore.store.holes import HoleFate

WAIT_S = 20
TRADE_1 = trade(1)
RAW_1 = TRADE_1[len(b'{"stream":"btcusdt@trade","data":') : -1]


class Desk(Bench):
    """A capture and a side server that serves its streams."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.captured = Captured(("BTCUSDT", "ETHUSDT"), ("trade", "ticker", "kline_1m"))
        self.streams = Streams(self.capture, lambda: self.captured, ["https://desk.example"])
        self.server = SideServer("127.0.0.1", 0, lambda: HEALTHY, self.streams)
        self.session = aiohttp.ClientSession()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.port}{path}"

    def connect(self, path: str, **options):
        return self.session.ws_connect(self.url(path), **options)

    async def until(self, condition) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    async def until_closed(self, reason: str, count: int = 1) -> None:
        await self.until(lambda: self.streams.closed[reason] == count)
        await self.until(lambda: not self.streams.use().clients)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path / "ring")
    await desk.server.start()
    yield desk
    await desk.session.close()
    await desk.server.stop()


async def ask(ws, method: str, params=None, request_id=1):
    """Send a request and return its reply; nothing else may come before."""
    request = {"method": method, "id": request_id}
    if params is not None:
        request["params"] = params
    await ws.send_str(json.dumps(request))
    return json.loads(await receive(ws))


async def receive(ws) -> str:
    message = await ws.receive(WAIT_S)
    assert message.type is aiohttp.WSMsgType.TEXT, message
    return message.data


async def end_of(ws) -> tuple[int, str]:
    """Return code and reason of the close frame that comes after whatever else comes."""
    async with asyncio.timeout(WAIT_S):
        while True:
            message = await ws.receive()
            if message.type is aiohttp.WSMsgType.CLOSE:
                return message.data, message.extra
            assert message.type is not aiohttp.WSMsgType.CLOSED


# --- URLs and requests ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/ws/btcusdt@trade", RAW_1),
        ("/ws/ethusdt@trade/btcusdt@trade", RAW_1),
        ("/ws/btcusdt%40trade?timeUnit=MILLISECOND", RAW_1),
        ("/stream?streams=btcusdt@trade", TRADE_1),
        ("/stream?streams=ethusdt@ticker/btcusdt@trade/", TRADE_1),
    ],
)
async def test_streams_of_the_url(desk: Desk, path: str, expected: bytes) -> None:
    async with desk.connect(path) as ws:
        desk.feed(1)
        assert (await receive(ws)).encode() == expected


@pytest.mark.parametrize("unit", ["MICROSECOND", "microsecond"])
async def test_microseconds_are_given_to_those_who_ask(desk: Desk, unit: str) -> None:
    event = in_microseconds(TICKER)
    async with (
        desk.connect(f"/stream?streams=btcusdt@ticker&timeUnit={unit}") as micro,
        desk.connect("/ws/btcusdt@ticker") as milli,
    ):
        desk.capture.feed(compact(wrapped(event, "btcusdt@ticker")))
        assert (await receive(micro)).encode() == compact(wrapped(event, "btcusdt@ticker"))
        assert (await receive(milli)).encode() == compact(TICKER)


async def test_requests_of_the_protocol(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(stream_session, "REQUESTS_PER_S", 5)
    async with desk.connect("/ws") as ws:
        assert await ask(ws, "LIST_SUBSCRIPTIONS", None, 1) == {"result": [], "id": 1}
        names = ["btcusdt@trade", "ethusdt@kline_1m"]
        assert await ask(ws, "SUBSCRIBE", names, "a1B2") == {"result": None, "id": "a1B2"}
        assert await ask(ws, "LIST_SUBSCRIPTIONS", None, None) == {"result": names, "id": None}
        desk.feed(1)
        assert (await receive(ws)).encode() == RAW_1
    async with desk.connect("/ws/btcusdt@trade") as ws:
        assert await ask(ws, "GET_PROPERTY", ["combined"], 5) == {"result": False, "id": 5}
        assert await ask(ws, "SET_PROPERTY", ["combined", True], 6) == {"result": None, "id": 6}
        assert await ask(ws, "GET_PROPERTY", ["combined"], -7) == {"result": True, "id": -7}
        desk.feed(2)
        assert (await receive(ws)).encode() == trade(2)
        reply = await ask(ws, "UNSUBSCRIBE", ["btcusdt@trade", "nobody@trade"], 2**63 - 1)
        assert reply == {"result": None, "id": 2**63 - 1}
        desk.feed(3)
    await desk.until(lambda: not desk.streams.use().clients)
    assert desk.streams.use().events == {"trade": 2, "ticker": 0, "kline_1m": 0, "hole": 0}
    async with desk.connect("/stream") as ws:
        assert await ask(ws, "GET_PROPERTY", ["combined"]) == {"result": True, "id": 1}


@pytest.mark.parametrize(
    ("text", "code", "words", "request_id"),
    [
        ("", 3, "Invalid JSON", None),
        ('{"method"', 3, "Invalid JSON", None),
        ("[" * 100_00, 3, "Invalid JSON", None),
        ("[]", 2, "must be an object", None),
        ("7", 2, "must be an object", None),
        ("{}", 2, "missing field `method`", None),
        ('{"id":3}', 2, "missing field `method`", 3),
        ('{"method":"PING","id":3}', 2, "unknown variant `PING`", 3),
        ('{"method":7,"id":3}', 2, "unknown variant", 3),
        ('{"method":"SUBSCRIBE","params":"x","id":3}', 2, "must be an array", 3),
        ('{"method":"SUBSCRIBE","params":[7],"id":3}', 2, "invalid stream", 3),
        ('{"method":"SUBSCRIBE","params":[""],"id":3}', 2, "invalid stream", 3),
        ('{"method":"LIST_SUBSCRIPTIONS","id":9223372036854775808}', 2, "request ID", None),
        ('{"method":"LIST_SUBSCRIPTIONS","id":99999999999999999999}', 2, "request ID", None),
        ('{"method":"LIST_SUBSCRIPTIONS","id":1.5}', 2, "request ID", None),
        ('{"method":"LIST_SUBSCRIPTIONS","id":true}', 2, "request ID", None),
        ('{"method":"LIST_SUBSCRIPTIONS","id":"a b"}', 2, "request ID", None),
        ('{"method":"LIST_SUBSCRIPTIONS","id":"' + "a" * 37 + '"}', 2, "request ID", None),
        ('{"method":"LIST_SUBSCRIPTIONS","id":[]}', 2, "request ID", None),
        ('{"method":"GET_PROPERTY","params":["color"],"id":4}', 0, "Unknown property", 4),
        ('{"method":"GET_PROPERTY","params":[],"id":4}', 2, "property name", 4),
        ('{"method":"GET_PROPERTY","params":["a","b"],"id":4}', 2, "too many parameters", 4),
        ('{"method":"SET_PROPERTY","params":["combined"],"id":4}', 1, "expected Boolean", 4),
        ('{"method":"SET_PROPERTY","params":["combined",1],"id":4}', 1, "expected Boolean", 4),
    ],
)
async def test_requests_that_are_refused(desk: Desk, text, code, words, request_id) -> None:
    async with desk.connect("/ws/btcusdt@trade") as ws:
        await ws.send_str(text)
        reply = json.loads(await receive(ws))
        assert reply["error"]["code"] == code
        assert words in reply["error"]["msg"]
        assert reply["id"] == request_id
        assert reply.keys() == {"error", "id"}
        desk.feed(1)
        assert (await receive(ws)).encode() == RAW_1


@pytest.mark.parametrize(
    "name",
    ["btcfoo@trade", "btcusdt@depth", "BTCUSDT@trade", "btcusdt", "@trade", "btcusdt@", "!holes"],
)
async def test_what_is_not_captured_is_refused(desk: Desk, name: str) -> None:
    expected = f"Invalid request: {name} is not captured"
    async with desk.connect("/ws/ethusdt@trade") as ws:
        reply = await ask(ws, "SUBSCRIBE", ["btcusdt@trade", name], 9)
        assert reply == {"error": {"code": 2, "msg": expected}, "id": 9}
        # Nothing of such a request is carried out.
        listed = await ask(ws, "LIST_SUBSCRIPTIONS")
        assert listed["result"] == ["ethusdt@trade"]
    async with desk.session.get(desk.url(f"/ws/{name}")) as response:
        assert response.status == 400
        assert (await response.json())["text"] == expected


async def test_what_is_captured_follows_the_roster(desk: Desk) -> None:
    desk.captured = Captured(("ETHUSDT",), ("trade",))
    async with desk.connect("/ws") as ws:
        assert "error" in await ask(ws, "SUBSCRIBE", ["btcusdt@trade"])
        assert "error" in await ask(ws, "SUBSCRIBE", ["ethusdt@ticker"])
        desk.captured = Captured(("ETHUSDT", "BTCUSDT"), ("trade", "ticker"))
        names = ["btcusdt@trade", "ethusdt@ticker", "btcusdt@hole", "!hole"]
        assert await ask(ws, "SUBSCRIBE", names) == {"result": None, "id": 1}


async def test_too_many_streams(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(stream_words, "STREAMS_MAX", 2)
    path = "/stream?streams=btcusdt@trade/ethusdt@trade"
    async with desk.connect(path) as ws:
        reply = await ask(ws, "SUBSCRIBE", ["btcusdt@ticker"], 5)
        assert reply == {"error": {"code": 4, "msg": "Too many subscriptions"}, "id": 5}
        assert (await ask(ws, "SUBSCRIBE", ["btcusdt@trade"]))["result"] is None
        desk.feed(1)
        assert (await receive(ws)).encode() == TRADE_1
    async with desk.session.get(desk.url(path + "/btcusdt@ticker")) as response:
        assert response.status == 400


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/ws/btcusdt@trade", {}, 400),
        ("/stream?streams=btcusdt@trade&timeUnit=NANOSECOND", {}, 400),
        ("/ws", {"Origin": "https://evil.example"}, 403),
        ("/ws", {"Origin": "null"}, 403),
        ("/ws", {"Origin": ""}, 403),
        ("/ws", {"Origin": "http://desk.example"}, 403),
        ("/ws", {"Host": "evil.example"}, 421),
    ],
)
async def test_requests_that_get_no_stream(desk: Desk, path, headers, status) -> None:
    async with desk.session.get(desk.url(path), headers=headers) as response:
        assert response.status == status
        assert response.content_type == "application/json"
        for name, value in security.HEADERS.items():
            assert response.headers[name] == value
    assert desk.streams.open == 0


async def test_compression_is_not_agreed_to(desk: Desk) -> None:
    async with desk.connect("/ws", compress=15) as ws:
        assert ws.compress == 0


@pytest.mark.parametrize("origin", [None, "https://desk.example", "HTTPS://desk.example"])
async def test_pages_that_may_connect(desk: Desk, origin: str | None) -> None:
    async with desk.connect("/ws", origin=origin or desk.url("")) as ws:
        assert "result" in await ask(ws, "LIST_SUBSCRIPTIONS")


# --- limits and ends --------------------------------------------------------------------------


async def test_a_stream_outlives_the_limits_of_plain_requests(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(security, "HANDLER_LIMIT_S", 0.01)
    monkeypatch.setattr(connections, "ANSWER_LIMIT_S", 0.01)
    monkeypatch.setattr(connections, "IDLE_LIMIT_S", 0.01)
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(stream_session, "PING_INTERVAL_S", 0.1)
    async with (
        desk.connect("/ws/btcusdt@trade", autoping=False) as one,
        desk.connect("/ws/btcusdt@trade"),
        desk.connect("/ws/btcusdt@trade"),
    ):
        for _ in range(2):
            message = await one.receive(WAIT_S)
            assert message.type is aiohttp.WSMsgType.PING
            await one.pong(message.data)
        async with desk.session.get(desk.url("/live")) as response:
            assert response.status == 200
        desk.feed(1)
        message = await one.receive(WAIT_S)
        while message.type is aiohttp.WSMsgType.PING:
            message = await one.receive(WAIT_S)
        assert message.data.encode() == RAW_1


async def test_clients_have_a_limit_of_their_own(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(streams, "CLIENTS_MAX", 2)
    async with desk.connect("/ws"), desk.connect("/ws"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await desk.connect("/ws")
        assert refused.value.status == 503
    await desk.until(lambda: desk.streams.open == 0)
    async with desk.connect("/ws"):
        pass


async def test_too_many_requests_end_a_client(desk: Desk) -> None:
    async with desk.connect("/ws/btcusdt@trade") as ws:
        for number in range(12):
            await ws.send_str(f'{{"method":"LIST_SUBSCRIPTIONS","id":{number}}}')
        assert await end_of(ws) == (1008, "Too many requests")
    await desk.until_closed("requests")


async def test_pings_count_as_requests_and_are_answered(desk: Desk) -> None:
    async with desk.connect("/ws", autoping=False) as ws:
        await ws.ping(b"abc")
        message = await ws.receive(WAIT_S)
        assert (message.type, bytes(message.data)) == (aiohttp.WSMsgType.PONG, b"abc")
        for _ in range(6):
            await ws.ping()
        async with asyncio.timeout(WAIT_S):
            while message.type is aiohttp.WSMsgType.PONG:
                message = await ws.receive()
        assert (message.data, message.extra) == (1008, "Too many requests")
    await desk.until_closed("requests")


@pytest.mark.parametrize("payload", [None, b"something else"])
async def test_a_half_open_client_is_dropped(desk: Desk, monkeypatch, payload) -> None:
    monkeypatch.setattr(stream_session, "PING_INTERVAL_S", 0.3)
    monkeypatch.setattr(stream_session, "PONG_LIMIT_S", 0.6)
    async with desk.connect("/ws/btcusdt@trade", autoping=False) as ws:
        if payload is not None:
            await ws.pong(payload)
        message = await ws.receive(WAIT_S)
        assert message.type is aiohttp.WSMsgType.PING
        assert message.data.isdigit()
        assert await end_of(ws) == (1008, "Pong timeout")
    await desk.until_closed("pong")


async def test_a_client_that_answers_nothing_at_all_is_cut_off(desk: Desk, monkeypatch) -> None:
    monkeypatch.setattr(stream_session, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(stream_session, "PONG_LIMIT_S", 0.1)
    monkeypatch.setattr(stream_session, "CLOSE_LIMIT_S", 0.1)
    async with raw_client(desk, "/ws/btcusdt@trade") as (reader, _):
        async with asyncio.timeout(WAIT_S):
            await reader.read()  # up to the end of the connection, without any reply
    await desk.until_closed("pong")


async def test_a_client_that_goes_away_is_forgotten(desk: Desk) -> None:
    async with desk.connect("/ws/btcusdt@trade"):
        await desk.until(lambda: desk.streams.use().clients == 1)
    await desk.until_closed("client")
    async with raw_client(desk, "/ws/btcusdt@trade") as (_, writer):
        await desk.until(lambda: desk.streams.use().clients == 1)
        writer.transport.abort()
    await desk.until_closed("lost")
    desk.feed(1)
    assert desk.streams.use().events["trade"] == 0


async def test_messages_that_are_none_of_the_protocol(desk: Desk) -> None:
    async with desk.connect("/ws") as ws:
        await ws.send_bytes(b"{}")
        assert (await end_of(ws))[0] == 1003
    async with desk.connect("/ws") as ws:
        await ws.send_str("x" * (stream_words.REQUEST_MAX_BYTES + 1))
        assert (await end_of(ws))[0] == 1009
    async with raw_client(desk, "/ws") as (reader, writer):
        writer.write(b"\xff\xff\xff\xff")
        async with asyncio.timeout(WAIT_S):
            await reader.read()
    await desk.until_closed("message", 3)


async def test_a_slow_reader_of_trades_is_closed_with_a_reason(desk: Desk) -> None:
    async with (
        raw_client(desk, "/ws/btcusdt@trade") as (reader, writer),
        desk.connect("/ws/btcusdt@trade/btcusdt@ticker") as quick,
    ):
        await desk.until(lambda: desk.streams.use().clients == 2)
        (slow,) = (one for one in desk.streams.sessions if not one.subscriptions[1:])
        writer.transport.pause_reading()
        trade_id = 0
        async with asyncio.timeout(WAIT_S * 3):
            while not slow.ending:
                for _ in range(500):
                    trade_id += 1
                    desk.feed(trade_id)
                    desk.ring.release(desk.ring.pending)
                last = {}
                while last.get("t") != trade_id:
                    last = json.loads(await receive(quick))
        writer.transport.resume_reading()
        async with asyncio.timeout(WAIT_S):
            data = await reader.read()
        assert data.endswith(b"\x03\xf0Slow reader: too much is unread")
        ids = [json.loads(payload)["t"] for payload in payloads(data[: data.rindex(b"\x88")])]
        assert ids == [*range(1, len(ids) + 1)]
        await desk.until(lambda: desk.streams.closed["slow"] == 1)
        desk.feed(trade_id + 1)
        assert json.loads(await receive(quick))["t"] == trade_id + 1


async def test_the_end_is_announced(desk: Desk) -> None:
    async with (
        desk.connect("/ws/btcusdt@trade") as raw,
        desk.connect("/stream?timeUnit=MICROSECOND") as combined,
    ):
        await desk.until(lambda: desk.streams.use().clients == 2)
        stopping = asyncio.create_task(desk.server.stop())
        event = json.loads(await receive(raw))
        assert event.keys() == {"e", "E"} and event["e"] == "serverShutdown"
        wrapper = json.loads(await receive(combined))
        assert wrapper["stream"] == "!serverShutdown"
        assert wrapper["data"]["E"] // 10**6 - event["E"] // 10**3 in (0, 1)
        assert await end_of(raw) == await end_of(combined) == (1001, "Going away")
        async with asyncio.timeout(WAIT_S):
            await stopping
    assert desk.streams.closed["shutdown"] == 2
    assert desk.streams.open == 0


async def test_the_end_does_not_wait_for_a_dead_client(desk: Desk) -> None:
    async with raw_client(desk, "/ws/btcusdt@trade") as (reader, _):
        await desk.until(lambda: desk.streams.use().clients == 1)
        async with asyncio.timeout(10):
            await desk.server.stop()
            with contextlib.suppress(ConnectionError):
                await reader.read()
    assert desk.streams.open == 0


async def test_holes_are_told(desk: Desk) -> None:
    assert not desk.streams.holes_wanted.is_set()
    async with (
        desk.connect("/ws/!hole") as every,
        desk.connect("/stream?streams=btcusdt@hole") as one,
    ):
        await desk.until(lambda: desk.streams.use().clients == 2)
        assert desk.streams.holes_wanted.is_set()
        desk.streams.tell_hole(HoleFate("ETHUSDT", 1, 2, "venue", "absent"))
        desk.streams.tell_hole(HoleFate("BTCUSDT", 5, 9, "disconnect", "open"))
        first, second = json.loads(await receive(every)), json.loads(await receive(every))
        assert list(first) == ["e", "E", "s", "state", "f", "l", "c"]
        assert (first["e"], first["s"], first["state"]) == ("hole", "ETHUSDT", "absent")
        expected = {"s": "BTCUSDT", "state": "open", "f": 5, "l": 9, "c": "disconnect"}
        assert second == {"e": "hole", "E": second["E"], **expected}
        wrapper = json.loads(await receive(one))
        assert wrapper == {"stream": "btcusdt@hole", "data": second}
    await desk.until(lambda: not desk.streams.holes_wanted.is_set())


@contextlib.asynccontextmanager
async def raw_client(desk: Desk, path: str):
    """A client that has shaken hands and then does nothing by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", desk.server.port)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101"), head
    assert b"permessage-deflate" not in head
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
