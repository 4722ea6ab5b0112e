"""compose.yaml as docker-compose reads it, and the secrets that it wants."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SCRIPTS = ROOT / "deploy" / "compose"


def read_compose(profile: str) -> dict[str, Any]:
    """Return what docker-compose makes of the file; it refuses what it does not know."""
    command = (BIN / "docker-compose", "-f", ROOT / "compose.yaml", "--profile", profile, "config")
    # The machine's own settings must not get into it.
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(
        [*command, "--format=json"], capture_output=True, text=True, timeout=60, env=environ
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def make_secrets(folder: Path) -> None:
    """Make them as an operator does."""
    subprocess.run(["sh", SCRIPTS / "secrets.sh", folder], check=True, timeout=60)
