"""Throws mutated frames at the codec and holds each answer against the oracle.

    python tests/fuzz_fastparse.py --seed 1 --runs 200000      own mutator, same frames every time
    python tests/fuzz_fastparse.py --atheris FOLDER -max_total_time=40   coverage-guided

Exit status 0: every answer was the oracle's. The first difference is printed and ends the run.
"""

import argparse
import importlib
import random
import sys
import time
from pathlib import Path

import oracle
from codec_check import Check
from plain_frames import SYMBOLS, corpus

TOKENS = (
    *(b'"e":"trade",', b'"E":', b'"s":"BTCUSDT",', b'"t":-1,', b'"p":"', b'"k":{', b'"data":{'),
    *(b'"stream":"', b'"result":null', b'"id":1', b'"error":{}', b'"i":"1m"', b'"x":true,'),
    *(b"92233720368.54775807", b"92233720368.54775808", b"9" * 30, b"0" * 24, b"-", b"-1", b"."),
    *(b"9223372036854775807", b"9223372036854775808", b"1e5", b"0.000000001", b"1723161255343999"),
    *(b"\\u0065", b"\\ud834\\udd1e", b"\\ud800", b'\\"', b"\\\\", b"\\/", b"\\", b"\\u00"),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\n", b"\x00", b"\x1f", b"\x7f", b"\xff"),
    *(b"\xed\xa0\x80", b"\xf0\x9d\x84\x9e", b"\xc0\x80", b"\xe5\xb8\x81", b"null", b"true"),
    *(b"false", b"[[[[", b'{"a":', b"[]", b"{}", *(symbol.encode() for symbol in SYMBOLS)),
)


def mutated(payload: bytes, dice: random.Random, seeds: list[bytes]) -> bytes:
    """Return `payload` with one to four random changes."""
    frame = bytearray(payload)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 4))):
        at = dice.randrange(len(frame) + 1)
        until = min(len(frame), at + dice.choice((1, 1, 2, 4, 8, 24)))
        match dice.randrange(9):
            case 0:
                frame[at:until] = bytes([dice.randrange(256)])
            case 1:
                frame[at:at] = dice.choice(TOKENS)
            case 2:
                frame[at:until] = dice.choice(TOKENS)
            case 3:
                del frame[at:until]
            case 4:
                frame[at:at] = frame[at:until]
            case 5:
                del frame[at:]
            case 6:
                other = dice.choice(seeds)
                frame[at:] = other[dice.randrange(len(other)) :]
            case 7:
                digits = [place for place, byte in enumerate(frame) if 0x30 <= byte <= 0x39]
                if digits:
                    frame[dice.choice(digits)] = dice.choice(b"0123456789.-e")
            case 8:
                source = dice.randrange(len(frame) + 1)
                frame[at:at] = frame[source : source + dice.randrange(40)]
    return bytes(frame)


def fuzz(seed: int, runs: int, seconds: float) -> int:
    """Check up to `runs` mutated frames within `seconds`; return how many were accepted."""
    dice = random.Random(seed)
    check = Check()
    seeds = corpus()
    end = time.monotonic() + seconds
    accepted = done = 0
    while done < runs and (done % 1000 or time.monotonic() < end):
        accepted += check(mutated(dice.choice(seeds), dice, seeds)) is not None
        done += 1
    print(f"{done} frames equal to the oracle, {accepted} of them accepted")
    return accepted


def fuzz_with_atheris(folder: str, arguments: list[str]) -> None:
    """Hand over to atheris; it ends the process itself, non-zero at a difference or a crash.

    The seeds are laid into `folder`. The oracle's branches steer the search; a codec compiled by
    clang with -fsanitize=fuzzer-no-link adds its own.
    """
    atheris = importlib.import_module("atheris")  # optional, and without type stubs
    for number, seed in enumerate(corpus()):
        Path(folder, f"seed-{number}").write_bytes(seed)
    with atheris.instrument_imports(include=["oracle"]):
        importlib.reload(oracle)
    check = Check()
    atheris.Setup([sys.argv[0], *arguments, folder], lambda data: check(data) and None)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--atheris", metavar="FOLDER", help="other options then go to atheris")
    options, rest = parser.parse_known_args()
    if options.atheris:
        fuzz_with_atheris(options.atheris, rest)
        return 0
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    return 0 if fuzz(options.seed, options.runs, options.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
