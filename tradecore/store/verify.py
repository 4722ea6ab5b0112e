"""Recounts raw_trades and holds it against the ledger: every id, exactly once, at its time.

The whole table is read once, in pieces of time of about a million rows, each sorted by id on the
server, which answers with unbroken runs of ids. What the runs and the ledger do not have in common
is the difference, to the id. All of it sees one snapshot, so that a daemon may write meanwhile.
Below the retention horizon nothing is counted: what still lies there is about to be dropped.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Literal, NamedTuple

import asyncpg

from tradecore.errors import DifferenceError, StoreError

MAX_LISTED = 1000
"""Differences that a report lists; the others are counted only."""

_ROWS_PER_PIECE = 1_000_000
_PIECE_LIMIT_S = 1800

# Rows of one run have the same trade_id - rank; equal ids have equal ranks.
_RUNS = """
SELECT symbol, min(trade_id) AS first_id, max(trade_id) AS last_id, count(*) AS rows,
       min(timestamp) AS first_time, max(timestamp) AS last_time
FROM (
    SELECT symbol, trade_id, timestamp,
           trade_id - dense_rank() OVER (PARTITION BY symbol ORDER BY trade_id) AS run
    FROM raw_trades
    WHERE timestamp >= $1 AND timestamp < $2 AND ($3::text IS NULL OR symbol = $3)
) AS ranked
GROUP BY symbol, run
"""
_REPEATED = """
SELECT trade_id FROM raw_trades
WHERE timestamp >= $1 AND timestamp < $2 AND symbol = $3 AND trade_id BETWEEN $4 AND $5
GROUP BY trade_id HAVING count(*) > 1 ORDER BY trade_id LIMIT $6
"""
# Of raw_trades as well, so that none of its days is dropped under this snapshot.
_HORIZON = """
SELECT CASE WHEN isfinite(ledger_from) THEN ledger_from END,
       (SELECT min(timestamp) FROM raw_trades WHERE timestamp >= ledger_from)
