"""`python -m tests.torture`: see the package."""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

from tests.torture.faults import FAULTS, MIXED
from tests.torture.rounds import Outcome, Plan, run


def plan_from(arguments: list[str] | None = None) -> Plan:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument(
        "--faults",
        default="",
        help=f"commas between: {', '.join(FAULTS)}, {MIXED} (several at once); default all",
    )
    parser.add_argument("--rate", type=int, default=500, help="trades per second")
    parser.add_argument("--lines", default="1,2", help="FEED_LINES of an arena is one of these")
    parser.add_argument(
        "--absent",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the venue lacks some ids in every other arena",
    )
    parser.add_argument("--keep", action="store_true", help="leave all logs")
    parser.add_argument("--only", type=int, help="do only the round of this number")
    options = parser.parse_args(arguments)
    names = tuple(n for n in options.faults.split(",") if n) or (*FAULTS, MIXED)
    if unknown := [name for name in names if name not in (*FAULTS, MIXED)]:
        parser.error(
            f"unknown faults: {', '.join(unknown)}; known are {', '.join(FAULTS)}, {MIXED}"
        )
    lines = tuple(int(number) for number in options.lines.split(","))
    return Plan(
        options.rounds,
        options.seed,
        names,
        options.rate,
        lines,
        options.absent,
        keep=options.keep,
        only=options.only,
    )


async def _until_told_to_stop(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """Let SIGTERM end the run as Ctrl-C does: nothing of it may go on running."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main() -> int:
    """Run, print the table and what failed; return the exit code."""
    from tqdm import tqdm

    plan = plan_from()
    print(f"seed {plan.seed}, {len(plan.numbers())} rounds", file=sys.stderr)
    with tqdm(total=len(plan.numbers()), unit="round", disable=None) as bar:
        begun = 0

        def show(name: str) -> None:
            nonlocal begun
            bar.update(begun and 1)
            begun += 1
            bar.set_description(name)
            if bar.disable:
                print(f"round {begun}: {name}", file=sys.stderr, flush=True)

        outcome = asyncio.run(_until_told_to_stop(run(plan, show)))
        bar.update(1)
    print(outcome.table())
    for failure in outcome.failures:
        print(f"\nFAILED {failure}")
    print(f"\nseed {plan.seed}: {outcome.last_word}")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
