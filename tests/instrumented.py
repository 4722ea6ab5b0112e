"""`make sanitize` and `make fuzz`: all extensions compiled once more, to be watched from inside.

    python -m tests.instrumented sanitize
    python -m tests.instrumented fuzz [SECONDS] [TARGET ...]

The first takes gcc's sanitizers of addresses and undefined behaviour, with warnings as errors, and
runs the tests of the extensions, then the fuzzer's own mutator over each target. The second takes
clang's and atheris, guided by coverage; what the search finds is kept in .venv/fuzz/corpus, and the
next goes on from there. A failing input is printed; `fuzz.py` tries it again. Exit code 0 = no
report, or a line that says what this machine lacks.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
FUZZED = (TESTS / "fuzz_targets.py").read_text().partition("TARGETS = {")[2]
TARGETS = [line.split('"')[1] for line in FUZZED.splitlines() if line.startswith('    "')]
SECONDS_EACH = 6
BUILD_LIMIT_S = 900

# -fno-wrapv undoes a flag of CPython's that hides overflow.
WATCHED = "-O1 -g -fno-omit-frame-pointer -fno-wrapv -fno-sanitize-recover=undefined"
# What Cython's own code is full of; ours has nothing of it to hide.
STRICT = (
    "-Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers -Wno-cast-function-type"
)
# Without a database; the processes that these start are few and our own.
TESTED = (
    *("schema", "fastparse", "fastparse_refused", "copyenc", "ring", "capture", "conflator"),
    *("broadcast", "listener", "dump"),
)


class LackingError(Exception):
    """This machine cannot do it; the text says what it lacks and how to get it."""


def build(folder: Path, python: Path, **environ: str) -> None:
    """Bring `folder` up to this tree and compile its extensions there."""
    junk = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    for name in ("tradecore", "sql"):
        shutil.copytree(ROOT / name, folder / name, ignore=junk, dirs_exist_ok=True)
    # What Cython made of this tree; it is the same for all compilers.
    shutil.copytree(ROOT / "build" / "cython", folder / "build" / "cython", dirs_exist_ok=True)
    shutil.copy(ROOT / "setup.py", folder)
    # Compiled are sources that have changed, and all of them when the flags have.
    made_with, flags = folder / "made-with", f"{python} {environ}"
    fresh = made_with.exists() and made_with.read_text() == flags
    made_with.unlink(missing_ok=True)
    force = [] if fresh else ["--force"]
    done = subprocess.run(
        [python, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "2", *force],
        cwd=folder,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    made_with.write_text(flags)


def paths(folder: Path) -> str:
    """The build before all else, then the tests, which import each other by name."""
    return os.pathsep.join(map(str, (folder, TESTS)))


def watch(what: str, command: Sequence[str | Path], folder: Path, **environ: str) -> None:
    """Run a program over the build; SystemExit with its output and all reports when it fails."""
    began = time.monotonic()
    reports = folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    options = (
        f"detect_leaks=0:quarantine_size_mb=32:exitcode=99:log_path={reports}/report:handle_abort=1"
    )
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": paths(folder), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": options}
        | {"UBSAN_OPTIONS": f"print_stacktrace=1:exitcode=98:log_path={reports}/report"}
        | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    found = "\n".join(path.read_text(errors="replace") for path in sorted(reports.glob("*")))
    if done.returncode or found:
        print(done.stdout[-8000:], found[-12000:], f"{what}: failed", sep="\n", file=sys.stderr)
        raise SystemExit(1)
    last = done.stdout.strip().splitlines()[-1]
    print(f"{what}: {last} ({time.monotonic() - began:.0f} s)", flush=True)


def sanitize() -> None:
    """Tests and mutated inputs over gcc's sanitizers."""
    gcc = shutil.which("gcc")
    if gcc is None:
        raise LackingError("gcc is missing: apt-get install gcc")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([gcc, f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(found.stdout.strip())
        if not Path(libraries[-1]).is_absolute():
            raise LackingError(f"this gcc has no {name}")
    folder = ROOT / ".venv" / "sanitized"
    folder.mkdir(exist_ok=True)
    build(
        folder,
        Path(sys.executable),
        CC=gcc,
        CFLAGS=f"{WATCHED} {STRICT} -fsanitize=address,undefined",
        LDFLAGS="-fsanitize=address,undefined",
    )
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(TESTS, folder / "tests", dirs_exist_ok=True)
    preload = " ".join(libraries)
    suite = [str(folder / "tests" / f"test_{name}.py") for name in TESTED]
    watch(
        "tests",
        [
            *(sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"),
            # Memory is what the sanitizer makes it.
            *("-k", "not resident", *suite),
        ],
        folder,
        LD_PRELOAD=preload,
        CI="1",  # hypothesis then sets no time limits
    )
    for target in TARGETS:
        fuzz = [sys.executable, TESTS / "fuzz.py", target, "--seconds", str(SECONDS_EACH)]
        watch(target, fuzz, folder, LD_PRELOAD=preload)


def clang() -> str:
    """The newest clang that has the sanitizers' runtime."""
    for name in ("clang", *(f"clang-{release}" for release in range(22, 13, -1))):
        found = shutil.which(name)
        flags = ["-fsanitize=address,undefined,fuzzer-no-link", "-shared", "-xc", "-o", "/dev/null"]
        if (
            found
            and not subprocess.run([found, *flags, "-"], input=b"", capture_output=True).returncode
        ):
            return found
    raise LackingError(
        "clang with its sanitizers is missing: apt-get install clang-14 libclang-rt-14-dev"
    )


def atheris_environment(folder: Path) -> tuple[Path, Path]:
    """An environment with atheris and what tradecore needs; its interpreter and its preload."""
    python = folder / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    pip = (*pip, "--only-binary", "atheris")
    wanted = ("atheris", "cython>=3.1,<4", "setuptools>=77", "picows==2.3.*", "orjson", "numpy")
    if not (folder / "env" / ".made").exists():
        for command in ([sys.executable, "-m", "venv", "--clear", folder / "env"], [*pip, *wanted]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise LackingError(f"atheris cannot be installed: {done.stderr[-400:]}")
        (folder / "env" / ".made").touch()
    asked = "import atheris, pathlib; print(pathlib.Path(atheris.path(), 'asan_with_fuzzer.so'))"
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    preload = Path(found.stdout.strip())
    if not preload.exists():
        raise LackingError(f"this atheris has no {preload.name}")
    return python, preload


def fuzz(seconds: int, targets: Sequence[str]) -> None:
    """Search by coverage, each target for its share of `seconds`."""
    compiler = clang()
    folder = ROOT / ".venv" / "fuzz"
    folder.mkdir(exist_ok=True)
    python, preload = atheris_environment(folder)
    build(
        folder,
        python,
        CC=compiler,
        LDSHARED=f"{compiler} -shared",
        # Cython itself adds nothing to a null pointer, which clang would report.
        CFLAGS=f"{WATCHED} -fsanitize=address,undefined,fuzzer-no-link"
        " -fno-sanitize=pointer-overflow",
    )
    for target in targets:
        kept = folder / "corpus" / target
        kept.mkdir(parents=True, exist_ok=True)
        watch(
            target,
            [
                *(python, TESTS / "fuzz.py", target, "--atheris", kept),
                f"-max_total_time={max(seconds // len(targets), 1)}",
                *("-max_len=2000", "-timeout=20", f"-artifact_prefix={folder}/failed-{target}-"),
            ],
            folder,
            LD_PRELOAD=str(preload),
        )


def main() -> int:
    what, *rest = sys.argv[1:] or ["sanitize"]
    try:
        if what == "fuzz":
            fuzz(int(rest[0]) if rest else 40, rest[1:] or TARGETS)
        else:
            sanitize()
    except LackingError as exc:
        print(f"{what}: not done, {exc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