FROM store_state
"""
_LEDGER = """
SELECT symbol, first_id, last_id, first_time, last_time FROM trade_coverage
WHERE $1::text IS NULL OR symbol = $1 ORDER BY symbol, first_id
"""
_HISTORY = """
SELECT symbol, first_id, last_id, state FROM trade_gaps
WHERE state <> 'filled' AND ($1::text IS NULL OR symbol = $1) ORDER BY symbol, first_id
"""
# LATERAL with LIMIT: one look into the key for each mark, never a join that reads the table.
_WRONG_MARKS = """
SELECT m.symbol, m.trade_id FROM trade_times AS m
LEFT JOIN LATERAL (
    SELECT true AS there FROM raw_trades AS r
    WHERE r.timestamp = m.timestamp AND r.symbol = m.symbol AND r.trade_id = m.trade_id LIMIT 1
) AS r ON true
WHERE r.there IS NULL AND ($1::text IS NULL OR m.symbol = $1) ORDER BY m.symbol, m.trade_id
"""

Kind = Literal["missing", "stray", "duplicate", "time", "ledger", "history", "mark"]

_MEANING: dict[Kind, str] = {
    "missing": "in the ledger and not in raw_trades",
    "stray": "in raw_trades and not in the ledger",
    "duplicate": "in raw_trades more than once",
    "time": "first_time or last_time of the ledger is not that of the rows",
    "ledger": "ranges of trade_coverage overlap or adjoin",
    "history": "trade_gaps does not agree with trade_coverage about a hole",
    "mark": "trade_times has it at a time at which raw_trades has no such row",
}


class Span(NamedTuple):
    """The ids first_id..last_id."""

    first_id: int
    last_id: int


class _Range(NamedTuple):
    """Ids and the times of their rows: a range of the ledger, or a run of the table."""

    first_id: int
    last_id: int
    first_time: datetime
    last_time: datetime


@dataclass(frozen=True, slots=True)
class Difference:
    """Ids of one symbol for which table and ledger do not agree."""

    kind: Kind
    symbol: str
    first_id: int
    last_id: int

    def __str__(self) -> str:
        return f"{self.symbol} {self.first_id}..{self.last_id}: {_MEANING[self.kind]}"


@dataclass(frozen=True, slots=True)
class Hole:
    """Ids between two ranges of a symbol: known to be missing, hence no difference.

    What lies between two ranges is told in parts when some of it is absent and some is not.
    """

    symbol: str
    first_id: int
    last_id: int
    absent: bool
    """Proven not to exist at the venue."""


@dataclass(slots=True)
class VerifyReport:
    """What the recount found."""

    symbols: int = 0
    ranges: int = 0
    """Of the ledger."""
    expected_rows: int = 0
    """By the ledger."""
    rows: int = 0
    """In the table, from `horizon` on."""
    horizon: datetime | None = None
    """What is older is not part of the record any more; None: there is no horizon."""
    holes: list[Hole] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    """At most MAX_LISTED, by symbol and id."""
    difference_count: int = 0

    @property
    def open_holes(self) -> list[Hole]:
        """Holes whose trades may be had yet."""
        return [hole for hole in self.holes if not hole.absent]

    @property
    def absent_holes(self) -> list[Hole]:
        """Holes of which it is proven that the venue has no such trades."""
        return [hole for hole in self.holes if hole.absent]

    def raise_if_different(self) -> None:
        """Raise DifferenceError unless table and ledger agree."""
        if self.difference_count:
            raise DifferenceError(
                f"raw_trades and its ledger differ in {self.difference_count} places"
                f" ({self.rows} rows, {self.expected_rows} by the ledger);"
                f" the first: {self.differences[0]}"
            )

    def _add(self, kind: Kind, symbol: str, spans: Iterable[Span]) -> None:
        for span in spans:
            self.difference_count += 1
            if len(self.differences) < MAX_LISTED:
                self.differences.append(Difference(kind, symbol, *span))


async def verify(
    conn: asyncpg.Connection,
    *,
    symbol: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Recount raw_trades, or the rows of `symbol`, against trade_coverage; change nothing.

    `progress(counted, expected)` is called with numbers of rows after each piece. `conn` must not
    be in a transaction; it keeps one snapshot until the end. Raises StoreError when the tables are
    not there, asyncpg errors when the server goes away.
    """
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        await conn.execute(
            f"SET LOCAL statement_timeout = '{_PIECE_LIMIT_S}s'; SET LOCAL work_mem = '128MB'"
        )
        try:
            row = await conn.fetchrow(_HORIZON, timeout=_PIECE_LIMIT_S)
            ledger = await conn.fetch(_LEDGER, symbol, timeout=_PIECE_LIMIT_S)
            history = await conn.fetch(_HISTORY, symbol, timeout=_PIECE_LIMIT_S)
            marks = await conn.fetch(_WRONG_MARKS, symbol, timeout=_PIECE_LIMIT_S)
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as exc:
            raise StoreError(f"{exc}: run `tradecore migrate`") from exc
        assert row is not None
        horizon: datetime | None = row[0]
        ranges: dict[str, list[_Range]] = defaultdict(list)
        stubs: dict[str, set[int]] = defaultdict(set)
        for row in ledger:
            ranges[row["symbol"]].append(_Range(*row[1:]))
            if horizon is not None and row["first_time"] < horizon:
                stubs[row["symbol"]].add(row["first_id"])
        holes: dict[str, list[tuple[Span, bool]]] = defaultdict(list)
        for row in history:
            span = Span(row["first_id"], row["last_id"])
            holes[row["symbol"]].append((span, row["state"] == "absent"))
        report = VerifyReport(
            ranges=len(ledger),
            expected_rows=sum(row["last_id"] - row["first_id"] + 1 for row in ledger)
            - sum(map(len, stubs.values())),
            horizon=horizon,
        )
        wrong_marks: dict[str, list[Span]] = defaultdict(list)
        for row in marks:
            wrong_marks[row["symbol"]].append(Span(row["trade_id"], row["trade_id"]))
        runs, repeated = await _count(conn, symbol, _piece(ledger), report, progress)
        for name in sorted({*ranges, *runs, *holes, *wrong_marks}):
            _compare(report, name, ranges[name], stubs[name], runs[name], repeated[name])
            _compare_history(report, name, ranges[name], holes[name])
            report._add("mark", name, wrong_marks[name])
        report.symbols = len({*ranges, *runs})
        return report


