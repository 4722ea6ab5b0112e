"""What bench/bench_peers.py compares tradecore with still runs, and stores what was sent."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest

from tests.fakes import SimulatedExchange, simulated_exchange
from tests.levels.server import Server
from tradecore.store.partitions import Partitions

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "bench" / "peers"
INSTALLED = ROOT / ".venv" / "peers"
SYMBOLS = "BTCUSDT,ETHUSDT"
STREAMS = "/".join(f"{symbol.lower()}@trade" for symbol in SYMBOLS.split(","))
TRADES = 2000
LIMIT_S = 60.0
OURS = "SELECT symbol, trade_id, price, quantity, side FROM raw_trades"
CRYPTOFEEDS = (
    "SELECT replace(symbol, '-', ''), trade_id::bigint, price, amount, upper(side) FROM trades"
)


def interpreter(environment: str) -> Path:
    """Return the Python of a peer's environment; skip without it."""
    python = INSTALLED / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{environment} of the peers is not installed: make peers")
    return python


def prototypes_own() -> Path:
    """Return the Python of the prototype, which is compiled then."""
    subprocess.run([sys.executable, PROGRAMS / "build_bare.py"], check=True, timeout=LIMIT_S)
    return Path(sys.executable)


@asynccontextmanager
async def running(
    folder: Path, python: Path, program: str, *arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a peer in a folder of its own; show what it says when the body fails."""
    process = await asyncio.create_subprocess_exec(
        *(python, PROGRAMS / program, *arguments),
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            yield process
    except BaseException:
        if process.returncode is None:
            process.kill()
        assert process.stdout is not None
        print((await process.stdout.read()).decode(errors="replace")[-3000:])
        raise
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def compare(exchange: SimulatedExchange, conn: asyncpg.Connection, query: str) -> None:
    """Assert that the table has exactly what the exchange has sent."""
    assert exchange.market is not None
    sent = (await exchange.state())["symbols"]
    wanted = [
        (symbol, t.trade_id, Decimal(t.price_e8).scaleb(-8), Decimal(t.quantity_e8).scaleb(-8),
         t.side)
        for symbol, ids in sent.items()
        for t in exchange.market.trades(symbol, ids["first_id"], ids["last_id"] + 1)
    ]  # fmt: skip
    assert sorted(map(tuple, await conn.fetch(query))) == sorted(wanted)
    assert len(wanted) == TRADES


@pytest.mark.parametrize("program", ["with_picows.py", "with_websockets.py", "bare.py"])
async def test_a_script_stores_what_was_sent(tmp_path: Path, server: Server, program: str) -> None:
    python = prototypes_own() if program == "bare.py" else interpreter("scripts")
    async with (
        server.database(migrated=True) as dsn,
        simulated_exchange(symbols=SYMBOLS, rate=0, count=TRADES) as exchange,
    ):
        conn = await asyncpg.connect(dsn)
        day = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=exchange.epoch_us)).date()
        await Partitions().ensure(conn, "raw_trades", [day, day + timedelta(days=1)])
        url = f"{exchange.ws}/stream?streams={STREAMS}&timeUnit=MICROSECOND"
        async with running(tmp_path, python, program, url, dsn, str(TRADES)) as process:
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()[-3000:]
        await compare(exchange, conn, OURS)
        await conn.close()


@pytest.mark.parametrize("version", ["2.4.1", "3.0.1"])
async def test_cryptofeed_stores_what_was_sent(
    tmp_path: Path, server: Server, version: str
) -> None:
    python = interpreter(f"cryptofeed-{version}")
    async with (
        server.database(migrated=False) as dsn,
        simulated_exchange(symbols=SYMBOLS, rate=0, count=TRADES) as exchange,
    ):
        conn = await asyncpg.connect(dsn)
        url = f"{exchange.ws}/stream?streams={STREAMS}"
        async with running(tmp_path, python, "with_cryptofeed.py", url, dsn) as process:
            count = 0
            while count < TRADES:
                assert process.returncode is None
                await asyncio.sleep(0.1)
                if await conn.fetchval("SELECT to_regclass('trades') IS NOT NULL"):
                    count = await conn.fetchval("SELECT count(*) FROM trades")
        await compare(exchange, conn, CRYPTOFEEDS)
        await conn.close()
