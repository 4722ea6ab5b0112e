"""The daemon with REDIS_URL, as a process: what it publishes, and that nothing which befalls Redis
costs the record a trade.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from scene import assert_exact, assert_readable, hang_up, metrics, until_whole

from tests.daemon import WAIT_LIMIT_S, Daemon, daemon
from tests.fakes import SimulatedExchange, simulated_exchange
from tests.redis_desk import RedisServer, needs_redis, next_batch, redis_server
from tests.test_nothing_lost import until_captured, venue

pytestmark = needs_redis

PAIR = ("BTCUSDT", "ETHUSDT")
STREAMS = {f"{symbol.lower()}@{kind}" for symbol in PAIR for kind in ("trade", "ticker")}


@asynccontextmanager
async def scene(
    folder: Path, dsn: str, redis: RedisServer, **more: Any
) -> AsyncIterator[tuple[SimulatedExchange, Daemon]]:
    async with (
        simulated_exchange(symbols=",".join(PAIR), rate=300) as exchange,
        daemon(folder, **venue(exchange, dsn, PAIR), REDIS_URL=redis.url, **more) as one,
    ):
        await until_captured(one, *PAIR)
        yield exchange, one


async def until_up(one: Daemon, up: bool = True) -> Any:
    return await one.until(lambda health: health["redis"]["up"] is up)


async def test_prices_and_tickers_are_those_of_the_tables(
    tmp_path: Path, short_dir: Path, migrated_database: str
) -> None:
    async with (
        redis_server(short_dir) as redis,
        scene(tmp_path, migrated_database, redis, REDIS_TRADES=1000, NODE_NAME="one") as (
            exchange,
            one,
        ),
    ):
        found = await redis.until_last(lambda found: found.keys() == STREAMS)
        market = await exchange.truth_now()
        async with redis.subscribed() as lines:
            batch = await next_batch(lines)
        for event in [*found.values(), *batch]:
            if event["e"] == "trade":
                truth = market.trade(event["s"], event["t"])
                assert int(Decimal(event["p"]).scaleb(8)) == truth.price_e8
                assert int(Decimal(event["q"]).scaleb(8)) == truth.quantity_e8
            else:
                assert event["e"] == "24hrTicker" and "." in event["c"]
        async with asyncio.timeout(WAIT_LIMIT_S):
            while not json.loads(status := await redis.cli("GET", "tradecore:status:one"))["ready"]:
                await asyncio.sleep(0.05)
        assert json.loads(status)["symbols"] == 2
        shown = await metrics(one)
        assert shown["tradecore_redis_up"] == 1
        assert shown["tradecore_redis_batches_total"] > 0
        assert shown["tradecore_redis_trades_dropped_total"] == 0
        assert shown["tradecore_redis_errors_total{auth}"] == 0
        assert await one.terminate() == 0
        # The last trade of each symbol that was stored is the one that Redis has.
        last = {event["s"]: event["t"] for event in (await redis.last()).values() if "t" in event}
        entries = (await redis.cli("XRANGE", "tradecore:trades", "-", "+")).splitlines()
        packed = [event for line in entries if line[:1] == "[" for event in json.loads(line)]
        ids = {s: [event["t"] for event in packed if event["s"] == s] for s in PAIR}
        assert {symbol: ids[symbol][-1] for symbol in PAIR} == last
        assert all(found == [*range(found[0], found[-1] + 1)] for found in ids.values())
        assert await redis.cli("EXISTS", "tradecore:status:one") == "0"
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=0)


async def test_nothing_that_befalls_redis_costs_a_trade(
    tmp_path: Path, short_dir: Path, migrated_database: str
) -> None:
    async with (
        redis_server(short_dir) as redis,
        scene(tmp_path, migrated_database, redis) as (exchange, one),
    ):

        async def fails(reason: str) -> None:
            before = (await one.health())["redis"]["errors"][reason]
            body = await one.until(lambda health: health["redis"]["errors"][reason] > before)
            assert body["ready"] is True
            await until_whole(migrated_database, exchange, PAIR)

        async def mended() -> None:
            await until_up(one)
            last = (await redis.last()).get("btcusdt@trade", {"t": 0})["t"]
            await redis.until_last(lambda found: found.get("btcusdt@trade", {"t": 0})["t"] > last)

        await mended()
        redis.hang()
        await fails("timeout")
        redis.go_on()
        await mended()
        await redis.kill()
        await fails("unreachable")
        await redis.start()
        await mended()
        for reason, spoil, mend in (
            ("readonly", "REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
            ("memory", "CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ):
            await redis.cli(*spoil.split())
            await fails(reason)
            await redis.cli(*mend.split())
            await mended()
        await redis.kill()

        async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(garbage, "127.0.0.1", redis.port):
            await fails("protocol")
            await one.until(lambda health: health["redis"]["away_s"] > 5)
            body = await one.health()
            assert body["status"] == "degraded" and body["ready"] is True
            assert [reason["code"] for reason in body["reasons"]] == ["redis_away"]
            assert (await one.get("/ready"))[0] == 200
        await redis.start()
        await mended()
        redis.hang()
        begin = asyncio.get_running_loop().time()
        assert await one.terminate() == 0
        assert asyncio.get_running_loop().time() - begin < WAIT_LIMIT_S / 4
        redis.go_on()
        await assert_exact(migrated_database, exchange)
        assert_readable(one, most=4)


async def test_symbols_that_come_and_go(
    tmp_path: Path, short_dir: Path, migrated_database: str
) -> None:
    path = tmp_path / "settings"
    path.write_text("SUPPORTED_SYMBOLS=BTCUSDT\n")
    async with (
        redis_server(short_dir) as redis,
        simulated_exchange(symbols=",".join(PAIR), rate=300) as exchange,
        daemon(
            tmp_path,
            **venue(exchange, migrated_database, PAIR),
            REDIS_URL=redis.url,
            SETTINGS_FILE=path,
            NODE_NAME="one",
        ) as one,
    ):
        await until_captured(one, "BTCUSDT")
        await redis.until_last(lambda found: "btcusdt@trade" in found)
        path.write_text("SUPPORTED_SYMBOLS=ETHUSDT\n")
        hang_up(one)
        found = await redis.until_last(lambda found: "ethusdt@trade" in found)
        await redis.cli("DEL", "tradecore:last")
        await redis.cli("CLIENT", "KILL", "TYPE", "normal")
        # All that is written anew is of today's symbols.
        found = await redis.until_last(lambda found: "ethusdt@ticker" in found)
        assert all(event["s"] == "ETHUSDT" for event in found.values())


@pytest.mark.parametrize("url", ["redis://h:x", "http://h", "redis://u@h"])
async def test_a_wrong_address_ends_the_start(tmp_path: Path, url: str) -> None:
    one = Daemon(tmp_path, REDIS_URL=url)
    await one.start()
    assert await one.ended() == 2
    assert "REDIS_URL has a wrong value: give" in one.log
