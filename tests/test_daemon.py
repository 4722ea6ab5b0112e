"""The whole daemon as a process against the simulated exchange, broken in every way we can.

After each kind of damage the table is compared with the exchange's truth, row by row.
"""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from scene import hang_up

from tests.daemon import Daemon, daemon
from tests.fakes import SimulatedExchange, simulated_exchange
from tests.torture.link import Link
from tradecore.simulate.proof import prove
from tradecore.store.embedded import EmbeddedPostgres
from tradecore.store.verify import verify

SYMBOLS = "BTCUSDT,ETHUSDT,PEPEUSDT,BTTCUSDT,币安人生USDT"
FRAMES = Path(__file__).parents[2] / "shared" / "frames"


def venue(exchange: SimulatedExchange, **more: Any) -> dict[str, Any]:
    return {
        "BINANCE_WEBSOCKET_URL": exchange.ws,
        "BINANCE_REST_URL": exchange.rest,
        "SUPPORTED_SYMBOLS": SYMBOLS,
        **more,
    }


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        await conn.close()


async def finished(exchange: SimulatedExchange) -> dict[str, tuple[int, int]]:
    """Wait until the exchange has sent all it will send; return what that was."""
    async with asyncio.timeout(60):
        while not (state := await exchange.state())["done"]:
            await asyncio.sleep(0.05)
    return {s: (one["first_id"], one["last_id"]) for s, one in state["symbols"].items()}


async def assert_exact(
    dsn: str, exchange: SimulatedExchange, sent: dict[str, tuple[int, int]]
) -> None:
    """Every trade sent is stored once and equal, and the ledger says the same."""
    async with connected(dsn) as conn:
        proofs = await prove(conn, exchange.truth, sent)
        for symbol, proof in proofs.items():
            assert proof.holds, (symbol, proof)
        await assert_ledger(conn)
        assert await conn.fetchval("SELECT count(*) FROM trade_coverage") == len(sent)


async def assert_ledger(conn: asyncpg.Connection) -> None:
    report = await verify(conn)
    report.raise_if_different()
    assert report.rows == report.expected_rows


async def test_every_kind_of_junk_and_odd_spelling(tmp_path: Path, migrated_database: str) -> None:
    faults = {
        "duplicate_every": 13, "garbage_every": 17, "fragment_every": 1200, "oversize_every": 700,
        "shuffle_keys_every": 7, "reorder_every": 31,
    }  # fmt: skip
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=2000, count=6000, **faults) as exchange,
        daemon(tmp_path, DATABASE_URL=migrated_database, **venue(exchange)) as one,
    ):
        sent = await finished(exchange)
        total = sum(last - first + 1 for first, last in sent.values())
        await one.until_stored(total)
        health = await one.health()
        assert health["counts"]["frames_refused"] > 300
        assert health["counts"]["trades_duplicate"] > 300
        assert health["counts"]["reconnects"] == 0, "junk never ends a connection"
        assert await one.terminate() == 0
        assert set(sent) == set(SYMBOLS.split(","))
        await assert_exact(migrated_database, exchange, sent)


async def test_ids_beyond_32_bits_and_extreme_quantities(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(
            symbols="LUNCUSDT,BTCUSDT", rate=3000, count=6000, first_id=6_720_000_000_000
        ) as exchange,
        daemon(
            tmp_path,
            **venue(exchange, DATABASE_URL=migrated_database, SUPPORTED_SYMBOLS="LUNCUSDT,BTCUSDT"),
        ) as one,
    ):
        sent = await finished(exchange)
        await one.until_stored(6000)
        assert await one.terminate() == 0
        await assert_exact(migrated_database, exchange, sent)
        async with connected(migrated_database) as conn:
            largest = await conn.fetchval("SELECT max(quantity) FROM raw_trades")
        assert largest == Decimal("92233720368.54775807")


