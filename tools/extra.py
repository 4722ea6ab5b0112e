"""Install an extra of pyproject.toml into this environment, alone: `python -m tools.extra report`.

`pip install .[report]` would build tradecore again.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        names = tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]]
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    raise SystemExit(subprocess.run([*pip, *names]).returncode)
