"""Draws what bench_scale and bench_memory have measured, as one picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from _scaling import Point, Scaling
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

COLOURS = {1: "#7fb3d5", 3: "#1f618d", 6: "#e67e22"}
STREAMS = {1: "1 stream a symbol", 3: "3 streams", 6: "3 streams, two lines"}
INK, FAINT, LIMIT = "#2c3e50", "#d5d8dc", "#c0392b"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#aab7b8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ecf0f1",
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
}


def draw(scaling: Scaling, path: Path) -> None:
    """Write the picture as a PNG."""
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 4, figsize=(15.5, 7.4), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
        on_empty = [one for one in scaling.points if not one.rows]
        over_symbols: Sequence[tuple[str, str, Callable[[dict[str, float]], float]]] = (
            ("Stored, saturated", "thousand trades/s", lambda m: m["stored"] / 1e3),
            (
                "Received to committed at 2,000/s",
                "ms: p99, p50 dotted",
                lambda m: m["p99_ms"],
            ),
            ("CPU of the daemon at 2,000/s", "% of a core", lambda m: m["cpu_percent"]),
            ("Memory at 2,000/s", "MiB resident", lambda m: m["rss_mib"]),
            ("A scrape of /metrics", "ms", lambda m: m["scrape_ms"]),
            ("Start to all streams subscribed", "s", lambda m: m["all_s"]),
        )
        flat = panels.flat
        for panel, (title, unit, value) in zip(flat, over_symbols, strict=False):
            panel.set_title(title)
            panel.set_ylabel(unit)
            _over_symbols(panel, on_empty, value)
            if "p99" in unit:
                _over_symbols(panel, on_empty, lambda m: m["p50_ms"], linestyle=":", marker="")
            panel.set_ylim(bottom=0)
        _limit(flat[3], 96, "96 MiB")
        _over_rows(flat[6], scaling)
        _over_time(flat[7], scaling)
        handles = [
            pyplot.Line2D([], [], color=COLOURS[one], marker="o", label=STREAMS[one])
            for one in sorted({one.streams for one in on_empty})
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
        figure.suptitle(
            "What grows with the work: symbols, streams, stored rows, time",
            x=0.01, ha="left", fontsize=13, fontweight="bold",
        )  # fmt: skip
        machine = scaling.machine
        figure.supxlabel(
            f"exchange, daemon and PostgreSQL on {machine['cores']} cores of an {machine['cpu']};"
            f" make bench-report",
            x=0.01, ha="left", fontsize=8.5, color="#7f8c8d",
        )  # fmt: skip
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)


def _over_symbols(
    panel: Any, points: Sequence[Point], value: Callable[[dict[str, float]], float], **style: Any
) -> None:
    for streams, colour in COLOURS.items():
        own = sorted((one.symbols, value(one.measures)) for one in points if one.streams == streams)
        if own:
            panel.plot(*zip(*own, strict=True), **{"color": colour, "marker": "o", **style})
    _symbols(panel, sorted({one.symbols for one in points}))


def _symbols(panel: Any, counts: Sequence[int]) -> None:
    # On an even axis a straight line is linear growth.
    panel.set_xticks(counts, ["" if count == 70 else f"{count:,}" for count in counts])
    panel.set_xlim(-30, counts[-1] * 1.05)
    panel.set_xlabel("symbols")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _limit(panel: Any, value: float, text: str) -> None:
    panel.axhline(value, color=LIMIT, linewidth=1, linestyle="--")
    panel.annotate(
        f"limit {text}", (1, value), (0, -4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="top", fontsize=8.5, color=LIMIT,
    )  # fmt: skip
    panel.set_ylim(0, value * 1.12)


def _over_rows(panel: Any, scaling: Scaling) -> None:
    points = [one for one in scaling.points if (one.symbols, one.streams) == (7, 3)]
    points.sort(key=lambda one: one.rows)
    places = range(len(points))
    bars = panel.bar(
        places, [one.measures["stored"] / 1e3 for one in points], width=0.55, color=COLOURS[3]
    )
    panel.bar_label(
        bars, [f"p99 {one.measures['p99_ms']:.0f} ms" for one in points], fontsize=8.5, padding=2
    )
    names = [f"{one.rows // 10**6} million" if one.rows else "none" for one in points]
    panel.set_xticks(places, names)
    panel.set_title("Rows stored before")
    panel.set_xlabel("rows, 7 symbols, 3 streams")
    panel.set_ylabel("thousand trades/s, saturated")
    panel.grid(axis="x", visible=False)


def _over_time(panel: Any, scaling: Scaling) -> None:
    panel.set_title("Memory at 100,000 trades/s")
    panel.set_xlabel("minutes")
    panel.set_ylabel("MiB")
    if scaling.samples:
        seconds, _, anonymous, files, _ = zip(*scaling.samples, strict=True)
        minutes = [one / 60 for one in seconds]
        panel.stackplot(minutes, anonymous, files, colors=(COLOURS[3], COLOURS[1]), linewidth=0)
        middle = minutes[len(minutes) // 2]
        for level, text in ((anonymous[-1] / 2, "the daemon's own"),
                            (anonymous[-1] + files[-1] / 2, "files: ring, programs")):  # fmt: skip
            panel.text(middle, level, text, ha="center", va="center", color="white", fontsize=8.5)
        panel.set_xlim(0, minutes[-1])
    _limit(panel, 96, "96 MiB")
