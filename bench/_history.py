"""A record of several days in the tables, as if tradecore had run: trades, ledger, marks, proof.

A daemon that starts on it finds nothing to repair: the ids end right below those of `_generator`,
every minute is proven, and candles are fenced off as done (they are not there: of closed minutes
nothing reads them while the daemon captures).
"""

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import numpy as np
from _generator import FIRST_ID
from numpy.typing import NDArray

from tradecore._copyenc import encode_trades
from tradecore._symbols import SymbolTable
from tradecore.schema import TRADE_COLUMNS, TRADE_DTYPE
from tradecore.store.partitions import Partitions
from tradecore.store.times import MARK_EVERY
from tradecore.store.transaction import copy_slices

DAYS = 10
_CHUNK_ROWS = 500_000
_HOUR_US = 3_600_000_000
_MINUTE_US = 60_000_000

# The end of the record is where the auditor and the candles go on.
_SYMBOLS = "INSERT INTO trade_symbols SELECT unnest($1::text[])"
_COVER = """
INSERT INTO trade_coverage (symbol, first_id, last_id, first_time, last_time)
SELECT symbol, $2, $3, $4, $5 FROM unnest($1::text[]) AS symbol
"""
_PROVEN = """
INSERT INTO audit_state (symbol, proven_from, proven_through, audited_through, audited_at)
SELECT symbol, $2, $3, $3, now() FROM unnest($1::text[]) AS symbol
"""
_FENCE = "UPDATE store_state SET candles_through = $1"
_MARKS = """
INSERT INTO trade_times (symbol, trade_id, timestamp)
SELECT symbol, id, timestamptz 'epoch' + us * interval '1 microsecond'
FROM unnest($1::text[]) AS symbol CROSS JOIN unnest($2::int8[], $3::int8[]) AS mark (id, us)
"""


class History:
    """`rows` trades of DAYS days until a minute ago, evenly of all symbols."""

    def __init__(self, symbols: tuple[str, ...], rows: int) -> None:
        self.symbols = symbols
        self.each = rows // len(symbols)
        """Trades of a symbol."""
        self.first_id = FIRST_ID - self.each
        now_us = int(datetime.now(UTC).timestamp()) * 1_000_000
        self.end_us = now_us // _MINUTE_US * _MINUTE_US
        self.begin_us = self.end_us - DAYS * 86_400_000_000
        self._step_us = (self.end_us - self.begin_us) / self.each

    def times_us(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the times of the trades at these places of each symbol."""
        return self.begin_us + (place * self._step_us).astype(np.int64)

    def rows(self, begin: int, end: int) -> NDArray[np.void]:
        """Return the trades from place `begin` to `end` - 1 of all symbols, in order of time."""
        count = len(self.symbols)
        place = np.repeat(np.arange(begin, end), count)
        rows = np.zeros(len(place), TRADE_DTYPE)
        rows["symbol_id"] = np.tile(np.arange(count), end - begin)
        rows["trade_id"] = self.first_id + place
        rows["trade_us"] = self.times_us(place)
        rows["recv_ns"] = rows["trade_us"] * 1000 + 7_654_321
        index = place * count + rows["symbol_id"]
        rows["price_e8"] = (10_000_000 + index * 48_271 % 90_000_000) * 10_000
        rows["quantity_e8"] = (1 + index * 69_621 % 9_999) * 10_000
        rows["flags"] = index >> 3 & 1
        return rows

    async def store(self, dsn: str) -> None:
        """Fill the tables of a new database."""
        conn = await asyncpg.connect(dsn)
        try:
            await self._make_days(conn)
            await asyncio.gather(*(self._copy(dsn, part) for part in range(2)))
            await self._account(conn)
            await conn.execute("VACUUM (ANALYZE, PARALLEL 0)", timeout=900)
            await conn.execute("CHECKPOINT", timeout=900)
        finally:
            await conn.close()

    async def _make_days(self, conn: asyncpg.Connection) -> None:
        first = _at(self.begin_us).date()
        days = [first + timedelta(days=day) for day in range(DAYS + 2)]
        for table in ("raw_trades", "tickers"):
            await Partitions().ensure(conn, table, days)

    async def _copy(self, dsn: str, part: int) -> None:
        """Copy every other chunk."""
        symbols = SymbolTable()
        for symbol in self.symbols:
            symbols.add(symbol)
        size = _CHUNK_ROWS // len(self.symbols)
        conn = await asyncpg.connect(dsn)
        try:
            await conn.execute("SET synchronous_commit = off")
            for begin in range(part * size, self.each, 2 * size):
                rows = self.rows(begin, min(begin + size, self.each))
                slices = encode_trades(rows, symbols)
                copied = await copy_slices(conn, "raw_trades", TRADE_COLUMNS, slices)
                assert copied == len(rows)
        finally:
            await conn.close()

    async def _account(self, conn: asyncpg.Connection) -> None:
        """Write ledger, marks, proof and fence."""
        names = list(self.symbols)
        first, end = _at(self.begin_us), _at(self.end_us)
        last = _at(int(self.times_us(np.array([self.each - 1]))[0]))
        places = np.arange(self.each)
        hours = self.times_us(places) // _HOUR_US
        marked = np.flatnonzero(
            (np.diff(hours, prepend=-1) != 0) | ((self.first_id + places) % MARK_EVERY == 0)
        )
        await conn.execute(_SYMBOLS, names)
        await conn.execute(_COVER, names, self.first_id, FIRST_ID - 1, first, last)
        await conn.execute(
            _MARKS, names, (self.first_id + marked).tolist(), self.times_us(marked).tolist()
        )
        await conn.execute(_PROVEN, names, first, end)
        await conn.execute(_FENCE, end)


def _at(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
