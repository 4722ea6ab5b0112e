"""Live streams of the daemon as a process, before a simulated exchange: what clients get is what
the venue sends, once, whatever becomes of the connections to it.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from scene import assert_exact, assert_readable, gaps, metrics, until_whole

from tests.daemon import WAIT_LIMIT_S, Daemon, daemon
from tests.fakes import simulated_exchange
from tests.test_nothing_lost import until_captured, venue

PAIR = ("BTCUSDT", "ETHUSDT")
TRADES = "btcusdt@trade/ethusdt@trade"


class Reader:
    """Keeps what comes over a connection, in the background."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._ws = ws
        self.texts: list[str] = []
        self.close: tuple[int, str] | None = None
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            message = await self._ws.receive()
            if message.type is not aiohttp.WSMsgType.TEXT:
                if message.type is aiohttp.WSMsgType.CLOSE:
                    self.close = message.data, message.extra
                return
            self.texts.append(message.data)

    async def until(self, condition) -> None:
        async with asyncio.timeout(WAIT_LIMIT_S):
            while not condition(self):
                assert not self.task.done(), self.close
                await asyncio.sleep(0.02)

    def by_key(self) -> dict[tuple[str, int], str]:
        """Return texts of combined trades by symbol and id; fails on a doubled one."""
        found = {}
        for text in self.texts:
            data = json.loads(text)["data"]
            key = data["s"], data["t"]
            assert key not in found, f"doubled: {text}"
            found[key] = text
        return found


@contextlib.asynccontextmanager
async def reading(url: str) -> AsyncIterator[Reader]:
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
        reader = Reader(ws)
        try:
            yield reader
        finally:
            reader.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader.task


def url_of(one: Daemon, path: str) -> str:
    return f"http://127.0.0.1:{one.port}{path}"


def ids_of(reader: Reader, symbol: str) -> list[int]:
    return [trade_id for name, trade_id in reader.by_key() if name == symbol]


def has_all_kinds(reader: Reader) -> bool:
    return all(
        sum(f'"e":"{kind}"' in text for text in reader.texts) > 2
        for kind in ("trade", "24hrTicker", "kline")
    )


async def test_clients_get_the_bytes_of_the_venue(tmp_path: Path, migrated_database: str) -> None:
    names = "btcusdt@trade/ethusdt@ticker/btcusdt@kline_1m"
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=300) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, PAIR)) as one,
    ):
        await until_captured(one, *PAIR)
        for query in ("", "&timeUnit=MICROSECOND"):
            path = f"/stream?streams={names}{query}"
            async with reading(exchange.ws + path) as theirs:
                await theirs.until(lambda reader: reader.texts)
                async with reading(url_of(one, path)) as ours:
                    await ours.until(has_all_kinds)
                    texts = list(ours.texts)
                    await theirs.until(lambda reader, last=texts[-1]: last in reader.texts)
                assert set(texts) <= set(theirs.texts)
        assert await one.terminate() == 0
        assert_readable(one, most=0)


async def test_rollovers_and_two_lines_double_nothing_and_leave_nothing_out(
    tmp_path: Path, migrated_database: str
) -> None:
    settings = {"FEED_LINES": 2, "CONNECTION_MAX_AGE": "5s"}
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=500, epoch=-60) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, PAIR, **settings)) as one,
    ):
        await until_captured(one, *PAIR)
        async with reading(url_of(one, f"/stream?streams={TRADES}")) as reader:
            await one.until(lambda health: health["counts"]["rollovers"] >= 3)
            seen = len(reader.texts)
            await reader.until(lambda reader: len(reader.texts) > seen + 200)
            texts = reader.by_key()
        for symbol in PAIR:
            ids = [trade_id for name, trade_id in texts if name == symbol]
            assert ids == [*range(ids[0], ids[0] + len(ids))]
        market = await exchange.truth_now()
        for (symbol, trade_id), text in list(texts.items())[::20]:
            data, truth = json.loads(text)["data"], market.trade(symbol, trade_id)
            assert data["T"] == truth.trade_us // 1000
            assert round(float(data["p"]) * 1e8) == truth.price_e8
        found = await metrics(one)
        assert found["tradecore_trades_duplicate_total"] > 0
        assert found["tradecore_stream_events_total{trade}"] >= len(texts)
        await until_whole(migrated_database, exchange, PAIR)
        assert await one.terminate() == 0
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=0)


