"""Clients of the venue that others wrote, against tradecore: they get what is in the table.

Each is a program in `clients/` and runs in an environment of its own (`make clients`, part of
`make test`), because what they depend on would take the daemon's packages back to older versions.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import asyncpg
import market_oracle as oracle
import pytest

from tests.daemon import Daemon, daemon
from tests.fakes import simulated_exchange
from tests.levels.server import Server

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("TEST_CLIENTS", HERE.parent / ".venv" / "clients")) / "bin" / "python"
CLIENTS = ("python_binance", "binance_connector", "ccxt", "binance_sdk")
SYMBOLS = "BTCUSDT,ETHUSDT"
LIMIT_S = 60.0

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="the venue's clients are not installed: make clients"
)


async def run(client: str, one: Daemon, *arguments: str) -> Any:
    """Run a client to its end and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, HERE / "clients" / f"with_{client}.py", f"http://127.0.0.1:{one.port}"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, error = await asyncio.wait_for(process.communicate(), LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, error.decode()[-3000:]
    return json.loads(out.splitlines()[-1])


async def until_settled(one: Daemon, conn: asyncpg.Connection) -> list[Any]:
    """Wait until the candles have all trades; return the rows of BTCUSDT."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            rows = await conn.fetch("SELECT * FROM raw_trades WHERE symbol = 'BTCUSDT'")
            wanted = [oracle.klines(rows, interval) for interval in ("1m", "1h", "1d")]
            found = [
                (await one.get(f"/api/v3/klines?symbol=BTCUSDT&interval={interval}"))[1]
                for interval in ("1m", "1h", "1d")
            ]
            if found == wanted:
                return list(rows)
            await asyncio.sleep(0.2)


async def test_every_client_gets_what_the_table_has(tmp_path: Path, server: Server) -> None:
    async with (
        server.database(migrated=True) as dsn,
        simulated_exchange(symbols=SYMBOLS, rate=300, count=3000) as exchange,
        daemon(
            tmp_path,
            DATABASE_URL=dsn,
            BINANCE_WEBSOCKET_URL=exchange.ws,
            BINANCE_REST_URL=exchange.rest,
            SUPPORTED_SYMBOLS=SYMBOLS,
        ) as one,
    ):
        await one.until_stored(3000)
        conn = await asyncpg.connect(dsn)
        rows = await until_settled(one, conn)
        trades = oracle.trades(rows)
        last = {
            row["symbol"]: oracle.eight(row["price"])
            for row in await conn.fetch("SELECT * FROM raw_trades ORDER BY trade_id")
        }
        for client in CLIENTS:
            found = await run(client, one)
            wanted = {
                "klines": oracle.klines(rows, "1m"),
                "klines_of_3m": oracle.klines(rows, "3m"),
                "history": oracle.klines(rows, "1m"),
                "trades": trades[-700:],
                "old_trades": trades[:300],
                "price": last["BTCUSDT"],
                "prices": last,
                "symbols": SYMBOLS.split(","),
                "error": [400, -1121, "Invalid symbol."],
            }
            ticker = found.pop("ticker")
            assert found == {name: wanted[name] for name in found}, client
            stored = await conn.fetchrow(
                "SELECT * FROM tickers WHERE symbol = 'BTCUSDT' AND last_id = $1"
                " AND close_time >= $2 ORDER BY timestamp LIMIT 1",
                ticker["lastId"],
                oracle.EPOCH + oracle.timedelta(milliseconds=ticker["closeTime"]),
            )
            shown = (ticker["lastPrice"], ticker["volume"], ticker["bidPrice"], ticker["count"])
            assert shown == (
                oracle.eight(stored["last_price"]),
                oracle.eight(stored["volume"]),
                oracle.eight(stored["best_bid_price"]),
                stored["trade_count"],
            ), client
        await conn.close()


@pytest.mark.parametrize("client", CLIENTS)
async def test_every_client_hears_the_live_stream(
    tmp_path: Path, server: Server, client: str
) -> None:
    async with (
        server.database(migrated=True) as dsn,
        simulated_exchange(symbols=SYMBOLS, rate=100) as exchange,
        daemon(
            tmp_path,
            DATABASE_URL=dsn,
            BINANCE_WEBSOCKET_URL=exchange.ws,
            BINANCE_REST_URL=exchange.rest,
            SUPPORTED_SYMBOLS=SYMBOLS,
        ) as one,
    ):
        await one.until_stored(10)
        heard = await run(client, one, "live", "50")
        ids = [trade_id for trade_id, _, _ in heard]
        assert ids == sorted(set(ids))
        assert len(ids) >= 50
        conn = await asyncpg.connect(dsn)
        async with asyncio.timeout(LIMIT_S):
            while True:
                rows = await conn.fetch(
                    "SELECT trade_id, price, quantity FROM raw_trades"
                    " WHERE symbol = 'BTCUSDT' AND trade_id = ANY($1) ORDER BY trade_id",
                    ids,
                )
                if len(rows) == len(ids):
                    break
                await asyncio.sleep(0.1)
        await conn.close()
        assert heard == [
            [row["trade_id"], oracle.eight(row["price"]), oracle.eight(row["quantity"])]
            for row in rows
        ]
