"""Who may ask for what: by which names, with which token."""

import base64
import json
import logging
import socket
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace

import pytest
from http_desk import HOST, assert_secure, fetch, raw, refusal_in, serving
from snapshots import changed

from tradecore.http import access
from tradecore.http.access import Policy
from tradecore.http.counts import HttpCounts
from tradecore.values import Secret

# --- the token -------------------------------------------------------------------------------

TOKEN = "correct-horse-battery"
OPEN = ("/live", "/ready", "/metrics", "/health", "/health/db", "/health/binance")
ASKS = ("/", "/page/page.js", "/api", "/no", "/ws", "/ws/btcusdt@trade", "/stream", "/api/v3/ping")


def basic(token: str, user: str = "x") -> str:
    return "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()


RIGHT = (f"Bearer {TOKEN}", f"bearer  {TOKEN} ", basic(TOKEN), basic(TOKEN, ""))
WRONG = (
    *("Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"Token {TOKEN}"),
    *(basic(""), basic(TOKEN + ":"), basic("", TOKEN), "Basic %%%", "Basic", "Basic w6Q=", "\xff"),
)


async def statuses(server, paths, authorization=None):
    headers = {} if authorization is None else {"Authorization": authorization}
    return [(await fetch(server, path, headers=headers))[0].status for path in paths]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_a_token_is_asked_for_all_but_probes(host):
    policy = Policy(token=Secret(TOKEN), is_token_asked=True)
    counts = HttpCounts()
    async with serving(host=host, policy=policy, counts=counts) as server:
        assert await statuses(server, OPEN) == [200] * len(OPEN)
        assert await statuses(server, ASKS) == [401] * len(ASKS)
        response, body = await fetch(server, "/api")
        _, of_the_api = await fetch(server, "/api/v3/ping")
        of_a_page = {"Sec-Fetch-Dest": "empty"}
        by_a_page, _ = await fetch(server, "/api", headers=of_a_page)
        for shown in RIGHT:
            assert await statuses(server, ("/", "/api", "/ready", "/no"), shown) == [
                *(200, 200, 200, 404)
            ]
    assert response.headers.getall("WWW-Authenticate") == [
        'Basic realm="tradecore", charset="UTF-8"',
        'Bearer realm="tradecore"',
    ]
    assert by_a_page.headers.getall("WWW-Authenticate") == ['Bearer realm="tradecore"']
    assert json.loads(body)["text"] == "Show the token of HTTP_TOKEN."
    assert json.loads(of_the_api) == {"code": -2015, "msg": "Show the token of HTTP_TOKEN."}
    assert counts.use().refused["token_missing"] == len(ASKS) + 3


@pytest.mark.parametrize("method", ["POST", "PUT", "TRACE", "OPTIONS", "HEAD"])
async def test_no_method_gets_around_the_token(method):
    async with serving(policy=Policy(token=Secret(TOKEN))) as server:
        for path in ASKS:
            assert (await fetch(server, path, method))[0].status == 401
        headers = {"Authorization": RIGHT[0]}
        response, _ = await fetch(server, "/api", method, headers=headers)
    assert response.status == (200 if method == "HEAD" else 405)


@pytest.mark.parametrize("shown", WRONG)
async def test_a_wrong_token_is_refused_and_told_to_nobody(shown, caplog):
    caplog.set_level(logging.DEBUG)
    counts = HttpCounts()
    async with serving(policy=Policy(token=Secret(TOKEN)), counts=counts) as server:
        request = f"GET /api HTTP/1.1\r\n{HOST}\r\nAuthorization: {shown}\r\n\r\n"
        answer = await raw(server, request.encode("latin-1"))
        assert await statuses(server, OPEN, "Bearer other-token-than-ours") == [200] * len(OPEN)
    assert refusal_in(answer)[0::2] == (401, "This is not the token of HTTP_TOKEN.")
    assert TOKEN not in f"{answer!r} {caplog.text} {[vars(one) for one in caplog.records]}"
    assert counts.use().refused["token_wrong"] == 1


async def test_many_wrong_tokens_have_to_wait_and_the_right_one_never_does(monkeypatch):
    monkeypatch.setattr(access, "FAILURES_BURST", 3)
    monkeypatch.setattr(access, "FAILURES_PER_S", 0.001)
    counts = HttpCounts()
    async with serving(policy=Policy(token=Secret(TOKEN)), counts=counts) as server:
        wrong = "Bearer wrong"
        # An open path takes part: what it tells those who have the token shows a right guess too.
        assert await statuses(server, ("/api", "/health", "/ws"), wrong) == [401, 200, 401]
        refused, body = await fetch(server, "/api", headers={"Authorization": wrong})
        # One behind the same proxy, between the wrong ones of the others.
        for shown in RIGHT:
            assert await statuses(server, ("/api",), shown) == [200]
            assert await statuses(server, ("/api",), wrong) == [429]
        missing, _ = await fetch(server, "/api")
    assert (refused.status, missing.status) == (429, 401)
    assert json.loads(body)["text"] == "Too many wrong tokens."
    assert 900 < int(refused.headers["Retry-After"]) <= 1000
    assert counts.use().refused["token_rate"] == 1 + len(RIGHT)


@pytest.mark.parametrize(
    ("host", "policy", "is_closed"),
    [
        ("0.0.0.0", Policy(is_token_asked=True), True),
        ("0.0.0.0", Policy(is_token_asked=False), False),
        ("127.0.0.1", Policy(is_token_asked=True), False),
    ],
)
async def test_an_open_address_without_a_token_serves_probes_only(host, policy, is_closed, caplog):
    async with serving(host=host, policy=policy) as server:
        assert await statuses(server, OPEN) == [200] * len(OPEN)
        found = await statuses(server, ASKS)
        _, body = await fetch(server, "/")
    assert found == ([403] * len(ASKS) if is_closed else [200, 200, 200, 404, 404, 404, 404, 404])
    if is_closed:
        assert "until HTTP_TOKEN is set, or HTTP_AUTH=off" in json.loads(body)["text"]
    warnings = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == (host != "127.0.0.1")


TOLD = {
    *("version", "name", "line", "state", "symbol", "symbols"),
    *("server_version", "edition", "level", "waits"),
}
"""Texts of a snapshot that all may read; every other one, and those to come, need the token."""

SECRET = "hunter2"


def infected(part):
    """Return a part of a snapshot with the secret in every text that not all may read."""
    if isinstance(part, str):
        return f"lost: connection refused to {SECRET}"
    if isinstance(part, Mapping):
        return {key: infected(value) for key, value in part.items()}
    if isinstance(part, tuple) and not hasattr(part, "_fields"):
        return tuple(infected(one) for one in part)
    if not is_dataclass(part):
        return part
    texts = {}
    for one in fields(part):
        value = getattr(part, one.name)
        if one.name not in TOLD:
            texts[one.name] = infected("" if value is None and "str" in str(one.type) else value)
    return replace(part, **texts)


@pytest.mark.parametrize("is_up", [True, False])
async def test_texts_of_errors_are_for_those_who_have_the_token(is_up):
    snapshot = infected(
        changed(
            database__reachable=is_up,
            database__away_s=None if is_up else 99.0,
            lifecycle__trouble={"drop": "why"},
            redis__away_s=99.0,
        )
    )
    async with serving(snapshot, policy=Policy(token=Secret(TOKEN))) as server:
        for path in OPEN:
            _, without = await fetch(server, path)
            _, wrong = await fetch(server, path, headers={"Authorization": "Bearer x"})
            assert SECRET.encode() not in without + wrong
            _, shown = await fetch(server, path, headers={"Authorization": RIGHT[0]})
            assert (SECRET.encode() in shown) is (path not in ("/live", "/metrics"))
            if path == "/health/binance":
                assert json.loads(without)["connections"][0]["last_end"] == "lost"
    async with serving(snapshot) as server:
        assert SECRET.encode() in (await fetch(server, "/health/db"))[1]


async def test_a_page_elsewhere_asks_before_it_shows_a_token():
    page = "https://page.example"
    policy = Policy(token=Secret(TOKEN), cors_origins=(page,))
    asks = {"Origin": page, "Access-Control-Request-Method": "GET"}
    async with serving(policy=policy) as server:
        allowed, _ = await fetch(server, "/api/v3/ping", "OPTIONS", headers=asks)
        refused, _ = await fetch(server, "/api/v3/ping", headers={"Origin": page})
        stranger, _ = await fetch(
            server, "/api/v3/ping", "OPTIONS", headers={**asks, "Origin": page + ".evil"}
        )
    assert allowed.status == 204
    assert "Authorization" in allowed.headers["Access-Control-Allow-Headers"]
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, page)
    assert "Access-Control-Allow-Credentials" not in allowed.headers
    assert stranger.status == 401
    assert "Access-Control-Allow-Origin" not in stranger.headers


# --- Host ------------------------------------------------------------------------------------


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
