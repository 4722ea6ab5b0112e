"""What every request meets before its handler, and every answer before it leaves.

Only GET and HEAD, no body, a bounded rate for each peer (below /api/ the venue's weights, which are
counted there), known Host names on a loopback bind, a time limit, security headers on all answers,
and errors as JSON that tell nothing about the inside. Pages of the origins that the operator names
may read what is below /api/, no others.
"""

import asyncio
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from tradecore.clock import mono_ns
from tradecore.values import is_loopback

log = logging.getLogger(__name__)

HANDLER_LIMIT_S = 5.0

RATE_PER_S = 50.0
RATE_BURST = 100
PEERS_MAX = 1024

API_PREFIX = "/api/"
STREAM_PATHS = ("/ws", "/stream")

UNLIMITED_PATHS = frozenset({"/live"})
"""Costs no more than the 429 would, and who refuses it gets killed by his supervisor."""

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
_CORS_REQUEST_HEADERS = "Content-Type, If-None-Match, X-MBX-APIKEY, X-MBX-TIME-UNIT"
_CORS_ANSWER_HEADERS = "ETag, Retry-After, X-MBX-USED-WEIGHT, X-MBX-USED-WEIGHT-1M"


async def set_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """Set the security headers and drop Server; connect it to `on_response_prepare`.

    An answer that may be cached, or needs a policy of its own, says so itself.
    """
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.popall(hdrs.SERVER, None)


def json_answer(body: dict[str, Any], status: int = 200) -> web.Response:
    """Return a JSON answer."""
    return web.Response(
        body=orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE),
        status=status,
        content_type="application/json",
    )


def error_answer(status: int, text: str = "", *, path: str = "") -> web.Response:
    """Return an error as JSON; without `text` it carries the status's standard words only.

    For a `path` below /api/ it has the shape that the venue's clients read (-1000: unknown error).
    """
    phrase = HTTPStatus(status)
    if path.startswith(API_PREFIX):
        return json_answer({"code": -1000, "msg": text or phrase.description}, status)
    return json_answer({"error": phrase.phrase, "text": text or phrase.description}, status)


class RateLimiter:
    """A token bucket for each peer; the peers that were silent longest are forgotten first."""

    def __init__(
        self,
        per_s: float = RATE_PER_S,
        burst: int = RATE_BURST,
        peers_max: int = PEERS_MAX,
        now_ns: Callable[[], int] = mono_ns,
    ) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._peers_max = peers_max
        self._now_ns = now_ns
        self._buckets: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def take(self, peer: str) -> float:
        """Take one token; return 0.0 when there was one, else the seconds until the next."""
        now_ns = self._now_ns()
        tokens, then_ns = self._buckets.pop(peer, (self._burst, now_ns))
        tokens = min(self._burst, tokens + (now_ns - then_ns) * 1e-9 * self._per_s)
        allowed = tokens >= 1.0
        self._buckets[peer] = (tokens - allowed, now_ns)
        if len(self._buckets) > self._peers_max:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self._per_s


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


def guard(bind_host: str, limiter: RateLimiter, cors_origins: Collection[str] = ()) -> Middleware:
    """Return the middleware that checks each request and turns every failure into JSON.

    On a loopback bind the Host header must name this machine: a page in the operator's browser
    could otherwise read the answers by pointing its own name to 127.0.0.1 (DNS rebinding).
    """
    cors = Cors(cors_origins)
    hosts = {"localhost", "127.0.0.1", "::1", bind_host} if is_loopback(bind_host) else None

    def refuse(request: web.Request) -> web.Response | None:
        host = request.headers.get(hdrs.HOST)
        if hosts is not None and host is not None and _host_name(host) not in hosts:
            return error_answer(421, "This Host name is not served here; use localhost.")
        if _is_limited(request) and (wait_s := limiter.take(request.remote or "")):
            answer = error_answer(429)
            answer.headers[hdrs.RETRY_AFTER] = str(math.ceil(wait_s))
            return answer
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            if (answered := cors.preflight(request)) is not None:
                return answered
            answer = error_answer(405, "Only GET and HEAD are served.", path=request.path)
            answer.headers[hdrs.ALLOW] = "GET, HEAD"
            return answer
        if request.can_read_body:
            return error_answer(413, "A request carries no body here.", path=request.path)
        return None

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (refusal := refuse(request)) is not None:
            if refusal.status != 204:
                refusal.force_close()
            cors.allow(request, refusal)
            return refusal
        response = await answered(request, handler)
        cors.allow(request, response)
        return response

    async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            async with asyncio.timeout(None if _is_stream(request) else HANDLER_LIMIT_S):
                return await handler(request)
        except TimeoutError:
            log.warning("HTTP request took too long", extra={"path": request.path})
            return error_answer(503, "The answer took too long.", path=request.path)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return error_answer(error.status, path=request.path)
        except Exception:
            log.exception("HTTP handler failed, a bug", extra={"path": request.path})
            return error_answer(500, path=request.path)

    return check


def _is_limited(request: web.Request) -> bool:
    return request.path not in UNLIMITED_PATHS and not request.path.startswith(API_PREFIX)


def _is_stream(request: web.Request) -> bool:
    return request.path in STREAM_PATHS or request.path.startswith("/ws/")


def may_open_stream(request: web.Request, origins: Collection[str]) -> bool:
    """Tell whether a request comes from no web page, from one of ours, or from one of `origins`.

    Before they open a WebSocket, browsers do not ask; whatever comes is shown to any page.
    """
    origin = request.headers.get(hdrs.ORIGIN, "").lower()
    is_ours = origin.partition("://")[2] == request.host.lower()
    return hdrs.ORIGIN not in request.headers or is_ours or origin in origins


# The dot behind a name is that of the DNS root.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+?)\.?)(?::[0-9]{1,5})?")


def _host_name(host: str) -> str:
    match = _HOST.fullmatch(host.lower())
    return (match[1] or match[2]) if match else ""
