"""Watches the daemon's event loop from outside: see `_stalls.c`."""

import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from _harness import HERE

LIMIT_MS = 5.0


class Stall(NamedTuple):
    """One time that the loop did not come round for longer than LIMIT_MS."""

    begin_s: float
    """Since 1970."""
    wall_ms: float
    cpu_ms: float
    """What the loop's thread worked; the rest it waited, or was kept from the processor."""
    waits: int
    """How often it waited: for a disk, or a lock."""
    preempted: int
    """How often another process got the processor."""
    page_faults: int

    @property
    def own_ms(self) -> float:
        """Its work, and its waiting when nobody took the processor from it."""
        return self.cpu_ms if self.preempted else self.wall_ms


@dataclass(frozen=True)
class StallWatch:
    """Preload `environ` into a daemon, then `read` what it was told in `folder`."""

    folder: Path
    traces: Path | None = None
    """File that gets a traceback of the daemon each time that it has worked for LIMIT_MS."""

    @property
    def environ(self) -> dict[str, str]:
        """Settings for the daemon's process; builds the library that is preloaded."""
        library = self.folder / "stalls.so"
        if not library.exists():
            source = HERE / "_stalls.c"
            command = ("cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl")
            subprocess.run(command, check=True, timeout=60)
        its = {
            "LD_PRELOAD": str(library),
            "STALLS_FILE": str(self.folder / "stalls"),
            "STALLS_LIMIT_US": str(int(LIMIT_MS * 1000)),
        }
        if self.traces is None:
            return its
        (self.folder / "sitecustomize.py").write_text(
            f"import faulthandler; faulthandler.register({signal.SIGUSR2:d},"
            f" file=open({str(self.traces.resolve())!r}, 'a'), all_threads=False)"
        )
        return its | {"PYTHONPATH": str(self.folder), "STALLS_SIGNAL": str(int(signal.SIGUSR2))}

    def read(self, begin_s: float, end_s: float) -> list[Stall]:
        """Return the stalls that began in this time (since 1970)."""
        stalls = []
        for line in (self.folder / "stalls").read_text().splitlines():
            begin_us, wall_us, cpu_us, *counts = map(int, line.split())
            if begin_s <= begin_us / 1e6 < end_s:
                stalls.append(Stall(begin_us / 1e6, wall_us / 1e3, cpu_us / 1e3, *counts))
        return stalls
