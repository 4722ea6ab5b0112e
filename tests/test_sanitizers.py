"""The codec, and what makes frames for clients, under the sanitizers of addresses and behaviour.

The extension is built a second time, into a folder of its own, and run in a process of its own:
the sanitizers must be loaded before Python, and pytest would swallow their report.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "tradecore"
CODEC = [
    PACKAGE / f"{name}.pyx"
    for name in ("_symbols", "_json", "_slowparse", "_fastparse", "_reframe")
]

# Optimisation hides nothing at -O1; -fno-wrapv undoes a flag of CPython's that hides overflow.
C_FLAGS = (
    "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-wrapv"
    " -fno-omit-frame-pointer"
)

# Bytes objects end in a zero that belongs to them, so one byte read too far would go unseen.
EXACT_FRAME = '''
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from tradecore._event cimport event_t
from tradecore._fastparse cimport parse_event_c
from tradecore._reframe cimport FRAME_SLACK, find_times, payload_t, write_frame
from tradecore._symbols cimport SymbolTable


def parse_exact(bytes payload, SymbolTable symbols, Py_ssize_t lie):
    """Return the status of a frame whose heap block ends where the frame ends."""
    cdef Py_ssize_t size = len(payload)
    cdef char *block = <char *>malloc(size if size else 1)
    cdef event_t *event = <event_t *>malloc(sizeof(event_t))
    memset(event, 0xA5, sizeof(event_t))
    memcpy(block, <const char *>payload, size)
    status = parse_event_c(block, size + lie, &symbols.table, event)
    free(event)
    if lie == 0:
        reframe_exact(block, size)
    free(block)
    return status


cdef int reframe_exact(const char *block, Py_ssize_t size) except -1:
    cdef payload_t payload
    cdef char *frame
    for kind in range(3):
        if find_times(kind, block, size, &payload):
            frame = <char *>malloc(payload.size + 13 + FRAME_SLACK)
            for mode in range(4):
                write_frame(frame, &payload, b"btcusdt@trade", 13, mode)
            free(frame)
    return 0


def double_it(int64_t number):
    return number * 2
'''


def sanitizer_libraries() -> list[str]:
    """Return the libraries to preload, or skip where the compiler has none."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc on this machine")
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"this gcc has no {name}")
        found.append(path)
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the codec with sanitizers; return the environment to run it in."""
    libraries = sanitizer_libraries()
    folder = tmp_path_factory.mktemp("sanitized")
    package = folder / "tradecore"
    package.mkdir()
    for source in (PACKAGE / "__init__.py", PACKAGE / "schema.py", *PACKAGE.glob("*.pxd"), *CODEC):
        shutil.copy(source, package)
    (folder / "exact_frame.pyx").write_text(EXACT_FRAME)
    directives = ("boundscheck=False", "wraparound=False", "cdivision=True")
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-q", "-i", "-3"]
    command += [part for directive in directives for part in ("-X", directive)]
    built = subprocess.run(
        [*command, *(f"tradecore/{source.name}" for source in CODEC), "exact_frame.pyx"],
        cwd=folder,
        env=os.environ
        | {"CC": "gcc", "CFLAGS": C_FLAGS, "LDFLAGS": "-fsanitize=address,undefined"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{folder}{os.pathsep}{TESTS}",
    }


def run(environment: dict[str, str], what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TESTS / "sanitizer_run.py"), what],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_corpus_and_mutations_run_without_a_report(sanitized: dict[str, str]) -> None:
    ended = run(sanitized, "corpus")
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    assert "no report" in ended.stdout
    assert "runtime error" not in ended.stderr


@pytest.mark.parametrize(("crime", "status"), [("overread", 99), ("overflow", 98)])
def test_the_sanitizers_are_awake(sanitized: dict[str, str], crime: str, status: int) -> None:
    """One byte too far, one bit too many: each is noticed, so silence above means something."""
    ended = run(sanitized, crime)
    assert ended.returncode == status, (ended.stdout + ended.stderr)[-6000:]
