"""The daemon as a container of the project's image, locked up as compose.yaml does it."""

import asyncio
import json
import resource
import secrets
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests import images
from tests.daemon import Daemon

MEMORY_MIB = 160
PIDS = 64
STOP_LIMIT_S = 60

# podman would raise both above what the machine allows.
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
_HARD = {name: resource.getrlimit(limit)[1] for name, limit in _LIMITS.items()}
ULIMITS = tuple(
    f"--ulimit={name}={min(20_000, most)}:{min(20_000, most)}"
    for name, most in _HARD.items()
    if most != resource.RLIM_INFINITY
)
LOCKED = (
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    f"--pids-limit={PIDS}",
    f"--memory={MEMORY_MIB}m",
    f"--memory-swap={MEMORY_MIB}m",
    *ULIMITS,
)
"""No right and no room that it does not need."""


class Container(Daemon):
    """A daemon in a container, attached: its signals, log and exit code are those of a process.

    DATA_DIR is a volume, which outlives the container. With the network "host" it shares the
    loopback with exchange and test.
    """

    def __init__(
        self,
        folder: Path,
        image: str,
        *,
        network: str = "host",
        mounts: Mapping[Path, str] | None = None,
        **environ: Any,
    ) -> None:
        super().__init__(folder, **environ)
        self.name = f"tradecore-{secrets.token_hex(4)}"
        self._image = image
        self._network = network
        self._mounts = mounts or {}
        for name in {"DATA_DIR", "LOG_FORMAT", "RING_CAPACITY"} - environ.keys():
            del self.environ[name]  # as the image has it
        self.environ.setdefault("HTTP_HOST", "127.0.0.1")

    async def start(self, *arguments: str) -> None:
        """Start it; `self.process` is podman, which passes on signals and the exit code."""
        with self.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *images.command("podman", "run", "--rm", "--replace", f"--name={self.name}"),
                *(f"--network={self._network}", "--log-driver=none", *LOCKED),
                *(f"--volume={self.name}:/data",),
                *(f"--volume={source}:{target}:ro" for source, target in self._mounts.items()),
                *(f"--env={name}={value}" for name, value in self.environ.items()),
                *(self._image, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def run(self, *command: str) -> str:
        """Run a program in it and return its output."""
        return await asyncio.to_thread(images.podman, "exec", self.name, *command)

    async def is_healthy(self) -> bool:
        """Ask as an engine does, by the HEALTHCHECK of the image."""
        try:
            await asyncio.to_thread(images.podman, "healthcheck", "run", self.name)
        except subprocess.CalledProcessError as error:
            assert error.returncode == 1, error.stderr
            return False
        return True

    async def inspect(self) -> dict[str, Any]:
        """Return what the engine knows of it."""
        (found,) = json.loads(await asyncio.to_thread(images.podman, "inspect", self.name))
        return dict(found)

    async def memory_bytes(self) -> dict[str, int]:
        """Return the kernel's account of it: anonymous and mapped pages, and the kills for want."""
        pid = (await self.inspect())["State"]["Pid"]
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        paths = {name: path for _, name, path in (line.split(":", 2) for line in groups)}
        path = paths["" if unified else "memory"]
        group = Path(f"/sys/fs/cgroup/{'' if unified else 'memory'}{path}")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        events = group / ("memory.events" if unified else "memory.oom_control")
        kills = dict(line.split() for line in events.read_text().splitlines())
        names = ("anon", "file_mapped") if unified else ("total_rss", "total_mapped_file")
        limit = group / ("memory.max" if unified else "memory.limit_in_bytes")
        return {
            "anonymous": int(stat[names[0]]),
            "mapped": int(stat[names[1]]),
            "limit": int(limit.read_text()),
            "kills": int(kills["oom_kill"]),
        }

    async def kill(self) -> None:
        """End it without warning."""
        await asyncio.to_thread(images.podman, "kill", "--signal=KILL", self.name)
        await self.ended()


@asynccontextmanager
async def container(
    folder: Path, image: str, *arguments: str, **options: Any
) -> AsyncIterator[Container]:
    """Run a container for the block; it and its volume are gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Container(folder, image, **options)
    try:
        await one.start(*arguments)
        yield one
    finally:
        images.podman("rm", "--force", "--time=0", "--ignore", one.name)
        if one.process is not None:
            await one.ended()
        images.podman("volume", "rm", "--force", one.name)
