"""From a request below /api/ to its answer: weight, parameters, errors, ETag, compression."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence

import orjson
from aiohttp import hdrs, web

from tradecore.errors import TransientStoreError
from tradecore.http import venue_errors
from tradecore.http.compression import gzip, takes_gzip
from tradecore.http.market import NOT_RECORDED, Body, Endpoint, Market
from tradecore.http.own import Own
from tradecore.http.parameters import Query
from tradecore.http.peers import peer_of
from tradecore.http.venue_errors import RefusedError
from tradecore.http.weights import Weights
from tradecore.snapshot import Snapshot
from tradecore.store.reader import BusyError, Reader

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 4.5
"""For all statements of an answer, and the wait for a connection."""

COMPRESS_FROM_BYTES = 16_384
"""Smaller answers are faster as they are."""

_SLOW = ("57014", "timeout")
"""Reasons of a failure: the server, or we, gave up on a statement."""


class Answers:
    """Everything that is served below /api/."""

    def __init__(
        self,
        reader: Reader,
        captured: Callable[[], Sequence[str]],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._weights = Weights()
        market = Market(reader, captured, self._weights.limit)
        own = Own(reader, snapshot)
        self._endpoints: dict[str, Endpoint] = {
            **{f"/api/v3/{path}": one for path, one in market.endpoints.items()},
            **{f"/api/{path}": one for path, one in own.endpoints.items()},
        }

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a GET or HEAD; what is wrong comes as the venue's error body."""
        endpoint = self._endpoints.get(request.path)
        weight = 1
        if endpoint is not None:
            query = request.query
            weight = endpoint.weight(query.get("symbol", ""), query.get("symbols", ""))
        used, wait_s = self._weights.use(peer_of(request.remote), weight)
        try:
            if wait_s:
                raise venue_errors.too_many_requests(self._weights.limit, wait_s)
            if endpoint is None:
                raise _unknown(request.path)
            async with asyncio.timeout(ANSWER_LIMIT_S):
                body = await endpoint.answer(Query(request, endpoint.names))
            response = await _found(request, body)
        except RefusedError as refused:
            response = _refused(refused)
        except TimeoutError:
            response = _refused(venue_errors.timed_out())
        except TransientStoreError as trouble:
            response = _refused(_from_trouble(trouble))
        response.headers["X-MBX-USED-WEIGHT"] = str(used)
        response.headers["X-MBX-USED-WEIGHT-1M"] = str(used)
        return response


async def _found(request: web.Request, body: Body) -> web.Response:
    headers = {hdrs.VARY: "Accept-Encoding, X-MBX-TIME-UNIT"}
    if body.settled:
        # Trades that are filled in later change it, so the client has to ask whether it is valid.
        digest = hashlib.blake2b(body.text, digest_size=16).hexdigest()
        headers |= {hdrs.ETAG: f'W/"{digest}"', hdrs.CACHE_CONTROL: "no-cache"}
        known = request.if_none_match or ()
        if any(tag.value in ("*", digest) for tag in known):
            return web.Response(status=304, headers=headers)
    text = body.text
    if len(text) >= COMPRESS_FROM_BYTES and takes_gzip(request):
        text = await asyncio.to_thread(gzip, text)
        headers[hdrs.CONTENT_ENCODING] = "gzip"
    response = web.Response(body=text, headers=headers, content_type="application/json")
    if body.behind:
        response.headers["X-Tradecore-Candles"] = "behind"
    return response


def _refused(refused: RefusedError) -> web.Response:
    response = web.Response(
        body=orjson.dumps({"code": refused.code, "msg": str(refused)}),
        status=refused.status,
        content_type="application/json",
    )
    if refused.retry_after_s is not None:
        response.headers[hdrs.RETRY_AFTER] = str(refused.retry_after_s)
    return response


def _unknown(path: str) -> RefusedError:
    why = NOT_RECORDED.get(path.removeprefix("/api/v3/"))
    if why is not None:
        return venue_errors.unsupported(why)
    return venue_errors.unsupported("Only market data that is recorded is served here.", 404)


def _from_trouble(trouble: TransientStoreError) -> RefusedError:
    log.debug("market data cannot be answered", extra={"error": str(trouble)})
    if isinstance(trouble, BusyError):
        return venue_errors.overloaded()
    if trouble.reason in _SLOW:
        return venue_errors.timed_out()
    return venue_errors.disconnected()
