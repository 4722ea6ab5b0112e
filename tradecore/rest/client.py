"""Asks the venue's public REST, within its budget. See binance.md §4 for what it answers."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

import orjson

from tradecore import clock
from tradecore.backoff import Backoff
from tradecore.block import retry_after_s
from tradecore.errors import UsageError
from tradecore.rest.budget import Budget, RestError
from tradecore.tls import tls_of
from tradecore.values import is_loopback

if TYPE_CHECKING:
    import aiohttp

Params = Mapping[str, str | int]

MAX_BYTES = 16 << 20
"""Longest answer; exchangeInfo alone may be longer."""
LIMIT_S = 10.0
"""The venue itself gives up after 10 s (its error -1007)."""
IDLE_S = 60.0
"""An unused session is closed after so long; it costs memory."""
WAIT_S = 90.0
"""How long a request waits for the budget: over the turn of the minute and some."""
TRIES = 3

_RETRY_S = (0.5, 8.0)
_ERROR_TEXT_S = 0.5
_SECOND_S = 1.0  # it is sent soon, or it is not worth its weight
_MENDS = {
    -1003: "too many requests from this address",
    -1008: "it is overloaded; try later",
    -1100: "correct the name of the symbol",
    -1121: "the venue lists no such symbol: correct SUPPORTED_SYMBOLS",
}
_STATUS_MENDS = {
    403: "its firewall refuses this address for a while",
    404: "check BINANCE_REST_URL",
    418: "this address is banned for a while",
    429: "too many requests from this address",
    451: "it does not serve this country; https://data-api.binance.vision may",
}


class RestClient:
    """GET requests to one base URL; a session is opened when needed and closed when idle.

    `requests` counts them by (endpoint, HTTP status or a word for what came instead).
    Raises UsageError for an address that is neither https nor this machine.
    """

    def __init__(
        self, base_url: str, budget: Budget, *, limit_s: float = LIMIT_S, idle_s: float = IDLE_S
    ) -> None:
        self.base_url = safe_base(base_url, "BINANCE_REST_URL")
        self.budget = budget
        self.requests: Counter[tuple[str, str]] = Counter()
        self._limit_s = limit_s
        self._idle_s = idle_s
        self._session: aiohttp.ClientSession | None = None
        self._under_way = 0
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def get(
        self,
        path: str,
        params: Params | None = None,
        weight: int = 1,
        *,
        wait_s: float = WAIT_S,
        reserve: int = 0,
        tries: int = TRIES,
        max_bytes: int = MAX_BYTES,
        hangs_s: float | None = None,
    ) -> bytes:
        """Return the body of the answer to GET `path`; the only error is RestError.

        The request waits for the budget for `wait_s` at most, leaving `reserve` weight of the
        minute to others. No answer, 5xx and 429 are tried again, `tries` times in all.
        One that is not answered after `hangs_s` is asked once more beside it.
        """
        ends_s = clock.mono_ns() / 1e9 + wait_s
        backoff = Backoff(*_RETRY_S)
        backoff.next_delay_s()  # the first, without a delay, was that of the first try
        while True:
            left_s = max(ends_s - clock.mono_ns() / 1e9, 0.0)

            async def second() -> bytes:
                ticket = await self.budget.take(weight, _SECOND_S, reserve=reserve)
                try:
                    return await self._ask(path, params or {}, max_bytes)
                finally:
                    self.budget.done(ticket)

            try:
                ticket = await self.budget.take(weight, left_s, reserve=reserve)
                try:
                    first = self._ask(path, params or {}, max_bytes)
                    return await (first if hangs_s is None else _sooner(first, second, hangs_s))
                finally:
                    self.budget.done(ticket)
            except RestError as error:
                tries -= 1
                again = error.kind == "unreachable" or error.status == 429
                if not again or tries <= 0:
                    raise
                delay_s = max(backoff.next_delay_s(), error.retry_after_s)
                if clock.mono_ns() / 1e9 + delay_s > ends_s:
                    raise
            await asyncio.sleep(delay_s)

    async def close(self) -> None:
        """Close the connections; the next request opens a new session."""
        self._stop_idling()
        self._drop_session()
        if self._closing:
            await asyncio.wait(self._closing, timeout=self._limit_s)
        self.budget.save()

    # -- one request ------------------------------------------------------------------------------

    async def _ask(self, path: str, params: Params, max_bytes: int) -> bytes:
        import aiohttp
        from yarl import URL

        query = f"?{urlencode(params, quote_via=quote)}" if params else ""
        url = URL(f"{self.base_url}{path}{query}", encoded=True)
        result = "cancelled"
        self._stop_idling()
        self._under_way += 1
        try:
            async with (
                asyncio.timeout(self._limit_s),
                self._open().get(url, allow_redirects=False) as response,
            ):
                result = str(response.status)
                headers = response.headers
                self.budget.observe(response.status, headers)
                if response.status != 200:
                    body = await _error_text(response)
                    if response.status in (418, 429):
                        self.budget.hear(headers, body)
                    raise self._explain(path, params, response.status, headers, body)
                return await read_body(response, max_bytes)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if result in ("cancelled", "200"):
                result = "timeout" if isinstance(error, TimeoutError) else "unreachable"
            text = str(error) or f"no answer within {self._limit_s:g} s"
            raise RestError(
                "unreachable",
                f"{_what(path, params)}: {self.base_url} does not answer ({text}); "
                "check the network and BINANCE_REST_URL",
            ) from error
        except ValueError as error:  # an answer that is no HTTP, or a body without end
            result = "broken"
            text = f"{_what(path, params)}: {self.base_url} gave a broken answer: {error}"
            raise RestError("broken", text) from error
        finally:
            self.requests[path.removeprefix("/api/v3/"), result] += 1
            self._under_way -= 1
            if not self._under_way:
                loop = asyncio.get_running_loop()
                self._idle = loop.call_later(self._idle_s, self._drop_session)

    def _explain(
        self,
        path: str,
        params: Params,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
    ) -> RestError:
        kind = {418: "banned", 429: "limited"}.get(status, "refused")
        if status >= 500:
            kind = "unreachable"
        code, message = _venue_error(body)
        hint = _STATUS_MENDS.get(status) or _MENDS.get(code or 0)
        if 300 <= status < 400:
            hint = f"it redirects to {headers.get('Location', '?')[:100]}; check BINANCE_REST_URL"
        text = f"{_what(path, params)}: {self.base_url} answered HTTP {status}"
        text += f", {code} {message}" if code is not None else f", {message}" if message else ""
        return RestError(
            kind,
            f"{text}; {hint}" if hint else text,
            retry_after_s=self.budget.silent_s
            or (retry_after_s(headers) if status >= 500 else 0.0),
            status=status,
            code=code,
        )

    # -- the session ------------------------------------------------------------------------------

    def _open(self) -> "aiohttp.ClientSession":
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=4, ssl=tls_of(self.base_url)),
                timeout=aiohttp.ClientTimeout(total=self._limit_s),
                headers={"X-MBX-TIME-UNIT": "MICROSECOND", "User-Agent": "tradecore"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            task = asyncio.get_running_loop().create_task(session.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _sooner(
    one: Coroutine[Any, Any, bytes],
    other: Callable[[], Coroutine[Any, Any, bytes]],
    hangs_s: float,
) -> bytes:
    """Return what the first request brings, or the second one if that is good and sooner.

    A host that hung does not answer what it was asked before it came back.
    """
    first = asyncio.create_task(one)
    asked = {first}
    try:
        done, _ = await asyncio.wait(asked, timeout=hangs_s)
        if not done:
            asked.add(second := asyncio.create_task(other()))
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            if second.done() and second.exception() is None:
                return second.result()
        return await first
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def safe_base(url: str, variable: str) -> str:
    """Return `url` without a trailing slash; UsageError unless it is https or this machine."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "https" or (
            parts.scheme == "http" and is_loopback(parts.hostname or "")
        ):
            return url.rstrip("/")
    except ValueError:
        pass  # told below
    raise UsageError(f"{variable} {url}: give an address with https://")


