"""Start the simulated exchange and the daemon, watch them from outside, end them."""

import asyncio
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from _harness import HERE

DAEMON = ("-m", "tradecore", "run")
START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
SAMPLE_S = 0.005
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Running:
    """A process of ours."""

    process: asyncio.subprocess.Process
    http: str
    """Base URL of its HTTP server."""
    ready: dict[str, Any] = field(default_factory=dict)
    """What the exchange said when it was ready; its market, for one."""

    def cpu_s(self) -> float:
        """User and system CPU seconds since its start."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def memory_mib(self, which: str) -> float:
        """Resident memory: "VmRSS" now, "VmHWM" at its peak."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{which}:\s+(\d+) kB", status)
        assert found, which
        return int(found[1]) / 1024

    async def get(self, path: str) -> str:
        """Return the body of a GET, whatever its status."""
        timeout = aiohttp.ClientTimeout(total=10)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(self.http + path) as response,
        ):
            return await response.text()


SIMULATOR = ("-m", "tradecore.simulate")
GENERATOR = (str(HERE / "_generator.py"),)
"""An exchange for heavy load, with the same options."""


class CpuClock:
    """CPU time of a process as a function of the wall clock, sampled from outside."""

    def __init__(self, pid: int) -> None:
        self._clock = (~pid << 3) | 2  # Linux: the CPU clock of another process, in nanoseconds
        self._samples: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Sample until cancelled; OSError when the process has ended."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        """Read it once."""
        self._samples.append((time.time(), time.clock_gettime(self._clock)))

    def between(self, begin: float, end: float) -> float:
        """Return the CPU seconds between two moments."""
        times, used = zip(*self._samples, strict=True)
        first, last = np.interp((begin, end), times, used)
        return float(last - first)


@asynccontextmanager
async def cpu_clock(running: Running) -> AsyncIterator[CpuClock]:
    """Yield the CPU clock of a process that lives on; it is sampled until the body ends."""
    cpu = CpuClock(running.process.pid)
    sampling = asyncio.create_task(cpu.run())
    try:
        yield cpu
        cpu.sample()
    finally:
        sampling.cancel()


@asynccontextmanager
async def exchange(
    *options: str, program: Sequence[str] = SIMULATOR
) -> AsyncIterator[tuple[Running, str]]:
    """Yield the simulated exchange, ready, and its WebSocket URL."""
    command = (sys.executable, *program, *options)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_LIMIT_S):
            ready = json.loads(await process.stdout.readline())
        yield Running(process, ready["rest"], ready), ready["ws"]
    finally:
        await _end(process)


@asynccontextmanager
async def daemon(environ: dict[str, str]) -> AsyncIterator[Running]:
    """Yield a started daemon with a DATA_DIR of its own; its log is shown when it fails."""
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder:
        async with daemon_in(Path(folder), {**environ, "DATA_DIR": folder}) as running:
            yield running


@asynccontextmanager
async def daemon_in(folder: Path, environ: dict[str, str]) -> AsyncIterator[Running]:
    """Yield a started daemon that writes its log to `folder`/daemon.log."""
    port = _free_port()
    log = folder / "daemon.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *DAEMON),
            env={"PATH": os.environ["PATH"], "HTTP_PORT": str(port), **environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=folder,
        )
    running = Running(process, f"http://127.0.0.1:{port}")
    try:
        yield running
        if process.returncode:
            raise RuntimeError(f"the daemon ended with {process.returncode}")
    except BaseException:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        await _end(process)


async def until_ready(running: Running) -> None:
    """Wait until /ready says yes."""
    async with asyncio.timeout(START_LIMIT_S):
        while True:
            with suppress(aiohttp.ClientError):
                answer: dict[str, Any] = json.loads(await running.get("/ready"))
                if answer["ready"]:
                    return
            await asyncio.sleep(0.1)


async def output_of(command: Sequence[str]) -> str:
    """Run a command to its end and return what it printed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(START_LIMIT_S):
            out, _ = await process.communicate()
    finally:
        await _end(process)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ended with {process.returncode}")
    return out.decode()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
    except TimeoutError:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
