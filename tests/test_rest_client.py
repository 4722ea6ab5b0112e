"""The REST client against an exchange that limits and bans, and against odd servers."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fakes import simulated_exchange
from rest_desk import odd_server

from tradecore.errors import UsageError
from tradecore.rest import budget as budgets
from tradecore.rest import client as clients
from tradecore.rest.budget import Budget, RestError
from tradecore.rest.client import RestClient

TIME = "/api/v3/time"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_RETRY_S", (0.01, 0.02))


@asynccontextmanager
async def client_of(url: str, **options: Any) -> AsyncIterator[RestClient]:
    client = RestClient(url, Budget(None, "test"), **options)
    try:
        yield client
    finally:
        await client.close()


async def failure(awaitable: Awaitable[Any]) -> RestError:
    with pytest.raises(RestError) as caught:
        await awaitable
    return caught.value


# -- an exchange that limits ----------------------------------------------------------------------


async def test_the_weight_limit_is_never_passed() -> None:
    """2,000 weight allowed, 5,000 wanted: some is refused by us, nothing by the exchange."""
    async with simulated_exchange(rate=10, weight_limit=2000) as exchange:
        budget = Budget(None, "test", limit_weight=2000)
        client = RestClient(exchange.rest, budget)
        params = {"symbol": "BTCUSDT", "limit": 1}
        outcomes = await asyncio.gather(
            *(client.get("/api/v3/trades", params, 25, wait_s=0.5) for _ in range(60)),
            return_exceptions=True,
        )
        while not isinstance(outcomes[-1], RestError):
            try:
                await client.get("/api/v3/trades", params, 25, wait_s=0)
            except RestError as error:
                outcomes.append(error)
        await client.close()
        assert outcomes[-1].kind == "limited"
        assert client.requests.keys() == {("trades", "200")}
        assert client.requests["trades", "200"] == 72, "nine tenths of 2,000 at 25 each"
        assert budget.used_weight == 1800
        counts = (await exchange.state())["counts"]
        assert not {"rest 429", "rest 418"} & counts.keys()


async def test_no_request_reaches_an_exchange_that_has_had_too_many(tmp_path: Path) -> None:
    """Other programs on the address use the weight up; three clients, one of them restarted."""
    async with simulated_exchange(rate=10, weight_limit=200, ban_seconds=600) as exchange:
        for _ in range(8):
            await exchange.get("/api/v3/trades", symbol="BTCUSDT")
        path = tmp_path / "rest_budget.json"
        errors = []
        for _ in range(3):
            client = RestClient(exchange.rest, Budget(path, "test"))
            asks = (client.get("/api/v3/trades", {"symbol": "BTCUSDT"}, 25) for _ in range(10))
            errors += await asyncio.gather(
                *(asyncio.wait_for(ask, 0.5) for ask in asks), return_exceptions=True
            )
            await client.close()
        # Answers come only when the exchange's minute turns in these two seconds.
        assert all(isinstance(e, RestError | TimeoutError | bytes) for e in errors)
        assert (await exchange.state())["counts"].get("rest 429", 0) <= 1
        assert "rest 418" not in (await exchange.state())["counts"]


async def test_errors_of_the_exchange_are_overcome() -> None:
    async with (
        simulated_exchange(rate=10, rest_error_every=3) as exchange,
        client_of(exchange.rest) as client,
    ):
        for _ in range(12):
            assert b"serverTime" in await client.get(TIME)
        assert client.requests["time", "200"] == 12
        assert 4 <= client.requests["time", "503"] <= 6


async def test_what_the_exchange_says_is_told() -> None:
    async with (
        simulated_exchange(rate=10, epoch=-600) as exchange,
        client_of(exchange.rest) as client,
    ):
        error = await failure(client.get("/api/v3/trades", {"symbol": "btcusdt"}, 25))
        assert (error.kind, error.status, error.code) == ("refused", 400, -1100)
        assert "trades btcusdt" in str(error) and "correct the name" in str(error)
        assert client.requests == {("trades", "400"): 1}, "asking again would not help"
        body = await client.get("/api/v3/trades", {"symbol": "币安人生USDT"}, 25)
        assert body.startswith(b'[{"id":')


# -- odd servers ----------------------------------------------------------------------------------


async def test_a_ban_ends_all_requests_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rest_budget.json"
    body = b'{"code":-1003,"msg":"Way too much request weight used; IP banned until 1. Please"}'
    async with odd_server((200, {}, b"{}"), (418, {"Retry-After": "300"}, body)) as odd:
        client = RestClient(odd.url, Budget(path, "test"))
        await client.get(TIME)
        errors = [failure(client.get(TIME)) for _ in range(20)]
        kinds = {error.kind for error in await asyncio.gather(*errors)}
        assert kinds == {"banned"} and len(odd.asked) == 2
        for _ in range(5):
            restarted = RestClient(odd.url, Budget(path, "test"))
            error = await failure(restarted.get(TIME))
            assert error.kind == "banned" and 299 < error.retry_after_s <= 301
            await restarted.close()
        assert len(odd.asked) == 2, "requests sent while banned"
        await client.close()


ASK_UNTIL_BANNED = """
import asyncio, sys
from pathlib import Path
from tradecore.rest.budget import Budget, RestError
from tradecore.rest.client import RestClient