def _piece(ledger: list[asyncpg.Record]) -> timedelta:
    """Return a length of time, a part of a day, that holds about _ROWS_PER_PIECE rows."""
    if not ledger:
        return timedelta(days=1)
    span = max(row["last_time"] for row in ledger) - min(row["first_time"] for row in ledger)
    rows = sum(row["last_id"] - row["first_id"] + 1 for row in ledger)
    rows_per_hour = rows / max(span / timedelta(hours=1), 1.0)
    for hours in (24, 6):
        if rows_per_hour * hours <= _ROWS_PER_PIECE:
            return timedelta(hours=hours)
    return timedelta(hours=1)


async def _count(
    conn: asyncpg.Connection,
    symbol: str | None,
    piece: timedelta,
    report: VerifyReport,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, list[_Range]], dict[str, list[Span]]]:
    """Read the table once; return its runs of ids and its repeated ids, by symbol."""
    runs: dict[str, list[_Range]] = defaultdict(list)
    repeated: dict[str, list[Span]] = defaultdict(list)
    begin = report.horizon or datetime(1970, 1, 1, tzinfo=UTC)
    while True:
        first = await conn.fetchval(
            "SELECT min(timestamp) FROM raw_trades WHERE timestamp >= $1",
            begin,
            timeout=_PIECE_LIMIT_S,
        )
        if first is None:
            return runs, repeated
        # Pieces are parts of a day, and the horizon is a midnight.
        begin = first - (first - datetime(1970, 1, 1, tzinfo=UTC)) % piece
        end = begin + piece
        suspects = []
        async for row in conn.cursor(
            _RUNS, begin, end, symbol, prefetch=10_000, timeout=_PIECE_LIMIT_S
        ):
            run = _Range(row["first_id"], row["last_id"], row["first_time"], row["last_time"])
            runs[row["symbol"]].append(run)
            report.rows += row["rows"]
            if row["rows"] > run.last_id - run.first_id + 1:
                suspects.append((row["symbol"], run.first_id, run.last_id))
        for name, first_id, last_id in suspects:
            found = await conn.fetch(
                _REPEATED, begin, end, name, first_id, last_id, MAX_LISTED, timeout=_PIECE_LIMIT_S
            )
            repeated[name] += [Span(row["trade_id"], row["trade_id"]) for row in found]
        if progress is not None:
            progress(report.rows, report.expected_rows)
        begin = end


def _compare(
    report: VerifyReport,
    symbol: str,
    ranges: list[_Range],
    stubs: set[int],
    runs: list[_Range],
    repeated: list[Span],
) -> None:
    """Report how the runs of one symbol differ from its ranges.

    `stubs`: ids at which a range begins and that have no row any more, by retention.
    """
    runs.sort()
    repeated += _overlaps(runs)
    report._add("ledger", symbol, _touching(ranges))
    ranges = [
        one._replace(first_id=one.first_id + (one.first_id in stubs))
        for one in ranges
        if one.first_id not in stubs or one.first_id < one.last_id
    ]
    stored, covered = _merge(runs), _merge(ranges)
    report._add("duplicate", symbol, _merge(sorted(repeated)))
    report._add("missing", symbol, _subtract(covered, stored))
    report._add("stray", symbol, _subtract(stored, covered))
    report._add("time", symbol, _wrong_times(ranges, runs, report.horizon))


