"""Writes docs/metrics.md and docs/settings.md from the tables in the code: `make docs`.

With `--check` nothing is written; the exit code is 1 where a file is not what it would be.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tradecore.metric_table import GROUPS, Metric
from tradecore.roster import CHANGEABLE
from tradecore.settings import VARIABLES, Variable

DOCS = Path(__file__).parents[1] / "docs"

_METRICS = """\
# Metrics

`/metrics` answers in the plain text format or, where the scraper asks for it, in OpenMetrics. It
needs no token. [deploy/prometheus](../deploy/prometheus) has a configuration, rules and alerts,
[deploy/grafana](../deploy/grafana) a dashboard, and [runbook.md](runbook.md) says what to do about
each alert.

Counters begin at zero with each start of the daemon, so ask for `rate` or `increase`. Times are
seconds since 1970: their age is `time() - …`. A histogram `x` has the series `x_bucket`, `x_sum`
and `x_count`. What is said of holes, unproven minutes and days of tables is true of the database,
and each of its daemons shows it, so take the `max`. Ages and rates of candles and of retention
belong to the one daemon that does the work.
"""

_SETTINGS = """\
# Settings

Environment variables; each has a default that works. `tradecore check` tests them against the
machine, and a start that finds something wrong lists all of it and what would be right. An empty
value counts as unset. A name that looks like a misspelt one of these is an error.

`SETTINGS_FILE` names a file of lines `NAME=value`, as systemd reads them, which win over the
environment; any other name in it is an error. SIGHUP reads it again: a running daemon follows
{changeable};
for everything else it says in the log that a restart is needed.

Secrets are {secrets}. Each is given as `NAME`, as `NAME_FILE` with the
path of a file, or as a systemd credential called `NAME` or `name` (`LoadCredential=name:path`), or
`tradecore_name`, as systemd calls the file `name` of a folder (`LoadCredential=tradecore:folder`).
They are shown in no log, no answer and no error. Keep them off command lines.

Durations have a unit: `90s`, `15 min`, `24h`, `7 days`, `2 years`.
"""

_SECTIONS: Mapping[str, str] = {
    "What is recorded": "SUPPORTED_SYMBOLS STREAMS FEED_LINES BACKFILL_MAX_AGE",
    "Where it is stored": "DATABASE_URL DATA_DIR RETENTION COMPRESS_AFTER AUTO_MIGRATE"
    " DB_POOL_SIZE",
    "The venue": "BINANCE_WEBSOCKET_URL BINANCE_REST_URL BINANCE_DUMP_URL RECONNECT_DELAY"
    " MAX_RECONNECT_DELAY CONNECTION_MAX_AGE",
    "Ring and flushes": "RING_CAPACITY BATCH_SIZE BATCH_TIMEOUT",
    "Several daemons of one database": "SHARDS NODE_NAME",
    "Health, metrics and market data over HTTP": "HTTP_HOST HTTP_PORT HTTP_HOSTS HTTP_TOKEN"
    " HTTP_AUTH CORS_ORIGINS",
    "Redis": "REDIS_URL REDIS_TRADES",
    "Log and the settings themselves": "LOG_LEVEL LOG_FORMAT SETTINGS_FILE",
}

_NONSENSE = "!?"


def metrics() -> str:
    """Return the page of all metrics."""
    parts = [_METRICS]
    for title, group in GROUPS.items():
        parts.append(f"\n## {title}\n\n")
        parts.append(_table("metric type labels meaning", map(_metric_row, group)))
    return _generated("tradecore/metric_table.py", "".join(parts))


def _metric_row(metric: Metric) -> list[str]:
    return [
        f"`{metric.name}`",
        metric.type,
        ", ".join(f"`{label}`" for label in metric.labels),
        metric.help,
    ]


def settings() -> str:
    """Return the page of all settings. Raises LookupError when one belongs to no section."""
    known = {variable.name: variable for variable in VARIABLES.values()}
    listed = " ".join(_SECTIONS.values()).split()
    if homeless := known.keys() - set(listed):
        raise LookupError(f"name the section of {', '.join(sorted(homeless))} in tools/docs.py")
    changeable = " and ".join(f"`{VARIABLES[name].name}`" for name in CHANGEABLE)
    secrets = ", ".join(f"`{one.name}`" for one in known.values() if one.secret)
    parts = [_SETTINGS.format(changeable=changeable, secrets=secrets)]
    for title, names in _SECTIONS.items():
        rows = [_setting_row(known[name]) for name in names.split()]
        parts += [f"\n## {title}\n\n", _table("variable default accepts meaning", rows)]
    return _generated("tradecore/settings.py", "".join(parts))


def _setting_row(variable: Variable) -> list[str]:
    default = variable.default.replace(",", ", ")
    secret = " (a secret)" if variable.secret else ""
    return [
        f"`{variable.name}`",
        f"`{default}`" if default else "unset",
        accepted(variable),
        f"{variable.meaning}{secret}",
    ]


def accepted(variable: Variable) -> str:
    """Return what a variable takes, as its own refusal of nonsense says it."""
    try:
        variable.parse(_NONSENSE)
    except ValueError as error:
        text = str(error)
    else:
        return "a path"
    text = text.partition("; ")[2] or text  # after what was wrong with it
    for lead in (f"{_NONSENSE!r} is none of ", "give one of ", "give ", "name each one, as in "):
        text = text.removeprefix(lead)
    return text


def _table(head: str, rows: Iterable[list[str]]) -> str:
    lines = [head.split(), ["---"] * len(head.split()), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines
    )


def _generated(source: str, text: str) -> str:
    return f"<!-- Written by `make docs` from {source}: change that. -->\n\n{text}"


PAGES = {"metrics.md": metrics, "settings.md": settings}


def main(check: bool) -> int:
    """Write the pages, or compare them; return the exit code."""
    stale = 0
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.exists() or path.read_text() != text:
            stale = 1
            if check:
                print(f"docs/{name} is not what the code says: run make docs", file=sys.stderr)
            else:
                path.write_text(text)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
