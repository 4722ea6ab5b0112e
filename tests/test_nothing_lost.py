"""The whole daemon as a process, in what an operator and a venue do to it: nothing is lost.

Each scenario ends with a comparison with the exchange's truth, row by row. `test_sharing.py` has
two daemons, `test_auditor.py` the cross-check, `tests/torture` mixes of faults.
"""

import asyncio
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import scene
from scene import assert_exact, assert_readable, gaps, metrics, until_whole

from tests.daemon import Daemon, daemon
from tests.fakes import SimulatedExchange, simulated_exchange

ALL = ("BTCUSDT", "ETHUSDT", "PEPEUSDT", "BTTCUSDT")


def venue(exchange: SimulatedExchange, dsn: str, symbols: tuple[str, ...], **more: Any) -> Any:
    return {
        "DATABASE_URL": dsn,
        "BINANCE_WEBSOCKET_URL": exchange.ws,
        "BINANCE_REST_URL": exchange.rest,
        "BINANCE_DUMP_URL": exchange.rest,
        "SUPPORTED_SYMBOLS": ",".join(symbols),
        **more,
    }


async def captured(one: Daemon) -> set[str]:
    """The symbols that are captured now."""
    return set((await one.get("/health/binance"))[1]["symbols"])


async def until_captured(one: Daemon, *symbols: str) -> None:
    """Wait until these symbols, and no others, are captured, and trades of each have come."""
    await one.until(
        lambda body: (
            body["symbols"].keys() == set(symbols)
            and all(state["trades_received"] for state in body["symbols"].values())
        ),
        "/health/binance",
    )


# -- SIGHUP ---------------------------------------------------------------------------------------


async def test_symbols_come_and_go_by_sighup_without_a_hole_for_those_that_stay(
    tmp_path: Path, migrated_database: str
) -> None:
    file = tmp_path / "settings.env"
    file.write_text("SUPPORTED_SYMBOLS=BTCUSDT,ETHUSDT\nBATCH_SIZE=100\n")
    async with (
        simulated_exchange(symbols=",".join(ALL), rate=1000, epoch=-60) as exchange,
        daemon(
            tmp_path, **venue(exchange, migrated_database, ("BTCUSDT",), SETTINGS_FILE=file)
        ) as one,
    ):
        await until_captured(one, "BTCUSDT", "ETHUSDT")

        file.write_text("SUPPORTED_SYMBOLS=BTCUSDT,PEPEUSDT,BTTCUSDT\nBATCH_SIZE=55\n")
        scene.hang_up(one)
        await until_captured(one, "BTCUSDT", "PEPEUSDT", "BTTCUSDT")
        await one.until_logged("these settings change with a restart only")
        assert '"settings":["BATCH_SIZE"]' in one.log

        # What is wrong is refused as a whole.
        file.write_text("SUPPORTED_SYMBOLS=BTCUSDT,ETHUSDT\nBATCH_SIZE=many\n")
        scene.hang_up(one)
        await one.until_logged("the settings are wrong; going on with the present ones")
        assert "BATCH_SIZE is 'many'" in one.log
        file.unlink()
        scene.hang_up(one)
        await one.until_logged("the settings are wrong; going on with the present ones", 2)
        assert await captured(one) == {"BTCUSDT", "PEPEUSDT", "BTTCUSDT"}

        # One that comes back has a hole, which is filled; streams change as well.
        file.write_text("SUPPORTED_SYMBOLS=BTCUSDT,ETHUSDT,PEPEUSDT,BTTCUSDT\nSTREAMS=trade\n")
        scene.hang_up(one)
        await until_captured(one, *ALL)
        body = await one.until(
            lambda body: body["streams_live"] == body["streams_wanted"] == 4, "/health/binance"
        )
        assert body["status"] == "ok"
        await until_whole(migrated_database, exchange, ALL)
        health = await one.until(lambda health: health["completeness"]["holes"] == 0)
        assert health["counts"]["reconnects"] == 0
        assert health["status"] == "ok"
        found = await metrics(one)
        assert found["tradecore_trades_filled_total{rest}"] > 0
        assert found["tradecore_rest_used_weight"] > 0
        assert found["tradecore_holes_closed_total{filled}"] > 0
        assert await one.terminate() == 0
        for symbol in ("BTCUSDT", "PEPEUSDT", "BTTCUSDT"):
            assert await gaps(migrated_database, symbol) == []
        (hole,) = await gaps(migrated_database, "ETHUSDT")
        assert hole[4:] == ("filled", "rest")
        await assert_exact(migrated_database, exchange)
        assert_readable(one)


