import asyncio
import json
import shutil
import socket
import subprocess

import pytest
from http_desk import PATHS, connected, fetch, serving
from snapshots import HEALTHY

from tradecore.errors import UsageError
from tradecore.http.server import SideServer


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
        _, body = await fetch(server, "/api")
    assert tuple(json.loads(body)["routes"]) == ("/", *PATHS)


async def test_metrics_negotiates():
    async with serving() as server:
        plain, plain_body = await fetch(server, "/metrics")
        accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        open_metrics, open_body = await fetch(server, "/metrics", headers=accept)
    assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b'tradecore_trades_received_total{symbol="BTCUSDT"} 1001\n' in plain_body
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
        got, _ = await fetch(server, path)
        head, nothing = await fetch(server, path, "HEAD")
    assert (head.status, nothing) == (got.status, b"")
    if path != "/metrics":
        assert head.headers["Content-Length"] == got.headers["Content-Length"]


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
