"""The project's image, built from its Dockerfile; `python -m tests.images` prepares and builds it.

It needs root, podman and buildah. No hub of images is asked: the Dockerfile's base is Debian with
its own Python, unpacked by mmdebstrap and given the base's name. Everything lies in CACHE.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import debian
from tests.levels.server import CACHE, lock

ROOT = Path(__file__).parents[1]
IMAGE = "localhost/tradecore"
_HOME = CACHE / "containers"
_PROGRAMS = ("podman", "buildah", "crun")
_PACKAGES = ("ca-certificates", "libpython3-dev", "python-is-python3", "python3", "python3-pip")
_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_BUILD_LIMIT_S = 900
_CALL_LIMIT_S = 60


class UnavailableError(Exception):
    """This machine cannot have the image; the text says why and what would help."""


def podman(*arguments: str | Path, limit_s: float = _CALL_LIMIT_S) -> str:
    """Run podman and return its output.

    Raises subprocess.CalledProcessError with what it said.
    """
    return run(*command("podman", *arguments), limit_s=limit_s)


def build() -> str:
    """Build the image from the tree as it is now, unless it is built, and return its name.

    Raises UnavailableError on a machine that cannot, and subprocess.CalledProcessError when the
    Dockerfile does not build.
    """
    with lock("containers"):
        _prepare_base()
        built = _HOME / "built"
        digest = _digest()
        if not (built.exists() and built.read_text() == digest):
            _build()
            built.write_text(digest)
    return IMAGE


def _digest() -> str:
    """Return a hash of all that goes into the image."""
    whole = hashlib.sha256()
    ignore = (ROOT / ".dockerignore").read_text().split()
    for name in ("Dockerfile", *(line[1:] for line in ignore if line.startswith("!"))):
        path = ROOT / name
        for one in sorted(path.rglob("*.*")) if path.is_dir() else [path]:
            if one.is_file() and one.suffix not in (".c", ".pyc", ".so"):
                whole.update(b"%s\0%s" % (str(one).encode(), one.read_bytes()))
    return whole.hexdigest()


def _build() -> None:
    # Packages come from where this machine gets its own; nothing of that is in the image.
    settings = _HOME / "pip.conf"
    lines = (f"{name} = {value}\n" for name, value in debian.pip_settings().items())
    settings.write_text("[global]\n" + "".join(lines))
    mounts = [f"--volume={settings}:/etc/pip.conf:ro"]
    if _BUNDLE.exists():
        mounts.append(f"--volume={_BUNDLE}:{_BUNDLE}:ro")
    build = ("build", "--isolation=chroot", "--network=host", "--pull=never")
    options = ("--format=docker", "--layers", *mounts)
    try:
        # The stage that compiles has a name as well, for what has none is cleared away.
        for target in (("--target=build", f"--tag={IMAGE}-build"), (f"--tag={IMAGE}",)):
            arguments = (*build, *options, *target, ROOT)
            run(*command("buildah", *arguments), limit_s=_BUILD_LIMIT_S)
        podman("image", "prune", "--force")
    finally:
        run(*command("buildah", "rm", "--all"))


def base_name() -> str:
    """Return the base that the Dockerfile names, such as python:3.13-slim-trixie."""
    tag = re.search(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert tag, "the Dockerfile has no ARG PYTHON"
    return f"python:{tag[1]}"


def _prepare_base() -> None:
    """Put Debian with Python under the name of the Dockerfile's base, unless it is there."""
    if os.geteuid() != 0:
        raise UnavailableError("building the image needs root")
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise UnavailableError(f"missing for the image: apt-get install {' '.join(missing)}")
    name = f"docker.io/library/{base_name()}"
    try:
        known = podman("images", "--format={{.Repository}}:{{.Tag}}")
    except subprocess.CalledProcessError as error:
        raise UnavailableError(
            f"podman does not work here: {error.stderr.strip()[-300:]}"
        ) from error
    if name in known.split():
        return
    release = name.rpartition("-")[2]
    root = _HOME / "root"
    try:
        debian.unpack(root, release, _PACKAGES)
    except debian.UnpackError as error:
        raise UnavailableError(f"base of the image: {error}") from error
    _slim(root)
    with tempfile.TemporaryDirectory(dir=_HOME) as folder:
        archive = Path(folder) / "root.tar"
        run("tar", "-C", root, "-cf", archive, ".", limit_s=_BUILD_LIMIT_S)
        podman("import", "--change=CMD python3", archive, name, limit_s=_BUILD_LIMIT_S)
    shutil.rmtree(root)


def _slim(root: Path) -> None:
    """Take out what the real base has not: bytecode, static libraries and papers."""
    for pattern in ("usr/**/*.pyc", "usr/lib/**/libpython*.a"):
        for path in root.glob(pattern):
            path.unlink()
    for folder in ("usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(root / folder)


def command(program: str, *arguments: str | Path) -> list[str | Path]:
    """Return the command that runs podman or buildah on a storage of our own.

    It has a mount namespace for itself: what it mounts goes with it, and crun, which takes no
    mixture of the two kinds of cgroups, does not see the empty second one.
    """
    options = ["--cgroup-manager=cgroupfs"] if program == "podman" else []
    return [
        *("unshare", "--mount", "--propagation=private", "sh", "-c"),
        *('umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh", program),
        *(f"--root={_HOME / 'storage'}", f"--runroot={_HOME / 'run'}", "--storage-driver=overlay"),
        *(*options, *arguments),
    ]


def run(*command: str | Path, limit_s: float = _CALL_LIMIT_S) -> str:
    """Run a program and return its output; CalledProcessError with what it said when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
    )
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, str(command[0]), done.stdout, done.stderr
        )
    return done.stdout


def main() -> None:
    """Build; what this machine cannot have is said, and skipped by the tests."""
    try:
        print(f"image: {build()}")
    except UnavailableError as error:
        print(f"will be skipped: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stdout[-3000:]}{error.stderr[-3000:]}")


if __name__ == "__main__":
    main()
