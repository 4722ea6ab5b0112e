import asyncio
import contextlib
import json
import logging
import shutil
import socket
import subprocess

import aiohttp
import pytest
from aiohttp import web
from snapshots import HEALTHY, changed

from tradecore.errors import UsageError
from tradecore.http import connections, security
from tradecore.http.health import assess
from tradecore.http.security import RateLimiter
from tradecore.http.server import SideServer
from tradecore.snapshot import ConnectionState, SymbolState

PATHS = ("/", "/health", "/health/db", "/health/binance", "/ready", "/live", "/metrics")

LIVE = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
API = b"GET /api/v3/ping HTTP/1.1\r\nHost: localhost\r\n\r\n"

AWAY = {"database__reachable": False, "database__last_error": "connection refused"}
STALE = SymbolState("ETHUSDT", 5, 9, 77.0, stale=True)
DEAD_FEED = {
    "connections": (
        ConnectionState(name="A0", line="A", state="backing_off", streams=6, data_age_s=None),
    )
}


def connection(state: str, streams: int) -> ConnectionState:
    return ConnectionState(name="A0", line="A", state=state, streams=streams, data_age_s=1.0)


@contextlib.asynccontextmanager
async def serving(snapshot=HEALTHY, host="127.0.0.1", server_class=SideServer):
    """Yield a started server whose snapshot is `snapshot`."""
    server = server_class(host, 0, lambda: snapshot)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def fetch(server, path, method="GET", **options):
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.request(method, path, **options) as response,
    ):
        return response, await response.read()


@contextlib.asynccontextmanager
async def connected(server):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_connections(server, count):
    async with asyncio.timeout(20):
        while len(server._runner.server.connections) != count:
            await asyncio.sleep(0.005)


