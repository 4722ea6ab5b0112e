"""The TLS context: who is trusted, by the daemon's requests and by nobody else."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from fake_venue import make_certificate, server_tls

from tradecore.rest.budget import Budget, RestError
from tradecore.rest.client import RestClient
from tradecore.tls import no_authorities, tls_context

SETTINGS = ("SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture
def certificate(tmp_path: Path) -> Iterator[Path]:
    tls_context.cache_clear()
    yield make_certificate(tmp_path)
    tls_context.cache_clear()


async def ask(certificate: Path) -> bytes:
    """Ask a server that shows this certificate, for 127.0.0.1."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="{}")

    app = web.Application()
    app.router.add_get("/api/v3/time", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_tls(certificate))
    await site.start()
    host, port = runner.addresses[0][:2]
    client = RestClient(f"https://{host}:{port}", Budget(None, "test"))
    try:
        return await client.get("/api/v3/time", tries=1)
    finally:
        await client.close()
        await runner.cleanup()


async def test_requests_trust_the_authorities_of_the_machine(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert await ask(certificate) == b"{}"


async def test_requests_refuse_a_certificate_of_nobody(certificate: Path) -> None:
    with pytest.raises(RestError, match=r"(?i)certificate"):
        await ask(certificate)


def test_aiohttp_is_imported_without_authorities_and_the_environment_is_as_before() -> None:
    code = (
        "import os, ssl\n"
        "from tradecore.tls import no_authorities, tls_context\n"
        "before = dict(os.environ)\n"
        "made = []\n"
        "real = ssl.create_default_context\n"
        "ssl.create_default_context = lambda *a, **k: made.append(real(*a, **k)) or made[-1]\n"
        "with no_authorities():\n"
        "    import aiohttp\n"
        "assert made and all(not one.get_ca_certs() for one in made), made\n"
        "assert dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_error_in_the_body_leaves_the_environment_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/some/file")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    before = {name: os.environ.get(name) for name in SETTINGS}
    with pytest.raises(ZeroDivisionError), no_authorities():
        assert os.environ["SSL_CERT_FILE"] == os.devnull
        raise ZeroDivisionError
    assert {name: os.environ.get(name) for name in SETTINGS} == before