async def test_holes_are_announced_as_the_ledger_has_them(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=300) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, PAIR)) as one,
    ):
        await until_captured(one, *PAIR)
        async with (
            reading(url_of(one, "/ws/!hole")) as every,
            reading(url_of(one, "/stream?streams=ethusdt@hole")) as ether,
        ):
            await one.until(lambda _: True)
            await exchange.fault("drop", n=40)

            def settled(reader: Reader) -> bool:
                events = [json.loads(text) for text in reader.texts]
                missing: dict[str, set[int]] = {symbol: set() for symbol in PAIR}
                opened = 0
                for event in events:
                    ids = set(range(event["f"], event["l"] + 1))
                    if event["state"] == "open":
                        missing[event["s"]] |= ids
                        opened += len(ids)
                    else:
                        assert event["state"] == "filled"
                        assert ids <= missing[event["s"]], "filled before it was opened"
                        missing[event["s"]] -= ids
                return opened >= 40 and not any(missing.values())

            await every.until(settled)
            rows = await gaps(migrated_database)
            assert rows and all(row[4] == "filled" for row in rows)
            told = [json.loads(text) for text in every.texts]
            for symbol in PAIR:
                stored = {
                    number
                    for row in rows
                    if row[0] == symbol
                    for number in range(row[1], row[2] + 1)
                }
                filled = {
                    number
                    for event in told
                    if event["s"] == symbol and event["state"] == "filled"
                    for number in range(event["f"], event["l"] + 1)
                }
                assert filled == stored
            if any(event["s"] == "ETHUSDT" for event in told):
                await ether.until(lambda reader: reader.texts)
                assert json.loads(ether.texts[0])["stream"] == "ethusdt@hole"
        await until_whole(migrated_database, exchange, PAIR)
        assert await one.terminate() == 0
        await assert_exact(migrated_database, exchange)


async def test_clients_are_told_of_the_end(tmp_path: Path, migrated_database: str) -> None:
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=300) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, PAIR)) as one,
    ):
        await until_captured(one, *PAIR)
        async with reading(url_of(one, f"/stream?streams={TRADES}")) as reader:
            await reader.until(lambda reader: len(reader.texts) > 10)
            assert await one.terminate() == 0
            async with asyncio.timeout(WAIT_LIMIT_S):
                await reader.task
            assert reader.close == (1001, "Going away")
            assert any("serverShutdown" in text for text in reader.texts)
        assert_readable(one, most=0)


async def test_a_client_that_reads_nothing_harms_nobody(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=10_000) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, PAIR)) as one,
    ):
        await until_captured(one, *PAIR)
        with idle_client(one.port, f"/stream?streams={TRADES}&timeUnit=MICROSECOND"):
            async with reading(url_of(one, f"/stream?streams={TRADES}")) as reader:
                # Which is told once the kernel's buffers and the client's bound are full.
                await one.until_logged("slow reader")
                seen = len(reader.texts)
                await reader.until(lambda reader: len(reader.texts) > seen)
                texts = reader.by_key()
        for symbol in PAIR:
            ids = [trade_id for name, trade_id in texts if name == symbol]
            assert ids == [*range(ids[0], ids[0] + len(ids))]
        await one.until(lambda health: health["counts"]["trades_missing"] == 0)
        found = await metrics(one)
        async with asyncio.timeout(WAIT_LIMIT_S):
            while not found["tradecore_stream_closed_total{slow}"]:
                await asyncio.sleep(0.1)
                found = await metrics(one)
        assert found["tradecore_stream_clients"] == 0
        assert await one.terminate() == 0
        await assert_exact(migrated_database, exchange)


@contextlib.contextmanager
def idle_client(port: int, path: str):
    """A client that shakes hands and never reads."""
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", port))
        link.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        yield


async def test_a_crowd_that_asks_nothing_shuts_nobody_out_and_ends(
    tmp_path: Path, migrated_database: str
) -> None:
    """With the daemon's own loop: its transports are not those of asyncio."""
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=10) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, PAIR)) as one,
    ):
        await until_captured(one, *PAIR)
        async with contextlib.AsyncExitStack() as stack:
            reads = []
            for _ in range(400):
                reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
                stack.callback(writer.close)
                reads.append(asyncio.create_task(reader.read()))
            for path in ("/live", "/ready"):
                assert (await one.get(path))[0] == 200
            async with asyncio.timeout(WAIT_LIMIT_S):
                while (await one.get("/api/v3/ping"))[0] != 200:
                    await asyncio.sleep(0.05)
                await asyncio.gather(*reads, return_exceptions=True)
        assert await one.terminate() == 0
