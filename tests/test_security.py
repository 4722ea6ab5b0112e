import json
import logging
import socket

import pytest
from http_desk import PATHS, Failing, assert_secure, fetch, raw, serving

from tradecore.http.access import Policy
from tradecore.http.peers import RateLimiter


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [*((path, "GET", 200) for path in PATHS), ("/no", "GET", 404), ("/live", "POST", 405)],
)
async def test_every_answer_is_secure(path, method, status):
    async with serving() as server:
        response, body = await fetch(server, path, method)
    assert response.status == status
    assert_secure(response.headers)
    if status >= 400:
        assert set(json.loads(body)) == {"error", "text"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods_are_405(method):
    async with serving() as server:
        response, _ = await fetch(server, "/health", method)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD"


async def test_a_bug_is_a_500_without_internals(caplog):
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


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW /live HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["tls", "line", "header", "headers", "length", "version", "method"],
)
async def test_what_is_no_request_is_a_400(request_bytes, caplog):
    async with serving() as server:
        head, _, body = (await raw(server, request_bytes)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    lines = head.decode().split("\r\n")[1:]
    assert_secure(dict(line.split(": ", 1) for line in lines))
    assert set(json.loads(body)) == {"error", "text"}
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /live HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n"
        + b"x" * 9999,
        b"GET /live HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_a_body_is_a_413(request_bytes):
    async with serving() as server:
        answer = await raw(server, request_bytes)
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:3000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:3000", 200),
        ("localhost.", 200),
        ("localhost.:3000", 200),
        ("localhost..", 421),
        (".", 421),
        ("evil.example.", 421),
        ("evil.example", 421),
        ("evil.example:3000", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::1].evil.example", 421),
        ("", 421),
    ],
)
async def test_only_local_names_on_a_loopback_bind(host, status):
    async with serving() as server:
        response, _ = await fetch(server, "/live", headers={"Host": host})
    assert response.status == status
    assert_secure(response.headers)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.0.2.7:3000", 200),
        ("[2001:db8::7]:3000", 200),
        ("localhost", 200),
        (socket.gethostname().upper(), 200),
        ("Capture.example.:80", 200),
        ("other.example", 421),
        ("2130706433", 421),
        ("192.0.2.7.other.example", 421),
    ],
)
async def test_addresses_and_listed_names_on_an_open_bind(host, status):
    policy = Policy(hosts=("capture.example",))
    async with serving(host="0.0.0.0", policy=policy) as server:
        response, _ = await fetch(server, "/live", headers={"Host": host})
    assert response.status == status


def test_bucket_fills_with_time():
    now_ns = 0
    limiter = RateLimiter(per_s=2.0, burst=3, now_ns=lambda: now_ns)
    assert [limiter.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert limiter.take("b") == 0.0
    now_ns = 250_000_000
    assert limiter.take("a") == 0.25
    now_ns = 500_000_000
    assert [limiter.take("a") for _ in range(2)] == [0.0, 0.5]
    now_ns = 3_600_000_000_000
    assert [limiter.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_bucket_memory_is_bounded():
    limiter = RateLimiter(burst=1, peers_max=100, now_ns=lambda: 0)
    limiter.take("often")
    for i in range(10_000):
        limiter.take(f"peer{i}")
        assert limiter.take("often") > 0.0
    assert len(limiter._buckets) == 100


async def test_too_many_requests_are_429_but_live_is_served(monkeypatch):
    monkeypatch.setattr(RateLimiter.__init__, "__defaults__", (0.1, 3, 1024, lambda: 0))
    async with serving() as server:
        answers = [(await fetch(server, "/ready"))[0] for _ in range(5)]
        live, _ = await fetch(server, "/live")
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["Retry-After"] == "10"
    assert_secure(answers[-1].headers)
    assert live.status == 200
