"""TimescaleDB's own jobs: the policies that stand in for the daemon, and whether they work.

Only the community edition has them. A server may report every run as failed although its work was
done (SQLSTATE 24000 on the PostgreSQL releases of November 2026), or have no scheduler that runs at
all; so what a job is for is never believed to be done because there is a job.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

import asyncpg

from tradecore.store.chunks import TABLES, Server

SPARE = timedelta(days=2)
"""So much later than RETENTION the server drops trades by itself, while no daemon does it."""

_STALLED = timedelta(minutes=15)
_RAN_ALL_THE_SAME = "24000"
_SHOWN = 3

_ORDER = {"raw_trades": "timestamp, trade_id", "tickers": "timestamp"}

# What exists is compared as intervals: the text of a config depends on who wrote it.
_POLICIES = """
SELECT j.job_id, j.hypertable_name AS table, j.proc_name AS proc,
       (j.config ->> CASE j.proc_name WHEN 'policy_retention' THEN 'drop_after'
                     ELSE 'compress_after' END)::interval AS after
FROM timescaledb_information.jobs AS j
WHERE j.hypertable_schema = current_schema() AND j.hypertable_name = ANY($1::text[])
  AND j.proc_name IN ('policy_retention', 'policy_compression')
"""
_COMPRESSION_IS_ON = """
SELECT compression_enabled FROM timescaledb_information.hypertables
WHERE hypertable_schema = current_schema() AND hypertable_name = $1::text
"""

_JOBS = """
SELECT j.job_id, j.proc_name, coalesce(v.view_name, j.hypertable_name)::text AS of, j.scheduled,
       s.last_run_status AS status, s.job_status = 'Running' AS running,
       coalesce(s.next_start, j.next_start) AS next_start, s.total_failures AS failures,
       e.sqlerrcode, e.err_message, clock_timestamp() AS now
FROM timescaledb_information.jobs AS j
LEFT JOIN timescaledb_information.continuous_aggregates AS v
    ON v.materialization_hypertable_schema = j.hypertable_schema
   AND v.materialization_hypertable_name = j.hypertable_name
LEFT JOIN timescaledb_information.job_stats AS s ON s.job_id = j.job_id
LEFT JOIN LATERAL (
    SELECT sqlerrcode, err_message FROM timescaledb_information.job_errors
    WHERE job_id = j.job_id ORDER BY start_time DESC LIMIT 1
) AS e ON s.last_run_status = 'Failed'
WHERE j.proc_name LIKE 'policy\\_%' AND (
    j.hypertable_schema = current_schema() AND (
        j.hypertable_name = ANY($1::text[]) OR j.hypertable_name LIKE 'candles\\_%')
    OR v.view_schema = current_schema() AND v.view_name LIKE 'candles\\_%')
ORDER BY j.proc_name = 'policy_refresh_continuous_aggregate', j.job_id
"""

JobState = Literal["ok", "waiting", "failed", "stalled", "paused"]
JOB_STATES: tuple[JobState, ...] = ("ok", "waiting", "failed", "stalled", "paused")


class Job(NamedTuple):
    """One policy of ours."""

    name: str
    """What it does and to what, such as "compression of raw_trades"."""
    state: JobState
    """waiting: it has not run yet, as where there is no scheduler; stalled: its time has come and
    gone; paused: somebody says so."""
    failures: int
    error: str
    """Of its last run, "" when that did not fail."""
    sqlstate: str = ""

    @property
    def did_run(self) -> bool:
        """Whether it did its work although it is reported as failed."""
        return self.sqlstate == _RAN_ALL_THE_SAME


@dataclass(frozen=True, slots=True)
class JobHealth:
    """All policies of ours."""

    jobs: tuple[Job, ...] = ()

    @property
    def states(self) -> dict[str, int]:
        """How many are in each state."""
        counts = Counter(job.state for job in self.jobs)
        return {state: counts[state] for state in JOB_STATES}

    @property
    def failures(self) -> int:
        """Failed runs, by the server's count."""
        return sum(job.failures for job in self.jobs)

    def works(self, kind: str) -> bool:
        """Tell whether the jobs for one thing ("compression", "retention") can be relied on."""
        those = [job for job in self.jobs if job.name.startswith(kind)]
        return bool(those) and all(job.state == "ok" for job in those)

    @property
    def trouble(self) -> str:
        """What is wrong, in a sentence; "" when nothing is."""
        parts = []
        if failed := [job for job in self.jobs if job.state == "failed"]:
            names = ", ".join(job.name for job in failed[:_SHOWN])
            if len(failed) > _SHOWN:
                names += f" and {len(failed) - _SHOWN} more"
            ran = ", although they ran" if all(job.did_run for job in failed) else ""
            parts.append(
                f"Jobs of TimescaleDB are reported as failed{ran}: {names} ({failed[0].error})"
            )
        if stalled := [job for job in self.jobs if job.state == "stalled"]:
            parts.append(
                f"{len(stalled)} jobs of TimescaleDB do not run, {stalled[0].name} first"
                " (timescaledb.max_background_workers, or no scheduler)"
            )
        return "; ".join(parts)


