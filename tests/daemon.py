"""The daemon as a process of its own, as an operator starts it."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

START_LIMIT_S = 60.0
WAIT_LIMIT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Daemon:
    """A running `tradecore run`; its log is in `log_file`."""

    def __init__(self, folder: Path, **environ: Any) -> None:
        self.folder = folder
        self.port = free_port()
        self.environ = {
            "DATA_DIR": str(folder / "data"),
            "HTTP_PORT": str(self.port),
            "RING_CAPACITY": "65536",
            "BATCH_TIMEOUT": "50",
            "RECONNECT_DELAY": "50",
            "MAX_RECONNECT_DELAY": "500",
            "LOG_FORMAT": "json",
            **{name: str(value) for name, value in environ.items()},
        }
        self.log_file = folder / "daemon.log"
        self.process: asyncio.subprocess.Process | None = None

    @staticmethod
    def inherited() -> dict[str, str]:
        """The environment without what would point at another daemon's data."""
        return {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "DATA_DIR")}

    async def start(self, *arguments: str) -> None:
        with self.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tradecore",
                *(arguments or ("run",)),
                env={**self.inherited(), **self.environ},
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON; (0, None) while nothing answers."""
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self.port}{path}") as response,
            ):
                return response.status, json.loads(await response.read())
        except aiohttp.ClientError:
            return 0, None

    async def text(self, path: str) -> str:
        """Return the body of a page that is there."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}{path}") as response,
        ):
            assert response.status == 200
            return await response.text()

    async def until_logged(self, text: str, times: int = 1) -> None:
        """Wait until the log has this text so often."""
        await self.until(lambda _: self.log.count(text) >= times, "/live")

    async def health(self) -> dict[str, Any]:
        return (await self.get("/health"))[1] or {}

    async def until(self, condition: Callable[[dict[str, Any]], Any], path: str = "/health") -> Any:
        """Wait until the JSON of `path` fulfils `condition`; return it."""
        body: dict[str, Any] | None = None
        try:
            async with asyncio.timeout(WAIT_LIMIT_S):
                while True:
                    assert self.process is not None
                    assert self.process.returncode is None, f"the daemon ended:\n{self.log[-3000:]}"
                    _, body = await self.get(path)
                    if body and condition(body):
                        return body
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"waited in vain: {body}\n{self.log[-3000:]}") from None

    async def until_stored(self, count: int) -> None:
        await self.until(lambda health: health["counts"]["trades_stored"] >= count)

    async def ended(self) -> int:
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), WAIT_LIMIT_S)

    async def terminate(self) -> int:
        """End it as systemd does; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """End it without warning."""
        assert self.process is not None
        self.process.kill()
        await self.ended()


@asynccontextmanager
async def daemon(folder: Path, **environ: Any) -> AsyncIterator[Daemon]:
    """Run a daemon for the block; killed at its end if it still runs."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Daemon(folder, **environ)
    await one.start()
    try:
        yield one
    finally:
        if one.process is not None and one.process.returncode is None:
            await one.kill()
