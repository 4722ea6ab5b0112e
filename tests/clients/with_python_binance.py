"""python-binance: SCRIPT BASE_URL asks for everything, SCRIPT BASE_URL live COUNT for trades."""

import asyncio
import json
import sys
from typing import Any

from binance.async_client import AsyncClient
from binance.client import Client
from binance.exceptions import BinanceAPIException
from binance.ws.streams import BinanceSocketManager


def ask(base: str) -> dict[str, Any]:
    client = Client(ping=False)
    client.API_URL = f"{base}/api"
    client.ping()
    client.get_server_time()
    found: dict[str, Any] = {
        "klines": client.get_klines(symbol="BTCUSDT", interval="1m"),
        "klines_of_3m": client.get_klines(symbol="BTCUSDT", interval="3m", limit=5),
        "history": list(client.get_historical_klines_generator("BTCUSDT", "1m", "1 day ago UTC")),
        "trades": client.get_recent_trades(symbol="BTCUSDT", limit=700),
        "old_trades": client.get_historical_trades(symbol="BTCUSDT", fromId=1, limit=300),
        "ticker": client.get_ticker(symbol="BTCUSDT"),
        "price": client.get_symbol_ticker(symbol="BTCUSDT")["price"],
        "prices": {one["symbol"]: one["price"] for one in client.get_all_tickers()},
        "symbols": [one["symbol"] for one in client.get_exchange_info()["symbols"]],
    }
    assert client.get_symbol_info("BTCUSDT")["baseAsset"] == "BTC"
    try:
        client.get_klines(symbol="NOPE", interval="1m")
    except BinanceAPIException as error:
        found["error"] = [error.status_code, error.code, error.message]
    return found


async def live(base: str, count: int) -> list[list[Any]]:
    client = AsyncClient()
    manager = BinanceSocketManager(client)
    manager.STREAM_URL = base.replace("http", "ws") + "/"
    found: list[list[Any]] = []
    async with manager.trade_socket("BTCUSDT") as stream:
        while len(found) < count:
            event = await asyncio.wait_for(stream.recv(), 20)
            found.append([event["t"], event["p"], event["q"]])
    await client.close_connection()
    return found


if __name__ == "__main__":
    if sys.argv[2:]:
        answer: Any = asyncio.run(live(sys.argv[1], int(sys.argv[3])))
    else:
        answer = ask(sys.argv[1])
    print(json.dumps(answer))
