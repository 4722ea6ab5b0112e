"""Builds the Cython extensions; everything else is in pyproject.toml.

TRADECORE_DEBUG=1 compiles with bounds checks and assertions. CFLAGS come last, so that they win.
"""

import os
import shlex
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("TRADECORE_DEBUG") == "1"

# CPython's own flags have -g, which would make a wheel four times as large.
C_FLAGS = ["-O1", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-g0", "-DNDEBUG", "-fno-plt"]
GIVEN = shlex.split(os.environ.get("CFLAGS", ""))
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": not DEBUG,
    "initializedcheck": DEBUG,
    "overflowcheck": False,
}

EXTENSIONS = [
    Extension(
        ".".join(source.with_suffix("").parts),
        [str(source)],
        extra_compile_args=[*C_FLAGS, "-Wall", "-Wno-unused-function", *GIVEN],
        define_macros=[("TRADECORE_DEBUG", "1")] if DEBUG else [],
    )
    for source in sorted(Path("tradecore").rglob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        EXTENSIONS, compiler_directives=DIRECTIVES, build_dir="build/cython", force=DEBUG
    )
)
