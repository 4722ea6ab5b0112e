"""Two daemons that share the symbols by leases in one database, as processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from scene import assert_exact, assert_readable, gaps, metrics, until_whole

from tests.daemon import Daemon, daemon
from tests.fakes import SimulatedExchange, simulated_exchange
from tradecore.shards import symbols_of
from tradecore.store.embedded import EmbeddedPostgres

SHARDS = 4
SYMBOLS = ("BTCUSDT", "ETHUSDT", "PEPEUSDT", "ADAUSDT", "BTTCUSDT", "BNBUSDT")
for shard in range(SHARDS):
    assert symbols_of(SYMBOLS, SHARDS, {shard}), "each shard has a symbol"


@asynccontextmanager
async def node(
    folder: Path, exchange: SimulatedExchange, dsn: str, **more: Any
) -> AsyncIterator[Daemon]:
    environ = {
        "DATABASE_URL": dsn,
        "BINANCE_WEBSOCKET_URL": exchange.ws,
        "BINANCE_REST_URL": exchange.rest,
        "SUPPORTED_SYMBOLS": ",".join(SYMBOLS),
        "SHARDS": SHARDS,
        **more,
    }
    async with daemon(folder, **environ) as one:
        await one.until(lambda health: health["database"]["reachable"])
        yield one


async def captured(one: Daemon) -> set[str]:
    body = (await one.get("/health/binance"))[1]
    return set(body["symbols"]) if body else set()


async def until_shared(*nodes: Daemon, limit_s: float = 30.0) -> list[set[str]]:
    """Wait until each symbol is captured by exactly one of them, evenly; return whose is what."""
    parts: list[set[str]] = []
    try:
        async with asyncio.timeout(limit_s):
            while True:
                parts = [await captured(one) for one in nodes]
                held = [(await metrics(one))["tradecore_shards_held"] for one in nodes]
                whole = sum(map(len, parts)) == len(SYMBOLS) == len(set().union(*parts))
                if whole and held == [SHARDS / len(nodes)] * len(nodes):
                    return parts
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not shared: {parts}") from None


async def assert_no_break(dsn: str) -> None:
    """The one may store what follows before the other stores what it had received; no more."""
    assert {hole[4:] for hole in await gaps(dsn)} <= {("filled", "feed")}


async def test_two_share_the_symbols_and_one_takes_all_over_from_a_dead_one(
    tmp_path: Path, migrated_database: str
) -> None:
    dsn = migrated_database
    async with (
        simulated_exchange(symbols=",".join(SYMBOLS), rate=700) as exchange,
        # Trades alone: no ticker tells what a symbol has done that is quiet at the take-over.
        node(tmp_path / "a", exchange, dsn, STREAMS="trade") as first,
        node(tmp_path / "b", exchange, dsn, STREAMS="trade") as second,
    ):
        mine, other = await until_shared(first, second)
        assert mine and other
        await until_whole(dsn, exchange, SYMBOLS)
        await assert_no_break(dsn)  # a shard that moves is captured by both for a while

        await first.kill()
        quiet = sorted(mine)[0]
        await asyncio.sleep(0.5)  # it trades on for a while, and nobody captures it
        await exchange.fault("quiet", symbol=quiet, seconds=600)
        await second.until(lambda body: len(body["symbols"]) == len(SYMBOLS), "/health/binance")
        assert (await metrics(second))["tradecore_shards_held"] == SHARDS
        await until_whole(dsn, exchange, SYMBOLS, limit_s=20)
        health = await second.health()
        assert health["status"] == "ok"
        assert health["counts"]["trades_filled"] > 0
        assert await second.terminate() == 0
        await assert_exact(dsn, exchange)
        assert_readable(first)
        assert_readable(second)


async def test_a_stopped_one_hands_over_without_a_hole(
    tmp_path: Path, migrated_database: str
) -> None:
    dsn = migrated_database
    async with (
        simulated_exchange(symbols=",".join(SYMBOLS), rate=700, epoch=-60) as exchange,
        node(tmp_path / "a", exchange, dsn) as first,
        node(tmp_path / "b", exchange, dsn) as second,
    ):
        await until_shared(first, second)
        assert await first.terminate() == 0
        assert (await metrics(second))["tradecore_shards_held"] == SHARDS, "at once"
        await until_whole(dsn, exchange, SYMBOLS)
        await assert_no_break(dsn)  # the new owner has connected before the old one goes
        assert await exchange.asked() == {}, "no request at all"
        assert await second.terminate() == 0
        await assert_exact(dsn, exchange)
        assert_readable(first, most=0)
        assert_readable(second, most=0)


async def test_with_the_database_away_both_capture_on(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    dsn = pg_server.dsn
    async with (
        simulated_exchange(symbols=",".join(SYMBOLS), rate=700, epoch=-60) as exchange,
        node(tmp_path / "a", exchange, dsn) as first,
        node(tmp_path / "b", exchange, dsn) as second,
    ):
        parts = await until_shared(first, second)
        await pg_server.stop()
        rows = [(await one.health())["ring"]["rows"] for one in (first, second)]
        await asyncio.sleep(4)  # longer than a lease lasts
        for one, part, before in zip((first, second), parts, rows, strict=True):
            assert await captured(one) == part
            health = await one.until(lambda h, n=before: h["ring"]["rows"] > n + 400)
            assert [reason["code"] for reason in health["reasons"]] == ["database_away"]
        await pg_server.start()
        await until_shared(first, second)
        await until_whole(dsn, exchange, SYMBOLS)
        assert await first.terminate() == await second.terminate() == 0
        await assert_exact(dsn, exchange)
        # Of what one has in its ring the other may learn before it is stored, and fetch it.
        assert {hole[4] for hole in await gaps(dsn)} <= {"filled"}
        assert_readable(first, most=20)
        assert_readable(second, most=20)


async def test_one_that_has_no_shard_stands_by_in_good_health(
    tmp_path: Path, migrated_database: str
) -> None:
    dsn = migrated_database
    async with (
        simulated_exchange(symbols=",".join(SYMBOLS), rate=300, epoch=-60) as exchange,
        node(tmp_path / "a", exchange, dsn, SHARDS=1) as first,
    ):
        await first.until_stored(100)
        async with node(tmp_path / "b", exchange, dsn, SHARDS=1) as second:
            await asyncio.sleep(1.5)  # some ticks of the leases
            health = await second.health()
            assert health["status"] == "ok", health["reasons"]
            assert (await second.get("/ready"))[0] == 200
            assert (await second.get("/health/binance"))[0] == 200
            found = await metrics(second)
            assert found["tradecore_shards_held"] == 0
            assert await captured(second) == set()
            await first.kill()
            await second.until(lambda health: health["ready"] and health["feed"]["streams_live"])
            assert (await metrics(second))["tradecore_shards_held"] == 1
            await until_whole(dsn, exchange, SYMBOLS)
            assert await second.terminate() == 0
        await assert_exact(dsn, exchange)
        assert_readable(second)
