"""binance-connector: SCRIPT BASE_URL asks for everything, SCRIPT BASE_URL live COUNT for trades."""

import json
import queue
import sys
from typing import Any

from binance.error import ClientError
from binance.spot import Spot
from binance.websocket.spot.websocket_stream import SpotWebsocketStreamClient


def ask(base: str) -> dict[str, Any]:
    client = Spot(base_url=base)
    client.ping()
    client.time()
    both = ["BTCUSDT", "ETHUSDT"]
    found: dict[str, Any] = {
        "klines": client.klines("BTCUSDT", "1m"),
        "klines_of_3m": client.klines("BTCUSDT", "3m", limit=5),
        "history": client.ui_klines("BTCUSDT", "1m", startTime=1, limit=1000),
        "trades": client.trades("BTCUSDT", limit=700),
        "old_trades": client.historical_trades("BTCUSDT", fromId=1, limit=300),
        "ticker": client.ticker_24hr("BTCUSDT"),
        "price": client.ticker_price("BTCUSDT")["price"],
        "prices": {one["symbol"]: one["price"] for one in client.ticker_price(symbols=both)},
        "symbols": [one["symbol"] for one in client.exchange_info(symbols=both)["symbols"]],
    }
    assert len(client.ticker_24hr(symbols=both, type="MINI")) == 2
    assert client.rolling_window_ticker("BTCUSDT", windowSize="2h")["count"] > 0
    try:
        client.klines("NOPE", "1m")
    except ClientError as error:
        found["error"] = [error.status_code, error.error_code, error.error_message]
    return found


def live(base: str, count: int) -> list[list[Any]]:
    events: queue.Queue[str] = queue.Queue()
    client = SpotWebsocketStreamClient(
        stream_url=base.replace("http", "ws"),
        on_message=lambda _client, message: events.put(message),
    )
    client.trade("BTCUSDT")
    found: list[list[Any]] = []
    while len(found) < count:
        event = json.loads(events.get(timeout=20))
        if event.get("e") == "trade":
            found.append([event["t"], event["p"], event["q"]])
    client.stop()
    return found


if __name__ == "__main__":
    if sys.argv[2:]:
        answer: Any = live(sys.argv[1], int(sys.argv[3]))
    else:
        answer = ask(sys.argv[1])
    print(json.dumps(answer))
