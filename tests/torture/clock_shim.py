"""Steps of the wall clock for one process: an LD_PRELOAD library made with the C compiler.

It adds an offset, read from a mapped file, to CLOCK_REALTIME; monotonic clocks stay as they are.
"""

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset_ns;

__attribute__((constructor)) static void map_offset(void)
{
    const char *path = getenv("TORTURE_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *at = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED)
        offset_ns = at;
}

int clock_gettime(clockid_t id, struct timespec *t)
{
    int rc = (int)syscall(SYS_clock_gettime, id, t);
    if (rc == 0 && offset_ns && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        int64_t ns = (int64_t)t->tv_sec * 1000000000 + t->tv_nsec + *offset_ns;
        t->tv_sec = ns / 1000000000;
        t->tv_nsec = ns % 1000000000;
    }
    return rc;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone)
{
    struct timespec t;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &t);
    tv->tv_sec = t.tv_sec;
    tv->tv_usec = t.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out)
        *out = t.tv_sec;
    return t.tv_sec;
}
"""


class ClockShim:
    """The library and its offset; `environ` is what the process needs."""

    def __init__(self, folder: Path, compiler: str) -> None:
        source, library = folder / "clock.c", folder / "clock.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O2", "-fPIC", "-shared", "-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        path = folder / "clock.offset"
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)
        self.environ = {"LD_PRELOAD": str(library), "TORTURE_CLOCK": str(path)}

    def step(self, seconds: float) -> None:
        """Put the process's clock so far from the true time."""
        struct.pack_into("q", self._map, 0, round(seconds * 1e9))


def clock_shim(folder: Path) -> ClockShim | None:
    """Make the library; None when there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    return ClockShim(folder, compiler) if compiler else None
