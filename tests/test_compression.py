"""Which answers are compressed, and for whom."""

import gzip
import json

import pytest
from http_desk import fetch, raw, serving
from snapshots import HEALTHY, changed

from tradecore.snapshot import SymbolState, SymbolStates

MANY = changed(symbols=SymbolStates(SymbolState(f"S{n}USDT", n, n, 0.25) for n in range(1400)))
PATHS = ("/health", "/metrics", "/health/binance")
"""Small, and large ones of two kinds."""


async def ask(server, path, accepts, method="GET"):
    """Return headers and body as they are sent."""
    request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    request += "" if accepts is None else f"Accept-Encoding: {accepts}\r\n"
    head, _, body = (await raw(server, f"{request}\r\n".encode())).partition(b"\r\n\r\n")
    headers: dict[str, str] = {}
    for line in head.decode().split("\r\n")[1:]:
        name, value = line.split(": ", 1)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers, body


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("accepts", "is_compressed"),
    [
        ("gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br;q=1.0, GZIP;q=0.2, *;q=0", True),
        ("gzip;q=0", False),
        ("gzip;q=0.0, identity", False),
        ("gzip;q=nonsense", False),
        ("identity", False),
        ("br", False),
        ("", False),
        (None, False),
    ],
)
async def test_who_takes_gzip_gets_it(path, accepts, is_compressed):
    async with serving(MANY) as server:
        plain_headers, plain = await ask(server, path, None)
        headers, body = await ask(server, path, accepts)
        head, nothing = await ask(server, path, accepts, "HEAD")
    assert (headers.get("Content-Encoding") == "gzip") is is_compressed
    if is_compressed:
        assert len(body) < len(plain) / 2
        body = gzip.decompress(body)
    assert (len(body), body[:100]) == (len(plain), plain[:100])
    assert "Accept-Encoding" in headers["Vary"] and headers["Vary"] == plain_headers["Vary"]
    assert (head["Content-Length"], nothing) == (headers["Content-Length"], b"")
    assert head.get("Content-Encoding") == headers.get("Content-Encoding")


async def test_what_is_small_stays_as_it_is():
    async with serving() as server:
        headers, body = await ask(server, "/live", "gzip")
        page, _ = await ask(server, "/", "gzip")
    assert body == b'{"live":true}\n'
    assert "Content-Encoding" not in headers
    assert (page["Content-Encoding"], page["Vary"]) == ("gzip", "Accept-Encoding")


async def test_fourteen_hundred_symbols():
    async with serving(MANY) as server:
        for path in ("/metrics", "/health/binance"):
            _, plain = await ask(server, path, None)
            headers, body = await ask(server, path, "gzip")
            assert len(plain) > 90_000
            assert int(headers["Content-Length"]) == len(body) < 60_000
            assert gzip.decompress(body).count(b"S1399USDT") == plain.count(b"S1399USDT") > 0


async def test_formats_of_the_exposition_are_kept_apart():
    async with serving(HEALTHY) as server:
        for accept, ending in (
            ("text/plain", b" 1\n"),
            ("application/openmetrics-text", b"EOF\n"),
        ):
            for _ in range(2):
                response, body = await fetch(server, "/metrics", headers={"Accept": accept})
                assert response.content_type == accept
                assert body.endswith(ending)
        _, other = await fetch(server, "/health")
    assert json.loads(other)["ready"]
