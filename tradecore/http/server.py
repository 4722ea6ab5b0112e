"""The side server: health, readiness and metrics over HTTP, on the loop of the capture."""

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import hdrs, web

from tradecore import metrics
from tradecore.errors import UsageError
from tradecore.http import connections, health, security
from tradecore.http.access import Policy, sees_inside
from tradecore.http.api import Api
from tradecore.http.compression import Packed, cut, pack
from tradecore.http.counts import HttpCounts
from tradecore.http.health import Health
from tradecore.http.page import Page
from tradecore.http.ration import Making, Ration
from tradecore.http.streams import Streams
from tradecore.snapshot import Snapshot

log = logging.getLogger(__name__)

STOP_LIMIT_S = 2.0

EVERYTHING = Policy()

Tell = Callable[[Snapshot, Health], tuple[dict[str, Any], bool]]
"""Makes a body of JSON, and tells whether all is well with what it is about."""


class Route(NamedTuple):
    """One path, what it tells, and who answers."""

    path: str
    text: str
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]]


class SideServer:
    """Serves the snapshots that `snapshot` builds; call `start`, and `stop` in the end.

    Raises UsageError from `start` when the address cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        snapshot: Callable[[], Snapshot],
        streams: Streams | None = None,
        api: Api | None = None,
        policy: Policy = EVERYTHING,
        counts: HttpCounts | None = None,
    ) -> None:
        self._api = api
        self._policy = policy
        self._counts = counts or HttpCounts()
        self._streams = streams
        self._host = host
        self._port = port
        self._snapshot = snapshot
        self._ration = Ration()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._page = page = Page()
        self.routes: tuple[Route, ...] = (
            Route("/", "a page for people: what is captured now", page.index),
            Route("/api", "this list", self._index),
            Route("/health", "state of the whole daemon; 503 when not ready", self._health),
            Route("/health/db", "state of the database; 503 while it is away", self._database),
            Route("/health/binance", "state of the feed; 503 without a live stream", self._binance),
            Route("/ready", "200 while trades are captured and stored, else 503", self._ready),
            Route("/live", "200: the event loop turns", self._live),
            Route("/metrics", "Prometheus and OpenMetrics exposition", self._metrics),
        )
        if streams is not None:
            self.routes += (
                Route("/ws", "live streams as of the venue, /ws/<stream>/<stream>", streams.accept),
                Route("/stream", "the same combined, ?streams=<stream>/<stream>", streams.accept),
            )

        if api is not None:
            self.routes += (
                Route("/api/v3/exchangeInfo", "market data as of the venue, /api/v3/…", api.accept),
                Route("/api/coverage", "what is stored and missing, ?symbol=", api.accept),
                Route("/api/stats", "rows, sizes, days, compression, lag", api.accept),
            )

    @property
    def port(self) -> int:
        """The port that is bound; of interest when the setting was 0."""
        if self._listener is None or not self._listener.sockets:
            return self._port
        return int(self._listener.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Bind and serve.

        Raises UsageError when the address is taken, forbidden or not of this machine.
        """
        if advice := self._policy.advice(self._host):
            log.warning(advice)
        guard = security.Guard(self._host, self._policy, self._counts)
        app = web.Application(middlewares=[guard.middleware], client_max_size=0)
        app.on_response_prepare.append(security.set_headers)
        routes = [(route.path, route.answer) for route in self.routes]
        routes += [("/page/{name}", self._page.accept)]
        if self._streams is not None:
            routes += [("/ws/{streams:.*}", self._streams.accept)]
        if self._api is not None:
            routes += [("/api/{path:.*}", self._api.accept)]
        for path, answer in routes:
            app.router.add_get(path, answer, expect_handler=_expect)
        app.router.add_route("*", "/{path:.*}", _nothing, expect_handler=_expect)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_LIMIT_S)
        await self._runner.setup()
        manager = self._runner.server
        assert manager is not None
        loop = asyncio.get_running_loop()
        streams = self._streams
        house = connections.House(lambda: streams.open if streams is not None else 0, self._counts)
        try:
            self._listener = await loop.create_server(
                lambda: connections.GuardedConnection(manager, loop, house),
                self._host,
                self._port,
                backlog=connections.BACKLOG,
                reuse_address=True,
            )
        except (OSError, OverflowError) as error:
            await self.stop()
            raise UsageError(_bind_problem(self._host, self._port, error)) from error
        log.info("HTTP server listens", extra={"host": self._host, "port": self.port})

    async def stop(self) -> None:
        """Close the listener and every connection, within a few seconds; idempotent."""
        listener, runner = self._listener, self._runner
        self._listener = self._runner = None
        if listener is not None:
            listener.close()
        if self._streams is not None:
            await self._streams.close()
        if runner is not None:
            await runner.cleanup()
        if self._api is not None:
            await self._api.close()

    async def _index(self, request: web.Request) -> web.Response:
        routes = {route.path: route.text for route in self.routes}
        body = security.json_bytes({"name": "tradecore", "routes": routes})
        return (await self._ration.get("index", lambda: pack([body]))).answer(request)

    async def _health(self, request: web.Request) -> web.Response:
        return await self._tell(request, _overall)

    async def _database(self, request: web.Request) -> web.Response:
        return await self._tell(request, _database)

    async def _binance(self, request: web.Request) -> web.Response:
        return await self._tell(request, _binance)

    async def _ready(self, request: web.Request) -> web.Response:
        return await self._tell(request, _ready)

    async def _live(self, _request: web.Request) -> web.Response:
        return security.json_answer({"live": True})

    async def _metrics(self, request: web.Request) -> web.Response:
        content_type = metrics.content_type(request.headers.get(hdrs.ACCEPT, ""))

        def make() -> Making[Packed]:
            snapshot = self._snapshot()
            yield from snapshot.symbols.read()
            return (yield from pack(metrics.pieces(snapshot, content_type)))

        packed = await self._ration.get(content_type, make)
        vary = f"{hdrs.ACCEPT}, {hdrs.ACCEPT_ENCODING}"
        return packed.answer(request, content_type=content_type, vary=vary)

    async def _tell(self, request: web.Request, tell: Tell) -> web.Response:
        """Answer what `tell` makes of the snapshot, as far as the client may see it."""
        is_inside = sees_inside(request)

        def make() -> Making[tuple[Packed, int]]:
            snapshot = self._snapshot() if is_inside else self._snapshot().without_errors()
            yield
            if tell in _OF_SYMBOLS:
                yield from snapshot.symbols.read()
            body, is_well = tell(snapshot, health.assess(snapshot))
            yield
            packed = yield from pack(cut(security.json_bytes(body)))
            return packed, 200 if is_well else 503

        packed, status = await self._ration.get((tell, is_inside), make)
        return packed.answer(request, status)


