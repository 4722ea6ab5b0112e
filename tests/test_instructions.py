"""Parse and encode take no more than 5 % more machine instructions than bench/ keeps."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "bench" / "instructions.py"


def test_parse_and_encode_have_not_grown() -> None:
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, timeout=110)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
