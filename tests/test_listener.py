"""The listener behind a real socket: fragments, pings, oversized and binary messages."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import picows
import pytest

from tests.test_capture import Bench, kline, ticker, trade
from tradecore.feed._listener import MAX_MESSAGE_BYTES, FrameListener

SYMBOLS = ("BTCUSDT", "ETHUSDT")
NOW_MS = 1723161255343
TEXT, BINARY, CONTINUATION, PING, PONG = 1, 2, 0, 9, 10


def frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """Build a server frame by hand."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", fin << 7 | opcode, size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", fin << 7 | opcode, 126, size)
    else:
        head = struct.pack("!BBQ", fin << 7 | opcode, 127, size)
    return head + payload


@dataclass
class Owner:
    """What a connection would be told."""

    control: list[bytes] = field(default_factory=list)
    shutdowns: list[int] = field(default_factory=list)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    pongs: int = 0

    def on_connected(self, transport: picows.WSTransport) -> None: ...

    def on_disconnected(self, transport: picows.WSTransport) -> None:
        self.disconnected.set()

    def on_control(self, payload: bytes) -> None:
        self.control.append(payload)

    def on_pong(self) -> None:
        self.pongs += 1

    def on_server_shutdown(self, event_us: int) -> None:
        self.shutdowns.append(event_us)


