"""Runs the sanitizer build of the codec; `test_sanitizers.py` starts it, outside pytest.

    python tests/sanitizer_run.py corpus | overread | overflow

`corpus` has to end with status 0; the other two commit the crime and must not.
"""

import importlib
import random
import sys
from pathlib import Path

from codec_check import Check, make_table
from fuzz import mutated
from plain_frames import TRADE, compact, corpus

from tradecore import _fastparse

exact_frame = importlib.import_module("exact_frame")  # compiled by test_sanitizers.py
EXACT_RUNS = 60_000
CHECKED_RUNS = 10_000


def run_corpus() -> None:
    """Parse every seed, every cut of it, and mutations, each in a heap block of its very size."""
    dice = random.Random(20240809)
    table = make_table()
    seeds = corpus()
    taken = 0
    for seed in seeds:
        for size in range(len(seed) + 1):
            taken += exact_frame.parse_exact(seed[:size], table, 0) > 0
    for _ in range(EXACT_RUNS):
        frame = mutated(dice.choice(seeds), dice, seeds)
        taken += exact_frame.parse_exact(frame, table, 0) > 0
    for opening in (b"[", b'{"a":', b'{"data":', b'"', b"\\", b"9", b'{"p":"'):
        exact_frame.parse_exact(opening * 100_000, table, 0)
    check = Check()
    for _ in range(CHECKED_RUNS):
        check(mutated(dice.choice(seeds), dice, seeds))
    many = Check(tuple(f"S{number}USDT" for number in range(500)))
    assert many(compact(TRADE.replaced(s="S499USDT"))) is not None
    assert taken > len(seeds)
    print(f"{taken} frames accepted, no report")


def main(what: str) -> None:
    # Were it another build than the one beside the hook, silence would prove nothing.
    assert Path(_fastparse.__file__).parents[1] == Path(exact_frame.__file__ or "").parent
    if what == "corpus":
        run_corpus()
    elif what == "overread":
        exact_frame.parse_exact(compact(TRADE), make_table(), 1)
    elif what == "overflow":
        exact_frame.double_it(2**62)


if __name__ == "__main__":
    main(sys.argv[1])
