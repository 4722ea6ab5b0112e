"""Machine instructions of parsing a trade frame and of encoding a row, held against those kept.

    python bench/instructions.py [--keep]

Valgrind counts a whole process; the difference of two that differ in their rounds only is the loop
itself. Counts do not depend on how busy the machine is, but on compiler and Python, so those of
each pair are kept in instructions.json; --keep (`make instructions`) writes ours. Exit code 0 = no
count has grown by more than 5 %, 1 = one has, 3 = it cannot be told, and why.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import _counted

from tradecore import _bench, _copyenc, _fastparse, capture

HERE = Path(__file__).parent
KEPT = HERE / "instructions.json"
GROWTH_MOST = 0.05
ROUNDS = 64
GROWN, UNKNOWN = 1, 3
LIMIT_S = 100


class LackingError(Exception):
    """It cannot be counted here, or there is nothing to compare with; the text says why."""


def made_with() -> str:
    """Return what the counts depend on: compiler and Python. Raises LackingError."""
    compilers = set()
    for module in (_bench, _copyenc, _fastparse, capture):
        binary = Path(str(module.__file__)).read_bytes()
        if b"__assert_fail" in binary:
            raise LackingError("the extensions were built with TRADECORE_DEBUG=1")
        # Clang's files have a part of gcc's start-up code, so it is looked for first.
        found = re.search(rb"(clang) version (\d+\.\d+)", binary) or re.search(
            rb"(GCC): \([^)]*\) (\d+\.\d+)", binary
        )
        compilers.add(b" ".join(found.groups()).decode() if found else "unknown compiler")
    python = f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}"
    return ", ".join([*sorted(compilers), python, platform.machine()])


def count() -> dict[str, float]:
    """Return the instructions of one item of each loop. Raises LackingError without valgrind."""
    if shutil.which("valgrind") is None:
        raise LackingError("valgrind is not installed (apt-get install valgrind)")
    least = [1] * len(_counted.LOOPS)
    runs = [[1 + ROUNDS * (at == n) for at in range(len(least))] for n in range(len(least))]
    with ThreadPoolExecutor(2) as pool:
        start, *wholes = pool.map(_whole_process, [least, *runs])
    items = ROUNDS * _counted.ITEMS
    return {
        name: round((whole - start) / items, 1)
        for name, whole in zip(_counted.LOOPS, wholes, strict=True)
    }


def _whole_process(rounds: Sequence[int]) -> int:
    done = subprocess.run(
        [
            *("valgrind", "--tool=cachegrind", "--cache-sim=no"),
            *("--cachegrind-out-file=/dev/null", sys.executable, _counted.__file__),
            *map(str, rounds),
        ],
        # Threads of OpenBLAS spin, and Python's own hashes are drawn at random.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    found = re.search(r"I +refs: +([\d,]+)", done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"valgrind ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return int(found[1].replace(",", ""))


def keep(made: str, counts: dict[str, float]) -> None:
    """Write the counts of this compiler and Python; those of others stay."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept[made] = {**counts, "cython": version("cython"), "valgrind": _valgrind()}
    KEPT.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _valgrind() -> str:
    command = ["valgrind", "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def compare(made: str, counts: dict[str, float]) -> int:
    """Print the counts beside those kept; return GROWN if one has. Raises LackingError."""
    kept = json.loads(KEPT.read_text())
    if made not in kept:
        raise LackingError(
            f"no counts are kept for {made}: `make instructions` keeps them;"
            f" there are those of {'; '.join(kept)}"
        )
    code = 0
    for name, now in counts.items():
        growth = now / kept[made][name] - 1
        print(
            f"{name}: {now:.1f} instructions an item, kept {kept[made][name]:.1f} ({growth:+.1%})"
        )
        if growth > GROWTH_MOST:
            code = GROWN
            print(f"{name} has grown by more than {GROWTH_MOST:.0%}: find out why, or, if it has")
            print("to be so, `make instructions` and tell the reason in the commit")
    return code


def main() -> int:
    """Count; keep or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="write the counts to instructions.json")
    options = parser.parse_args()
    try:
        made, counts = made_with(), count()
        if options.keep:
            keep(made, counts)
        return compare(made, counts)
    except LackingError as error:
        print(error)
        return UNKNOWN


if __name__ == "__main__":
    sys.exit(main())
