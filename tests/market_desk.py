"""The side server with the market of test_queries behind it, and a client that asks it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from snapshots import HEALTHY
from store_desk import Database, trades
from test_queries import BUSY, ONCE, RARE, Desk, make_candles, market

from tradecore.http.access import Policy
from tradecore.http.api import Api
from tradecore.http.server import SideServer
from tradecore.store.reader import Reader

FRESH = "NEWUSDT"
"""Captured, and nothing of it is stored yet."""
CAPTURED = (BUSY, RARE, ONCE, FRESH)
PAGE = "https://page.example:8443"


class Client:
    """Asks one server."""

    def __init__(self, server: SideServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[Any, bytes]:
        """Return response and body; `path` goes out as it is, `a_b` is the header a-b."""
        from yarl import URL

        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        url = URL(f"http://127.0.0.1:{self.server.port}{path}", encoded=True)
        async with self.session.request(method, url, headers=sent) as response:
            return response, await response.read()

    async def json(self, path: str, **headers: str) -> Any:
        response, body = await self.get(path, **headers)
        assert response.status == 200, body
        assert response.content_type == "application/json"
        return json.loads(body)

    async def refused(self, path: str, **headers: str) -> tuple[int, int, str]:
        response, body = await self.get(path, **headers)
        error = json.loads(body)
        assert set(error) == {"code", "msg"}, error
        return response.status, error["code"], error["msg"]


@asynccontextmanager
async def serving(dsn: Any, origins: tuple[str, ...] = ()) -> AsyncIterator[Client]:
    api = Api(dsn, lambda: CAPTURED, lambda: HEALTHY)
    server = SideServer(
        "127.0.0.1", 0, lambda: HEALTHY, api=api, policy=Policy(cors_origins=origins)
    )
    await server.start()
    try:
        async with aiohttp.ClientSession(
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            connector=aiohttp.TCPConnector(limit=24),
        ) as session:
            yield Client(server, session)
    finally:
        await server.stop()


@pytest.fixture
async def desk(db: Database) -> AsyncIterator[Desk]:
    await db.sink.write_trades(trades(*market()))
    read = Reader(lambda: db.dsn)
    one = Desk(db, read)
    await make_candles(one)
    yield one
    await read.close()


@pytest.fixture
async def client(desk: Desk) -> AsyncIterator[Client]:
    async with serving(lambda: desk.db.dsn, (PAGE,)) as client:
        yield client


@pytest.fixture
async def small(db: Database) -> AsyncIterator[Client]:
    """A server with one trade."""
    await db.sink.write_trades(trades(market()[0]))
    async with serving(lambda: db.dsn) as client:
        yield client
