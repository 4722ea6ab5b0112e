"""Room: bytes of a ticker, a kline and a candle on disk, and WAL of a trade by the size of batches.

Plain PostgreSQL, rows as the daemon writes them, a day of one symbol each; bench_storage.py has the
trades. WAL is what a stored trade costs a replica or an archive; the ledger's part is included.
"""

import asyncio
from collections.abc import Iterator

import asyncpg
import numpy as np
from _database import database, server
from _harness import Figure, arguments, figure, report
from numpy.typing import NDArray

from tradecore._symbols import SymbolTable
from tradecore.schema import TRADE_DTYPE
from tradecore.store.candles import WIDTHS
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import Sink

_DAY_S = 86_400
_BEGIN = "2026-11-27Z"
_BEGIN_US = 1_795_737_600_000_000
_BATCHES = (10, 100, 1000, 16_384)
_WAL_ROWS = 65_536

# Prices of two decimals, quantities of five, sums of eight, as most symbols have them.
_PRICE = "round((60000 + random() * 9000)::numeric, 2)"
_QUANTITY = "round((random() * 9)::numeric, 5)"
_SUM = "round((random() * 900000)::numeric, 8)"
_TICKERS = f"""
INSERT INTO tickers SELECT t, 'BTCUSDT', t + interval '3 ms', {_PRICE}, {_QUANTITY}, {_PRICE},
    {_PRICE}, {_PRICE}, {_QUANTITY}, {_PRICE}, {_QUANTITY}, {_PRICE}, {_QUANTITY}, {_PRICE},
    {_PRICE}, {_PRICE}, {_SUM}, {_SUM}, t - interval '1 day', t, 3735683259, 3739683259, 4000001, t
FROM generate_series('{_BEGIN}'::timestamptz, '2026-11-27 23:59:59Z', '1 second') AS t
"""
_KLINES = f"""
INSERT INTO klines SELECT t, 'BTCUSDT', t, t, {_PRICE}, {_PRICE}, {_PRICE}, {_PRICE}, {_SUM},
    {_SUM}, {_SUM}, {_SUM}, 2800, 3735683259, 3735686059, true, t
FROM generate_series('{_BEGIN}'::timestamptz, '2026-11-27 23:59Z', '1 minute') AS t
"""
_CANDLES = f"""
INSERT INTO candles_{{name}} SELECT t, 'BTCUSDT', {_PRICE}, {_PRICE}, {_PRICE}, {_PRICE}, {_SUM},
    {_SUM}, 2800, {_SUM}, {_SUM}, 3735683259, 3735686059
FROM generate_series('{_BEGIN}'::timestamptz, '2026-11-27 23:59:59Z', $1) AS t
"""


async def _size(connection: asyncpg.Connection, table: str) -> int:
    size: int = await connection.fetchval(
        "SELECT coalesce((SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree(t)),"
        " pg_total_relation_size(t))::bigint FROM CAST($1::text AS regclass) AS t",
        table,
    )
    return size


async def _states(dsn: str) -> list[Figure]:
    figures = []
    pool = await open_pool(dsn, 2)
    try:
        await Partitions().ensure(pool, "tickers", [np.datetime64(_BEGIN[:-1]).item()])
        async with pool.acquire() as connection:
            for table, query in (("tickers", _TICKERS), ("klines", _KLINES)):
                await connection.execute(query)
                rows = await connection.fetchval(f"SELECT count(*) FROM {table}")
                bytes_a_row = await _size(connection, table) / rows
                figures.append(figure("room", table, [bytes_a_row], "B a row"))
            whole = 0
            for name, width in WIDTHS.items():
                await connection.execute(_CANDLES.format(name=name), width)
                whole += await _size(connection, f"candles_{name}")
            minutes = await connection.fetchval("SELECT count(*) FROM candles_1m")
            a_row = await _size(connection, "candles_1m") / minutes
            figures.append(figure("room", "candles_1m", [a_row], "B a row"))
            day = whole / 2**10
            figures.append(figure("room", "candles of all widths, a day", [day], "KiB a symbol"))
    finally:
        await pool.close()
    return figures


def _batches(rows: int) -> Iterator[NDArray[np.void]]:
    found = np.zeros(_WAL_ROWS, TRADE_DTYPE)
    count = np.arange(_WAL_ROWS)
    found["trade_id"] = 3_735_683_259 + count
    found["trade_us"] = _BEGIN_US + count * 1000
    found["recv_ns"] = (found["trade_us"] + 40_000) * 1000
    found["price_e8"] = 6_012_345_000_000 + count % 997 * 1_000_000
    found["quantity_e8"] = 1_000 + count % 7919 * 1_000
    for at in range(0, _WAL_ROWS, rows):
        yield found[at : at + rows]


async def _wal(dsn: str, rows: int) -> Figure:
    symbols = SymbolTable()
    symbols.add("BTCUSDT")
    pool = await open_pool(dsn, 2)
    try:
        sink = Sink(pool, symbols, Partitions())
        await pool.execute("CHECKPOINT")
        before = await pool.fetchval("SELECT pg_current_wal_insert_lsn()")
        for batch in _batches(rows):
            await sink.write_trades(batch)
        written = await pool.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", before)
    finally:
        await pool.close()
    subject = f"WAL, batches of {rows:,}"
    return figure("room", subject, [float(written) / _WAL_ROWS], "B a trade")


async def _main() -> list[Figure]:
    async with server() as server_dsn:
        async with database(server_dsn, "bench_room") as dsn:
            figures = await _states(dsn)
        for rows in _BATCHES:
            async with database(server_dsn, "bench_room") as dsn:
                figures.append(await _wal(dsn, rows))
    return figures


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    raise SystemExit(report(asyncio.run(_main()), options.json))
