"""Builds the Cython extensions; everything else is in pyproject.toml.

TRADECORE_DEBUG=1 compiles with bounds checks, overflow checks and assertions.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("TRADECORE_DEBUG") == "1"

C_FLAGS = ["-O1", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-DNDEBUG", "-fno-plt"]
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
        extra_compile_args=[*C_FLAGS, "-Wall", "-Wno-unused-function"],
        define_macros=[("TRADECORE_DEBUG", "1")] if DEBUG else [],
    )
    for source in sorted(Path("tradecore").rglob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        EXTENSIONS, compiler_directives=DIRECTIVES, build_dir="build/cython", force=DEBUG
    )
)
