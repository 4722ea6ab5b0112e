"""What bench_scale has measured: its points, as tables in Markdown and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _harness import HERE, Figure, fingerprint

SAVED = HERE / "scaling.json"
"""Where the last run left what it has measured."""

MEASURES = {
    "stored": ("stored, saturated", "trades/s"),
    "cpu_us": ("CPU of the daemon then", "µs/trade"),
    "peak_mib": ("memory then, at most", "MiB"),
    "p50_ms": ("received to committed at 2,000/s, p50", "ms"),
    "p99_ms": ("the same, p99", "ms"),
    "cpu_percent": ("CPU of the daemon then", "% of a core"),
    "rss_mib": ("memory then", "MiB"),
    "scrape_ms": ("a scrape of /metrics", "ms"),
    "scrape_kib": ("its size", "KiB"),
    "ready_s": ("start to ready", "s"),
    "all_s": ("start to all streams subscribed", "s"),
}
"""By key: name and unit, in the order of the tables."""


TITLES = {
    1: "1 stream a symbol (trade)",
    3: "3 streams a symbol (trade, ticker, kline_1m)",
    6: "the 3 streams over two lines",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One daemon: what it captured, what was stored before, and what that cost."""

    symbols: int
    streams: int
    """Subscriptions of a symbol."""
    rows: int = 0
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Scaling:
    """All that one run has measured."""

    machine: dict[str, str] = field(default_factory=fingerprint)
    points: list[Point] = field(default_factory=list)
    memory: list[tuple[str, str, str]] = field(default_factory=list)
    """What, how much, at most how much."""
    samples: list[tuple[float, ...]] = field(default_factory=list)
    """Of the steady load: seconds, MiB resident, anonymous, of files, shared."""

    def save(self, path: Path = SAVED) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path = SAVED) -> "Scaling":
        """Read what `save` wrote; nothing when there is no such file."""
        if not path.exists():
            return cls()
        found: dict[str, Any] = json.loads(path.read_text())
        found["points"] = [Point(**one) for one in found["points"]]
        return cls(**found)

    def add_points(self, other: "Scaling") -> None:
        """Take the points of another run in place of those of the same work."""
        points = {(one.rows, one.streams, one.symbols): one for one in self.points}
        points |= {(one.rows, one.streams, one.symbols): one for one in other.points}
        self.points = [points[key] for key in sorted(points)]
        self.machine = other.machine

    def add_memory(self, figures: Sequence[Figure], samples: Sequence[tuple[float, ...]]) -> None:
        """Take what bench_memory has measured."""
        self.memory = [
            (
                f"{one.bench}: {one.subject}",
                f"{_number(one.value)} {one.unit}",
                "" if one.limit is None else f"{_number(one.limit)} {one.unit}",
            )
            for one in figures
        ]
        self.samples = [tuple(round(value, 2) for value in one) for one in samples]

    def markdown(self) -> str:
        """Return the tables."""
        by_symbols = sorted(
            (one for one in self.points if not one.rows), key=lambda one: (one.streams, one.symbols)
        )
        tables = []
        for streams in dict.fromkeys(one.streams for one in by_symbols):
            points = [one for one in by_symbols if one.streams == streams]
            heads = [f"{one.symbols:,} symbols" for one in points]
            tables.append(_table(TITLES[streams], heads, points))
        seven = [one for one in self.points if (one.symbols, one.streams) == (7, 3)]
        heads = [f"{one.rows:,} rows" if one.rows else "empty tables" for one in seven]
        if len(seven) > 1:
            tables.append(_table("7 symbols, 3 streams each", heads, seven))
        if self.memory:
            rows = ["| memory | | target |", "| --- | ---: | ---: |"]
            tables.append("\n".join([*rows, *(f"| {' | '.join(one)} |" for one in self.memory)]))
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n\n".join([*tables, f"Machine: {machine}."])


def _table(title: str, heads: Sequence[str], points: Sequence[Point]) -> str:
    lines = [f"| {title} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for key, (name, unit) in MEASURES.items():
        values = [f"{_number(one.measures[key])} {unit}" for one in points]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Print three digits."""
    if value >= 1000:
        digits = max(0, len(str(round(value))) - 3)
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
