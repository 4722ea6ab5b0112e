"""What every request meets before its handler, and every answer before it leaves.

Known Host names, only GET and HEAD, no body, a bounded rate for each peer (below /api/ the venue's
weights, which are counted there), the token where one is asked for, a time limit, security headers
on all answers, and errors as JSON that tell nothing about the inside. Pages of the origins that the
operator names may read what is below /api/, no others.

Answers are compressed for whoever asks. That lets somebody who can write into an answer and watch
its length guess the rest of it (BREACH): no answer holds a secret.
"""

import asyncio
import logging
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from tradecore.http.access import (
    PROBE_PATHS,
    Access,
    HostNames,
    Policy,
    Refusal,
    add_reply_headers,
)
from tradecore.http.counts import HttpCounts
from tradecore.http.peers import RateLimiter, peer_of
from tradecore.log import once_per

log = logging.getLogger(__name__)

HANDLER_LIMIT_S = 5.0

API_PREFIX = "/api/"
STREAM_PATHS = ("/ws", "/stream")

UNLIMITED_PATHS = frozenset({"/live"})
"""Costs no more than the 429 would, and who refuses it gets killed by his supervisor."""

_VENUE_CODES = {401: -2015, 403: -2015, 429: -1003}
"""Permissions, too many requests; -1000 is an unknown error."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Origin-Agent-Cluster": "?1",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-DNS-Prefetch-Control": "off",
    "X-Permitted-Cross-Domain-Policies": "none",
    "X-XSS-Protection": "0",
    "Cache-Control": "no-store",
}

CORS_MAX_AGE_S = 600
_CORS_REQUEST_HEADERS = "Authorization, Content-Type, If-None-Match, X-MBX-APIKEY, X-MBX-TIME-UNIT"
_CORS_ANSWER_HEADERS = "ETag, Retry-After, X-MBX-USED-WEIGHT, X-MBX-USED-WEIGHT-1M"


async def set_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """Set the security headers and drop Server; connect it to `on_response_prepare`.

    An answer that may be cached, or needs a policy of its own, says so itself.
    """
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.popall(hdrs.SERVER, None)


def json_bytes(body: dict[str, Any]) -> bytes:
    """Return a body of JSON that ends its line, for those who ask in a terminal."""
    return orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)


def json_answer(body: dict[str, Any], status: int = 200) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=json_bytes(body), status=status, content_type="application/json")


def error_answer(status: int, text: str = "", *, path: str = "") -> web.Response:
    """Return an error as JSON; without `text` it carries the status's standard words only.

    For a `path` below /api/ it has the shape that the venue's clients read.
    """
    phrase = HTTPStatus(status)
    if path.startswith(API_PREFIX):
        code = _VENUE_CODES.get(status, -1000)
        return json_answer({"code": code, "msg": text or phrase.description}, status)
    return json_answer({"error": phrase.phrase, "text": text or phrase.description}, status)


class Cors:
    """Tells browsers which pages may read what is below /api/: those of `origins`, exactly."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    def preflight(self, request: web.Request) -> web.Response | None:
        """Answer the question that a browser asks before a request with headers of its own."""
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or asked is None or self._of(request) is None:
            return None
        headers: dict[str, str] = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, HEAD",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _CORS_REQUEST_HEADERS,
            hdrs.ACCESS_CONTROL_MAX_AGE: str(CORS_MAX_AGE_S),
        }
        if "Access-Control-Request-Private-Network" in request.headers:
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)

    def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let the page that asks read the answer, if it is one of them."""
        if not self._origins or not request.path.startswith(API_PREFIX):
            return
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if (origin := self._of(request)) is not None:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _CORS_ANSWER_HEADERS

    def _of(self, request: web.Request) -> str | None:
        origin = request.headers.get(hdrs.ORIGIN)
        listed = origin is not None and origin.lower() in self._origins
        return origin if listed and request.path.startswith(API_PREFIX) else None


class Guard:
    """The middleware that checks each request and turns every failure into JSON."""

    def __init__(self, bind_host: str, policy: Policy, counts: HttpCounts) -> None:
        self._hosts = HostNames(bind_host, policy.hosts)
        self._access = Access(bind_host, policy)
        self._cors = Cors(policy.cors_origins)
        self._counts = counts
        # Apart, so that no crowd of scrapers makes a supervisor think that we are ill.
        self._probes, self._metrics, self._others = RateLimiter(), RateLimiter(), RateLimiter()

    @property
    def middleware(self) -> Middleware:
        """What aiohttp takes."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            response = await self._answer(request, handler)
            self._cors.allow(request, response)
            self._counts.answered(_route_of(request), response.status)
            return response

        return check

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if (refusal := self._refuse_early(request)) is not None:
            return self._refused(request, refusal)
        if (answered := self._cors.preflight(request)) is not None:
            return answered
        if (refusal := self._refuse(request)) is not None:
            return self._refused(request, refusal)
        return await _handled(request, handler)

    def _refuse_early(self, request: web.Request) -> Refusal | None:
        """Refuse what no page may ask either."""
        if (refusal := self._hosts.refuse(request)) is not None:
            return refusal
        limiter = self._limiter_of(request.path)
        if limiter is not None and (wait_s := limiter.take(peer_of(request.remote))):
            return Refusal("rate", 429, wait_s=wait_s)
        return None

    def _limiter_of(self, path: str) -> RateLimiter | None:
        if path in UNLIMITED_PATHS or path.startswith(API_PREFIX):
            return None
        if path == "/metrics":
            return self._metrics
        return self._probes if path in PROBE_PATHS else self._others

    def _refuse(self, request: web.Request) -> Refusal | None:
        if (refusal := self._access.refuse(request)) is not None:
            return refusal
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            return Refusal("method", 405, "Only GET and HEAD are served.")
        if request.can_read_body:
            return Refusal("body", 413, "A request carries no body here.")
        return None

    def _refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        self._counts.refused(refusal.reason)
        answer = error_answer(refusal.status, refusal.text, path=request.path)
        add_reply_headers(request, refusal, answer)
        answer.force_close()
        return answer


async def _handled(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        async with asyncio.timeout(None if _is_stream(request) else HANDLER_LIMIT_S):
            return await handler(request)
    except TimeoutError:
        once_per(log, ("slow", _route_of(request))).warning(
            "HTTP request took too long", extra={"path": request.path}
        )
        return error_answer(503, "The answer took too long.", path=request.path)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_answer(error.status, path=request.path)
    except Exception as error:  # noqa: BLE001 - the log tells it, the client nothing
        once_per(log, (type(error), _route_of(request))).error(
            "HTTP handler failed, a bug", {"path": request.path}, error
        )
        return error_answer(500, path=request.path)


def _route_of(request: web.Request) -> str:
    """Return which of the server's routes a request takes, however it is written."""
    resource = request.match_info.route.resource
    known = "" if resource is None else resource.canonical.partition("/{")[0]
    return known or "none"


def _is_stream(request: web.Request) -> bool:
    return request.path in STREAM_PATHS or request.path.startswith("/ws/")


def may_open_stream(request: web.Request, origins: Collection[str]) -> bool:
    """Tell whether a request comes from no web page, from one of ours, or from one of `origins`.

    Before they open a WebSocket, browsers do not ask; whatever comes is shown to any page.
    """
    origin = request.headers.get(hdrs.ORIGIN, "").lower()
    is_ours = origin.partition("://")[2] == request.headers.get(hdrs.HOST, "").lower()
    return hdrs.ORIGIN not in request.headers or is_ours or origin in origins