async def health(conn: asyncpg.Connection, server: Server) -> JobHealth:
    """Look at the policies. Raises asyncpg errors."""
    if server.level != "community":
        return JobHealth()
    return JobHealth(tuple(map(_job, await conn.fetch(_JOBS, TABLES))))


def _job(row: asyncpg.Record) -> Job:
    kind = row["proc_name"].removeprefix("policy_").replace("_continuous_aggregate", "")
    return Job(
        f"{kind} of {row['of']}",
        _state_of(row),
        row["failures"] or 0,
        f"{row['err_message']}, SQLSTATE {row['sqlerrcode']}" if row["err_message"] else "",
        row["sqlerrcode"] or "",
    )


def _state_of(row: asyncpg.Record) -> JobState:
    if not row["scheduled"]:
        return "paused"
    if row["status"] == "Failed":
        return "failed"
    due: datetime | None = row["next_start"]
    if due is None or row["status"] is None:
        return "waiting"
    # asyncpg gives -infinity, as of a job that is to run at once, as the least datetime there is.
    if not row["running"] and due.year > 1 and due < row["now"] - _STALLED:
        return "stalled"
    return "ok"


async def enable_compression(conn: asyncpg.Connection, server: Server) -> None:
    """Let chunks be compressed: by symbol, in the order of time. Raises asyncpg errors."""
    for table, order in _ORDER.items():
        if not await conn.fetchval(_COMPRESSION_IS_ON, table):
            await conn.execute(
                f"ALTER TABLE {table} SET (timescaledb.compress,"
                f" timescaledb.compress_segmentby = 'symbol',"
                f" timescaledb.compress_orderby = '{order}')"
            )


async def set_policies(
    conn: asyncpg.Connection,
    server: Server,
    *,
    retention: timedelta | None,
    compress_after: timedelta | None,
    caught_up: bool,
) -> list[str]:
    """Bring the server's policies up to what the settings say; None: none. Return what changed.

    Until the horizon is where `retention` puts it (`caught_up`) no policy may drop more than it
    did: those would be trades whose candles are not computed and that the ledger holds.
    """
    there = {(row["table"], row["proc"]): row for row in await conn.fetch(_POLICIES, TABLES)}
    changed = []
    for table in TABLES:
        drop_after = retention + SPARE if retention is not None else None
        for proc, after in (
            ("policy_retention", drop_after),
            ("policy_compression", compress_after),
        ):
            found = there.get((table, proc))
            if after == (found["after"] if found else None):
                continue
            kind = proc.removeprefix("policy_")
            sooner = after is not None and (found is None or after < found["after"])
            if kind == "retention" and sooner and not caught_up:
                continue
            if found:
                await conn.execute(
                    f"SELECT {server.schema}.remove_{kind}_policy('{table}'::regclass)"
                )
            if after is not None:
                await conn.execute(
                    f"SELECT {server.schema}.add_{kind}_policy('{table}'::regclass, $1::interval)",
                    after,
                )
            changed.append(f"{kind} of {table}: {after or 'off'}")
    return changed
