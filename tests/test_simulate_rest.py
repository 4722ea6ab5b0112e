"""The simulated exchange's REST side: history, candles, statistics, weights, error bodies."""

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from fakes import SimulatedExchange, simulated_exchange

from tradecore.simulate.limits import WeightLimit
from tradecore.simulate.words import E8, MINUTE_US, Candle, Trade

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exchange() -> AsyncIterator[SimulatedExchange]:
    """An exchange with ten minutes of history."""
    async with simulated_exchange(rate=50, epoch=-600, weight_limit=1_000_000) as exchange:
        yield exchange


def trades_of(symbol: str, rows: list[dict[str, Any]], unit_us: int = 1000) -> list[Trade]:
    """Read REST trade rows."""
    keys = ["id", "price", "qty", "quoteQty", "time", "isBuyerMaker", "isBestMatch"]
    assert all(list(row) == keys for row in rows)
    assert all(Decimal(r["price"]) * Decimal(r["qty"]) == Decimal(r["quoteQty"]) for r in rows)
    return [
        Trade(
            symbol,
            row["id"],
            int(Decimal(row["price"]) * E8),
            int(Decimal(row["qty"]) * E8),
            row["time"] * unit_us,
            row["isBuyerMaker"],
        )
        for row in rows
    ]


@pytest.mark.parametrize("symbol", ["BTCUSDT", "LUNCUSDT", "币安人生USDT", "NEVERLISTEDUSDT"])
async def test_historical_trades_equal_the_market(exchange: SimulatedExchange, symbol: str) -> None:
    market = exchange.truth
    first = market.first_id(symbol)
    path = "/api/v3/historicalTrades"
    rows = await exchange.get(path, symbol=symbol, fromId=first + 10, limit=1000)
    expected = market.trades(symbol, first + 10, first + 10 + len(rows))
    assert len(rows) > 100
    assert trades_of(symbol, rows) == [
        t._replace(trade_us=t.trade_us // 1000 * 1000) for t in expected
    ]
    older = await exchange.get(path, symbol=symbol, fromId=1, limit=5)
    assert [row["id"] for row in older] == list(range(first, first + 5))
    assert await exchange.get(path, symbol=symbol, fromId=first + 10**9) == []


async def test_newest_trades_and_microseconds(exchange: SimulatedExchange) -> None:
    async with aiohttp.ClientSession(headers={"X-MBX-TIME-UNIT": "MICROSECOND"}) as session:
        for path in ("trades", "historicalTrades"):
            url = f"{exchange.rest}/api/v3/{path}"
            async with session.get(url, params={"symbol": "ETHUSDT", "limit": 7}) as response:
                trades = trades_of("ETHUSDT", await response.json(), unit_us=1)
            assert trades == exchange.truth.trades(
                "ETHUSDT", trades[0].trade_id, trades[0].trade_id + 7
            )
        async with session.get(f"{exchange.rest}/api/v3/time") as response:
            assert len(str((await response.json())["serverTime"])) == 16
    assert await exchange.get("/api/v3/ping") == {}
    assert len(str((await exchange.get("/api/v3/time"))["serverTime"])) == 13


@pytest.mark.parametrize("symbol", ["BTCUSDT", "QUIETUSDT"])
async def test_klines_equal_the_market(exchange: SimulatedExchange, symbol: str) -> None:
    rows = await exchange.get("/api/v3/klines", symbol=symbol, interval="1m")
    for row in rows[:-1]:
        truth = exchange.truth.minute(symbol, row[0] * 1000)
        if truth is None:
            assert (row[8], {Decimal(row[5]), Decimal(row[7])}) == (0, {0})
            continue
        sums = [int(Decimal(row[at]) * E8) for at in (1, 2, 3, 4, 5, 7, 9, 10)]
        assert Candle(truth.first_id, truth.last_id, *sums) == truth
        assert row[8] == truth.trade_count
        assert row[6] - row[0] == 59_999
    opens = [row[0] for row in rows]
    assert opens == list(range(opens[0], opens[-1] + 1, 60_000))
    some = await exchange.get(
        "/api/v3/klines", symbol=symbol, interval="1m", startTime=opens[1], limit=2
    )
    assert some[:1] == rows[1:2]
    assert [row[0] for row in some] == opens[1:3]


async def test_day_statistics(exchange: SimulatedExchange) -> None:
    day = await exchange.get("/api/v3/ticker/24hr", symbol="BTCUSDT")
    market = exchange.truth
    truth = market.candle("BTCUSDT", day["firstId"], day["lastId"] + 1)
    assert truth is not None
    assert day["firstId"] == market.first_id("BTCUSDT")
    assert day["count"] == truth.trade_count
    names = ("openPrice", "highPrice", "lowPrice", "lastPrice", "volume", "quoteVolume")
    assert tuple(int(Decimal(day[name]) * E8) for name in names) == truth[2:8]
    days = await exchange.get("/api/v3/ticker/24hr", type="MINI")
    assert [d["symbol"] for d in days] == list(market.symbols)
    assert "priceChange" not in days[0]
    two = await exchange.get("/api/v3/ticker/24hr", symbols='["BTCUSDT","ETHUSDT"]')
    assert [d["symbol"] for d in two] == ["BTCUSDT", "ETHUSDT"]


async def test_exchange_info(exchange: SimulatedExchange) -> None:
    info = await exchange.get("/api/v3/exchangeInfo")
    assert [s["symbol"] for s in info["symbols"]] == list(exchange.truth.symbols)
    pepe = next(s for s in info["symbols"] if s["symbol"] == "PEPEUSDT")
    assert (pepe["baseAsset"], pepe["quoteAsset"]) == ("PEPE", "USDT")
    assert (pepe["baseAssetPrecision"], pepe["quoteAssetPrecision"]) == (2, 8)
    one = await exchange.get("/api/v3/exchangeInfo", symbol="BTCIDRT")
    assert [s["quoteAssetPrecision"] for s in one["symbols"]] == [2]


@pytest.mark.parametrize(
    ("path", "parameters", "code"),
    [
        ("trades", {}, -1102),
        ("trades", {"symbol": "btcusdt"}, -1100),
        ("trades", {"symbol": "BTCUSDT", "limit": "many"}, -1100),
        ("trades", {"symbol": "BTCUSDT", "limit": 0}, -1130),
        ("trades", {"symbol": "BTCUSDT", "extra": 1}, -1104),
        ("klines", {"symbol": "BTCUSDT"}, -1102),
        ("klines", {"symbol": "BTCUSDT", "interval": "7m"}, -1120),
        ("ticker/24hr", {"symbol": "BTCUSDT", "symbols": "[]"}, -1128),
        ("ticker/24hr", {"type": "HUGE"}, -1130),
    ],
)
async def test_error_bodies(
    exchange: SimulatedExchange, path: str, parameters: dict[str, Any], code: int
) -> None:
    body = await exchange.get(f"/api/v3/{path}", **parameters)
    assert body["code"] == code
    assert body["msg"]


async def test_weights_then_429_then_418() -> None:
    async with simulated_exchange(rate=1, weight_limit=60, strict_symbols=True) as exchange:
        async with aiohttp.ClientSession(exchange.rest) as session:

            async def ask(path: str) -> aiohttp.ClientResponse:
                async with session.get(path) as response:
                    await response.read()
                    return response

            spent = 0
            statuses = []
            for path, weight in (
                ("/api/v3/ping", 1),
                ("/api/v3/exchangeInfo", 20),
                ("/api/v3/klines?symbol=BTCUSDT&interval=1m", 2),
                ("/api/v3/trades?symbol=NOPEUSDT", 25),
                ("/api/v3/ticker/24hr?symbol=BTCUSDT", 2),
            ):
                response = await ask(path)
                spent += weight
                used = int(response.headers["X-MBX-USED-WEIGHT-1M"])
                assert used in (spent, weight)  # the minute may turn in between
                spent = used
                statuses.append(response.status)
            assert statuses == [200, 200, 200, 400, 200]
            while (response := await ask("/api/v3/exchangeInfo")).status == 200:
                pass
            assert response.status == 429
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            while (response := await ask("/api/v3/exchangeInfo")).status != 418:
                assert response.status in (200, 429)
            assert 1 <= int(response.headers["Retry-After"]) <= 120
            body = await exchange.get("/api/v3/ping")
            assert body["code"] == -1003
            assert "IP banned until" in body["msg"]
        assert (await exchange.state())["counts"]["rest 418"] == 2


async def test_lag_retention_and_server_errors() -> None:
    options = {"rest_lag": 30, "rest_keep": 100, "rest_error_every": 3}
    async with simulated_exchange(rate=100, epoch=-60, **options) as exchange:
        path = "/api/v3/historicalTrades"
        rows = await exchange.get(path, symbol="BTCUSDT", fromId=1, limit=1000)
        newest = await exchange.get("/api/v3/trades", symbol="BTCUSDT", limit=1)
        assert len(rows) == 100
        assert newest[0]["time"] - rows[-1]["time"] > 25_000
        failed = await exchange.get("/api/v3/ping")
        assert failed["code"] == -1000


async def test_the_ban_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 6_000.0
    monkeypatch.setattr("tradecore.clock.wall_ns", lambda: int(now_s * 1e9))
    limit = WeightLimit(limit=10, ban_s=120)
    assert [limit.charge(5).status for _ in range(6)] == [200, 200, 429, 429, 429, 418]
    now_s += MINUTE_US / 1e6
    assert limit.charge(1).status == 418
    now_s += 61
    verdict = limit.charge(1)
    assert (verdict.status, verdict.used) == (200, 1)
