"""A bounded fuzz run of each target, in a process of its own: a crash is a failure, not the end.

The search that is guided by coverage is `make fuzz`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_targets import TARGETS

TESTS = Path(__file__).resolve().parent
SECONDS = {"events": 6}


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_bytes_give_what_the_oracle_gives(target: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, str(TESTS / "fuzz.py"), target),
            *("--seed", "20240809", "--seconds", str(SECONDS.get(target, 2))),
        ],
        env=os.environ
        | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    assert "equal to the oracle" in ended.stdout


def test_a_difference_is_told_with_its_bytes() -> None:
    """Guards the other tests: a fuzzer that cannot fail would pass them all."""
    program = (
        "import fuzz, fuzz_targets\n"
        "def check(data):\n"
        "    assert b'trade' in data\n"
        "fuzz_targets.TARGETS['events'] = fuzz_targets.Target(lambda: check, lambda: [b'trade'])\n"
        "fuzz.fuzz('events', 1, 10**6, 60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 1
    assert "events fails at these bytes: b'" in ended.stderr
