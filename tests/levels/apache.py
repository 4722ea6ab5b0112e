"""TimescaleDB of the Apache edition: Debian's packages, in a folder that is a system of its own.

Debian builds them since trixie, so `prepare` unpacks a minimal trixie (half a gigabyte) and the
server runs there with chroot, which needs root. Nothing is mounted in it.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests import debian
from tests.levels.server import CACHE, FAST, PostgresServer, UnavailableError, lock

_RELEASE = "trixie"
_PACKAGES = ("postgresql-17", "postgresql-17-timescaledb")
_BIN = Path("/usr/lib/postgresql/17/bin")
_ROOT = CACHE / "apache"
_SETTINGS = FAST | {
    "shared_preload_libraries": "timescaledb",
    "timescaledb.telemetry_level": "off",
    "max_worker_processes": "24",
    "timescaledb.max_background_workers": "4",
    "max_locks_per_transaction": "256",
    "shared_buffers": "64MB",
    "listen_addresses": "",
}
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
}
_CHROOT = ("chroot", "--userspec=postgres:postgres", _ROOT)
_LIMIT_S = 60


def prepare() -> str:
    """Unpack Debian with the packages unless it is there; return what there is."""
    if os.geteuid() != 0:
        raise UnavailableError("level apache needs root, for chroot")
    with lock("apache"):
        if not debian.is_unpacked(_ROOT):
            _unpack()
    return f"{_RELEASE} with {_read_version()}"


def _unpack() -> None:
    no_cluster = (
        'mkdir -p "$1/etc/postgresql-common"'
        ' && echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.conf"'
    )
    try:
        debian.unpack(_ROOT, _RELEASE, _PACKAGES, setup_hook=no_cluster)
    except debian.UnpackError as error:
        raise UnavailableError(f"level apache: {error}") from error
    for folder in ("dev/shm", "tmp"):  # the server is not root in there
        (_ROOT / folder).chmod(0o1777)


def _read_version() -> str:
    status = (_ROOT / "var/lib/dpkg/status").read_text()
    found = re.search(rf"^Package: {_PACKAGES[1]}\n(?:.+\n)*?Version: (.+)$", status, re.MULTILINE)
    return f"{_PACKAGES[1]} {found[1] if found else 'of an unknown version'}"


def start() -> PostgresServer:
    """Start a server of our own on what `prepare` has unpacked."""
    if os.geteuid() != 0:
        raise UnavailableError("level apache needs root, for chroot")
    if not debian.is_unpacked(_ROOT):
        raise UnavailableError("level apache is not unpacked: `make levels` does it")
    inside = Path(tempfile.mkdtemp(prefix="tc-", dir=_ROOT / "tmp"))
    outside = Path(tempfile.mkdtemp(prefix="tc-"))
    # A path that fits into the address of a socket, however deep this checkout lies.
    link = outside / "s"
    link.symlink_to(inside)
    process: subprocess.Popen[bytes] | None = None

    def stop() -> None:
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(inside)
        shutil.rmtree(outside)

    try:
        os.chown(inside, *_user())
        process = _launch(inside)
        _await_ready(process, inside)
    except BaseException:
        stop()
        raise
    return PostgresServer(f"postgresql://postgres@/postgres?host={link}", stop)


def _launch(inside: Path) -> subprocess.Popen[bytes]:
    """Make a cluster and start the server on it."""
    home = Path("/") / inside.relative_to(_ROOT)
    cluster = home / "cluster"
    done = subprocess.run(
        [*_CHROOT, _BIN / "initdb", "-D", cluster, "-U", "postgres", "-A", "trust", "-E", "UTF8"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=_ENVIRONMENT,
        timeout=_LIMIT_S,
    )
    if done.returncode != 0:
        raise UnavailableError(f"level apache: initdb failed: {done.stderr[-500:]}")
    options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
    # The end of its input stops it, so it does not outlive a pytest that is killed.
    watch = '"$@" & read -r nothing; kill -INT $!; wait'
    server: list[str | Path] = [_BIN / "postgres", "-D", cluster, "-k", home, *options]
    with (inside / "server.log").open("wb") as log:
        return subprocess.Popen(
            [*_CHROOT, "sh", "-c", watch, "sh", *server],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_ENVIRONMENT,
            start_new_session=True,  # a Ctrl-C at the terminal is for pytest
        )


def _await_ready(process: subprocess.Popen[bytes], inside: Path) -> None:
    begin = time.monotonic()
    state = inside / "cluster" / "postmaster.pid"
    while not (state.exists() and state.read_text().rstrip().endswith("ready")):
        if process.poll() is not None or time.monotonic() - begin > _LIMIT_S:
            words = (inside / "server.log").read_text(errors="replace")[-1000:]
            raise UnavailableError(f"level apache: the server does not start: {words}")
        time.sleep(0.02)


def _user() -> tuple[int, int]:
    """The ids of `postgres` in there; outside they may be someone else's."""
    entries = (line.split(":") for line in (_ROOT / "etc/passwd").read_text().splitlines())
    return next((int(entry[2]), int(entry[3])) for entry in entries if entry[0] == "postgres")
