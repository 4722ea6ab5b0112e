"""The exposition of a snapshot for Prometheus: its plain text 0.0.4, or OpenMetrics 1.0.

The tests read it with prometheus_client. To write it, that takes five times as long and 3 MiB of
an idle daemon's memory.
"""

from collections.abc import Iterator
from functools import lru_cache

from tradecore.http.accept import choices
from tradecore.metric_table import METRICS, Metric
from tradecore.snapshot import Histogram, Snapshot

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_PIECE_LINES = 1000  # at least, and one metric more

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def content_type(accept: str) -> str:
    """Return OPENMETRICS for an Accept header that wants it as much as plain text, else PLAIN."""
    wanted: dict[str, float] = {}
    for name, parameters, weight in choices(accept):
        if parameters.get("version", "1.0.0") == "1.0.0" or name == "text/plain":
            wanted[name] = max(weight, wanted.get(name, 0.0))
    openmetrics = wanted.get("application/openmetrics-text", 0.0)
    plain = next((wanted[name] for name in ("text/plain", "text/*", "*/*") if name in wanted), 0.0)
    return OPENMETRICS if 0.0 < openmetrics >= plain else PLAIN


def render(snapshot: Snapshot, content_type: str = PLAIN) -> bytes:
    """Return the exposition of a snapshot in the form of `content_type`."""
    return b"".join(pieces(snapshot, content_type))


def pieces(snapshot: Snapshot, content_type: str = PLAIN) -> Iterator[bytes]:
    """Yield it in pieces, of which none takes long to make."""
    openmetrics = content_type == OPENMETRICS
    lines: list[str] = []
    for metric in METRICS:
        if len(lines) >= _PIECE_LINES:
            yield _encoded(lines)
            lines = []
        # OpenMetrics names the family of a counter without the ending of its samples.
        family = metric.name.removesuffix("_total") if openmetrics else metric.name
        lines.append(f"# HELP {family} {metric.help}\n# TYPE {family} {metric.type}\n")
        lines += _samples(metric, snapshot)
    if openmetrics:
        lines.append("# EOF\n")
    yield _encoded(lines)


def _encoded(lines: list[str]) -> bytes:
    return "".join(lines).replace(" inf\n", " +Inf\n").encode()


def _samples(metric: Metric, snapshot: Snapshot) -> list[str]:
    name, names, value = metric.name, metric.labels, metric.read(snapshot)
    if isinstance(value, Histogram):
        return list(_buckets(name, value))
    if isinstance(value, int | float):
        return [f"{name} {value!r}\n"]
    return [f"{name}{_labels(names, labels)} {number!r}\n" for labels, number in value]


def _buckets(name: str, histogram: Histogram) -> Iterator[str]:
    seen = 0
    for bound, count in zip((*map(float, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        seen += count
        yield f'{name}_bucket{{le="{bound}"}} {seen}\n'
    yield f"{name}_count {seen}\n{name}_sum {histogram.sum!r}\n"


@lru_cache(8192)  # three for each symbol are the most of an exposition
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    if not values:
        return ""
    pairs = zip(names, values, strict=True)
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in pairs) + "}"
