"""The listener behind a real socket: fragments, pings, oversized and binary messages."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import picows
import pytest

from tests.test_capture import Bench, trade
from tradecore.feed._listener import MAX_MESSAGE_BYTES, FrameListener

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

    def on_connected(self, transport: picows.WSTransport) -> None: ...

    def on_disconnected(self, transport: picows.WSTransport) -> None:
        self.disconnected.set()

    def on_control(self, payload: bytes) -> None:
        self.control.append(payload)

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

    def refused(self) -> dict[str, int]:
        return {cause: n for cause, n in self.bench.capture.refused().items() if n}


@asynccontextmanager
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    client = Client()
    server = await picows.ws_create_server(lambda _: client, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    bench, owner = Bench(tmp_path / "ring"), Owner()
    transport, listener = await picows.ws_connect(
        lambda: FrameListener(bench.capture, owner, 0, 1),
        f"ws://127.0.0.1:{port}/stream",
        enable_auto_pong=False,
        max_frame_size=16 << 20,
    )
    await asyncio.wait_for(client.connected.wait(), 10)
    try:
        yield Wire(bench, owner, client, listener)
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
