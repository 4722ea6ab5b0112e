"""Retention beside a venue: what is too old is neither fetched again and again nor imported."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from fill_desk import Desk, desk, rows_of, running, today_us, until
from lifecycle_desk import candles_done
from scene import metrics
from store_desk import at
from test_history_commands import csv_of, tradecore, zip_of

from tests.daemon import daemon
from tradecore.backfill.plan import DAY_US
from tradecore.store import horizon, trim
from tradecore.store.verify import verify

BTC, ETH = "BTCUSDT", "ETHUSDT"
DAYS = {"epoch": -3 * 86_400, "rate": 0.2, "first_id": 1000}


async def give_up(conn: asyncpg.Connection, to_us: int) -> None:
    await candles_done(conn)
    while True:
        state = await horizon.read_state(conn)
        step = await horizon.next_horizon(conn, state, at(to_us))
        if step is None:
            return
        assert await horizon.raise_horizon(conn, step)
        await trim.trim(conn, state, step, await trim.survey(conn, state, step))


async def rows_from(d: Desk, symbol: str, from_us: int) -> list[int]:
    rows = await d.conn.fetch(
        "SELECT trade_id FROM raw_trades WHERE symbol = $1 AND timestamp >= $2 ORDER BY 1",
        symbol,
        at(from_us),
    )
    return [row[0] for row in rows]


async def test_a_hole_across_the_horizon(migrated_database: str, tmp_path: Path) -> None:
    """It is filled down to the horizon; what is older is closed, and nobody asks for it again."""
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        to_us = today_us() - DAY_US
        first = d.market.next_id(BTC, to_us - 1)
        await d.capture(BTC, (first - 400, first - 300), (first + 300, first + 400))
        # Another one lies below by all of it, and goes with the first step.
        await d.capture(ETH, (1000, 1010), (1100, 1110))
        await give_up(d.conn, to_us)
        assert [(h.symbol, h.first_id, h.last_id) for h in await d.store.open_holes()] == [
            (BTC, first - 299, first + 299)
        ]
        backfill = d.backfill(max_age_s=4 * 86_400.0)
        async with running(backfill):
            await until(lambda: d.closed(BTC))
            asked = d.client.requests.total()
            await asyncio.sleep(1.5)  # several looks
            assert d.client.requests.total() == asked
        assert await rows_from(d, BTC, to_us) == list(range(first, first + 401))
        assert [gap[2:] for gap in await d.gaps(BTC)] == [
            ("absent", None),
            ("filled", "rest"),
        ]
        assert (await verify(d.conn)).differences == []
        # The next midnight takes the rest of the story away.
        await give_up(d.conn, to_us + DAY_US)
        assert (await verify(d.conn)).differences == []
        assert await d.closed(BTC)


async def test_history_ends_at_the_horizon(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        to_us = today_us() - DAY_US
        first = d.market.next_id(BTC, to_us - 1)
        await d.capture(BTC, (first + 500, first + 600))
        await give_up(d.conn, to_us)
        result = await tradecore(d.environ, "backfill", "--from", "3d")
        assert result.code == 5, result
        (note,) = result.of("note")
        assert "RETENTION gives up what is older" in note["text"]
        assert f"{at(to_us):%Y-%m-%d} 00:00:00Z" in note["text"]
        assert await rows_from(d, BTC, 0) == list(range(first, first + 601))
        # A setting counts before the horizon has moved there.
        environ = {**d.environ, "RETENTION": "1 day", "COMPRESS_AFTER": "off"}
        result = await tradecore(environ, "backfill", "--from", "3d", "--symbol", BTC)
        assert (result.code, result.summary["stored"]) == (5, 0)
        assert (await verify(d.conn)).differences == []


async def test_an_import_tells_what_is_too_old(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        to_us = today_us() - DAY_US
        first = d.market.next_id(BTC, to_us - 1)
        await d.capture(ETH, (5000, 5100))
        await give_up(d.conn, to_us)
        text = csv_of(d.market, BTC, first - 250, first + 100)
        dump = zip_of(tmp_path / f"{BTC}-trades-2026-01-31.zip", text)
        result = await tradecore(d.environ, "import", str(dump))
        assert result.code == 0, result
        assert (result.summary["stored"], result.summary["expired"]) == (101, 250)
        assert await rows_from(d, BTC, 0) == list(range(first, first + 101))
        days = await d.conn.fetch(
            "SELECT relname FROM pg_class WHERE relname ~ '^raw_trades_[0-9]+$' ORDER BY 1"
        )
        assert f"{at(to_us):raw_trades_%Y%m%d}" in [row[0] for row in days]
        assert (await verify(d.conn)).differences == []


@pytest.mark.usefixtures("plain_level")
async def test_a_daemon_gives_up_old_days(migrated_database: str, tmp_path: Path) -> None:
    async with desk(migrated_database, tmp_path, **DAYS) as d:
        ids: dict[str, tuple[int, int]] = {}
        for symbol in (BTC, ETH):
            last = d.market.next_id(symbol, today_us() + 1) - 1
            ids[symbol] = 1000, last
            symbol_id = d.symbols.add(symbol)
            for begin in range(1000, last + 1, 10_000):
                rows = rows_of(d.market, symbol, begin, min(begin + 10_000, last + 1), symbol_id)
                await d.store.write_trades(rows)
        environ: dict[str, Any] = {
            "DATABASE_URL": migrated_database,
            "BINANCE_WEBSOCKET_URL": d.exchange.ws,
            "BINANCE_REST_URL": d.exchange.rest,
            "SUPPORTED_SYMBOLS": f"{BTC},{ETH}",
            "RETENTION": "1 day",
            "COMPRESS_AFTER": "off",
        }
        async with daemon(tmp_path / "run", **environ) as one:
            days = {at(today_us() - days * DAY_US).date().isoformat() for days in (1, 2)}
            body = await one.until(
                lambda body: str(body["retention"]["horizon"])[:10] in days, "/health/db"
            )
            assert body["retention"]["waits"] is None
            assert body["reasons"] == []
            assert body["level"] == "plain"
            found = await metrics(one)
            to_us = int(found["tradecore_retention_horizon_timestamp_seconds"]) * 1_000_000
            assert to_us in (today_us() - DAY_US, today_us() - 2 * DAY_US)
            assert found["tradecore_chunks_dropped_total{raw_trades}"] >= 1
            assert found["tradecore_chunks{open,raw_trades}"] >= 2
            for symbol, (_, last) in ids.items():
                first = d.market.next_id(symbol, to_us - 1)
                rows = await rows_from(d, symbol, 0)
                assert rows[: last - first + 1] == list(range(first, last + 1))
                (begin,) = await d.conn.fetchrow(
                    "SELECT min(first_id) FROM trade_coverage WHERE symbol = $1", symbol
                )
                assert begin == first
            days = await d.conn.fetchval(
                "SELECT count(*) FROM candles_1d WHERE bucket < $1", at(to_us)
            )
            assert days >= 2 * 2  # candles are kept
        report = await verify(d.conn)
        assert (report.differences, report.horizon) == ([], at(to_us))
