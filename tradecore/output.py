"""Standard output, whose reader may go."""

import os
import sys


def forsake() -> None:
    """Whoever read our output has gone: give the interpreter nothing left to flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
