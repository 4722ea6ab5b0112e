"""A simulated exchange, a real database, and what was captured of the one in the other."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from fakes import SimulatedExchange, simulated_exchange

from tradecore import clock
from tradecore._symbols import SymbolTable
from tradecore.backfill import plan
from tradecore.backfill.engine import Backfill, FillPolicy
from tradecore.rest.budget import Budget
from tradecore.rest.client import RestClient
from tradecore.schema import FLAG_BUYER_IS_MAKER, TRADE_DTYPE
from tradecore.settings import load
from tradecore.simulate.market import Market
from tradecore.simulate.proof import prove
from tradecore.store.store import Store

WAIT_LIMIT_S = 60.0


def rows_of(market: Market, symbol: str, first_id: int, end_id: int, symbol_id: int = 0) -> Any:
    """Trades first_id..end_id - 1 as the feed would have put them into the ring."""
    trades = market.trades(symbol, first_id, end_id)
    rows = np.zeros(len(trades), TRADE_DTYPE)
    for row, trade in zip(rows, trades, strict=True):
        row["symbol_id"] = symbol_id
        row["trade_id"] = trade.trade_id
        row["price_e8"] = trade.price_e8
        row["quantity_e8"] = trade.quantity_e8
        row["trade_us"] = trade.trade_us
        row["recv_ns"] = trade.trade_us * 1000 + 1_000_000
        row["flags"] = FLAG_BUYER_IS_MAKER if trade.buyer_is_maker else 0
    return rows


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until the condition, which may be a coroutine function, holds."""
    try:
        async with asyncio.timeout(WAIT_LIMIT_S):
            while True:
                found = condition()
                if asyncio.iscoroutine(found):
                    found = await found
                if found:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited in vain {what}") from None


def today_us() -> int:
    """The beginning of this UTC day: dumps are there for what is before."""
    return clock.wall_ns() // 1000 // plan.DAY_US * plan.DAY_US


class Desk:
    """One exchange, one database, one folder."""

    def __init__(self, exchange: SimulatedExchange, dsn: str, conn: Any, folder: Path) -> None:
        self.exchange = exchange
        self.dsn = dsn
        self.conn = conn
        self.folder = folder
        self.environ = {
            "DATABASE_URL": dsn,
            "DATA_DIR": str(folder),
            "BINANCE_REST_URL": exchange.rest,
            "BINANCE_DUMP_URL": exchange.rest,
            "LOG_FORMAT": "json",
        }
        self.symbols = SymbolTable()
        self.store = Store(load(self.environ), self.symbols)
        self.client = RestClient(exchange.rest, Budget.of(folder, exchange.rest))

    @property
    def market(self) -> Market:
        return self.exchange.truth

    def backfill(self, max_age_s: float = 86_400.0, **changes: Any) -> Backfill:
        """A back-fill with short delays; `changes` are fields of its policy or its arguments."""
        arguments = {
            name: changes.pop(name)
            for name in ("grace", "paused", "on_progress")
            if name in changes
        }
        policy = {
            "max_age_s": max_age_s,
            "dump_url": self.exchange.rest,
            "folder": self.folder / "dumps",
            "confirm_s": 0.3,
            "look_s": 0.5,
            "lag_cap_s": 0.5,
            "trouble_base_s": 0.1,
            "trouble_cap_s": 0.5,
            "dump_retry_s": 1.0,
            **changes,
        }
        return Backfill(
            self.store,
            self.client,
            FillPolicy(**policy),
            **{"grace": lambda _: 0.0, **arguments},
        )

    async def capture(self, symbol: str, *spans: tuple[int, int]) -> None:
        """Store the trades of the spans (first, last id), the lowest first: holes in between."""
        known = self.symbols.get(symbol)
        symbol_id = self.symbols.add(symbol) if known is None else known
        for first_id, last_id in spans:
            rows = rows_of(self.market, symbol, first_id, last_id + 1, symbol_id)
            await self.store.write_trades(rows)

    async def whole(self, symbol: str, first_id: int, last_id: int) -> bool:
        """Tell whether these ids are stored, all of them, in one range."""
        return await self.store.covered(symbol, first_id, last_id) == [(first_id, last_id)]

    async def closed(self, symbol: str) -> bool:
        """Tell whether no hole of the symbol is open."""
        return not await self.store.open_holes(symbol=symbol)

    async def prove(self, symbol: str, first_id: int, last_id: int) -> None:
        """Hold the table against the market, row by row, and the ledger against the table."""
        (proof,) = (await prove(self.conn, self.market, {symbol: (first_id, last_id)})).values()
        assert proof.holds, proof

    async def gaps(self, symbol: str) -> list[tuple[Any, ...]]:
        """The history of holes: first id, last id, state, filled_by."""
        query = (
            "SELECT first_id, last_id, state, filled_by FROM trade_gaps WHERE symbol = $1"
            " ORDER BY first_id"
        )
        return [tuple(row) for row in await self.conn.fetch(query, symbol)]


@asynccontextmanager
async def desk(dsn: str, folder: Path, **options: Any) -> AsyncIterator[Desk]:
    """Run an exchange that is ten minutes old, and open the database."""
    options = {"symbols": "BTCUSDT,ETHUSDT", "rate": 60, "epoch": -600, **options}
    async with simulated_exchange(**options) as exchange:
        conn = await asyncpg.connect(dsn)
        one = Desk(exchange, dsn, conn, folder)
        try:
            yield one
        finally:
            await one.client.close()
            await one.store.close()
            await conn.close()


@asynccontextmanager
async def running(backfill: Backfill) -> AsyncIterator[asyncio.Task[None]]:
    """Run a back-fill as the daemon does, for the block."""
    task = asyncio.create_task(backfill.run())
    try:
        yield task
        assert not task.done(), "the back-fill ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
