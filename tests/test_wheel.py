"""The wheel: built from the source archive, repaired for other machines, run where nothing else is.

TRADECORE_WHEEL names a wheel of this tree to be looked at instead of a new one (`make pythons`).
"""

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILT_S = 500
MADE_BY_BUILDING = shutil.ignore_patterns("*.so", "*.c", "*.html.c", "__pycache__", "*.egg-info")

pytestmark = pytest.mark.timeout(BUILT_S + 200)


def run(*command: str | Path, cwd: Path, limit_s: float = BUILT_S) -> str:
    """Run a program without a trace of this tree in its environment; return what it printed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DATABASE_"))}
    environ["CFLAGS"] = "-O1"  # how fast it runs is not asked here
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environ | {"PATH": f"{BIN}{os.pathsep}{environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr


def build(source: Path, what: str, out: Path) -> None:
    """Build from `source`; what Cython made of this tree saves half of the time."""
    shutil.copytree(ROOT / "build" / "cython", source / "build" / "cython")
    run(BIN / "pyproject-build", "--no-isolation", what, "--outdir", out, ".", cwd=source)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    if given := os.environ.get("TRADECORE_WHEEL"):
        shutil.copy(given, folder)
        return folder
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tradecore", "sql"):
        shutil.copytree(ROOT / name, source / name, ignore=MADE_BY_BUILDING)
    build(source, "--sdist", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(source / "unpacked", filter="data")
    (unpacked,) = (source / "unpacked").iterdir()
    build(unpacked, "--wheel", source)
    (raw,) = source.glob("*.whl")
    run(BIN / "auditwheel", "repair", "--wheel-dir", folder, raw, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    pip = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", f"{wheel}[embedded]", cwd=folder)
    run(*pip, "check", cwd=folder)
    return folder / "bin"


def tree(folder: str, name: str) -> set[str]:
    """What the package has here, under the names of the wheel: extensions by their module."""
    found = set()
    for path in (ROOT / folder).rglob("*"):
        inside = path.relative_to(ROOT / folder)
        if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts):
            if path.suffix in (".so", ".c"):
                continue
            inside = inside.with_suffix(".so") if path.suffix == ".pyx" else inside
            found.add((name / inside).as_posix())
    return found


def test_the_wheel_has_all_of_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        records = list(csv.reader(io.StringIO(archive.read(record_of(names)).decode())))
        for name, checksum, size in records:
            if checksum:
                data = archive.read(name)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
                assert (checksum, int(size)) == (f"sha256={digest.decode()}", len(data)), name
    assert {name for name, *_ in records} == set(names)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    found = {name.replace(suffix, ".so") for name in names if ".dist-info/" not in name}
    wanted = tree("tradecore", "tradecore") | tree("sql", "tradecore/sql")
    assert sorted(found ^ wanted) == []


def record_of(names: list[str]) -> str:
    (name,) = (name for name in names if name.endswith(".dist-info/RECORD"))
    return name


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        tags = archive.read(f"{info}/WHEEL").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(rf"^Tag: {python}-{python}-manylinux_2_\d+_", tags, re.MULTILINE)
    assert wheel.name.startswith(f"tradecore-{info.split('-')[1].removesuffix('.dist')}")
    assert "tradecore = tradecore.cli:main" in scripts
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert sorted(needed) == sorted(PROJECT["project"]["dependencies"])
    assert "Requires-Python: >=3.11" in metadata and "License-Expression: MIT" in metadata


def test_the_source_archive_has_what_builds(dist: Path) -> None:
    archives = list(dist.glob("*.tar.gz"))
    if not archives:
        pytest.skip("TRADECORE_WHEEL names a wheel without its source archive")
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("py", "pyx", "pxd", "pyi")
        for path in (ROOT / "tradecore").rglob(f"*.{suffix}")
    }
    sources |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "sql").glob("*.sql")}
    assert sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".c", ".so"))]


def test_an_empty_environment_captures_and_stores(place: Path, tmp_path: Path) -> None:
    """The installed daemon against the installed exchange: every trade is compared."""
    assert run(place / "tradecore", "--version", cwd=tmp_path).startswith("tradecore ")
    where = run(place / "python", "-c", "import tradecore; print(tradecore.__file__)", cwd=tmp_path)
    assert "site-packages" in where
    printed = run(
        *(place / "python", ROOT / "bench" / "demo.py", "--seconds", "3", "--rate", "1000"),
        cwd=tmp_path,
        limit_s=150,
    )
    proof = re.search(r"PROOF: ([\d,]+) trades printed, ([\d,]+) stored, ([\d,]+) equal", printed)
    assert proof and set(proof.groups()) == {"3,000"}, printed