# -- start ----------------------------------------------------------------------------------------


async def test_a_quiet_symbol_that_moved_while_the_daemon_was_away_is_completed(
    tmp_path: Path, migrated_database: str
) -> None:
    """No trade of it comes any more, and without tickers nothing but REST can tell."""
    symbols = ("BTCUSDT", "ETHUSDT")
    async with (
        simulated_exchange(symbols=",".join(symbols), rate=300) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, symbols, STREAMS="trade")) as one,
    ):
        await one.until_stored(300)
        await one.kill()
        before = await scene.printed(exchange, symbols)
        async with asyncio.timeout(20):
            while (await scene.printed(exchange, symbols))["ETHUSDT"] < before["ETHUSDT"] + 150:
                await asyncio.sleep(0.05)
        await exchange.fault("quiet", symbol="ETHUSDT", seconds=600)
        await one.start()
        await until_whole(migrated_database, exchange, symbols)
        await one.until_logged("held against the venue")
        (line,) = [line for line in one.log.splitlines() if "held against the venue" in line]
        assert "ETHUSDT" in json.loads(line)["moved_while_away"]
        body = (await one.get("/health/binance"))[1]["symbols"]["ETHUSDT"]
        assert body["trades_received"] == 0, "all that is stored of it came by REST"
        assert await one.terminate() == 0
        await assert_exact(migrated_database, exchange)
        assert {hole[3:] for hole in await gaps(migrated_database, "ETHUSDT")} <= {
            ("restart", "filled", "rest")
        }
        assert_readable(one)


async def test_nothing_is_called_complete_that_nobody_can_know(
    tmp_path: Path, migrated_database: str
) -> None:
    """Back without a venue, complete is what is stored, however long that is ago."""
    symbols = ("BTCUSDT", "ETHUSDT")
    async with (
        simulated_exchange(symbols=",".join(symbols), rate=300) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, symbols)) as one,
    ):
        await one.until_stored(300)
        assert await one.terminate() == 0
    async with scene.connected(migrated_database) as conn:
        newest = dict(await conn.fetch("SELECT symbol, last_time FROM trade_coverage"))
    await one.start()
    try:
        for _ in range(2):  # that it stays so must be seen twice
            body = await one.until(
                lambda body: all(one["complete_through"] for one in body["symbols"].values()),
                "/health/binance",
            )
            for symbol, last_time in newest.items():
                told = datetime.fromisoformat(body["symbols"][symbol]["complete_through"])
                assert abs(told - last_time) < timedelta(milliseconds=2), symbol
            await asyncio.sleep(1.1)  # until the next reading
    finally:
        await one.kill()


# -- rollover -------------------------------------------------------------------------------------


async def test_rollovers_cost_no_id_and_no_rest_request(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols=",".join(ALL), rate=1000, epoch=-60) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, ALL, CONNECTION_MAX_AGE="5s")) as one,
    ):
        await one.until(lambda health: health["counts"]["rollovers"] >= 3)
        await until_whole(migrated_database, exchange, ALL)
        found = await metrics(one)
        assert found["tradecore_rollovers_total{age}"] >= 3
        assert found["tradecore_rollovers_total{stale}"] == 0
        assert found["tradecore_reconnects_total{A}"] == 0
        assert found["tradecore_holes"] == 0
        assert found["tradecore_trades_missing_total"] == 0
        assert await exchange.asked() == {}, "no request at all"
        assert await one.terminate() == 0
        assert await gaps(migrated_database) == []
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=0)


