"""`python -m tests.levels`: get what the levels need that this machine can have, and say so.

It never fails: what cannot be had is skipped by the tests, with the reason.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.levels import PREPARE, UnavailableError


def main() -> None:
    with ThreadPoolExecutor() as pool:
        for level, prepared in [(lv, pool.submit(do)) for lv, do in PREPARE.items()]:
            try:
                print(f"level {level}: {prepared.result()}")
            except (UnavailableError, OSError, subprocess.SubprocessError) as exc:
                print(f"will be skipped: {exc}", file=sys.stderr)


if __name__ == "__main__":
    main()
