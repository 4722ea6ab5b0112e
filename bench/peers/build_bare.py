"""Compile the listener of bare.py against tradecore's present C; nothing is done when it is."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    subprocess.run(
        [Path(sys.executable).parent / "cythonize", "-q", "-i", HERE / "_bare.pyx"],
        cwd=HERE.parents[1],  # where the .pxd files of tradecore are found
        env={**os.environ, "CFLAGS": "-O3 -g0 -DNDEBUG"},
        check=True,
    )
