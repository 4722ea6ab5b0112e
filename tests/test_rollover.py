"""Rollovers against the simulated exchange, held against the trades that it really printed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import picows
import pytest
from fake_venue import eventually
from fakes import SimulatedExchange, simulated_exchange

from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.feed._listener import FrameListener
from tradecore.feed.feed import Feed
from tradecore.feed.plan import Timing
from tradecore.ring import Ring
from tradecore.settings import load

SYMBOLS = ("BTCUSDT", "ETHUSDT", *(f"SYM{number}USDT" for number in range(20)))
BRIEF = Timing(settle_s=1.0, tick_s=0.05, grace_s=4.0)


@dataclass
class Recorder:
    """A feed with the compiled listener; `asked` is what REST would have been asked for."""

    exchange: SimulatedExchange
    ring: Ring
    capture: Capture
    feed: Feed
    asked: list[tuple[str, ...]]

    def rollovers(self, cause: str) -> int:
        return sum(status.rollovers[cause] for status in self.feed.describe())

    def check_complete(self) -> None:
        """No id is missing or doubled, and every row is a true trade."""
        rows = self.ring.peek(1 << 17)
        assert len(rows) > 500
        for symbol_id in set(rows["symbol_id"].tolist()):
            ids = rows["trade_id"][rows["symbol_id"] == symbol_id]
            assert ids.tolist() == list(range(ids[0], ids[0] + len(ids)))
            symbol = self.ring.symbols.name(symbol_id)
            for row in rows[rows["symbol_id"] == symbol_id][::50]:
                trade = self.exchange.truth.trade(symbol, int(row["trade_id"]))
                assert (row["price_e8"], row["quantity_e8"], row["trade_us"]) == trade[2:5]
        counted = self.capture.counters()
        assert (counted["gaps"], counted["missing"], counted["far_below"]) == (0, 0, 0)


@asynccontextmanager
async def recording(
    tmp_path: Path, timing: Timing = BRIEF, *, changes: dict[str, Any], **options: Any
) -> AsyncIterator[Recorder]:
    async with simulated_exchange(symbols=",".join(SYMBOLS), rate=400, **options) as exchange:
        ring = Ring(tmp_path / "ring", 1 << 17)
        for symbol in SYMBOLS:
            ring.intern(symbol)
        capture = Capture(ring, ring.symbols, Conflator(len(SYMBOLS)))

        def factory(owner: Any, line: int, epoch: int) -> picows.WSListener:
            return FrameListener(capture, owner, line, epoch)

        asked: list[tuple[str, ...]] = []

        async def confirm(symbols: Sequence[str]) -> set[str]:
            asked.append(tuple(symbols))
            return set()

        settings = replace(
            load({"RECONNECT_DELAY": "100", "MAX_RECONNECT_DELAY": "1000"}),
            **({"websocket_urls": (exchange.ws,), "symbols": SYMBOLS} | changes),
        )
        feed = Feed(settings, factory, symbol_id=ring.intern, confirm=confirm, timing=timing)
        task = asyncio.create_task(feed.run())
        try:
            yield Recorder(exchange, ring, capture, feed, asked)
        finally:
            await feed.close()
            async with asyncio.timeout(5):
                await task


@pytest.mark.parametrize("lines", [1, 2])
async def test_planned_rollovers_lose_nothing_and_ask_nobody(tmp_path: Path, lines: int) -> None:
    changes = {"connection_max_age_s": 3, "feed_lines": lines}
    async with recording(tmp_path, changes=changes) as recorder:
        await eventually(lambda: recorder.rollovers("age") >= 3 * lines, 40)
        await eventually(lambda: recorder.feed.live == lines)
        recorder.check_complete()
        assert not recorder.asked
        assert all(not status.reconnects for status in recorder.feed.describe())


async def test_announced_shutdowns_lose_nothing(tmp_path: Path) -> None:
    """The notice comes a while before the cut."""
    options = {"shutdown_after": 3, "cut_after": 8}
    async with recording(tmp_path, changes={}, **options) as recorder:
        await eventually(lambda: recorder.rollovers("server_shutdown") >= 3, 40)
        recorder.check_complete()
        assert not recorder.asked
        (status,) = recorder.feed.describe()
        assert status.reconnects == {}


async def test_a_half_open_socket_is_replaced_within_seconds(tmp_path: Path) -> None:
    async with recording(tmp_path, changes={}, half_open_after=4) as recorder:
        await eventually(lambda: recorder.rollovers("silent") >= 2, 40)
        (status,) = recorder.feed.describe()
        assert not recorder.asked and status.reconnects == {}
        # what was missed is what the exchange printed within a few seconds
        assert 0 < recorder.capture.counters()["missing"] < 2 * 400 * 8


async def test_a_cut_is_followed_by_a_new_socket_at_once(tmp_path: Path) -> None:
    async with recording(tmp_path, changes={}, cut_after=3) as recorder:
        down_s: list[float] = []
        loop = asyncio.get_running_loop()
        feed, began = recorder.feed, 0.0
        await eventually(lambda: feed.live == 1, 20)
        while len(down_s) < 3:
            await asyncio.sleep(0.002)
            if not feed.live and not began:
                began = loop.time()
            elif feed.live and began:
                down_s.append(loop.time() - began)
                began = 0.0
        assert sorted(down_s)[1] < 0.5


async def test_symbols_change_without_a_hole(tmp_path: Path) -> None:
    async with recording(tmp_path, changes={"symbols": SYMBOLS[:12]}) as recorder:
        feed = recorder.feed
        await eventually(lambda: feed.live == 1, 20)
        await feed.apply(SYMBOLS, ("trade", "ticker", "kline_1m"))
        await feed.apply((SYMBOLS[0], *SYMBOLS[4:]), ("trade",))
        # and back again: a session that is opened meanwhile has the new set too
        feed.replace(SYMBOLS, "a test")
        await eventually(lambda: recorder.rollovers("stale") == 1, 20)
        await eventually(lambda: recorder.ring.pending > 3000, 20)
        recorder.check_complete()