async def raw(server, request: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes."""
    answer = b""
    async with asyncio.timeout(20), connected(server) as (reader, writer):
        writer.write(request)
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
    return answer


def assert_secure(headers):
    for name, value in security.HEADERS.items():
        assert headers[name] == value
    assert "Server" not in headers


# --- assess ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "codes"),
    [
        ({}, "ok", []),
        ({"holes__open": 99, "counters__trades_parked": 5}, "ok", []),
        ({"symbols": (STALE,)}, "degraded", ["symbols_stale"]),
        ({"counters__trades_far_below": 1}, "degraded", ["ids_far_below"]),
        ({"connections": (), "shards__held": 0}, "ok", []),
        ({**AWAY, "database__away_s": 0.0}, "degraded", ["database_away"]),
        ({**AWAY, "database__away_s": 30.0}, "degraded", ["database_away"]),
        ({**AWAY, "database__away_s": 30.1}, "failed", ["database_away"]),
        ({"connections": (), "shards__total": 0}, "failed", ["no_live_stream"]),
        (DEAD_FEED, "failed", ["no_live_stream"]),
        ({"connections": (connection("stale", 6),)}, "failed", ["no_live_stream"]),
        ({"connections": (connection("live", 0),)}, "failed", ["no_live_stream"]),
        ({"connections": (connection("live", 5),)}, "degraded", ["streams_missing"]),
        (
            {"connections": (connection("live", 6), connection("draining", 6))},
            "ok",
            [],
        ),
        (
            {"connections": (connection("live", 6), connection("connecting", 6))},
            "degraded",
            ["connection_not_live"],
        ),
        ({"lifecycle__job_trouble": "Jobs fail: x"}, "degraded", ["timescale_jobs"]),
        ({"lifecycle__trouble": {"drop": "why"}}, "degraded", ["lifecycle_drop"]),
        ({"lifecycle__waits": "candles", "lifecycle__waits_s": 86_000.0}, "ok", []),
        (
            {"lifecycle__waits": "candles", "lifecycle__waits_s": 87_000.0},
            "degraded",
            ["retention_waits"],
        ),
        ({"ring__above_high_water": True}, "failed", ["ring_above_high_water"]),
        (
            {**AWAY, "database__away_s": 31.0, **DEAD_FEED, "ring__above_high_water": True},
            "failed",
            ["database_away", "no_live_stream", "ring_above_high_water"],
        ),
    ],
)
async def test_every_reason_reaches_assess_and_ready(changes, status, codes):
    snapshot = changed(**changes)
    verdict = assess(snapshot)
    assert verdict.status == status
    assert [reason.code for reason in verdict.reasons] == codes
    async with serving(snapshot) as server:
        response, body = await fetch(server, "/ready")
        overall, _ = await fetch(server, "/health")
    assert response.status == overall.status == (503 if status == "failed" else 200)
    answer = json.loads(body)
    assert answer["ready"] is (status != "failed")
    assert [reason["code"] for reason in answer["reasons"]] == codes


def test_reasons_say_how_much():
    verdict = assess(changed(**AWAY, database__away_s=42.4, ring__above_high_water=True))
    assert [reason.text for reason in verdict.reasons] == [
        "The database has been away for 42 s; trades wait in the ring.",
        "256 of 1024 ring slots are taken; sockets are paused.",
    ]


# --- routes ---------------------------------------------------------------------------------


async def test_health_tells_everything():
    async with serving() as server:
        response, body = await fetch(server, "/health")
    assert response.content_type == "application/json"
    assert json.loads(body) == {
        "status": "ok",
        "reasons": [],
        "ready": True,
        "version": "0.1.0",
        "uptime_s": 12.3,
        "feed": {
            "connections_live": 2,
            "connections_total": 2,
            "streams_live": 6,
            "streams_wanted": 6,
            "data_age_s": 0.25,
        },
        "ring": {
            "rows": 256,
            "capacity": 1024,
            "fill_ratio": 0.25,
            "above_high_water": False,
            "oldest_age_s": 0.125,
            "absorbable_s": 12.0,
        },
        "database": {
            "embedded": True,
            "reachable": True,
            "away_s": None,
            "server_version": "18.6",
            "edition": "timescale-community",
            "level": "plain",
            "schema_version": 3,
            "last_error": None,
        },
        "counts": {
            "frames_received": 1002,
            "frames_refused": 1003,
            "trades_received": 1001,
            "trades_stored": 1011,
            "trades_duplicate": 1005,
            "trades_refused": 1004,
            "trades_parked": 1012,
            "tickers_stored": 1013,
            "klines_stored": 1014,
            "reconnects": 1016,
            "gaps_detected": 1007,
            "trades_missing": 1008,
            "trades_missing_arrived": 1017,
            "trades_far_below": 0,
            "trades_filled": 2039,
            "rollovers": 1018,
            "holes": 7,
        },
        "completeness": {
            "complete_through": "2023-11-14T22:13:21.250+00:00",
            "proven_through": "2023-11-14T22:13:00.000+00:00",
            "holes": 7,
            "ids_missing": 70,
            "oldest_hole_age_s": 33.5,
            "symbols_stale": 0,
            "backfill": {
                "under_way": 3,
                "trades_filled": {"rest": 1019, "dump": 1020},
                "holes_closed": {"filled": 1021, "absent": 1022},
                "last_error": None,
            },
            "rest": {"used_weight": 1024, "limit_weight": 6000, "banned_s": 0.0},
            "audit": {
                "klines_proven": 1026,
                "klines_mismatched": {"volume": 1027},
                "klines_unproven": 4,
                "age_s": 1.5,
            },
        },
        "rates": {"trades_received_per_s": 64.0, "trades_stored_per_s": 32.0},
    }


async def test_database_health_is_503_as_soon_as_it_is_away():
    async with serving(changed(**AWAY, database__away_s=1.0)) as server:
        response, body = await fetch(server, "/health/db")
        feed, _ = await fetch(server, "/health/binance")
    answer = json.loads(body)
    assert response.status == 503
    assert (answer["status"], answer["last_error"]) == ("degraded", "connection refused")
    assert answer["pool"] == {"idle": 3, "used": 1, "limit": 20}
    assert feed.status == 200


async def test_database_health_tells_what_becomes_of_old_trades():
    trouble = "Jobs of TimescaleDB are reported as failed: compression of raw_trades (why)"
    async with serving(changed(lifecycle__job_trouble=trouble)) as server:
        response, body = await fetch(server, "/health/db")
        ready, _ = await fetch(server, "/ready")
    answer = json.loads(body)
    assert (response.status, ready.status, answer["status"]) == (200, 200, "degraded")
    assert answer["reasons"] == [
        {"code": "timescale_jobs", "text": f"{trouble}; tradecore does this work itself."}
    ]
    assert answer["retention"] == {
        "horizon": "2020-09-13T12:26:40.000+00:00",
        "waits": None,
        "days_dropped": {"raw_trades": 1045, "tickers": 0},
    }
    assert answer["days"] == {
        "raw_trades": {
            "open": 8,
            "compressed": 9,
            "compression": {
                "heap_and_index_bytes_before": 1000,
                "bytes_after": 80,
                "saved_ratio": 0.92,
            },
        }
    }
    assert answer["days_compressed"] == {"raw_trades": 1046, "tickers": 0}
    assert (answer["jobs"]["ok"], answer["job_failures"]) == (10, 1047)


async def test_binance_health_lists_connections_and_symbols():
    async with serving(changed(received_per_s=0.0)) as server:
        response, body = await fetch(server, "/health/binance")
        _, overall = await fetch(server, "/health")
    answer = json.loads(body)
    assert response.status == 200
    assert answer["connections"][0] == {
        "name": "A0",
        "line": "A",
        "state": "live",
        "streams": 4,
        "data_age_s": 0.25,
    }
    assert answer["symbols"]["BTCUSDT"] == {
        "trades_received": 1001,
        "last_trade_id": 5_000_000_001,
        "last_trade_age_s": 0.25,
        "complete_through": "2023-11-14T22:13:21.250+00:00",
        "proven_through": "2023-11-14T22:13:00.000+00:00",
        "holes": 2,
        "ids_missing": 30,
        "stale": False,
    }
    assert answer["lines"][0]["first"] == 1028
    assert answer["shards"] == {"held": 5, "total": 8}
    assert answer["symbols"]["ETHUSDT"]["last_trade_id"] is None
    assert json.loads(overall)["ring"]["absorbable_s"] is None
    async with serving(changed(**DEAD_FEED)) as server:
        response, body = await fetch(server, "/health/binance")
        database, _ = await fetch(server, "/health/db")
    assert (response.status, json.loads(body)["status"]) == (503, "failed")
    assert database.status == 200


async def test_live_does_not_depend_on_a_snapshot():
    def broken():
        raise RuntimeError("no snapshot today")

    server = SideServer("127.0.0.1", 0, broken)
    await server.start()
    try:
        response, body = await fetch(server, "/live")
    finally:
        await server.stop()
    assert (response.status, json.loads(body)) == (200, {"live": True})


async def test_index_lists_the_routes():
    async with serving() as server:
        _, body = await fetch(server, "/")
    assert tuple(json.loads(body)["routes"]) == PATHS


async def test_metrics_negotiates():
    async with serving() as server:
        plain, plain_body = await fetch(server, "/metrics")
        accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        open_metrics, open_body = await fetch(server, "/metrics", headers=accept)
    assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b'tradecore_trades_received_total{symbol="BTCUSDT"} 1001.0\n' in plain_body
    assert open_metrics.content_type == "application/openmetrics-text"
    assert open_body.endswith(b"# EOF\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (apt: prometheus) is absent")
async def test_promtool_passes_on_a_live_scrape():
    async with serving() as server:
        _, body = await fetch(server, "/metrics")
    result = await asyncio.to_thread(
        subprocess.run,
        ["promtool", "check", "metrics"],
        input=body,
        capture_output=True,
        timeout=30,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.parametrize("path", PATHS)
async def test_head_is_get_without_the_body(path):
    async with serving() as server:
        got, body = await fetch(server, path)
        head, nothing = await fetch(server, path, "HEAD")
    assert (head.status, nothing) == (got.status, b"")
    if path != "/metrics":
        assert head.headers["Content-Length"] == str(len(body))


# --- security -------------------------------------------------------------------------------


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


class Failing(SideServer):
    async def _health(self, _request):
        raise RuntimeError("secret detail")

    async def _ready(self, _request):
        await asyncio.sleep(60)
        return web.Response()

    async def _live(self, _request):
        return web.Response(body=b"x" * (64 << 20))


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


async def test_a_slow_handler_is_cut_off(monkeypatch):
    monkeypatch.setattr(security, "HANDLER_LIMIT_S", 0.05)
    async with serving(server_class=Failing) as server:
        response, body = await fetch(server, "/ready")
    assert (response.status, json.loads(body)["text"]) == (503, "The answer took too long.")
    assert_secure(response.headers)


async def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(connections, "ANSWER_LIMIT_S", 0.2)
    async with serving(server_class=Failing) as server, connected(server) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.transport.pause_reading()
        await until_connections(server, 0)


async def test_half_a_request_is_cut_off(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_LIMIT_S", 0.1)
    async with serving() as server:
        assert await raw(server, b"GET /live HTTP/1.1\r\nHost: loc") == b""


async def test_half_a_head_ends_however_often_some_of_it_comes(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.2)
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(LIVE)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.3)  # no limit of heads for one that has not begun
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n")
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"X: y\r\n")
                    await reader.read(1000) if reader._buffer else await asyncio.sleep(0.02)
        await until_connections(server, 0)


async def test_a_head_may_come_in_pieces_and_behind_another(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_LIMIT_S", 0.3)
    async with serving() as server, connected(server) as (reader, writer):
        for _ in range(3):
            for piece in (LIVE[:5], LIVE[5:30], LIVE[30:] + LIVE[:7], LIVE[7:]):
                writer.write(piece)
                await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            for _ in range(6):
                assert (await reader.readuntil(b"true}\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.4)
            writer.write(LIVE)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


class Waiting(SideServer):
    """A server whose index is answered when the test says so."""

    def __init__(self, *rest):
        self.go = asyncio.Event()
        super().__init__(*rest)

    async def _index(self, _request):
        await self.go.wait()
        return web.Response(body=b"done")


@contextlib.asynccontextmanager
async def busy(server, count):
    """Keep so many connections busy; yield their answers."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(connected(server)) for _ in range(count)]
        await until_connections(server, count)
        for _, writer in pairs:
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(20):
            while not all(one._request_in_progress for one in server._runner.server.connections):
                await asyncio.sleep(0.005)
        yield pairs


async def test_who_has_waited_longest_gives_way(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 0.0)
    async with serving() as server, contextlib.AsyncExitStack() as stack:
        silent, half, asked = [await stack.enter_async_context(connected(server)) for _ in range(3)]
        await until_connections(server, 3)
        half[1].write(LIVE[:20])
        asked[1].write(LIVE)
        await asked[0].readuntil(b"true}\n")
        for gone in (silent, half, asked):
            reader, writer = await stack.enter_async_context(connected(server))
            writer.write(LIVE)
            async with asyncio.timeout(20):
                assert await reader.readuntil(b"true}\n")
                with contextlib.suppress(ConnectionError):
                    assert await gone[0].read() == b""
            await until_connections(server, 3)


async def test_who_has_just_come_gives_way_to_nobody(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 60.0)
    async with serving() as server, connected(server) as (reader, writer):
        await until_connections(server, 1)
        head, _, body = (await raw(server, API)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert json.loads(body)["code"] == -1000
        writer.write(LIVE)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_when_all_are_busy_others_are_told_so_and_probes_are_served(monkeypatch, pieces):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 2)
    async with serving(server_class=Waiting) as server:
        async with busy(server, 2) as pairs:
            async with connected(server) as (reader, writer):
                writer.write(b"GET /x HTTP/1.1\r\n")
                if pieces == 2:
                    await asyncio.sleep(0.05)
                writer.write(b"Host: localhost\r\nX: " + b"y" * 3000 + b"\r\n\r\n")
                async with asyncio.timeout(20):
                    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            assert status == "HTTP/1.1 503 Service Unavailable"
            assert (headers["Retry-After"], headers["Connection"]) == ("1", "close")
            assert_secure(headers)
            assert set(json.loads(body)) == {"error", "text"}
            for path in ("/live", "/ready", "/metrics", "/health?x=1"):
                for method in ("GET", "HEAD"):
                    response, _ = await fetch(server, path, method)
                    assert response.status == 200
            server.go.set()
            for reader, _ in pairs:
                assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
        await until_connections(server, 0)
        assert (await fetch(server, "/"))[0].status == 200


async def test_places_for_probes_and_at_the_door_are_bounded(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 1)
    monkeypatch.setattr(connections, "PROBES_MAX", 1)
    monkeypatch.setattr(connections, "DOOR_MAX", 2)
    monkeypatch.setattr(connections, "IDLE_LEAST_S", 60.0)
    async with (
        serving(server_class=Waiting) as server,
        busy(server, 1),
        connected(server) as (reader, writer),
    ):
        writer.write(LIVE)
        assert (await reader.readuntil(b"true}\n")).startswith(b"HTTP/1.1 200")
        assert (await raw(server, LIVE)).startswith(b"HTTP/1.1 503 ")
        async with connected(server) as first, connected(server), connected(server):
            async with asyncio.timeout(1):
                assert (await first[0].read()).startswith(b"HTTP/1.1 503 ")
            writer.write(LIVE)
            assert await reader.readuntil(b"true}\n")
        server.go.set()


async def test_nobody_stands_at_the_door_for_long(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS_MAX", 0)
    monkeypatch.setattr(connections, "DOOR_LIMIT_S", 0.05)
    async with serving() as server:
        assert await raw(server, b"") == b""
        async with connected(server) as (reader, writer):
            writer.write(API)
            async with asyncio.timeout(20):
                assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
                with pytest.raises(ConnectionError):
                    while True:
                        writer.write(b"x")
                        await writer.drain()
                        await asyncio.sleep(0.01)


async def test_a_pool_of_a_hundred_and_a_crowd_of_idlers_leave_room_for_others():
    async with serving() as server, contextlib.AsyncExitStack() as stack:
        session = aiohttp.ClientSession(f"http://127.0.0.1:{server.port}")
        await stack.enter_async_context(session)

        async def status(path):
            async with session.get(path) as response:
                await response.read()
                return response.status

        assert await asyncio.gather(*(status("/live") for _ in range(100))) == [200] * 100
        for number in range(200):
            _, writer = await stack.enter_async_context(connected(server))
            writer.write(LIVE if number % 3 == 0 else LIVE[:20])
        async with asyncio.timeout(2):
            for _ in range(20):
                assert (await fetch(server, "/live"))[0].status == 200
        assert await asyncio.gather(*(status("/live") for _ in range(100))) == [200] * 100


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


async def test_any_name_on_an_open_bind():
    async with serving(host="0.0.0.0") as server:
        response, _ = await fetch(server, "/live", headers={"Host": "capture.example"})
    assert response.status == 200


# --- rate limit -----------------------------------------------------------------------------


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
    monkeypatch.setattr(security.RateLimiter.__init__, "__defaults__", (0.1, 3, 1024, lambda: 0))
    async with serving() as server:
        answers = [(await fetch(server, "/ready"))[0] for _ in range(5)]
        live, _ = await fetch(server, "/live")
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["Retry-After"] == "10"
    assert_secure(answers[-1].headers)
    assert live.status == 200


# --- life -----------------------------------------------------------------------------------


async def test_a_taken_port_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = SideServer("127.0.0.1", port, lambda: HEALTHY)
        with pytest.raises(UsageError) as caught:
            await server.start()
    assert str(caught.value) == (
        f"HTTP_PORT {port} on 127.0.0.1 is taken by another program; "
        "stop it or set HTTP_PORT to a free port"
    )
    await server.start()  # the failed start left nothing behind
    await server.stop()


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("203.0.113.7", "HTTP_HOST 203.0.113.7 is no address of this machine"),
        ("no.such.host.invalid", "HTTP_HOST no.such.host.invalid is not a known name or address"),
    ],
)
async def test_a_wrong_host_is_one_sentence(host, words):
    server = SideServer(host, 0, lambda: HEALTHY)
    with pytest.raises(UsageError, match=words):
        await server.start()


async def test_stop_is_quick_with_open_connections_and_idempotent():
    server = SideServer("127.0.0.1", 0, lambda: HEALTHY)
    await server.start()
    async with asyncio.timeout(5), connected(server) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await server.stop()
        await server.stop()
        await reader.read()  # ends, because the server closed the connection
