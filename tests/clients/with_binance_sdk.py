"""binance-sdk-spot: SCRIPT BASE_URL asks for everything, SCRIPT BASE_URL live COUNT for trades."""

import asyncio
import json
import sys
from typing import Any

from binance_common.errors import BadRequestError
from binance_sdk_spot.rest_api.models import KlinesIntervalEnum
from binance_sdk_spot.spot import (
    ConfigurationRestAPI,
    ConfigurationWebSocketStreams,
    Spot,
)


def ask(base: str) -> dict[str, Any]:
    client = Spot(config_rest_api=ConfigurationRestAPI(base_path=base)).rest_api
    client.ping()
    client.time().data()
    minute, three = KlinesIntervalEnum.INTERVAL_1m, KlinesIntervalEnum.INTERVAL_3m
    both = ["BTCUSDT", "ETHUSDT"]
    prices = client.ticker_price(symbols=both).data().actual_instance
    found: dict[str, Any] = {
        "klines": _plain(client.klines("BTCUSDT", minute).data()),
        "klines_of_3m": _plain(client.klines("BTCUSDT", three, limit=5).data()),
        "history": _plain(client.ui_klines("BTCUSDT", minute, start_time=1, limit=1000).data()),
        "trades": _plain(client.get_trades("BTCUSDT", limit=700).data()),
        "old_trades": _plain(client.historical_trades("BTCUSDT", limit=300, from_id=1).data()),
        "ticker": _plain(client.ticker24hr("BTCUSDT").data().actual_instance),
        "price": client.ticker_price("BTCUSDT").data().actual_instance.price,
        "prices": {one.symbol: one.price for one in prices},
        "symbols": [one.symbol for one in client.exchange_info(symbols=both).data().symbols],
    }
    try:
        client.klines("NOPE", minute)
    except BadRequestError as error:
        found["error"] = [400, *error.args]
    return found


def _plain(model: Any) -> Any:
    """Return what the JSON was."""
    if isinstance(model, list):
        return [_plain(one) for one in model]
    if hasattr(model, "actual_instance"):
        return model.actual_instance
    if hasattr(model, "to_dict"):
        return {k: v for k, v in model.to_dict().items() if k != "additional_properties"}
    return model


async def live(base: str, count: int) -> list[list[Any]]:
    url = base.replace("http", "ws")
    client = Spot(config_ws_streams=ConfigurationWebSocketStreams(stream_url=url))
    connection = await client.websocket_streams.create_connection()
    stream = await connection.trade(symbol="btcusdt")
    found: list[list[Any]] = []
    stream.on("message", lambda event: found.append([event.t, event.p, event.q]))
    async with asyncio.timeout(30):
        while len(found) < count:
            await asyncio.sleep(0.05)
    await connection.close_connection(close_session=True)
    return found


if __name__ == "__main__":
    if sys.argv[2:]:
        answer: Any = asyncio.run(live(sys.argv[1], int(sys.argv[3])))
    else:
        answer = ask(sys.argv[1])
    print(json.dumps(answer))
