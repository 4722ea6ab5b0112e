"""A real redis-server of a test's own, looked at with redis-cli."""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import free_port

WAIT_LIMIT_S = 20.0

SERVER = shutil.which("redis-server")
CLI = shutil.which("redis-cli")

needs_redis = pytest.mark.skipif(
    not (SERVER and CLI), reason="redis-server and redis-cli are not installed"
)


class RedisServer:
    """A redis-server on a port that stays the same over restarts, and on a unix socket."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.socket = folder / "redis.sock"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.login: tuple[str, ...] = ()
        self._folder = folder
        self._options = options
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it and wait until it answers."""
        assert SERVER
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "redis.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(SERVER, "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._folder)),
                *("--unixsocket", str(self.socket), *self._options),
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(WAIT_LIMIT_S):
            while "PONG" not in await self.cli("PING"):
                assert self._process.returncode is None
                await asyncio.sleep(0.02)

    def hang(self) -> None:
        """Stop it as it is; `go_on` undoes it."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    async def kill(self) -> None:
        """End it without warning; what it had is gone."""
        self._send(signal.SIGKILL)
        assert self._process is not None
        await self._process.wait()

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    def _send(self, signum: int) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    async def cli(self, *words: Any) -> str:
        """Return what redis-cli prints."""
        assert CLI
        process = await asyncio.create_subprocess_exec(
            *(CLI, "-s", str(self.socket), *self.login, *map(str, words)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), WAIT_LIMIT_S)
        return out.decode().rstrip("\n")

    async def last(self) -> dict[str, Any]:
        """Return the newest event of each stream, by name."""
        lines = (await self.cli("HGETALL", "tradecore:last")).splitlines()
        names, events = lines[::2], lines[1::2]
        return {name: json.loads(event) for name, event in zip(names, events, strict=True)}

    async def until_last(self, condition: Any) -> dict[str, Any]:
        """Wait until the newest events fulfil `condition`; return them."""
        async with asyncio.timeout(WAIT_LIMIT_S):
            while not condition(found := await self.last()):
                await asyncio.sleep(0.02)
        return found

    @asynccontextmanager
    async def subscribed(self) -> AsyncIterator[asyncio.StreamReader]:
        """Yield what redis-cli prints of the channel: lines of JSON arrays."""
        assert CLI
        process = await asyncio.create_subprocess_exec(
            *(CLI, "-s", str(self.socket), *self.login, "SUBSCRIBE", "tradecore:last"),
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert process.stdout is not None
        try:
            for _ in range(3):
                await asyncio.wait_for(process.stdout.readline(), WAIT_LIMIT_S)
            yield process.stdout
        finally:
            process.kill()
            await process.wait()


async def next_batch(lines: asyncio.StreamReader) -> list[dict[str, Any]]:
    """Return the next batch that was published."""
    words = [await asyncio.wait_for(lines.readline(), WAIT_LIMIT_S) for _ in range(3)]
    assert words[:2] == [b"message\n", b"tradecore:last\n"]
    batch: list[dict[str, Any]] = json.loads(words[2])
    return batch


@asynccontextmanager
async def redis_server(folder: Path, *options: str) -> AsyncIterator[RedisServer]:
    """Run a server for the block."""
    one = RedisServer(folder, *options)
    try:
        await one.start()
        yield one
    finally:
        await one.stop()