async def test_recorded_frames_of_the_venue(tmp_path: Path, migrated_database: str) -> None:
    """Replay 19,904 real trades over a real socket; compare each with json + Decimal."""
    recording = FRAMES / "btcusdt_trade_20240809.jsonl.gz"
    if not recording.exists():
        pytest.skip(f"no recorded frames at {recording}")
    with gzip.open(recording) as lines:
        frames = [json.loads(line, parse_float=Decimal)["data"] for line in lines]
    want = {
        (
            frame["t"],
            datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=frame["T"]),
            Decimal(frame["p"]),
            Decimal(frame["q"]),
            "SELL" if frame["m"] else "BUY",
        )
        for frame in frames
    }
    assert len(want) == 19_904
    async with (
        simulated_exchange(replay=recording, replay_speed=0) as exchange,
        daemon(
            tmp_path,
            **venue(exchange, DATABASE_URL=migrated_database, SUPPORTED_SYMBOLS="BTCUSDT"),
            STREAMS="trade",
        ) as one,
    ):
        await one.until_stored(19_904)
        assert await one.terminate() == 0
        async with connected(migrated_database) as conn:
            rows = await conn.fetch(
                "SELECT trade_id, timestamp, price, quantity, side FROM raw_trades"
            )
            assert len(rows) == 19_904
            assert {tuple(row) for row in rows} == want
            ranges = await conn.fetch("SELECT first_id, last_id FROM trade_coverage")
            assert [tuple(row) for row in ranges] == [(3735683259, 3735703162)]
            await assert_ledger(conn)


async def test_tickers_and_klines_equal_what_the_exchange_shows(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols="BTCUSDT,ETHUSDT", rate=200, epoch=-300) as exchange,
        daemon(
            tmp_path,
            **venue(exchange, DATABASE_URL=migrated_database, SUPPORTED_SYMBOLS="BTCUSDT,ETHUSDT"),
        ) as one,
    ):
        await one.until(lambda health: health["counts"]["tickers_stored"] >= 6)
        await one.until(lambda health: health["counts"]["klines_stored"] >= 4)
        assert await one.terminate() == 0
        async with connected(migrated_database) as conn:
            tickers = await conn.fetch("SELECT * FROM tickers")
            klines = await conn.fetch("SELECT * FROM klines")
        assert {row["symbol"] for row in tickers} == {"BTCUSDT", "ETHUSDT"}
        seconds = [(row["symbol"], row["timestamp"]) for row in tickers]
        assert len(set(seconds)) == len(seconds)
        for row in tickers:
            assert row["timestamp"] == row["event_time"].replace(microsecond=0)
            assert row["trade_count"] == row["last_id"] - row["first_id"] + 1
            last = exchange.truth.trade(row["symbol"], row["last_id"])
            assert row["last_price"] == Decimal(last.price_e8).scaleb(-8)
            assert row["last_quantity"] == Decimal(last.quantity_e8).scaleb(-8)
        for row in klines:
            if row["trade_count"] == 0:  # of a minute that has only just begun
                assert row["first_id"] == row["last_id"] == -1
                continue
            candle = exchange.truth.candle(row["symbol"], row["first_id"], row["last_id"] + 1)
            assert candle is not None
            for column, value in {
                "open": candle.open_e8,
                "high": candle.high_e8,
                "low": candle.low_e8,
                "close": candle.close_e8,
                "volume": candle.volume_e8,
                "quote_volume": candle.quote_volume_e8,
                "taker_buy_base_volume": candle.taker_base_e8,
                "taker_buy_quote_volume": candle.taker_quote_e8,
            }.items():
                assert row[column] == Decimal(value).scaleb(-8), (column, dict(row))
            assert row["trade_count"] == candle.trade_count
            assert row["timestamp"].second == 0


async def test_a_database_that_is_down_at_the_start_and_goes_away_costs_no_row(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    dsn = pg_server.dsn
    await pg_server.stop()
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=1500, count=9000) as exchange,
        daemon(tmp_path, DATABASE_URL=dsn, **venue(exchange)) as one,
    ):
        await one.until(lambda health: health["ring"]["rows"] > 1000)
        status, ready = await one.get("/health/db")
        assert status == 503
        assert not ready["reachable"]
        await pg_server.start()
        await one.until(lambda health: health["counts"]["trades_stored"] > 2000)
        await pg_server.stop()
        await one.until(lambda health: health["database"]["away_s"])
        await one.until(lambda health: health["ring"]["rows"] > 500)
        await pg_server.start()
        sent = await finished(exchange)
        await one.until_stored(9000)
        assert (await one.get("/health/db"))[0] == 200
        assert await one.terminate() == 0
        await assert_exact(dsn, exchange, sent)


