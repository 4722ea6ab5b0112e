"""What every answer carries, and every refusal: a list to read."""

import asyncio
import json
import logging
import re
from collections import Counter

import pytest
from http_desk import HOST, PATHS, Failing, assert_secure, fetch, raw, refusal_in, serving
from test_streams import desk as desk

from tradecore import log
from tradecore.http.counts import HttpCounts
from tradecore.http.peers import RateLimiter

# --- what every answer carries ---------------------------------------------------------------

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
"""Strict-Transport-Security is for whoever puts TLS before it; Server is sent by nobody."""

OWN_POLICY = ("/", "/page/page.js")
"""The page has a Content-Security-Policy of its own, and may be cached."""


@pytest.mark.parametrize("path", [*PATHS, *OWN_POLICY, "/no", "/api/v3/no"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_every_answer_has_these_headers(path, method):
    async with serving() as server:
        response, _ = await fetch(server, path, method)
    is_page = path in OWN_POLICY and method != "POST"
    for name, value in HEADERS.items():
        if is_page and name in ("Content-Security-Policy", "Cache-Control"):
            assert response.headers[name]
        else:
            assert response.headers.getall(name) == [value]
    others = {name.title() for name in response.headers} - {name.title() for name in HEADERS}
    usual = {"Content-Type", "Content-Length", "Date", "Vary", "Etag", "Content-Encoding"}
    assert others <= (usual if method != "POST" else {*usual, "Allow", "Connection"})


# --- what is refused -------------------------------------------------------------------------

NO_HTTP = "Bad request syntax or unsupported method"
WRONG_HOST = "This Host name is not in HTTP_HOSTS; use localhost."
ONLY_GET = "Only GET and HEAD are served."
NO_BODY = "A request carries no body here."
NOTHING = "Nothing matches the given URI"
ALLOW = ["Allow: GET, HEAD"]

REFUSED = [
    # what comes                                           status  text  more headers  counted as
    # Host: DNS rebinding needs a name.
    (["GET /live HTTP/1.1"], 400, NO_HTTP, [], "malformed"),
    (["GET /live HTTP/1.1", HOST, HOST], 400, NO_HTTP, [], "malformed"),
    (["GET /live HTTP/1.1", "Host: evil.example"], 421, WRONG_HOST, [], "host"),
    (["GET /live HTTP/1.0", "Host: evil.example"], 421, WRONG_HOST, [], "host"),
    (["GET http://evil.example/live HTTP/1.1", HOST], 421, WRONG_HOST, [], "host"),
    (["GET http://localhost/live HTTP/1.1", "Host: evil.example"], 421, WRONG_HOST, [], "host"),
    (["GET /live HTTP/1.1", "Host : localhost"], 400, NO_HTTP, [], "malformed"),
    # Methods.
    (["POST /live HTTP/1.1", HOST], 405, ONLY_GET, ALLOW, "method"),
    (["PUT /metrics HTTP/1.1", HOST], 405, ONLY_GET, ALLOW, "method"),
    (["DELETE /api/v3/klines HTTP/1.1", HOST], 405, ONLY_GET, ALLOW, "method"),
    (["PATCH / HTTP/1.1", HOST], 405, ONLY_GET, ALLOW, "method"),
    (["TRACE /live HTTP/1.1", HOST], 405, ONLY_GET, ALLOW, "method"),
    (["OPTIONS * HTTP/1.1", HOST], 405, ONLY_GET, ALLOW, "method"),
    (["CONNECT localhost:443 HTTP/1.1", HOST + ":443"], 405, ONLY_GET, ALLOW, "method"),
    (["CONNECT evil.example:443 HTTP/1.1", HOST], 421, WRONG_HOST, [], "host"),
    (["BREW /live HTTP/1.1", HOST], 400, NO_HTTP, [], "malformed"),
    (["get /live HTTP/1.1", HOST], 400, NO_HTTP, [], "malformed"),
    # Bodies, and requests that two readers would take apart at different places.
    (["GET /live HTTP/1.1", HOST, "Content-Length: 9999999999"], 413, NO_BODY, [], "body"),
    (["GET /live HTTP/1.1", HOST, "Transfer-Encoding: chunked"], 413, NO_BODY, [], "body"),
    (["POST /x HTTP/1.1", HOST, "Expect: 100-continue"], 405, ONLY_GET, ALLOW, "method"),
    (["GET /live HTTP/1.1", HOST, "Content-Length: -5"], 400, NO_HTTP, [], "malformed"),
    (
        ["GET /live HTTP/1.1", HOST, "Content-Length: 1", "Content-Length: 2"],
        *(400, NO_HTTP, [], "malformed"),
    ),
    (
        ["GET /live HTTP/1.1", HOST, "Content-Length: 4", "Transfer-Encoding: chunked"],
        *(400, NO_HTTP, [], "malformed"),
    ),
    (
        ["GET /live HTTP/1.1", HOST, "Transfer-Encoding: chunked, identity"],
        *(400, NO_HTTP, [], "malformed"),
    ),
    (["GET /live HTTP/1.1", HOST, "X: folded", " line"], 400, NO_HTTP, [], "malformed"),
    (["GET /live HTTP/1.1", HOST, "X: a\0b"], 400, NO_HTTP, [], "malformed"),
    # Sizes.
    (["GET /?" + "a=b&" * 2500 + " HTTP/1.1", HOST], 400, NO_HTTP, [], "malformed"),
    (["GET / HTTP/1.1", HOST, "X: " + "x" * 20_000], 400, NO_HTTP, [], "malformed"),
    (["GET / HTTP/1.1", HOST, *["X: y"] * 200], 400, NO_HTTP, [], "malformed"),
    # Other protocols.
    (["GET / HTTP/9.9", HOST], 400, NO_HTTP, [], "malformed"),
    (["PRI * HTTP/2.0", "", "SM"], 400, NO_HTTP, [], "malformed"),
    (["\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4], 400, NO_HTTP, [], "malformed"),
    (["SSH-2.0-OpenSSH_9.2"], 400, NO_HTTP, [], "malformed"),
    # Paths.
    (["GET /../../etc/passwd HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET /page/..%2f..%2fserver.py HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET /page/../server.py HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET /live%00 HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET /%zz%ff HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET //live HTTP/1.1", HOST], 404, NOTHING, [], None),
    (["GET /li\0ve HTTP/1.1", HOST], 400, NO_HTTP, [], "malformed"),
]


@pytest.mark.parametrize(
    ("lines", "status", "text", "more", "reason"), REFUSED, ids=[row[0][0][:40] for row in REFUSED]
)
async def test_what_is_refused(lines, status, text, more, reason, caplog):
    if status == 404:
        lines = [*lines, "Connection: close"]
    counts = HttpCounts()
    async with serving(counts=counts) as server:
        answer = refusal_in(await raw(server, "\r\n".join([*lines, "", ""]).encode("latin-1")))
    assert answer[0] == status
    assert answer[2] == text
    closes = [] if "HTTP/1.1" not in lines[0] and reason != "malformed" else ["Connection: close"]
    assert sorted(answer[1]) == sorted([*more, *closes])
    assert Counter(counts.use().refused) == Counter({reason: 1} if reason else {})
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(
    "lines",
    [
        ["GET /live HTTP/1.0"],
        ["GET http://localhost:3000/live HTTP/1.1", HOST],
        ["GET http://[::1]:3000/live HTTP/1.1", HOST],
        ["GET /%6cive HTTP/1.1", HOST],
        ["GET /live?" + "a=b&" * 1500 + " HTTP/1.1", HOST],
        ["GET /live HTTP/1.1", HOST, "Range: bytes=0-1"],
        ["GET /live HTTP/1.1", HOST, "Expect: 100-continue"],
        ["GET /live HTTP/1.1", HOST, "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"],
        ["GET /live HTTP/1.1", HOST, "Content-Length: 0"],
        ["GET /live HTTP/1.1", HOST, "Authorization: Basic nonsense", "Cookie: a=b"],
    ],
    ids=lambda lines: lines[-1][:30],
)
async def test_what_is_odd_and_served(lines):
    async with serving() as server:
        request = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
        answer = await raw(server, request)
    assert answer.split(b" ")[1] == b"200"
    assert answer.endswith(b'\r\n\r\n{"live":true}\n')


UPGRADE = [
    *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
]


@pytest.mark.parametrize(
    ("lines", "status", "text"),
    [
        (["GET /ws HTTP/1.1", "Host: evil.example", *UPGRADE], 421, WRONG_HOST),
        (
            ["GET /ws HTTP/1.1", HOST, *UPGRADE, "Origin: https://evil.example"],
            *(403, "Pages of other origins are not served."),
        ),
        (
            ["GET /ws HTTP/1.1", HOST, *UPGRADE, "Origin: null"],
            *(403, "Pages of other origins are not served."),
        ),
        (
            ["GET /ws/<script>@trade HTTP/1.1", HOST, *UPGRADE],
            *(400, "Invalid request: <script>@trade is not captured"),
        ),
        (["GET /ws HTTP/1.1", HOST], 400, NO_HTTP),
        (["GET /ws HTTP/1.1", HOST, *UPGRADE[:2], "Sec-WebSocket-Version: 1"], 400, NO_HTTP),
        (["POST /ws HTTP/1.1", HOST, *UPGRADE], 405, ONLY_GET),
    ],
)
async def test_what_is_refused_a_stream(desk, lines, status, text):
    request = "\r\n".join([*lines, *([] if UPGRADE[0] in lines else ["Connection: close"]), "", ""])
    reader, writer = await asyncio.open_connection("127.0.0.1", desk.server.port)
    writer.write(request.encode())
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.partition(b"Content-Length: ")[2].split()[0])
        answer = refusal_in(head + await reader.readexactly(size))
    writer.close()
    assert answer[0::2] == (status, text)


async def test_a_request_of_the_last_century_is_refused():
    async with serving() as server:
        answer = await raw(server, b"GET /live\r\n\r\n")
    assert refusal_in(answer) == (400, [], NO_HTTP)


async def test_pipelined_requests_are_answered_in_order_until_one_is_refused():
    get = f"GET {{}} HTTP/1.1\r\n{HOST}\r\n\r\n"
    requests = get.format("/live") * 50 + get.format("/no") + f"POST /a HTTP/1.1\r\n{HOST}\r\n\r\n"
    async with serving() as server:
        answer = await raw(server, (requests + get.format("/live") * 5).encode())
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3})", answer)]
    assert found == [200] * 50 + [404, 405]


# --- failures --------------------------------------------------------------------------------


@pytest.fixture
def unlimited(monkeypatch):
    """Forget what was logged a moment ago."""
    monkeypatch.setattr(log, "_limits", {})


async def test_a_bug_is_a_500_without_internals(caplog, unlimited):
    async with serving(server_class=Failing) as server:
        response, body = await fetch(server, "/health")
        after, _ = await fetch(server, "/health/db")
    assert response.status == 500
    assert json.loads(body)["error"] == "Internal Server Error"
    assert b"secret" not in body
    assert b"Traceback" not in body
    assert_secure(response.headers)
    assert [(record.levelno, record.path) for record in caplog.records if record.exc_info] == [
        (logging.ERROR, "/health")
    ]
    assert after.status == 200


async def test_a_bug_that_is_met_often_is_told_once(caplog, unlimited):
    async with serving(server_class=Failing) as server:
        for _ in range(5):
            assert (await fetch(server, "/health"))[0].status == 500
    assert len([record for record in caplog.records if record.exc_info]) == 1


# --- rate limit -----------------------------------------------------------------------------


async def test_too_many_requests_are_429_but_live_is_served(monkeypatch):
    monkeypatch.setattr(RateLimiter.__init__, "__defaults__", (0.1, 3, 1024, lambda: 0))
    async with serving() as server:
        answers = [(await fetch(server, "/ready"))[0] for _ in range(5)]
        live, _ = await fetch(server, "/live")
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["Retry-After"] == "10"
    assert_secure(answers[-1].headers)
    assert live.status == 200


async def test_scrapers_do_not_use_up_what_probes_may_ask(monkeypatch):
    monkeypatch.setattr(RateLimiter.__init__, "__defaults__", (0.1, 3, 1024, lambda: 0))
    counts = HttpCounts()
    async with serving(counts=counts) as server:
        found = {
            path: [(await fetch(server, path))[0].status for _ in range(4)]
            for path in ("/metrics", "/ready", "/api", "/live")
        }
    assert found.pop("/live") == [200] * 4
    assert list(found.values()) == [[200, 200, 200, 429]] * 3
    assert counts.use().refused["rate"] == 3
    assert counts.use().requests[("/ready", "4xx")] == 1
