"""One connection to Redis: login, TLS, addresses, and everything that may answer in its place."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.daemon import free_port
from tests.redis_desk import needs_redis, redis_server
from tests.test_redis import Desk
from tradecore.redis import wire as wires
from tradecore.redis.address import parse
from tradecore.redis.wire import RedisError, Wire

pytestmark = needs_redis


@asynccontextmanager
async def impostor(answer: bytes, *, closes: bool = False) -> AsyncIterator[str]:
    """Something that listens and answers with these bytes; yield its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(100)
            writer.write(answer)
            await writer.drain()
            if not closes:
                await reader.read()
        except OSError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "closes", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False, "protocol"),
        (b"\x00\xff" * 50 + b"\n", False, "protocol"),
        (b"x" * 100_000, False, "protocol"),
        (b"$99999999999\r\n", False, "protocol"),
        (b"*3\r\n", False, "protocol"),
        (b":\r\n", False, "protocol"),
        (b"+OK\n", False, "protocol"),
        (b"", True, "closed"),
        (b"+O", True, "closed"),
        (b"$5\r\nab", True, "closed"),
        (b"-MOVED 1 127.0.0.1:7001\r\n", False, "refused"),
        (b"-ERR unknown\r\n", False, "refused"),
        (b"", False, "timeout"),
    ],
)
async def test_whatever_answers_in_its_place(
    answer: bytes, closes: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "ANSWER_LIMIT_S", 0.2)
    async with impostor(answer, closes=closes) as url:
        with pytest.raises(RedisError) as caught:
            await Wire.open(parse(url))
    assert caught.value.reason == reason, caught.value


async def test_nobody_there(tmp_path: Path) -> None:
    for url in ("redis://127.0.0.1:1", f"unix://{tmp_path}/none", "redis://no-such-host.invalid"):
        with pytest.raises(RedisError) as caught:
            await Wire.open(parse(url))
        assert caught.value.reason == "unreachable"


async def test_user_password_database_and_socket(tmp_path: Path, short_dir: Path) -> None:
    async with redis_server(short_dir) as redis:
        await redis.cli(
            *("ACL", "SETUSER", "writer", "on", ">p@ss word", "~tradecore:*", "&tradecore:*"),
            *("+@all", "-@dangerous"),
        )
        login = "writer:p%40ss%20word@"
        for url in (
            redis.url.replace("//", f"//{login}").replace("/0", "/3"),
            f"unix://{login}{redis.socket}?db=3",
        ):
            wire = await Wire.open(parse(url))
            assert await wire.call([wires.command("SET", "tradecore:x", "1")]) == [b"OK"]
            wire.close()
        assert await redis.cli("-n", "3", "GET", "tradecore:x") == "1"
        with pytest.raises(RedisError, match="give the user") as caught:
            wire = await Wire.open(parse(redis.url.replace("//", f"//{login}")))
            await wire.call([wires.command("SET", "other", "1")])
        wire.close()
        assert caught.value.reason == "auth"
        desk = Desk(tmp_path, redis.url.replace("//", f"//{login}"), trades_kept=10)
        async with desk.running():
            desk.feed(1)
            await redis.until_last(lambda found: found)
            await desk.until(lambda use: use.trades == 1)
        assert not sum(desk.publisher.use().errors.values())


async def test_tls_with_a_certificate_that_is_believed_and_one_that_is_not(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, cert = short_dir / "key.pem", short_dir / "cert.pem"
    openssl = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await openssl.wait() == 0
    port = free_port()
    options = ("--tls-port", str(port), "--tls-auth-clients", "no")
    async with redis_server(
        short_dir, *options, "--tls-cert-file", str(cert), "--tls-key-file", str(key)
    ):
        address = parse(f"rediss://localhost:{port}")
        with pytest.raises(RedisError) as caught:
            await Wire.open(address)
        assert caught.value.reason == "tls"
        trusting = ssl.create_default_context(cafile=str(cert))
        monkeypatch.setattr(wires, "tls_context", lambda: trusting)
        wire = await Wire.open(address)
        assert await wire.call([wires.command("PING")]) == [b"PONG"]
        wire.close()


# -- the address -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text", "clear"),
    [
        ("redis://127.0.0.1", "redis://127.0.0.1:6379/0", False),
        ("redis://:pw@cache.example:6380/2", "redis://cache.example:6380/2", True),
        ("rediss://u:p%2Fw@[2001:db8::1]", "rediss://[2001:db8::1]:6379/0", False),
        ("unix:///run/redis/redis.sock?db=1", "unix:///run/redis/redis.sock?db=1", False),
        ("redis://localhost/?db=7", "redis://localhost:6379/7", False),
    ],
)
def test_addresses(url: str, text: str, clear: bool) -> None:
    assert str(parse(url)) == text
    assert parse(url).in_the_clear is clear


@pytest.mark.parametrize(
    "url",
    [
        "memcached://h",
        "redis:h",
        "redis://",
        "redis://h:port",
        "redis://h:70000",
        "redis://h/one",
        "redis://h/-1",
        "redis://user@h",
        "redis://h?ssl=1",
        "redis://h?db=1&db=2",
        "redis://h#x",
        "redis://[::1",
        "unix://host/run/x",
        "unix://",
        "unix:///" + "x" * 120,
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="give"):
        parse(url)
