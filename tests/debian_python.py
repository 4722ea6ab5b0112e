"""`make pythons` on Python 3.14 where the machine has none: Debian's next release, in a folder.

    python -m tests.debian_python

It needs root and mmdebstrap. Exit code 0 = all that ran is right, or nothing had to run (the
machine has that Python), or nothing could, which is said. Programs in the folder have namespaces of
their own, so that no mount and no process stays behind; they see this tree in its place, and may
write to .venv/pythons only.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests import debian
from tests.levels.server import CACHE, UnavailableError, lock
from tests.pythons import KEPT, ROOT, interpreters

VERSION = "3.14"
_RELEASE = "forky"
_PYTHON = Path(f"/usr/bin/python{VERSION}")
_PACKAGES = (
    *("ca-certificates", "gcc", "libc6-dev"),
    *(f"python{VERSION}", f"python{VERSION}-dev", f"python{VERSION}-venv"),
)
_LIMIT_S = 1800

# The shell stays as process 1 of its namespace: it reaps what the tests' processes leave.
_ENTER = """
set -e
root=$1 tree=$2 kept=$3
shift 3
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root$tree" "$kept"
mount --bind "$tree" "$root$tree"
mount -o remount,bind,ro "$root$tree"
mount --bind "$kept" "$root$kept"
for file in /etc/hosts /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$file" ]; then
        touch "$root$file"
        mount --bind "$file" "$root$file"
    fi
done
chroot "$root" env --chdir="$tree" "$@"
exit 0
"""


def prepare() -> Path:
    """Unpack Debian unless that was done; return its folder. Raises UnavailableError."""
    if os.geteuid() != 0:
        raise UnavailableError("chroot needs root")
    root = CACHE / _RELEASE
    with lock(_RELEASE):
        if not debian.is_unpacked(root):
            try:
                debian.unpack(root, _RELEASE, _PACKAGES)
            except debian.UnpackError as error:
                raise UnavailableError(str(error)) from error
    if run(root, "true") != 0:
        raise UnavailableError("this machine lets nobody mount or have namespaces")
    return root


def run(root: Path, *command: str | Path) -> int:
    """Run a program in the folder, where this tree is; return its exit code."""
    pip = {f"PIP_{k.upper().replace('-', '_')}": v for k, v in debian.pip_settings().items()}
    return subprocess.run(
        [
            *("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", _ENTER, "sh", root, ROOT, KEPT, *command),
        ],
        env=os.environ | pip | {"LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        timeout=_LIMIT_S,
    ).returncode


def main() -> int:
    if VERSION in interpreters() or sys.version_info[:2] == tuple(map(int, VERSION.split("."))):
        return 0
    began = time.monotonic()
    try:
        root = prepare()
    except UnavailableError as error:
        print(f"Python {VERSION} is not tested: {error}", file=sys.stderr)
        return 0
    print(f"Debian {_RELEASE}: {time.monotonic() - began:.0f} s", flush=True)
    return run(root, _PYTHON, "-m", "tests.pythons", VERSION)


if __name__ == "__main__":
    sys.exit(main())