def _merge(ranges: Iterable[_Range | Span]) -> list[Span]:
    """Join what overlaps or adjoins in sorted ranges."""
    merged: list[Span] = []
    for item in ranges:
        if merged and item.first_id <= merged[-1].last_id + 1:
            last_id = max(merged[-1].last_id, item.last_id)
            merged[-1] = Span(merged[-1].first_id, last_id)
        else:
            merged.append(Span(item.first_id, item.last_id))
    return merged


def _overlaps(ranges: Iterable[_Range | Span]) -> list[Span]:
    """Return the ids that lie in more than one of the sorted ranges."""
    found: list[Span] = []
    reached: int | None = None
    for item in ranges:
        if reached is not None and item.first_id <= reached:
            found.append(Span(item.first_id, min(item.last_id, reached)))
        reached = item.last_id if reached is None else max(reached, item.last_id)
    return found


def _touching(ranges: list[_Range]) -> list[Span]:
    """Return the ranges of the ledger that should have been one with the range before."""
    found: list[Span] = []
    for below, above in pairwise(ranges):
        if above.first_id <= below.last_id + 1:
            found.append(Span(above.first_id, above.last_id))
    return found


def _subtract(spans: list[Span], others: list[Span]) -> list[Span]:
    """Return the ids of `spans` that are not in `others`; both sorted and disjoint."""
    left: list[Span] = []
    at = 0
    for first_id, last_id in spans:
        while at < len(others) and others[at].last_id < first_id:
            at += 1
        look = at
        while look < len(others) and others[look].first_id <= last_id:
            if first_id < others[look].first_id:
                left.append(Span(first_id, others[look].first_id - 1))
            first_id = others[look].last_id + 1
            look += 1
        if first_id <= last_id:
            left.append(Span(first_id, last_id))
    return left


def _wrong_times(ranges: list[_Range], runs: list[_Range], horizon: datetime | None) -> list[Span]:
    """Return the ranges whose times are not the least and greatest of their rows.

    A range that lacks rows is left out: it is reported for that. The first time of one that begins
    below the horizon is that of a row which is gone.
    """
    wrong: list[Span] = []
    at = 0
    for item in ranges:
        while at < len(runs) and runs[at].first_id < item.first_id:
            at += 1
        inside = []
        while at < len(runs) and runs[at].last_id <= item.last_id:
            inside.append(runs[at])
            at += 1
        rows = sum(run.last_id - run.first_id + 1 for run in inside)
        if rows == item.last_id - item.first_id + 1:
            first_time = min(run.first_time for run in inside)
            if horizon is not None and item.first_time < horizon:
                first_time = item.first_time
            last_time = max(run.last_time for run in inside)
            if (first_time, last_time) != (item.first_time, item.last_time):
                wrong.append(Span(item.first_id, item.last_id))
    return wrong


def _compare_history(
    report: VerifyReport, symbol: str, ranges: list[_Range], history: list[tuple[Span, bool]]
) -> None:
    """List the holes of one symbol; report those that trade_gaps does not know, or invents."""
    covered = _merge(ranges)
    holes = [Span(a.last_id + 1, b.first_id - 1) for a, b in pairwise(covered)]
    told = _merge(span for span, _ in history)
    absent = _merge(span for span, is_absent in history if is_absent)
    still_open = _subtract(holes, absent)
    parts = [(span, False) for span in still_open]
    parts += [(span, True) for span in _subtract(holes, still_open)]
    report.holes += [Hole(symbol, *span, absent=is_absent) for span, is_absent in sorted(parts)]
    report._add("history", symbol, _merge(_overlaps(span for span, _ in history)))
    report._add("history", symbol, _subtract(holes, told))
    invented = _subtract(told, _subtract(told, covered))
    report._add("history", symbol, invented)