async def read_body(response: "aiohttp.ClientResponse", max_bytes: int) -> bytes:
    """Return a body; ValueError when it is longer than `max_bytes`."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"it is longer than {max_bytes:,} bytes")
    return bytes(body)


async def _error_text(response: "aiohttp.ClientResponse") -> bytes:
    """Return the body of a refusal, b"" when it does not come soon: the status says enough."""
    import aiohttp

    with suppress(aiohttp.ClientError, OSError, ValueError):
        async with asyncio.timeout(_ERROR_TEXT_S):
            return await read_body(response, 1 << 16)
    return b""


def _venue_error(body: bytes) -> tuple[int | None, str]:
    """Take {"code":-1121,"msg":"..."} apart; else the start of the text."""
    with suppress(orjson.JSONDecodeError):
        found = orjson.loads(body)
        if isinstance(found, dict) and isinstance(found.get("code"), int):
            return found["code"], str(found.get("msg", ""))[:300]
    return None, body[:200].decode(errors="replace").strip()


def _what(path: str, params: Params) -> str:
    """Name a request for messages: endpoint, symbol, first id."""
    about = [str(params[name])[:60] for name in ("symbol", "symbols", "fromId") if name in params]
    return " ".join([path.removeprefix("/api/v3/"), *about])


def json_list(names: list[str]) -> str:
    """Return names as the venue takes them in `symbols`: JSON without blanks, UTF-8."""
    return json.dumps(names, ensure_ascii=False, separators=(",", ":"))
