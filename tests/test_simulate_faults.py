"""Every fault of the simulated exchange is seen on the wire, and only where it belongs."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import aiohttp
import pytest
from fakes import SimulatedExchange, simulated_exchange

from tradecore.simulate.faults import GARBAGE_KINDS, OVERSIZE, POISON, STRANGER, VIOLATION_KINDS

WAIT_S = 30.0
COUNT = 3_000
TEXT, BINARY, PING = 1, 2, 9
SATURATED: dict[str, Any] = {
    "rate": 0,
    "count": COUNT,
    "symbols": "BTCUSDT",
    "first_id": [1_000],
    "ping_interval": 1_000,
}


class Frame(NamedTuple):
    """A WebSocket frame as it came."""

    first_byte: int
    masked: bool
    payload: bytes

    @property
    def opcode(self) -> int:
        return self.first_byte & 15

    @property
    def fin(self) -> bool:
        return bool(self.first_byte & 0x80)


class RawSocket:
    """A WebSocket client that reads frames without judging them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def frame(self) -> Frame:
        """Read one frame; IncompleteReadError or ConnectionResetError when the link is gone."""
        async with asyncio.timeout(WAIT_S):
            first, second = await self.reader.readexactly(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
            return Frame(first, bool(second & 128), await self.reader.readexactly(size))


@asynccontextmanager
async def raw_socket(
    exchange: SimulatedExchange, path: str = "/stream?streams=btcusdt@trade"
) -> AsyncIterator[RawSocket]:
    reader, writer = await asyncio.open_connection("127.0.0.1", exchange.port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
        assert head.startswith(b"HTTP/1.1 101")
        yield RawSocket(reader, writer)
    finally:
        writer.transport.abort()


def good_id(frame: Frame) -> int | None:
    """Return the id of a frame that holds a good trade of BTCUSDT."""
    try:
        data = json.loads(frame.payload)["data"]
    except (ValueError, KeyError, TypeError):
        return None
    good = (
        frame.first_byte == 0x80 | TEXT
        and data.get("e") == "trade"
        and data.get("s") == "BTCUSDT"
        and isinstance(data.get("t"), int)
        and 1_000 <= data["t"] < 1_000 + COUNT
    )
    return int(data["t"]) if good else None


async def trade_ids(socket: RawSocket) -> tuple[list[int], list[Frame]]:
    """Read until the last trade of the tape; return good ids in order, and all other frames."""
    ids: list[int] = []
    others: list[Frame] = []
    while not ids or ids[-1] < 1_000 + COUNT - 1:
        frame = await socket.frame()
        trade_id = good_id(frame)
        if trade_id is None:
            others.append(frame)
        else:
            ids.append(trade_id)
    return ids, others


def hits(every: int) -> list[int]:
    """Return the ids that `--x-every n` hits."""
    return list(range(1_000 + every - 1, 1_000 + COUNT, every))


ALL = list(range(1_000, 1_000 + COUNT))


async def run_to_end(**options: Any) -> tuple[list[int], list[Frame], dict[str, int]]:
    async with simulated_exchange(**SATURATED, **options) as exchange, raw_socket(exchange) as raw:
        ids, others = await trade_ids(raw)
        return ids, others, (await exchange.state())["counts"]


async def test_without_faults_nothing_else_is_sent() -> None:
    ids, others, counts = await run_to_end()
    assert ids == ALL
    assert others == []
    assert counts == {}


async def test_drop_leaves_gaps_that_rest_fills() -> None:
    options = {**SATURATED, "drop_every": 7}
    async with simulated_exchange(**options) as exchange, raw_socket(exchange) as raw:
        ids, _ = await trade_ids(raw)
        missing = sorted(set(ALL) - set(ids))
        assert missing == hits(7)
        rows = await exchange.get(
            "/api/v3/historicalTrades", symbol="BTCUSDT", fromId=1_000, limit=1_000
        )
        assert [row["id"] for row in rows] == ALL[:1_000]
        state = await exchange.state()
        assert state["counts"] == {"drop": len(missing)}
        assert state["symbols"]["BTCUSDT"]["last_id"] == ids[-1]


async def test_the_last_id_sent_is_never_a_dropped_one() -> None:
    options = {**SATURATED, "drop_every": COUNT}
    async with simulated_exchange(**options) as exchange, raw_socket(exchange) as raw:
        while good_id(await raw.frame()) != ALL[-2]:
            pass
        assert await exchange.next_event() == {"event": "done", "trades": COUNT}
        state = await exchange.state()
        assert state["symbols"]["BTCUSDT"]["last_id"] == ALL[-2]


async def test_duplicates_and_order() -> None:
    ids, _, counts = await run_to_end(duplicate_every=9)
    assert [k for k, n in Counter(ids).items() if n == 2] == hits(9)[: counts["duplicate"]]
    assert sorted(set(ids)) == ALL
    ids, _, counts = await run_to_end(reorder_every=7)
    assert sorted(ids) == ALL
    late = [b for a, b in pairwise(ids) if b < a]
    assert late == hits(7)
    assert counts == {"reorder": len(late)}


async def test_garbage_of_every_kind_never_looks_like_a_trade() -> None:
    ids, others, counts = await run_to_end(garbage_every=19)
    assert ids == ALL
    assert len(others) == counts["garbage"] == COUNT // 19
    assert {f"garbage {kind}" for kind in GARBAGE_KINDS} <= counts.keys()
    opcodes = Counter(frame.opcode for frame in others)
    assert opcodes.keys() == {TEXT, BINARY}
    payloads = [frame.payload for frame in others if frame.opcode == TEXT]
    assert any(not payload for payload in payloads)
    assert any(STRANGER.encode() in payload for payload in payloads)
    for payload in payloads:
        try:
            event = json.loads(payload)["data"]
        except (ValueError, TypeError):
            continue
        if event.get("s") == "BTCUSDT" and event.get("e") == "trade":
            assert (
                "t" not in event or event["t"] == -5 or event["t"] == "x" or (event["t"] >= POISON)
            )


async def test_oversize_fragments_and_pings_between() -> None:
    _, others, counts = await run_to_end(oversize_every=1_400)
    assert counts == {"oversize": 2}
    assert all(len(frame.payload) > OVERSIZE for frame in others)
    async with simulated_exchange(**SATURATED, fragment_every=11) as exchange:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(exchange.ws + "/ws/btcusdt@trade") as socket,
        ):
            ids = [json.loads(await socket.receive_str())["t"] for _ in range(COUNT)]
        assert ids == ALL  # the client library has put them together
    ids, others, counts = await run_to_end(fragment_every=11)
    assert counts["fragment"] * 4 == len(others)
    shape = [(frame.opcode, frame.fin) for frame in others[:4]]
    assert shape == [(TEXT, False), (PING, True), (0, False), (0, True)]


@pytest.mark.parametrize("combined", [True, False])
async def test_slow_path_variants_are_the_same_trades(combined: bool) -> None:
    options = {"shuffle_keys_every": 5, "whitespace_every": 7, "escape_every": 11}
    path = "/stream?streams=btcusdt@trade" if combined else "/ws/btcusdt@trade"
    usual = 0
    async with (
        simulated_exchange(**SATURATED, **options) as exchange,
        raw_socket(exchange, path) as raw,
    ):
        for expected in ALL:
            frame = await raw.frame()
            message = json.loads(frame.payload)
            event = message["data"] if combined else message
            truth = exchange.truth.trade("BTCUSDT", expected)
            assert (event["t"], event["s"]) == (expected, "BTCUSDT")
            assert event["T"] == truth.trade_us // 1000
            compact = json.dumps(message, separators=(",", ":")).encode()
            usual += compact == frame.payload and next(iter(event)) == "e"
        counts = (await exchange.state())["counts"]
    assert counts.keys() == {"shuffle keys", "whitespace", "escape"}
    assert usual == COUNT - sum(counts.values())


async def test_protocol_violations() -> None:
    async with simulated_exchange(**SATURATED, protocol_violation_every=50) as exchange:
        async with raw_socket(exchange) as raw:
            broken = set()
            while len(broken) < 5:
                frame = await raw.frame()
                if frame.first_byte & 0x70:
                    broken.add("reserved bit")
                elif frame.opcode == 3:
                    broken.add("reserved opcode")
                elif frame.opcode == 0:
                    broken.add("lone continuation")
                elif frame.opcode == PING:
                    broken.add("fragmented ping" if not frame.fin else "long ping")
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(exchange.ws + "/ws/btcusdt@trade") as socket,
        ):
            assert not socket.closed
        assert len(VIOLATION_KINDS) == 6


