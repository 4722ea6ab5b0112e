"""The linters as tests, over the whole tree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--quiet", "--output-format=concise"],
        ["ruff", "format", "--check"],
        ["mypy", "--strict"],
        ["cython-lint", "tradecore"],
        ["bandit", "-qr", "-c", "pyproject.toml", "tradecore", "setup.py"],
    ],
    ids=" ".join,
)
def test_lint(command: list[str]) -> None:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # cython-lint looks for pycodestyle there
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
