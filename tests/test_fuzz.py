"""A bounded fuzz run: in a process of its own, so that a crash is a failure and not the end."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TESTS / "fuzz_fastparse.py"), *arguments],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_mutated_frames_give_what_the_oracle_gives() -> None:
    ended = fuzz("--seed", "20240809", "--runs", "200000", "--seconds", "12")
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    assert "equal to the oracle" in ended.stdout


def test_coverage_guided_fuzzing_finds_no_difference(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; the mutator above has run")
    ended = fuzz("--atheris", str(tmp_path), "-max_total_time=10", "-max_len=600")
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
