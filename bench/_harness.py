"""What all benches share: cases, figures, the machine's fingerprint, the table, JSON lines.

A figure is the median of several repeats and stands beside a baseline of the same run: a ratio
travels from one machine to another, a wall-clock figure does not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGES = ("numpy", "orjson", "picows", "uvloop", "asyncpg")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. `ratio` tells how many times better it is than the baseline's."""

    bench: str
    subject: str
    value: float
    low: float
    high: float
    repeats: int
    unit: str
    baseline: str = ""
    ratio: float | None = None
    limit: float | None = None
    """Target for `value`: at least for rates (units that end in /s), at most for all else."""
    ratio_least: float | None = None

    @property
    def rate(self) -> bool:
        """Whether more is better."""
        return self.unit.endswith("/s")

    @property
    def met(self) -> bool | None:
        """Whether the targets are met; None when there is none."""
        checks = []
        if self.limit is not None:
            checks.append(self.value >= self.limit if self.rate else self.value <= self.limit)
        if self.ratio_least is not None:
            checks.append(self.ratio is not None and self.ratio >= self.ratio_least)
        return all(checks) if checks else None


Prepared = tuple[Callable[[], object], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small bench.

    `prepare(folder)` proves that the work is right and returns (setup of a repeat, work).
    """

    bench: str
    subject: str
    items: int
    unit: str
    prepare: Callable[[Path], Prepared]
    baseline: str = ""
    limit: float | None = None
    ratio_least: float | None = None
    repeats: int = 15


def figure(
    bench: str, subject: str, values: Sequence[float], unit: str, **rest: float | str | None
) -> Figure:
    """Return the figure of several repeats."""
    return Figure(
        bench=bench,
        subject=subject,
        value=median(values),
        low=min(values),
        high=max(values),
        repeats=len(values),
        unit=unit,
        **rest,  # type: ignore[arg-type]
    )


def with_ratios(figures: Iterable[Figure]) -> list[Figure]:
    """Return the figures with the ratio to their baseline, found by bench and subject."""
    figures = list(figures)
    by_subject = {(f.bench, f.subject): f for f in figures}
    done = []
    for f in figures:
        if base := by_subject.get((f.bench, f.baseline)):
            better, worse = (f.value, base.value) if f.rate else (base.value, f.value)
            f = replace(f, ratio=better / worse)
        done.append(f)
    return done


def run_small(benches: Sequence[str]) -> list[Figure]:
    """Time the cases of `test_bench_small.py` with pytest-benchmark and return their figures."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", HERE / "test_bench_small.py"),
                *("-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", " or ".join(benches)),
                *("--benchmark-only", f"--benchmark-json={result}"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise SystemExit(f"small benches failed:\n{done.stdout}{done.stderr}")
        benchmarks = json.loads(result.read_text())["benchmarks"]
    return [
        figure(values=[seconds * 1e9 / info["items"] for seconds in b["stats"]["data"]], **rest)
        for b in benchmarks
        for info in [b["extra_info"]]
        for rest in [{key: value for key, value in info.items() if key != "items"}]
    ]


def fingerprint() -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "load_before": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit or "none",
        **{name: version(name) for name in PACKAGES},
    }


def print_table(figures: Sequence[Figure], machine: dict[str, str]) -> None:
    """Print all figures as one table."""
    head = ("bench", "subject", "median", "min .. max", "unit", "ratio", "target", "")
    print_rows([head, *(_cells(f) for f in figures)], right={2, 3, 5})
    if baselines := _baselines(figures):
        print("\nratio: times better than " + "; ".join(baselines))
    print_machine(machine)


def print_rows(rows: Sequence[Sequence[str]], right: set[int]) -> None:
    """Print rows of texts, the head first; columns `right` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def print_machine(machine: dict[str, str]) -> None:
    """Print what the figures depend on."""
    print("machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()))


def _cells(f: Figure) -> tuple[str, ...]:
    target = []
    if f.limit is not None:
        target.append(f"{'>=' if f.rate else '<='} {_number(f.limit)}")
    if f.ratio_least is not None:
        target.append(f"ratio >= {_number(f.ratio_least)}")
    spread = f"{_number(f.low)} .. {_number(f.high)}" if f.repeats > 1 else ""
    return (
        f.bench,
        f.subject,
        _number(f.value),
        spread,
        f.unit,
        "" if f.ratio is None else f"{f.ratio:.3g}x",
        ", ".join(target),
        {None: "", True: "met", False: "MISSED"}[f.met],
    )


def _baselines(figures: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(f"{f.baseline} ({f.bench})" for f in figures if f.ratio is not None))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def report(figures: Sequence[Figure], json_path: Path | None) -> int:
    """Print the table, append JSON lines if wanted; return 1 when a target is missed, else 0."""
    machine = fingerprint()
    figures = with_ratios(figures)
    print_table(figures, machine)
    append_json(figures, json_path, machine)
    return int(any(f.met is False for f in figures))


def append_json(figures: Sequence[Figure], json_path: Path | None, machine: dict[str, str]) -> None:
    """Append the figures to a file as JSON lines, if one is given."""
    if json_path is not None:
        with json_path.open("a") as out:
            for f in figures:
                out.write(json.dumps({**asdict(f), "met": f.met, "machine": machine}) + "\n")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the parser with the options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="append the figures to this file as JSON lines")
    return parser


def main_small(bench: str, description: str | None) -> int:
    """Run one small bench from its own command line."""
    return report(run_small([bench]), arguments(description).parse_args().json)
