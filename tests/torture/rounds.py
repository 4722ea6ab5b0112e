"""Rounds: which faults, in which arena, and what came of them."""

import asyncio
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from tests.torture.arena import Arena, arena, describe
from tests.torture.faults import FAULTS, LIMITS_S, MIXED, Skipped
from tests.torture.judge import WHOLE_LIMIT_S, Verdict, judge

ROUNDS_PER_ARENA = 20
_MOST_MIXED = 3
_MIX_WINDOW_S = 3.0


@dataclass(frozen=True)
class Plan:
    """What a run does. Round `n` depends on nothing but the seed, `n` and the faults."""

    rounds: int
    seed: int
    faults: tuple[str, ...]
    """Names of FAULTS, or MIXED for several of them at once."""
    rate: int = 500
    lines: tuple[int, ...] = (1, 2)
    """FEED_LINES of an arena is one of these."""
    absent: bool = True
    """Some arenas have ids that the venue itself does not have."""
    limit_s: float = WHOLE_LIMIT_S
    """How long the daemon may take to be whole again."""
    keep: bool = False
    """Leave the folders of good arenas too."""
    only: int | None = None
    """Do this round alone."""

    def fault_of(self, number: int) -> str:
        """Return the name of a round's fault: all in turn, each turn shuffled."""
        turn, place = divmod(number, len(self.faults))
        names = list(self.faults)
        Random(f"{self.seed} turn {turn}").shuffle(names)
        return names[place]

    def numbers(self) -> Sequence[int]:
        """Return the numbers of the rounds."""
        return range(self.rounds) if self.only is None else [self.only]


@dataclass
class Tally:
    """What the rounds of one fault came to."""

    rounds: int = 0
    failed: int = 0
    rows: int = 0
    missing: int = 0
    doubled: int = 0
    wrong: int = 0
    whole_s: list[float] = field(default_factory=list)
    reconnect_s: list[float] = field(default_factory=list)
    """After an end that the venue made; known only where the venue has one host."""
    rest_calls: int = 0
    banned_calls: int = 0
    skipped: str = ""

    def add(self, verdict: Verdict) -> None:
        """Take in a round that was judged."""
        self.rows += verdict.total("equal")
        for name in ("missing", "doubled", "wrong"):
            setattr(self, name, getattr(self, name) + verdict.total(name))
        if verdict.whole_s is not None:
            self.whole_s.append(verdict.whole_s)


@dataclass
class Outcome:
    """A whole run."""

    plan: Plan
    tallies: dict[str, Tally]
    failures: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Tell whether every round ended whole and right."""
        return not self.failures

    @property
    def last_word(self) -> str:
        """Return in a sentence how it ended, and what was left out."""
        skipped = [f"{name} ({t.skipped})" for name, t in self.tallies.items() if t.skipped]
        word = "every round is whole" if self.good else "NOT WHOLE"
        return word + (f"; SKIPPED: {', '.join(skipped)}." if skipped else ".")

    def table(self) -> str:
        """Return the table of faults."""
        head = ("fault", "rounds", "failed", "rows", "missing", "doubled", "wrong",
                "whole again s, median", "max", "reconnect s, median",
                "REST calls", "while banned")  # fmt: skip
        lines: list[tuple[str, ...]] = [head]
        for name, tally in self.tallies.items():
            if tally.skipped:
                lines.append(
                    (name, "-", "", "", "", "", "", f"skipped: {tally.skipped}", "", "", "")
                )
                continue
            times = tally.whole_s
            lines.append(
                (
                    name,
                    *(f"{getattr(tally, n):,}" for n in head[1:7]),
                    f"{median(times):.2f}" if times else "-",
                    f"{max(times):.2f}" if times else "-",
                    f"{median(tally.reconnect_s):.3f}" if tally.reconnect_s else "-",
                    f"{tally.rest_calls:,}",
                    str(tally.banned_calls),
                )
            )
        return "\n".join("| " + " | ".join(line) + " |" for line in _ruled(lines))


def _ruled(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [lines[0], ("---",) * len(lines[0]), *lines[1:]]


class NotWholeError(AssertionError):
    """Something is missing, doubled or wrong; the text says what."""


class _Broken(Exception):
    """The arena of a failed round: kept for a look, and not used again."""


async def run(plan: Plan, progress: Callable[[str], None]) -> Outcome:
    """Do all rounds; `progress` is told each one's fault when it begins."""
    outcome = Outcome(plan, {name: Tally() for name in plan.faults})
    waiting = list(plan.numbers())
    while waiting:
        with suppress(_Broken):
            await _in_one_arena(plan, waiting, outcome, progress)
    return outcome