class Client(picows.WSListener):  # type: ignore[misc]
    """The server's view of our connection."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.pongs: list[bytes] = []

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        self.connected.set()

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.PONG:
            self.pongs.append(frame.get_payload_as_bytes())

    def send(self, *raw: bytes) -> None:
        self.transport.underlying_transport.write(b"".join(raw))


@dataclass
class Wire:
    bench: Bench
    owner: Owner
    client: Client
    listener: FrameListener

    async def until_ids(self, *ids: int) -> None:
        async with asyncio.timeout(10):
            while self.bench.ids() != list(ids):
                await asyncio.sleep(0.002)

    async def deliver(self, *messages: bytes) -> None:
        """Send messages and wait until the listener has taken all of them."""
        data_frames = self.listener.data_frames + len(messages)
        self.client.send(*(frame(TEXT, message) for message in messages))
        async with asyncio.timeout(10):
            while self.listener.data_frames < data_frames:
                await asyncio.sleep(0.002)

    def unconfirmed(self) -> list[str]:
        found = self.listener.unconfirmed(range(len(SYMBOLS)))
        return [SYMBOLS[i] for i in found]

    def refused(self) -> dict[str, int]:
        return {cause: n for cause, n in self.bench.capture.refused().items() if n}


@asynccontextmanager
async def wire(tmp_path: Path, bench: Bench | None = None) -> AsyncIterator[Wire]:
    client = Client()
    server = await picows.ws_create_server(lambda _: client, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    epoch = 1 if bench is None else 2
    known, owner = bench or Bench(tmp_path / "ring"), Owner()
    transport, listener = await picows.ws_connect(
        lambda: FrameListener(known.capture, owner, 0, epoch),
        f"ws://127.0.0.1:{port}/stream",
        enable_auto_pong=False,
        max_frame_size=16 << 20,
    )
    await asyncio.wait_for(client.connected.wait(), 10)
    try:
        yield Wire(known, owner, client, listener)
    finally:
        transport.disconnect(graceful=False)
        server.close()
        await asyncio.wait_for(server.wait_closed(), 10)


async def test_frames_of_one_read_share_their_receive_time(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        one.client.send(*(frame(TEXT, trade(i)) for i in range(5)))
        await one.until_ids(0, 1, 2, 3, 4)
        times = one.bench.ring.peek(9)["recv_ns"].tolist()
        assert len(set(times)) == 1
        assert one.listener.data_frames == 5
        assert one.listener.last_data_ns > 0
        one.client.send(frame(TEXT, trade(5)), frame(PING, b"x"))
        await one.until_ids(0, 1, 2, 3, 4, 5)
        one.client.send(frame(TEXT, trade(6)))
        await one.until_ids(0, 1, 2, 3, 4, 5, 6)
        later = one.bench.ring.peek(9)["recv_ns"].tolist()
        assert later[4] < later[5] < later[6], "a ping at the end of a read does not hide its end"


async def test_a_message_in_fragments_with_pings_between_is_put_together(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        whole = trade(7, "BTCUSDT")
        one.client.send(frame(TEXT, whole[:3], fin=False), frame(PING, b"1700000000000"))
        one.client.send(frame(CONTINUATION, whole[3:90], fin=False), frame(PING, b""))
        one.client.send(frame(CONTINUATION, b"", fin=False), frame(CONTINUATION, whole[90:]))
        one.client.send(frame(TEXT, trade(8)))
        await one.until_ids(7, 8)
        async with asyncio.timeout(10):
            while len(one.client.pongs) < 2:
                await asyncio.sleep(0.002)
        assert one.client.pongs == [b"1700000000000", b""]


async def test_binary_and_oversized_messages_are_counted_and_the_connection_stays(
    tmp_path: Path,
) -> None:
    async with wire(tmp_path) as one:
        one.client.send(frame(BINARY, trade(1)))
        one.client.send(frame(BINARY, b"a", fin=False), frame(CONTINUATION, b"b"))
        padded = trade(2) + b" " * MAX_MESSAGE_BYTES
        one.client.send(frame(TEXT, padded))
        one.client.send(frame(TEXT, padded[:700_000], fin=False))
        one.client.send(frame(CONTINUATION, padded[700_000:], fin=False), frame(CONTINUATION, b""))
        one.client.send(frame(TEXT, trade(3)[:-1] + b" " * 5000 + b"}"))
        await one.until_ids(3)
        assert one.refused() == {"binary": 2, "oversized": 2}
        assert not one.owner.disconnected.is_set()


async def test_control_replies_and_the_shutdown_notice_reach_the_owner(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        replies = [b'{"result":null,"id":1}', b'{"error":{"code":2,"msg":"no"},"id":null}']
        one.client.send(*(frame(TEXT, reply) for reply in replies))
        notice = b'{"stream":"!serverShutdown","data":{"e":"serverShutdown","E":1770123456789}}'
        one.client.send(frame(TEXT, notice), frame(TEXT, trade(1)))
        await one.until_ids(1)
        assert one.owner.control == replies
        assert one.owner.shutdowns == [1770123456789000]
        assert one.listener.data_frames == 1, "replies and notices are no data"


async def test_pongs_reach_the_owner(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        one.client.send(frame(PONG, b"x"), frame(PONG, b""), frame(TEXT, trade(1)))
        await one.until_ids(1)
        assert (one.owner.pongs, one.listener.pongs) == (2, 2)
        assert one.listener.data_frames == 1


@asynccontextmanager
async def rollover(tmp_path: Path) -> AsyncIterator[tuple[Wire, Wire]]:
    """An old connection that has delivered up to 100 of one symbol, and its successor."""
    async with wire(tmp_path) as old, wire(tmp_path, old.bench) as new:
        await old.deliver(trade(99), trade(100))
        assert new.unconfirmed() == ["BTCUSDT", "ETHUSDT"], "it has shown nothing yet"
        yield old, new


async def test_a_trade_confirms_when_the_id_before_it_has_come(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (old, new):
        await new.deliver(trade(103))
        assert "BTCUSDT" in new.unconfirmed(), "the old one owes 101 and 102"
        await new.deliver(ticker(103, 9, NOW_MS), trade(104))
        assert "BTCUSDT" in new.unconfirmed(), "what is told above the hole proves nothing"
        await old.deliver(trade(101))
        assert "BTCUSDT" in new.unconfirmed()
        await old.deliver(trade(102))
        assert "BTCUSDT" not in new.unconfirmed()
        assert sorted(new.bench.ids()) == [99, 100, 101, 102, 103, 104]


async def test_what_others_bring_after_the_mark_is_owed(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (old, new):
        btc, eth = range(len(SYMBOLS))
        await new.deliver(ticker(100, 9, NOW_MS))
        assert "BTCUSDT" not in new.unconfirmed()
        await old.deliver(trade(101))
        new.listener.mark()
        assert new.listener.left_out([btc, eth]) == new.listener.behind([btc, eth]) == []
        await old.deliver(trade(102))
        await new.deliver(ticker(102, 9, NOW_MS + 1))
        assert "BTCUSDT" in new.unconfirmed(), "that the old one brought it says nothing of this"
        assert new.listener.left_out([btc, eth]) == [btc]
        assert new.listener.behind([btc, eth]) == [(btc, -1, 102)]
        await new.deliver(trade(103))
        assert new.listener.left_out([btc, eth]) == new.listener.behind([btc, eth]) == []
        assert "BTCUSDT" not in new.unconfirmed()
        await old.deliver(trade(103), trade(104))
        assert new.listener.behind([btc, eth]) == [(btc, 103, 104)]
        await new.deliver(ticker(106, 9, NOW_MS + 2))
        assert new.listener.behind([btc, eth]) == [(btc, 103, 106)]
        assert old.listener.behind([btc, eth]) == []


async def test_what_is_told_here_after_the_mark_is_owed(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (_, new):
        new.listener.mark()
        await new.deliver(kline(-1, 0, NOW_MS), ticker(100, 9, NOW_MS))
        assert new.listener.left_out([0]) == [], "it may have been printed before the mark"
        await new.deliver(ticker(101, 9, NOW_MS + 1))
        assert new.listener.left_out([0]) == [0]
        await new.deliver(trade(101))
        assert new.listener.left_out([0]) == []


async def test_a_trade_that_both_have_confirms(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (old, new):
        await old.deliver(trade(101))
        await new.deliver(trade(101))
        assert "BTCUSDT" not in new.unconfirmed()


async def test_ids_that_nobody_has_are_not_waited_for(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (old, new):
        await new.deliver(trade(103))
        await old.deliver(trade(103))
        assert "BTCUSDT" not in new.unconfirmed(), "the old one is past 102 and brings it no more"
        assert new.bench.capture.track("BTCUSDT").hole == (101, 102)


async def test_the_first_trades_of_a_symbol_confirm_when_both_have_them(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (old, new):
        await new.deliver(trade(7, "ETHUSDT"))
        assert "ETHUSDT" in new.unconfirmed(), "the old one may owe 6"
        await old.deliver(trade(7, "ETHUSDT"))
        assert "ETHUSDT" not in new.unconfirmed()


@pytest.mark.parametrize("trade_id", [0, 7])
async def test_the_very_first_trade_or_the_next_of_the_ledger_confirms(
    tmp_path: Path, trade_id: int
) -> None:
    async with rollover(tmp_path) as (_, new):
        if trade_id:
            new.bench.capture.seed("ETHUSDT", trade_id - 1, 0)
        await new.deliver(trade(trade_id, "ETHUSDT"))
        assert "ETHUSDT" not in new.unconfirmed()


@pytest.mark.parametrize("tell", [ticker, kline])
async def test_a_last_id_that_is_told_confirms_when_it_has_come(
    tmp_path: Path, tell: Callable[[int, int, int], bytes]
) -> None:
    async with rollover(tmp_path) as (old, new):
        await old.deliver(tell(100, 9, NOW_MS))
        assert "BTCUSDT" in new.unconfirmed(), "only its own frames show that it delivers"
        await new.deliver(tell(101, 9, NOW_MS + 1))
        assert "BTCUSDT" in new.unconfirmed(), "101 is under way, or lost"
        await old.deliver(trade(101))
        assert "BTCUSDT" not in new.unconfirmed()


async def test_a_quiet_symbol_is_confirmed_by_what_tells_no_trade(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (_, new):
        await new.deliver(ticker(-1, 0, NOW_MS))
        assert "BTCUSDT" not in new.unconfirmed()


async def test_a_last_id_that_the_ledger_holds_confirms(tmp_path: Path) -> None:
    async with wire(tmp_path) as old, wire(tmp_path, old.bench) as new:
        await new.deliver(ticker(500, 9, NOW_MS))
        assert "BTCUSDT" in new.unconfirmed()
        old.bench.capture.seed("BTCUSDT", 500, 0)
        assert "BTCUSDT" not in new.unconfirmed()


def _of_ether(frame_of_bitcoin: bytes) -> bytes:
    return frame_of_bitcoin.replace(b"BTCUSDT", b"ETHUSDT")


async def test_a_symbol_without_any_trade_is_confirmed_when_the_same_id_is_told_on(
    tmp_path: Path,
) -> None:
    """It last traded before anybody listened: nothing can be lost between two connections."""
    async with rollover(tmp_path) as (old, new):
        await old.deliver(_of_ether(ticker(500, 9, NOW_MS)))
        await new.deliver(_of_ether(ticker(500, 9, NOW_MS)))
        assert "ETHUSDT" in new.unconfirmed(), "the trade may still be under way"
        number = 1
        async with asyncio.timeout(20):
            while "ETHUSDT" in new.unconfirmed():
                await asyncio.sleep(0.05)
                await new.deliver(_of_ether(ticker(500, 9, NOW_MS + number)))
                number += 1
        await new.deliver(_of_ether(ticker(501, 9, NOW_MS + number)))
        assert "ETHUSDT" in new.unconfirmed(), "this one was printed meanwhile"


async def test_a_connection_that_is_gone_owes_nothing(tmp_path: Path) -> None:
    async with rollover(tmp_path) as (old, new), wire(tmp_path, old.bench) as third:
        await third.deliver(trade(103))
        await new.deliver(trade(103))
        assert "BTCUSDT" in new.unconfirmed()
        old.client.transport.disconnect(graceful=False)
        await asyncio.wait_for(old.owner.disconnected.wait(), 10)
        assert "BTCUSDT" not in new.unconfirmed()


async def test_symbols_that_come_later_are_confirmed_too(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        await one.deliver(trade(0))
        late = one.bench.ring.intern("LATEUSDT")
        with pytest.raises(IndexError, match="no track for the symbol id 2"):
            one.listener.unconfirmed([late])
        one.bench.capture.grow()
        assert one.listener.unconfirmed([0, late]) == [late]
        await one.deliver(trade(0, "LATEUSDT"))
        assert one.listener.unconfirmed([0, late]) == []


async def test_an_id_far_below_shows_nothing(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        one.bench.capture.seed("BTCUSDT", 9_000_000, 0)
        await one.deliver(trade(0))
        assert one.bench.count("far_below") == 1
        assert one.listener.unconfirmed([0]) == [0]


@pytest.mark.parametrize(
    "violation",
    [
        frame(CONTINUATION, b"x"),
        frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"),
        frame(3, b"reserved opcode"),
        frame(PING, b"x" * 126),
        frame(PING, b"x", fin=False),
        b"\xf1" + frame(TEXT, b"{}")[1:],
    ],
    ids=["stray continuation", "message in message", "opcode", "long ping", "split ping", "rsv"],
)
async def test_a_protocol_violation_ends_the_connection(tmp_path: Path, violation: bytes) -> None:
    async with wire(tmp_path) as one:
        one.client.send(frame(TEXT, trade(1)))
        await one.until_ids(1)
        one.client.send(violation)
        await asyncio.wait_for(one.owner.disconnected.wait(), 10)
        assert one.bench.ids() == [1]


async def test_a_close_frame_is_answered_and_ends_the_connection(tmp_path: Path) -> None:
    async with wire(tmp_path) as one:
        one.client.transport.send_close(picows.WSCloseCode.POLICY_VIOLATION, b"Pong timeout")
        await asyncio.wait_for(one.owner.disconnected.wait(), 10)
