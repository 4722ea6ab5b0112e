"""Throws mutated bytes at what reads foreign bytes, and holds each answer against an oracle.

    python tests/fuzz.py events --seed 1 --runs 200000      own mutator, same bytes every time
    python tests/fuzz.py events --replay FILE               once, the bytes that a run left behind
    python tests/fuzz.py events --atheris FOLDER -max_total_time=40    coverage-guided

`fuzz_targets.py` has the targets. Exit status 0: every answer was the oracle's. The first
difference is printed and ends the run.
"""

import argparse
import importlib
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from plain_frames import SYMBOLS

TOKENS = (
    *(b'"e":"trade",', b'"E":', b'"s":"BTCUSDT",', b'"t":-1,', b'"p":"', b'"k":{', b'"data":{'),
    *(b'"stream":"', b'"result":null', b'"id":1', b'"error":{}', b'"i":"1m"', b'"x":true,'),
    *(b"92233720368.54775807", b"92233720368.54775808", b"9" * 30, b"0" * 24, b"-", b"-1", b"."),
    *(b"9223372036854775807", b"9223372036854775808", b"1e5", b"0.000000001", b"1723161255343999"),
    *(b"\\u0065", b"\\ud834\\udd1e", b"\\ud800", b'\\"', b"\\\\", b"\\/", b"\\", b"\\u00"),
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\n", b"\x00", b"\x1f", b"\x7f", b"\xff"),
    *(b"\xed\xa0\x80", b"\xf0\x9d\x84\x9e", b"\xc0\x80", b"\xe5\xb8\x81", b"null", b"true"),
    *(b"false", b"[[[[", b'{"a":', b"[]", b"{}", *(symbol.encode() for symbol in SYMBOLS)),
    *(b"1e400", b'"a":1e400,', b"1" * 5000, b"\r\n", b"True", b"FALSE", b"61837.63000000,"),
    *(b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f", b"\x80" + b"\x00" * 7, b"\x00" * 7 + b"\x80"),
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


def fuzz(name: str, seed: int, runs: int, seconds: float) -> int:
    """Check up to `runs` mutated inputs within `seconds`; return how many meant anything."""
    dice = random.Random(seed)
    target = importlib.import_module("fuzz_targets").TARGETS[name]
    check, seeds = target.make(), target.seeds()
    for one in seeds:
        check(one)
    end = time.monotonic() + seconds
    accepted = done = 0
    while done < runs and (done % 100 or time.monotonic() < end):
        data = mutated(dice.choice(seeds), dice, seeds)
        try:
            accepted += check(data)
        except Exception:
            print(f"{name} fails at these bytes: {data!r}", file=sys.stderr)
            raise
        done += 1
    print(f"{done} inputs equal to the oracle, {accepted} of them accepted")
    return accepted


def fuzz_with_atheris(name: str, folder: Path, arguments: list[str]) -> None:
    """Hand over to atheris; it ends the process itself, non-zero at a difference or a crash.

    `folder`, which gets the seeds, keeps what the search finds. The oracle's branches steer it, and
    the extensions' own when clang compiled them with -fsanitize=fuzzer-no-link (`make fuzz`).
    """
    atheris = importlib.import_module("atheris")  # optional, and without type stubs
    with atheris.instrument_imports(include=["fuzz_targets", "oracle", "copy_oracle"]):
        target = importlib.import_module("fuzz_targets").TARGETS[name]
    check = target.make()
    for number, seed in enumerate(target.seeds()):
        check(seed)
        (folder / f"seed-{number}").write_bytes(seed)

    def once(data: bytes) -> None:
        try:
            check(data)
        except Exception:
            # libFuzzer tells of a crash only; the bytes and the difference are what is wanted.
            print(f"{name} fails at these bytes: {data!r}", file=sys.stderr)
            traceback.print_exc()
            raise

    atheris.Setup([sys.argv[0], *arguments, str(folder)], once)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--atheris", type=Path, metavar="FOLDER", help="takes the options left")
    options, rest = parser.parse_known_args()
    logging.disable()  # of refused frames and damaged files
    if options.atheris:
        fuzz_with_atheris(options.target, options.atheris, rest)
        return 0
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if options.replay:
        target = importlib.import_module("fuzz_targets").TARGETS[options.target]
        target.make()(options.replay.read_bytes())
        return 0
    return 0 if fuzz(options.target, options.seed, options.runs, options.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
