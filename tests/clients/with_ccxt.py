"""ccxt: SCRIPT BASE_URL asks for everything, SCRIPT BASE_URL live COUNT for trades.

Its numbers are floats, but what the venue said is in `info`. It takes aggregate trades unless told
otherwise, and those are not recorded.
"""

import asyncio
import json
import sys
from typing import Any

import ccxt
import ccxt.pro

OPTIONS = {"options": {"fetchMarkets": ["spot"], "fetchTradesMethod": "publicGetTrades"}}


def ask(base: str) -> dict[str, Any]:
    client = ccxt.binance(OPTIONS)
    client.urls["api"]["public"] = f"{base}/api/v3"
    markets = client.load_markets()
    client.fetch_time()
    candles = client.fetch_ohlcv("BTC/USDT", "1m")
    raw = client.public_get_klines({"symbol": "BTCUSDT", "interval": "1m", "limit": 500})
    assert candles == [[int(one[0]), *map(float, one[1:6])] for one in raw]
    assert client.fetch_ohlcv("BTC/USDT", "1h", since=1, limit=5)
    found: dict[str, Any] = {
        "klines": [_kline(one) for one in raw],
        "trades": [_trade(one["info"]) for one in client.fetch_trades("BTC/USDT", limit=700)],
        "ticker": client.fetch_ticker("BTC/USDT")["info"],
        "symbols": [markets[one]["id"] for one in ("BTC/USDT", "ETH/USDT")],
        "prices": {
            one["info"]["symbol"]: one["info"]["price"]
            for one in client.fetch_last_prices(["BTC/USDT", "ETH/USDT"]).values()
        },
    }
    found["price"] = found["prices"]["BTCUSDT"]
    for name in ("openTime", "closeTime", "firstId", "lastId", "count"):
        found["ticker"][name] = int(found["ticker"][name])
    assert sorted(client.fetch_tickers(["BTC/USDT", "ETH/USDT"])) == ["BTC/USDT", "ETH/USDT"]
    try:
        client.public_get_klines({"symbol": "NOPE", "interval": "1m"})
    except ccxt.BadSymbol as error:
        told = json.loads(str(error).removeprefix("binance "))
        found["error"] = [400, told["code"], told["msg"]]
    return found


def _kline(texts: list[str]) -> list[Any]:
    """Its parser makes texts of whole numbers."""
    return [int(text) if at in (0, 6, 8) else text for at, text in enumerate(texts)]


def _trade(info: dict[str, Any]) -> dict[str, Any]:
    return {**info, "id": int(info["id"]), "time": int(info["time"])}


async def live(base: str, count: int) -> list[list[Any]]:
    client = ccxt.pro.binance(OPTIONS)
    client.urls["api"]["public"] = f"{base}/api/v3"
    client.urls["api"]["ws"]["spot"] = base.replace("http", "ws") + "/ws"
    found: list[list[Any]] = []
    try:
        while len(found) < count:
            for one in await asyncio.wait_for(client.watch_trades("BTC/USDT"), 20):
                found.append([int(one["info"]["t"]), one["info"]["p"], one["info"]["q"]])
    finally:
        await client.close()
    return found


if __name__ == "__main__":
    if sys.argv[2:]:
        answer: Any = asyncio.run(live(sys.argv[1], int(sys.argv[3])))
    else:
        answer = ask(sys.argv[1])
    print(json.dumps(answer))
