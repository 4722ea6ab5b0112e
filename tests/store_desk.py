"""A database with its sink, rows to put in, and the slow oracle of what must be there then."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

from tradecore._symbols import SymbolTable
from tradecore.schema import (
    FLAG_BUYER_IS_MAKER,
    FLAG_VOID,
    TRADE_DTYPE,
)
from tradecore.store.partitions import Partitions
from tradecore.store.sink import Sink

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NAMES = ("BTCUSDT", "ETHUSDT", "币安人生USDT", "1000SATSUSDT")
NOW_US = 1_790_000_000_000_000
EXTREME = 2**63 - 1


def at(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=us)


def decimal(scaled: int) -> Decimal:
    return Decimal(scaled).scaleb(-8)


def trade(symbol_id: int, trade_id: int) -> dict[str, int]:
    """A trade that is a pure function of symbol and id; its time does not rise with the id."""
    seed = (symbol_id * 7919 + trade_id) % 10**9
    time_us = NOW_US + trade_id % 10**9 * 1000
    return {
        "symbol_id": symbol_id,
        "trade_id": trade_id,
        "price_e8": seed * 2654435761 % 10**13 + 1,
        "quantity_e8": seed * 40503 % 10**11,
        "trade_us": time_us - trade_id % 7 * 2500,
        "recv_ns": 0 if trade_id % 5 == 0 else time_us * 1000 + 999,
        "flags": FLAG_BUYER_IS_MAKER if seed % 3 else 0,
    }


def trades(*rows: dict[str, int]) -> Any:
    array = np.zeros(len(rows), TRADE_DTYPE)
    for i, row in enumerate(rows):
        for key, value in row.items():
            array[i][key] = value
    return array


def batch(*spans: tuple[int, int, int]) -> Any:
    """Trades of (symbol id, first id, last id), in that order."""
    return trades(*(trade(s, i) for s, first, last in spans for i in range(first, last + 1)))


def record(row: Any) -> tuple[Any, ...]:
    """A ring row as the database shall hold it."""
    recv_ns = int(row["recv_ns"])
    return (
        at(int(row["trade_us"])),
        NAMES[int(row["symbol_id"])],
        decimal(int(row["price_e8"])),
        decimal(int(row["quantity_e8"])),
        "SELL" if int(row["flags"]) & FLAG_BUYER_IS_MAKER else "BUY",
        int(row["trade_id"]),
        at(recv_ns // 1000) if recv_ns else None,
    )


class Database:
    """A migrated database with a sink, and the means to look at it from outside."""

    def __init__(self, dsn: str, pool: Any, conn: Any) -> None:
        self.dsn = dsn
        self.pool = pool
        self.conn = conn
        self.symbols = SymbolTable()
        for name in NAMES:
            self.symbols.add(name)
        self.sink = Sink(pool, self.symbols, Partitions())

    async def check(self, *batches: Any) -> None:
        """Compare everything with what these batches say; the first arrival of an id counts."""
        expected: dict[tuple[str, int], tuple[Any, ...]] = {}
        for rows in batches:
            for row in rows:
                if not int(row["flags"]) & FLAG_VOID:
                    found = record(row)
                    expected.setdefault((found[1], found[5]), found)
        stored = [tuple(row) for row in await self.conn.fetch("SELECT * FROM raw_trades")]
        key = lambda row: (row[1], row[5])  # noqa: E731
        assert sorted(stored, key=key) == sorted(expected.values(), key=key)
        await self.check_ledger()

    async def check_ledger(self) -> None:
        """The ledger and its marks are what the table says; holes lie between the ranges."""
        assert not await self.conn.fetch(
            "SELECT symbol, trade_id, timestamp FROM trade_times"
            " EXCEPT SELECT symbol, trade_id, timestamp FROM raw_trades"
        )
        assert not await self.conn.fetch(
            "SELECT symbol, trade_id FROM raw_trades WHERE trade_id % 65536 = 0"
            " EXCEPT SELECT symbol, trade_id FROM trade_times"
        )
        assert not await self.conn.fetch(
            "SELECT symbol, date_trunc('hour', timestamp) FROM raw_trades"
            " EXCEPT SELECT symbol, date_trunc('hour', timestamp) FROM trade_times"
        )
        assert await self.conn.fetch(
            "SELECT symbol, first_id, last_id, first_time, last_time FROM trade_coverage"
            " ORDER BY symbol, first_id"
        ) == await self.conn.fetch(
            """
            SELECT symbol, min(trade_id), max(trade_id), min(timestamp), max(timestamp)
            FROM (SELECT *, trade_id - row_number() OVER (PARTITION BY symbol ORDER BY trade_id)
                         AS island FROM raw_trades) AS numbered
            GROUP BY symbol, island ORDER BY symbol, 2
            """
        )
        assert await self.conn.fetch(
            """
            SELECT symbol, min(first_id), max(last_id)
            FROM (SELECT *, sum(rows) OVER (PARTITION BY symbol ORDER BY first_id) - last_id
                         AS island
                  FROM (SELECT *, last_id - first_id + 1 AS rows FROM trade_gaps
                        WHERE state <> 'filled') AS unfilled) AS numbered
            GROUP BY symbol, island ORDER BY symbol, 2
            """
        ) == await self.conn.fetch(
            """
            SELECT symbol, last_id + 1, next_id - 1
            FROM (SELECT symbol, last_id, lead(first_id) OVER (PARTITION BY symbol
                         ORDER BY first_id) AS next_id FROM trade_coverage) AS pairs
            WHERE next_id IS NOT NULL ORDER BY 1, 2
            """
        )

    async def gaps(self) -> list[tuple[Any, ...]]:
        rows = await self.conn.fetch(
            "SELECT first_id, last_id, cause, state, filled_by FROM trade_gaps ORDER BY first_id"
        )
        return [tuple(row) for row in rows]


async def parked(db: Database) -> list[tuple[Any, ...]]:
    rows = await db.conn.fetch(
        "SELECT kind, symbol, trade_id, sqlstate FROM dead_letters ORDER BY id"
    )
    return [tuple(row) for row in rows]
