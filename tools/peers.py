"""`make peers`: what bench/bench_peers.py compares tradecore with, in .venv/peers.

Each peer has an environment of its own, with the versions that bench/peers/<peer>.txt pins. What
this machine cannot have is said, and left out of the bench.
"""

import os
import shutil
import sys
from pathlib import Path

from tests.pythons import ROOT, interpreters, run

PINNED = ROOT / "bench" / "peers"
KEPT = ROOT / ".venv" / "peers"
PYTHONS = {"cryptofeed-2.4.1": ("3.11", "3.12", "3.13"), "cryptofeed-3.0.1": ("3.13", "3.14")}
"""Which Python a peer runs on, the best first; the others take the one of tradecore."""


def install(pinned: Path, python: Path) -> None:
    """Make the environment of a peer, or leave the one that is as it should be."""
    folder = KEPT / pinned.stem
    state = f"{python}\n{pinned.read_text()}"
    made = folder / "made-of"
    if made.exists() and made.read_text() == state:
        return
    print(f"installing into {folder.relative_to(ROOT)}", flush=True)
    run(python, "-m", "venv", "--clear", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--requirement", pinned)
    made.write_text(state)


def main() -> int:
    """Install what can be had."""
    found = interpreters()
    own = ".".join(map(str, sys.version_info[:2]))
    found[own] = Path(os.path.realpath(sys.executable))
    for pinned in sorted(PINNED.glob("*.txt")):
        wanted = PYTHONS.get(pinned.stem, (own,))
        python = next((found[name] for name in wanted if name in found), None)
        if python is None:
            print(f"{pinned.stem} needs Python {' or '.join(wanted)}, with headers: left out")
            continue
        try:
            install(pinned, python)
        except SystemExit as failure:
            shutil.rmtree(KEPT / pinned.stem, ignore_errors=True)
            print(f"{pinned.stem} cannot be installed here, and is left out:\n{failure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