async def test_a_database_that_goes_while_the_market_is_quiet_is_noticed(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    async with (
        simulated_exchange(rate=300, symbols="BTCUSDT") as exchange,
        daemon(
            tmp_path,
            DATABASE_URL=pg_server.dsn,
            STREAMS="trade",
            **venue(exchange) | {"SUPPORTED_SYMBOLS": "BTCUSDT"},
        ) as one,
    ):
        await one.until_stored(1)
        await exchange.fault("quiet", symbol="BTCUSDT", seconds=600)
        health = await one.until(lambda health: health["feed"]["data_age_s"] > 0.5)
        stored = health["counts"]["trades_stored"]
        await pg_server.stop()
        health = await one.until(lambda health: not health["database"]["reachable"])
        assert "database_away" in [reason["code"] for reason in health["reasons"]]
        assert (await one.get("/health/db"))[0] == 503
        assert "the database does not answer" in one.log
        await pg_server.start()
        health = await one.until(lambda health: health["database"]["reachable"])
        assert health["counts"]["trades_stored"] == stored, "and nothing was written"


async def test_rows_in_the_ring_survive_kill_9(tmp_path: Path, pg_server: EmbeddedPostgres) -> None:
    """With the database away every trade is in the ring only; the daemon is killed there."""
    dsn = pg_server.dsn
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=2000, count=5000) as exchange,
        daemon(tmp_path, DATABASE_URL=dsn, **venue(exchange)) as one,
    ):
        await one.until(lambda health: health["counts"]["trades_stored"] > 1000)
        await pg_server.stop()
        sent = await finished(exchange)
        total = sum(last - first + 1 for first, last in sent.values())
        await one.until(lambda h: sum(h["counts"][n] for n in ("trades_received",)) >= total)
        await one.kill()
        await pg_server.start()
        await one.start()
        await one.until(lambda health: health["ring"]["rows"] == 0 and health["database"])
        assert await one.terminate() == 0
        await assert_exact(dsn, exchange, sent)


async def test_kill_9_at_random_points_leaves_only_true_rows_and_a_true_ledger(
    tmp_path: Path, migrated_database: str
) -> None:
    """What was sent while the daemon was dead is a hole in the ledger; all else is exact."""
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=3000) as exchange,
        daemon(tmp_path, DATABASE_URL=migrated_database, **venue(exchange)) as one,
    ):
        for wanted in (700, 1100, 300, 2100):
            await one.until_stored(wanted)
            await one.kill()
            await one.start()
        await one.until_stored(500)
        assert await one.terminate() == 0
        async with connected(migrated_database) as conn:
            await assert_ledger(conn)
            for symbol in SYMBOLS.split(","):
                ranges = await conn.fetch(
                    "SELECT first_id, last_id FROM trade_coverage WHERE symbol = $1", symbol
                )
                for first_id, last_id in ranges:
                    proof = (await prove(conn, exchange.truth, {symbol: (first_id, last_id)}))[
                        symbol
                    ]
                    assert proof.equal == proof.sent, proof
            holes = await conn.fetch("SELECT * FROM trade_gaps WHERE state = 'open'")
            assert holes, "trades were printed while the daemon was dead"
            assert {hole["cause"] for hole in holes} == {"restart"}
            count = await conn.fetchval(
                "SELECT count(*) - count(DISTINCT symbol) FROM trade_coverage"
            )
            assert len(holes) == count


async def test_a_dropped_connection_and_a_half_open_one_are_replaced(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=500, cut_after=1.5) as exchange,
        daemon(tmp_path, DATABASE_URL=migrated_database, **venue(exchange)) as one,
    ):
        await one.until(lambda health: health["counts"]["reconnects"] >= 3)
        await one.until_stored(1000)
        assert await one.terminate() == 0
        async with connected(migrated_database) as conn:
            await assert_ledger(conn)


async def test_the_embedded_database_is_kept_between_runs(tmp_path: Path, short_dir: Path) -> None:
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=1000, count=2000) as exchange,
        daemon(tmp_path, **venue(exchange, DATA_DIR=short_dir / "data")) as one,
    ):
        sent = await finished(exchange)
        await one.until_stored(2000)
        assert await one.terminate() == 0
        assert one.log.index("database is open") < one.log.index("capturing"), "at the very first"
        assert "trades were captured here before" not in one.log, "it is a first start"
        await one.start()
        health = await one.until(lambda health: health["database"]["reachable"])
        assert health["database"]["embedded"]
        assert await one.terminate() == 0
        server = EmbeddedPostgres(short_dir / "data")
        try:
            await assert_exact(await server.start(), exchange, sent)
        finally:
            await server.stop()