def _arena_of(plan: Plan, batch: int, folder: Path) -> AbstractAsyncContextManager[Arena]:
    return arena(folder, Random(f"{plan.seed} arena {batch}"), plan.rate, plan.lines, plan.absent)


async def _in_one_arena(
    plan: Plan, waiting: list[int], outcome: Outcome, progress: Callable[[str], None]
) -> None:
    """Do the next rounds that share an arena; takes them from `waiting`."""
    folder = Path(tempfile.mkdtemp(prefix="tc-torture-"))
    folder.chmod(0o711)
    batch = waiting[0] // ROUNDS_PER_ARENA
    kept = plan.keep
    try:
        async with _arena_of(plan, batch, folder) as place:
            while waiting and waiting[0] // ROUNDS_PER_ARENA == batch:
                number = waiting.pop(0)
                name = plan.fault_of(number)
                progress(name)
                try:
                    await _round(plan, number, name, place, outcome.tallies[name])
                except Exception as exc:
                    kept = True
                    outcome.tallies[name].failed += 1
                    outcome.failures.append(_told(plan, number, name, place, exc))
                    raise _Broken from exc
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


async def _round(plan: Plan, number: int, name: str, place: Arena, tally: Tally) -> None:
    random = Random(f"{plan.seed} round {number}")
    place.mix = []
    await place.end_calm()
    before, early_before = await place.exchange.state(), await _early_upgrades(place)
    try:
        if name == MIXED:
            await _mixed(plan, place, random)
        elif name in place.skipped:
            raise Skipped(place.skipped[name])
        else:
            await FAULTS[name](place, random)
    except Skipped as skipped:
        tally.skipped = str(skipped)
        await place.begin_calm()
        return
    verdict = await judge(place, min(plan.limit_s, LIMITS_S.get(name, plan.limit_s)))
    after = await place.exchange.state()
    banned = after["rest_while_banned"] - before["rest_while_banned"]
    if banned:
        verdict.problems.append(f"{banned} REST calls while banned")
    early = await _early_upgrades(place) - early_before
    if early and not place.mix:  # in a mix it may be another daemon, or one that was killed
        verdict.problems.append(f"{early} upgrades were asked for while they were banned")
    tally.rounds += 1
    tally.banned_calls += banned
    tally.rest_calls += sum(after["rest"].values()) - sum(before["rest"].values())
    if len(place.exchanges) == 1:
        tally.reconnect_s += after["reconnect_s"][len(before["reconnect_s"]) :]
    tally.add(verdict)
    if verdict.problems:
        raise NotWholeError("\n".join(verdict.problems))
    await place.begin_calm()


async def _early_upgrades(place: Arena) -> int:
    return sum([(await host.state())["upgrades_while_banned"] for host in place.exchanges])


async def _mixed(plan: Plan, place: Arena, random: Random) -> None:
    """Let several faults happen at moments that overlap."""
    possible = [
        n for n in FAULTS if n not in place.skipped and (n in plan.faults or len(plan.faults) == 1)
    ]
    names = random.sample(possible, min(len(possible), random.randint(2, _MOST_MIXED)))
    place.mix = names

    async def one(name: str, delay_s: float, seed: float) -> None:
        await asyncio.sleep(delay_s)
        with suppress(Skipped):
            await FAULTS[name](place, Random(seed))

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(one(name, random.uniform(0, _MIX_WINDOW_S), random.random()))


def _told(plan: Plan, number: int, name: str, place: Arena, exc: Exception) -> str:
    """Say what failed, where it is to be seen, and how to repeat it."""
    text = "".join(traceback.format_exception(exc)) if not isinstance(exc, NotWholeError) else exc
    (place.folder / "failure.txt").write_text(f"{describe(place)}\n{text}")
    faults = ",".join(plan.faults)
    return (
        f"round {number} ({name}{': ' + ', '.join(place.mix) if name == MIXED else ''}): {text}\n"
        f"  logs: {place.folder}\n"
        f"  again: python -m tests.torture --seed {plan.seed} --rate {plan.rate}"
        f" --lines {','.join(map(str, plan.lines))} --faults {faults} --only {number}"
    )
