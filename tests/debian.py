"""Debian in a folder, unpacked by mmdebstrap: what a chroot, a container or a booted system is."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_LIMIT_S = 900


class UnpackError(Exception):
    """The folder cannot be had; the text says why and what would help."""


def is_unpacked(root: Path) -> bool:
    """Tell whether `unpack` has finished there."""
    return (root / ".ready").exists()


def unpack(root: Path, release: str, packages: Sequence[str], *, setup_hook: str = "") -> None:
    """Unpack a minimal `release` with `packages` into `root`, which needs root rights.

    `setup_hook` is a shell command that sees the folder as $1 before the first package. Raises
    UnpackError.
    """
    if os.geteuid() != 0:
        raise UnpackError("unpacking Debian needs root")
    if shutil.which("mmdebstrap") is None:
        raise UnpackError("mmdebstrap is missing: apt-get install mmdebstrap")
    if any(f" {root}/" in line for line in Path("/proc/mounts").read_text().splitlines()):
        raise UnpackError(f"something is mounted in {root}, unmount it")
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [
            "mmdebstrap",
            *("--quiet", "--variant=minbase", "--include=" + ",".join(packages)),
            *("--dpkgopt=force-unsafe-io", '--aptopt=APT::Install-Recommends "false"'),
            # What is not released yet is valid for a week, which a resting mirror outlives. Its
            # signature is checked all the same.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            *([f"--setup-hook={setup_hook}"] if setup_hook else []),
            release,
            root,
            *_mirrors(),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        timeout=_LIMIT_S,
    )
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-300:]
        raise UnpackError(f"{release} could not be unpacked: {words}")
    (root / ".ready").touch()


def _mirrors() -> list[str]:
    """The mirror that this machine itself uses; without one, mmdebstrap knows a default."""
    sources = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    texts = (path.read_text(errors="replace") for path in sources if path.is_file())
    form = r"^(?:URIs:|deb(?: \[[^]]*\])?) *(https?://\S+/debian/?)(?:\s|$)"
    return [found[1] for text in texts for found in re.finditer(form, text, re.MULTILINE)][:1]


def pip_settings() -> dict[str, str]:
    """What this machine's pip is told about its index, for a pip in the folder."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    lines = re.findall(r"^(?:global|:env:)\.(cert|index-url)='(.*)'$", shown, re.MULTILINE)
    return dict(lines)