async def test_a_record_that_begins_anew_elsewhere_is_told(
    tmp_path: Path, short_dir: Path, migrated_database: str
) -> None:
    """As when the file with DATABASE_URL is lost and PostgreSQL's programs are at hand."""
    async with simulated_exchange(rate=1000) as exchange:
        for environ in ({"DATABASE_URL": migrated_database}, {}):
            given = venue(exchange, SUPPORTED_SYMBOLS="BTCUSDT", DATA_DIR=short_dir, **environ)
            async with daemon(tmp_path, **given) as one:
                await one.until_stored(100)
                assert await one.terminate() == 0
                assert ("although trades were captured here before" in one.log) is (not environ)


async def test_a_stop_while_the_embedded_database_is_made(tmp_path: Path, short_dir: Path) -> None:
    """The cluster is left whole or not at all, and no server runs on."""
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=1000, count=2000) as exchange,
        daemon(tmp_path, **venue(exchange, DATA_DIR=short_dir / "data")) as one,
    ):
        await one.until_logged("making a new PostgreSQL cluster")
        async with asyncio.timeout(15):
            assert await one.terminate() == 0
        assert not EmbeddedPostgres(short_dir / "data").running
        assert not list(short_dir.rglob("postmaster.pid"))
        assert "Traceback" not in one.log
        await one.start()
        await one.until_stored(2000)
        assert await one.terminate() == 0


async def run_and_end(folder: Path, **environ: Any) -> tuple[int, str]:
    one = Daemon(folder, **environ)
    await one.start()
    code = await one.ended()
    return code, one.log


async def test_what_cannot_start_says_why_in_a_sentence(
    tmp_path: Path, migrated_database: str, server_dsn: str
) -> None:
    missing = server_dsn.replace("/tradecore?", "/nosuchdb?")
    code, log = await run_and_end(tmp_path, DATABASE_URL=missing)
    assert code == 3
    assert "nosuchdb" in log
    assert "Traceback" not in log
    async with connected(migrated_database) as conn:
        await conn.execute(
            "INSERT INTO schema_migrations (version, name, checksum) VALUES (999, '999_x', 'x')"
        )
    code, log = await run_and_end(tmp_path, DATABASE_URL=migrated_database)
    assert code == 3
    assert "newer" in log
    assert "Traceback" not in log


@asynccontextmanager
async def linked(folder: Path, dsn: str) -> AsyncIterator[Link]:
    """A way to the database that can be stalled."""
    link = Link(folder / "link", dsn)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def test_a_database_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, short_dir: Path, migrated_database: str
) -> None:
    """Neither the start of capture nor a change of the symbols; what came is stored later."""
    settings = tmp_path / "settings"
    settings.write_text("SUPPORTED_SYMBOLS=BTCUSDT\n")
    async with (
        linked(short_dir, migrated_database) as link,
        simulated_exchange(symbols=SYMBOLS, rate=300) as exchange,
    ):
        link.stall()
        environ = {**venue(exchange), "SETTINGS_FILE": settings, "STREAMS": "trade"}
        del environ["SUPPORTED_SYMBOLS"]
        async with daemon(tmp_path, DATABASE_URL=link.dsn, **environ) as one:
            async with asyncio.timeout(7):  # a database that says nothing is given up after 10 s
                await one.until(lambda h: h["ring"]["rows"] > 0)
                assert not (await one.health())["database"]["reachable"]
                await one.until(lambda h: h["rates"]["trades_received_per_s"] > 0)
                settings.write_text("SUPPORTED_SYMBOLS=BTCUSDT,ETHUSDT\n")
                hang_up(one)
                await one.until(lambda h: h["feed"]["streams_live"] == 2)
            link.flow()
            await one.until(lambda h: h["ring"]["rows"] == 0 and h["database"]["reachable"])
            assert await one.terminate() == 0
            assert "Traceback" not in one.log
        async with connected(migrated_database) as conn:
            found = await conn.fetch("SELECT DISTINCT symbol FROM trade_coverage")
            assert {row["symbol"] for row in found} == {"BTCUSDT", "ETHUSDT"}