async def test_a_quiet_symbol_without_a_ticker_is_confirmed_by_rest_before_a_rollover(
    tmp_path: Path, migrated_database: str
) -> None:
    symbols = ("BTCUSDT", "ETHUSDT")
    environ = {"STREAMS": "trade", "CONNECTION_MAX_AGE": "5s"}
    async with (
        simulated_exchange(symbols=",".join(symbols), rate=300) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, symbols, **environ)) as one,
    ):
        await until_captured(one, *symbols)
        await exchange.fault("quiet", symbol="ETHUSDT", seconds=600)
        await one.until(lambda health: health["counts"]["rollovers"] >= 1)
        asked = await exchange.asked()
        assert asked.keys() == {"ticker/24hr"}, asked
        await until_whole(migrated_database, exchange, symbols)
        health = await one.health()
        assert health["counts"]["reconnects"] == 0
        assert health["counts"]["trades_filled"] == 0
        assert await one.terminate() == 0
        assert await gaps(migrated_database) == []
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=0)


# -- two lines ------------------------------------------------------------------------------------


async def test_what_one_line_lacks_the_other_brings(tmp_path: Path, migrated_database: str) -> None:
    async with (
        simulated_exchange(symbols=",".join(ALL), rate=1000, epoch=-60) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, ALL, FEED_LINES=2)) as one,
    ):
        await until_captured(one, *ALL)
        await one.until(
            lambda body: all(line["lag_count"] + line["late"] for line in body["lines"]),
            "/health/binance",
        )
        await exchange.fault("drop", n=200, connections="one")
        await one.until(
            lambda body: sum(line["missing"] for line in body["lines"]) >= 150, "/health/binance"
        )
        await until_whole(migrated_database, exchange, ALL)
        found = await metrics(one)
        lost = [found[f"tradecore_line_missing_ids_total{{{line}}}"] for line in "AB"]
        assert sorted(lost)[0] == 0
        assert 150 <= sorted(lost)[1] <= 200, "drops at the very end do not show yet"
        for line in "AB":
            assert found[f"tradecore_line_trades_total{{first,{line}}}"] > 0
            assert found[f"tradecore_line_trades_total{{late,{line}}}"] > 0

        # One line dies without a word: the other goes on.
        await exchange.fault("half_open", connections="one")
        stored = (await one.health())["counts"]["trades_stored"]
        await one.until_stored(stored + 1500)
        await one.until(
            lambda health: health["counts"]["rollovers"] + health["counts"]["reconnects"] >= 1
        )
        await one.until(lambda health: health["feed"]["connections_live"] == 2)
        await until_whole(migrated_database, exchange, ALL)
        assert await exchange.asked() == {}, "no request at all"
        assert await one.terminate() == 0
        assert all(hole[4:] == ("filled", "feed") for hole in await gaps(migrated_database))
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=10)


# -- back-fill off --------------------------------------------------------------------------------


async def test_without_back_fill_holes_stay_and_are_shown_until_the_command_fills_them(
    tmp_path: Path, migrated_database: str
) -> None:
    async with (
        simulated_exchange(symbols=",".join(ALL), rate=1000, epoch=-60) as exchange,
        daemon(tmp_path, **venue(exchange, migrated_database, ALL, BACKFILL_MAX_AGE="off")) as one,
    ):
        await until_captured(one, *ALL)
        await exchange.fault("drop", n=100)
        health = await one.until(lambda health: health["completeness"]["ids_missing"] >= 80)
        held = health["completeness"]
        assert held["holes"] > 0
        assert held["oldest_hole_age_s"] > 0
        health = await one.until(lambda health: health["completeness"]["oldest_hole_age_s"] > 2)
        assert health["status"] == "ok", "a hole is a number, not an illness"
        assert health["completeness"]["complete_through"] == held["complete_through"], "stands"
        found = await metrics(one)
        assert found["tradecore_holes_ids"] >= 80
        assert found["tradecore_holes_oldest_age_seconds"] > 2
        assert found["tradecore_trades_filled_total{rest}"] == 0
        assert await exchange.asked() == {}

        code, output = await scene.command("backfill", **one.environ)
        assert code == 0, output
        health = await one.until(lambda health: health["completeness"]["holes"] == 0)
        assert health["completeness"]["complete_through"] > held["complete_through"]
        assert health["completeness"]["oldest_hole_age_s"] is None
        await until_whole(migrated_database, exchange, ALL)
        assert await one.terminate() == 0
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=5)