async def test_cut_shutdown_notice_and_half_open() -> None:
    async with simulated_exchange(rate=500, cut_after=1.0, shutdown_after=0.3) as exchange:
        for path, wrapped in (
            ("/stream?streams=btcusdt@trade", True),
            ("/ws/btcusdt@trade", False),
        ):
            notices = []
            async with raw_socket(exchange, path) as raw:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    while True:
                        frame = await raw.frame()
                        if b"serverShutdown" in frame.payload:
                            notices.append(json.loads(frame.payload))
            assert len(notices) == 1
            assert notices[0].get("stream") == ("!serverShutdown" if wrapped else None)
            event = notices[0]["data"] if wrapped else notices[0]
            assert list(event) == ["e", "E"]
        counts = (await exchange.state())["counts"]
        assert counts == {"server shutdown": 2, "cut": 2}
    async with (
        simulated_exchange(rate=2_000, half_open_after=0.3) as exchange,
        raw_socket(exchange) as raw,
    ):
        await raw.frame()
        with pytest.raises(TimeoutError):
            while True:
                await asyncio.wait_for(raw.reader.readexactly(1), 1.5)
        assert not raw.reader.at_eof()
        assert (await exchange.state())["connections"] == 1


async def test_refused_connects_and_the_limit_of_attempts() -> None:
    async with simulated_exchange(rate=1, refuse_connects=2, connect_limit=3) as exchange:
        statuses = []
        async with aiohttp.ClientSession() as session:
            for _ in range(4):
                try:
                    async with session.ws_connect(exchange.ws + "/ws/btcusdt@trade"):
                        statuses.append(101)
                except aiohttp.WSServerHandshakeError as exc:
                    statuses.append(exc.status)
        assert statuses == [503, 503, 101, 429]


@pytest.mark.parametrize("rendered_micro", [False, True])
@pytest.mark.parametrize("unit", ["MILLISECOND", "MICROSECOND"])
async def test_prerendered_trades_are_the_same_trades(unit: str, rendered_micro: bool) -> None:
    options: dict[str, Any] = {**SATURATED, "symbols": "BTCUSDT,ETHUSDT", "prerender": 2_000}
    if rendered_micro:
        options["prerender_micro"] = True
    path = f"/stream?streams=btcusdt@trade/ethusdt@trade&timeUnit={unit}"
    async with simulated_exchange(**options) as exchange:
        seen: dict[str, list[int]] = {"BTCUSDT": [], "ETHUSDT": []}
        async with raw_socket(exchange, path) as raw:
            for _ in range(COUNT):
                event = json.loads((await raw.frame()).payload)["data"]
                truth = exchange.truth.trade(event["s"], event["t"])
                wanted = truth.trade_us // (1 if unit == "MICROSECOND" else 1000)
                assert event["T"] == wanted <= event["E"]
                seen[event["s"]].append(event["t"])
        assert all(ids == list(range(1_000, 1_000 + len(ids))) for ids in seen.values())
        assert (await exchange.state())["trades"] == COUNT