async def test_klines_that_are_added_by_sighup_are_cross_checked(
    tmp_path: Path, migrated_database: str
) -> None:
    settings = tmp_path / "settings"
    settings.write_text("STREAMS=trade\n")
    async with (
        simulated_exchange(symbols="BTCUSDT", rate=300, epoch=-120) as exchange,
        daemon(
            tmp_path,
            DATABASE_URL=migrated_database,
            **venue(exchange, SUPPORTED_SYMBOLS="BTCUSDT", SETTINGS_FILE=settings),
        ) as one,
    ):
        await one.until_stored(300)
        settings.write_text("STREAMS=trade,kline_1m\n")
        hang_up(one)
        await one.until(lambda h: h["counts"]["klines_stored"] > 0)
        await one.until(lambda h: h["completeness"]["audit"]["age_s"] is not None)
        assert await one.terminate() == 0


async def test_a_refusal_that_comes_late_ends_the_start_all_the_same(
    tmp_path: Path, short_dir: Path, migrated_database: str
) -> None:
    async with connected(migrated_database) as conn:
        await conn.execute(
            "INSERT INTO schema_migrations (version, name, checksum) VALUES (999, '999_x', 'x')"
        )
    async with (
        linked(short_dir, migrated_database) as link,
        simulated_exchange(symbols=SYMBOLS, rate=300) as exchange,
    ):
        link.stall()
        async with daemon(tmp_path, DATABASE_URL=link.dsn, **venue(exchange)) as one:
            await one.until(lambda h: h["ring"]["rows"] > 0)
            link.flow()
            assert await one.ended() == 3
            assert "newer" in one.log.splitlines()[-1]
            assert "Traceback" not in one.log


async def test_a_second_daemon_on_the_same_folder_is_refused(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=100) as exchange,
        daemon(tmp_path, DATABASE_URL=migrated_database, **venue(exchange)) as one,
    ):
        await one.until_stored(1)
        second = Daemon(tmp_path, DATABASE_URL=migrated_database, **venue(exchange))
        second.log_file = tmp_path / "second.log"
        await second.start()
        assert await second.ended() == 4
        assert "used by another tradecore" in second.log
        stored = (await one.health())["counts"]["trades_stored"]
        await one.until_stored(stored + 1)
        assert await one.terminate() == 0


async def test_a_taken_port_and_wrong_settings_are_said_at_once(tmp_path: Path) -> None:
    code, log = await run_and_end(
        tmp_path, BATCH_SIZE="many", HTTP_PORT="99999", SUPORTED_SYMBOLS="X"
    )
    assert code == 2
    assert all(name in log for name in ("BATCH_SIZE", "HTTP_PORT", "SUPORTED_SYMBOLS"))


async def test_a_full_ring_refuses_a_known_hole_and_recovers(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    dsn = pg_server.dsn
    environ = {"RING_CAPACITY": 1024, "DATABASE_URL": dsn, "BACKFILL_MAX_AGE": "off"}
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=2000) as exchange,
        daemon(tmp_path, **venue(exchange, **environ)) as one,
    ):
        await one.until_stored(500)
        await pg_server.stop()
        body = await one.until(lambda h: "ring_above_high_water" in str(h["reasons"]))
        assert not body["ready"]
        # The sockets are paused first; when that has lasted, trades are refused and counted.
        await one.until(lambda h: h["counts"]["trades_refused"] > 100)
        await pg_server.start()
        await one.until(lambda h: h["ready"] and h["ring"]["rows"] < 500)
        counts = (await one.health())["counts"]
        refused = counts["trades_refused"]
        await one.until_stored(counts["trades_stored"] + 1000)  # what comes next shows the holes
        assert await one.terminate() == 0
        async with connected(dsn) as conn:
            await assert_ledger(conn)
            missing = await conn.fetchval(
                "SELECT sum(last_id - first_id + 1) FROM trade_gaps WHERE state = 'open'"
            )
            assert missing >= refused
            causes = await conn.fetch("SELECT DISTINCT cause FROM trade_gaps")
            assert [row["cause"] for row in causes] == ["overload"]
