"""A machine of its own for a test: Debian, booted by its own systemd, on the network of this one.

`python -m tests.machine` unpacks it. What is written in it goes with it: its disk is a tmpfs above
the unpacked folder. It needs root and systemd-nspawn. Nothing is left behind: its mounts belong to
a namespace of its own, and its control group has a name that no other run has.
"""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests import debian
from tests.levels.server import CACHE, lock

ROOT = Path(__file__).parents[1]
PROGRAM = Path("opt/tradecore")
RELEASE = "bookworm"
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3")
_PYTHON = (3, 11)  # of that release
_TREE = CACHE / "machine"
_GROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
_LIMIT_S = 60

# The second hierarchy takes the place of the first, /run has to be on another disk than the tree.
_BOOT = """
echo $$ >"$1/cgroup.procs"
shift
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
exec "$@"
"""


class UnavailableError(Exception):
    """This machine cannot boot another one; the text says why and what would help."""


def prepare() -> str:
    """Unpack Debian unless that was done; return what there is. Raises UnavailableError."""
    if os.geteuid() != 0:
        raise UnavailableError("booting a machine needs root")
    if shutil.which("systemd-nspawn") is None:
        raise UnavailableError("systemd-nspawn is missing: apt-get install systemd-container")
    _groups()
    with lock("machine"):
        if not debian.is_unpacked(_TREE):
            try:
                debian.unpack(_TREE, RELEASE, _PACKAGES)
            except debian.UnpackError as error:
                raise UnavailableError(f"a machine to boot: {error}") from error
    return f"{RELEASE} with systemd"


def _groups() -> Path:
    """Return where the second version of control groups is mounted; raises UnavailableError."""
    for folder in _GROUPS:
        if os.access(folder / "cgroup.procs", os.W_OK):
            return folder
    raise UnavailableError("booting a machine needs control groups of the second version")


class Machine:
    """A booted machine; `root` is its file system, seen from here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a program in it as root and return what it prints; an error fails the test."""
        done = subprocess.run(
            [
                *("nsenter", f"--target={self.pid}"),
                *("--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd"),
                *command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Make a file in it."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def show(self, unit: str) -> dict[str, str]:
        """Return the properties of a unit; those that are not set are empty."""
        lines = self.run("systemctl", "show", "--all", unit).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def journal(self, unit: str, *options: str) -> str:
        """Return what a unit, and systemd about it, have logged."""
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}", *options)

    async def until(
        self, unit: str, condition: Callable[[dict[str, str]], object]
    ) -> dict[str, str]:
        """Wait until the properties of a unit fulfil `condition`; return them."""
        deadline_s = time.monotonic() + _LIMIT_S
        while not condition(state := await asyncio.to_thread(self.show, unit)):
            if time.monotonic() > deadline_s:
                words = "\n".join(f"{name}={value}" for name, value in state.items())
                raise AssertionError(f"{words}\n{self.journal(unit)[-5000:]}")
            await asyncio.sleep(0.1)
        return state


@contextmanager
def booted(binds: Mapping[Path, str]) -> Iterator[Machine]:
    """Boot a machine that sees folders of ours (`binds`), and power it off in the end.

    Raises UnavailableError. tradecore is in it, at PROGRAM, with the packages of our own
    environment.
    """
    if sys.version_info[:2] != _PYTHON:
        raise UnavailableError("the machine has Python 3.11, for which nothing is built here")
    prepare()
    name = f"tradecore-test-{secrets.token_hex(6)}"
    group = _groups() / name
    group.mkdir()
    packages = Path(sys.prefix, "lib/python3.11/site-packages").resolve()
    mounts = [f"--bind-ro={packages}:/{PROGRAM}/packages"]
    mounts += [f"--bind={folder}:{there}" for folder, there in binds.items()]
    with tempfile.TemporaryFile() as console:
        host = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "TERM"),  # it powers off, should we be killed
                *("unshare", "--mount", "--propagation=private", "sh", "-ec", _BOOT, "sh", group),
                *("systemd-nspawn", "--boot", "--quiet", f"--directory={_TREE}"),
                *(f"--machine={name}", "--volatile=overlay", "--register=no", "--keep-unit"),
                *("--link-journal=no", "--console=pipe", "--rlimit=RLIMIT_NOFILE=1024:20000"),
                *mounts,
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )
        try:
            yield _await_booted(host)
        finally:
            _power_off(host)
            for folder, _, _ in os.walk(group, topdown=False):
                Path(folder).rmdir()
            if host.returncode != 0:
                console.seek(0)
                sys.stderr.write(console.read().decode(errors="replace"))


def _await_booted(host: subprocess.Popen[bytes]) -> Machine:
    deadline_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline_s and host.poll() is None:
        children = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
        if children:
            machine = Machine(int(children[0]))
            state = machine.run("systemctl", "is-system-running", check=False).strip()
            if state in ("running", "degraded"):
                _install_program(machine)
                return machine
        time.sleep(0.05)
    raise AssertionError("the machine does not boot")


def _install_program(machine: Machine) -> None:
    """Put tradecore into it as an installed wheel would be; its packages are mounted."""
    home = machine.root / PROGRAM
    site = home / "lib/python3.11/site-packages"
    ignore = shutil.ignore_patterns("*.pyx", "*.pxd", "*.c", "__pycache__")
    shutil.copytree(ROOT / "tradecore", site / "tradecore", ignore=ignore)
    shutil.copytree(ROOT / "sql", site / "tradecore/sql")
    (site / "packages.pth").write_text(f"/{PROGRAM}/packages\n")
    (home / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (home / "bin").mkdir()
    (home / "bin/python").symlink_to("/usr/bin/python3")


def _power_off(host: subprocess.Popen[bytes]) -> None:
    if host.poll() is None:
        host.send_signal(signal.SIGTERM)  # systemd-nspawn then ends the machine in order
        try:
            host.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            host.send_signal(signal.SIGTERM)  # the second one does not wait for its services
            host.wait(_LIMIT_S)


def main() -> None:
    try:
        print(f"machine: {prepare()}")
    except UnavailableError as error:
        print(f"will be skipped: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
