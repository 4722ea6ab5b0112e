"""cryptofeed and its PostgreSQL back end with the options that they come with, 2.x or 3.x.

Changed is only where it connects, and the stream: `trade` in place of `aggTrade`. It writes to its
own table `trades`, which this makes, and runs until it is terminated.
"""

import argparse
import asyncio
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import asyncpg
from cryptofeed import FeedHandler
from cryptofeed.backends.postgres import TradePostgres
from cryptofeed.connection import RestEndpoint, Routes, WebsocketEndpoint
from cryptofeed.defines import TRADES
from cryptofeed.exchanges import binance

TABLE = """
    CREATE TABLE IF NOT EXISTS trades (id serial PRIMARY KEY, timestamp timestamp,
        receipt_timestamp timestamp, exchange varchar(32), symbol varchar(32), side varchar(8),
        amount numeric(64, 32), price numeric(64, 32), trade_id varchar(64), order_type varchar(32))
"""
"""The columns that the back end writes, in its order."""

ROUTES = Routes("/api/v3/exchangeInfo")


class Trades(binance.Binance):
    """Single trades of the venue at the class's endpoints."""

    websocket_channels: ClassVar = {**binance.Binance.websocket_channels, TRADES: "trade"}

    def connect(self) -> list[Any]:
        connections: list[Any] = super().connect()
        for connection, *_ in connections:
            # Its constructor takes no other scheme.
            connection.address = connection.address.replace("wss:", "ws:")
        return connections

    async def message_handler(self, msg: str, conn: Any, timestamp: float) -> None:
        event = binance.json.loads(msg, parse_float=binance.Decimal)["data"]
        event["a"] = event["t"]
        await self._trade(event, timestamp)


async def make_table(dsn: str) -> None:
    """Make the table, which the back end expects to be there."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    await connection.close()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="ws://host:port/stream?streams=btcusdt@trade/...")
    parser.add_argument("dsn")
    parser.add_argument("--block", action="store_true", help="3.x: wait where its queue is full")
    options = parser.parse_args()
    url, dsn = urlsplit(options.url), urlsplit(options.dsn)
    names = [stream.partition("@")[0] for stream in parse_qs(url.query)["streams"][0].split("/")]
    Trades.websocket_endpoints = [WebsocketEndpoint(f"wss://{url.netloc}")]
    Trades.rest_endpoints = [RestEndpoint(f"http://{url.netloc}", routes=ROUTES)]
    database = TradePostgres(
        host=parse_qs(dsn.query)["host"][0] if dsn.query else dsn.hostname,
        user=dsn.username,
        pw=dsn.password,
        db=dsn.path.removeprefix("/"),
        port=dsn.port,
        **({"overflow": "block"} if options.block else {}),
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(make_table(options.dsn))
    loop.close()
    handler = FeedHandler()
    symbols = [f"{name.upper().removesuffix('USDT')}-USDT" for name in names]
    handler.add_feed(Trades(symbols=symbols, channels=[TRADES], callbacks={TRADES: database}))
    handler.run()


if __name__ == "__main__":
    main()