def _overall(snapshot: Snapshot, verdict: Health) -> tuple[dict[str, Any], bool]:
    return health.overall_json(snapshot, verdict), verdict.ready


def _database(snapshot: Snapshot, verdict: Health) -> tuple[dict[str, Any], bool]:
    return health.database_json(snapshot, verdict), snapshot.database.reachable


def _binance(snapshot: Snapshot, verdict: Health) -> tuple[dict[str, Any], bool]:
    return health.binance_json(snapshot, verdict), verdict.of("feed").ready


def _ready(_snapshot: Snapshot, verdict: Health) -> tuple[dict[str, Any], bool]:
    return health.ready_json(verdict), verdict.ready


_OF_SYMBOLS = (_overall, _binance)
"""What tells of each symbol, or of all of them."""


async def _nothing(_request: web.Request) -> web.Response:
    raise web.HTTPNotFound


async def _expect(_request: web.Request) -> None:
    """Promise nothing to those who ask before they send a body: they get their refusal instead."""


def _bind_problem(host: str, port: int, error: Exception) -> str:
    place = f"HTTP_PORT {port} on {host}"
    if isinstance(error, socket.gaierror):
        return f"HTTP_HOST {host} is not a known name or address; use 127.0.0.1 or 0.0.0.0"
    match error.errno if isinstance(error, OSError) else None:
        case errno.EADDRINUSE:
            return f"{place} is taken by another program; stop it or set HTTP_PORT to a free port"
        case errno.EACCES:
            return f"{place} is not allowed for this user; set HTTP_PORT to 1024 or above"
        case errno.EADDRNOTAVAIL | None if isinstance(error, OSError):
            # From Python 3.13 on asyncio says it without a number.
            return f"HTTP_HOST {host} is no address of this machine; use 127.0.0.1 or 0.0.0.0"
    return f"{place} cannot be used: {error}"