async def main():
    client = RestClient(sys.argv[1], Budget.of(Path(sys.argv[2]), sys.argv[1]))
    try:
        while True:
            await client.get("/api/v3/time")
    except RestError as error:
        print(error.kind)

asyncio.run(main())
"""


async def test_processes_share_a_ban_and_restarts_do_not_ask(tmp_path: Path) -> None:
    async def ask() -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ASK_UNTIL_BANNED, odd.url, str(tmp_path)),
            stdout=asyncio.subprocess.PIPE,
        )
        return (await process.communicate())[0].decode().strip()

    fine = [b"{}"] * 200
    async with odd_server(*fine, (418, {"Retry-After": "600"}, b"")) as odd:
        assert await asyncio.gather(ask(), ask()) == ["banned"] * 2
        assert len(odd.asked) <= 202, "one of the other process may have been on its way"
        count = len(odd.asked)
        assert await asyncio.gather(*(ask() for _ in range(3))) == ["banned"] * 3
        assert len(odd.asked) == count


async def test_the_end_of_a_ban_is_read_from_the_body_too_or_assumed() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=418)
        await response.prepare(request)
        await asyncio.sleep(60)
        return response

    until = b'{"code":-1003,"msg":"banned until 99999999999999."}'
    for answer, seconds in (
        ((418, {}, until), 3 * 86_400),
        ((418, {}, b"no"), 121),
        ((418, {"Retry-After": "soon"}, until), 3 * 86_400),
        ((418, {"Retry-After": "600"}, until), 3 * 86_400),
        (hang, 121),
    ):
        async with odd_server(answer) as odd, client_of(odd.url) as client:
            error = await asyncio.wait_for(failure(client.get(TIME)), 5)
            assert error.kind == "banned" and error.status == 418
            assert error.retry_after_s == pytest.approx(seconds, abs=2)


async def test_a_429_is_waited_out_within_the_callers_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budgets, "MARGIN_S", 0.1)
    limited = (429, {"Retry-After": "1"}, b"{}")
    async with odd_server(limited, b"{}") as odd, client_of(odd.url) as client:
        error = await failure(client.get(TIME, wait_s=0.5))
        assert error.kind == "limited" and 0.5 < error.retry_after_s <= 1.1
        assert await client.get(TIME) == b"{}"
        assert client.budget.refusals == {429: 1}


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((302, {"Location": "http://169.254.169.254/"}, b""), "refused", "redirects to"),
        ((451, {}, b"Eligibility"), "refused", "data-api.binance.vision"),
        ((403, {}, b"<html>"), "refused", "firewall"),
        ((404, {}, b""), "refused", "check BINANCE_REST_URL"),
        ((400, {}, b'{"code":-1121,"msg":"Invalid symbol."}'), "refused", "-1121 Invalid symbol"),
        ((500, {}, b"oops"), "unreachable", "HTTP 500, oops"),
        ((503, {"Retry-After": "999"}, b""), "unreachable", "HTTP 503"),
        ((200, {"Content-Encoding": "gzip"}, b"no gzip at all"), "unreachable", "not answer"),
        (b"x" * (17 << 20), "broken", "longer than 16,777,216 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
async def test_odd_answers(answer: Any, kind: str, text: str) -> None:
    async with odd_server(answer) as odd, client_of(odd.url) as client:
        error = await failure(client.get(TIME))
        assert error.kind == kind and text in str(error)
        retried = kind == "unreachable" and "Retry-After" not in str(answer)
        assert len(odd.asked) == (3 if retried else 1)
        assert sum(client.requests.values()) == len(odd.asked)


async def test_a_server_that_is_not_there() -> None:
    async with odd_server(b"") as odd:
        url = odd.url
    async with client_of(url) as client:
        error = await failure(client.get(TIME))
        assert error.kind == "unreachable" and "BINANCE_REST_URL" in str(error)
        assert client.requests == {("time", "unreachable"): 3}


async def test_a_server_that_hangs_costs_its_limit_only() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async def trickle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    for answer in (hang, trickle):
        async with odd_server(answer) as odd, client_of(odd.url, limit_s=0.2) as client:
            error = await asyncio.wait_for(failure(client.get(TIME, tries=2)), 3)
            assert error.kind == "unreachable" and "no answer within 0.2 s" in str(error)
            assert client.requests == {("time", "timeout"): 2}


async def test_a_server_that_hung_is_asked_beside_what_it_leaves_unanswered() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async with odd_server(hang, b"{}") as odd, client_of(odd.url) as client:
        assert await asyncio.wait_for(client.get(TIME, hangs_s=1.2), 3) == b"{}"
        assert client.requests == {("time", "200"): 1, ("time", "cancelled"): 1}
        assert not client.budget._in_flight


async def test_a_slow_answer_is_taken_whatever_becomes_of_the_second() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(2.0)
        return web.Response(body=b"slow")

    for second in (slow, (503, {}, b"")):
        async with odd_server(slow, second) as odd, client_of(odd.url) as client:
            assert await client.get(TIME, hangs_s=1.2) == b"slow"
            assert len(odd.asked) == 2


@pytest.mark.parametrize("reply", [b"", b"\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\0" * 100_000])
async def test_a_server_that_speaks_no_http(reply: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with client_of(f"http://127.0.0.1:{port}", limit_s=2.0) as client:
        error = await failure(client.get(TIME, tries=1))
        assert error.kind in ("unreachable", "broken")
    server.close()
    await server.wait_closed()


async def test_headers_and_encoding_of_a_request() -> None:
    async with odd_server(b"{}") as odd, client_of(odd.url + "/") as client:
        await client.get("/api/v3/trades", {"symbol": "币安人生USDT", "limit": 5})
        (request,) = odd.asked
        assert request.headers["X-MBX-TIME-UNIT"] == "MICROSECOND"
        raw = "/api/v3/trades?symbol=%E5%B8%81%E5%AE%89%E4%BA%BA%E7%94%9FUSDT&limit=5"
        assert request.raw_path == raw


async def test_cookies_are_not_kept() -> None:
    answer = (200, {"Set-Cookie": "a=b"}, b"{}")
    async with odd_server(answer) as odd, client_of(odd.url) as client:
        for _ in range(2):
            await client.get(TIME)
        assert "Cookie" not in odd.asked[1].headers


async def test_an_idle_session_is_closed_and_opened_again() -> None:
    async with odd_server(b"{}") as odd, client_of(odd.url, idle_s=0.05) as client:
        for _ in range(2):
            await client.get(TIME)
            assert client._session is not None
            async with asyncio.timeout(5):
                while client._session is not None or client._closing:
                    await asyncio.sleep(0.01)


async def test_a_cancelled_request_gives_its_place_back() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async with odd_server(hang, b"{}") as odd, client_of(odd.url) as client:
        task = asyncio.create_task(client.get(TIME))
        async with asyncio.timeout(5):
            while not odd.asked:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await client.get(TIME, wait_s=0) == b"{}"
        assert client.requests == {("time", "cancelled"): 1, ("time", "200"): 1}


@pytest.mark.parametrize(
    "url", ["http://api.binance.com", "ftp://127.0.0.1", "api.binance.com", "http://[::1"]
)
def test_only_https_or_this_machine(url: str) -> None:
    with pytest.raises(UsageError, match="https://"):
        RestClient(url, Budget(None, "test"))
