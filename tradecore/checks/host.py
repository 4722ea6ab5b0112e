"""What a capture needs of this host: the side server's address, the folder, its room, the ring."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tradecore.checks.finding import Finding
from tradecore.errors import EXIT_DATA_DIR, EXIT_USAGE
from tradecore.settings import Settings

_SPARE_BYTES = 5 << 30
"""What the embedded database should have to grow for some days."""


def check_host(settings: Settings) -> Iterator[Finding]:
    """Yield what there is to say; changes nothing."""
    if (finding := _side_server(settings)) is not None:
        yield finding
    if (finding := _port(settings)) is not None:
        yield finding
    yield from _folder(settings)
    yield _ring(settings)


def _side_server(settings: Settings) -> Finding | None:
    from tradecore.http.access import Policy

    advice = Policy.of(settings).advice(settings.http_host)
    return Finding("warn", "http", advice) if advice else None


def _port(settings: Settings) -> Finding | None:
    """Tell who has HTTP_PORT; what else is wrong with the address is told by `run`."""
    host, port = settings.http_host, settings.http_port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)  # of two with SO_REUSEADDR only the second to listen is refused
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return None
        text = f"HTTP_PORT {port} on {host} is taken"
        if holder := _holder(settings.data_dir.absolute()):
            return Finding("warn", "http", f"{text}, by the running tradecore (process {holder})?")
        mend = "stop the program that has it, or set HTTP_PORT to a free port"
        return Finding("fail", "http", text, mend, EXIT_USAGE)
    return None


def _folder(settings: Settings) -> Iterator[Finding]:
    path = settings.data_dir.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(
            "fail",
            "folder",
            f"DATA_DIR {path} cannot be written",
            "give this user write access or set another DATA_DIR",
            EXIT_DATA_DIR,
        )
        return
    if holder := _holder(path):
        text = f"DATA_DIR {path} is used by a running tradecore (process {holder})"
        yield Finding("warn", "folder", text, "stop it before you start another one there")
    else:
        state = "can be written" if there == path else "will be made"
        yield Finding("ok", "folder", f"DATA_DIR {path} {state}")
    yield _room(settings, path, there)


def _holder(path: Path) -> str:
    """Return the process that holds the folder's lock, "" when nobody does."""
    from tradecore.datadir import LOCK_NAME

    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return ""


def _room(settings: Settings, path: Path, there: Path) -> Finding:
    from tradecore.ring import ROWS_AT
    from tradecore.schema import TRADE_DTYPE

    ring = path / "ring"
    taken = ring.stat().st_size if ring.exists() else 0
    need = max(ROWS_AT + settings.ring_capacity * TRADE_DTYPE.itemsize - taken, 0)
    spare = 0 if settings.database_url else _SPARE_BYTES
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.1f} GiB free"
    if free < need:
        mend = f"free {need / 2**20:.0f} MiB, or set a smaller RING_CAPACITY"
        return Finding("fail", "disk", text, mend, EXIT_DATA_DIR)
    if free < need + spare:
        return Finding("warn", "disk", text, "little for a database that grows every day")
    return Finding("ok", "disk", text)


def _ring(settings: Settings) -> Finding:
    rows = settings.ring_capacity
    return Finding(
        "ok",
        "ring",
        f"{rows:,} trades ({rows * 64 / 2**20:,.0f} MiB) bridge a database outage of "
        f"{_duration(rows / 1_000)} at 1,000 trades/s, {_duration(rows / 10_000)} at 10,000",
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
