"""TimescaleDB's own jobs: what stands in for the daemon, and whether it works.

Only the community edition has them. A server may report every run as failed although its work was
done (SQLSTATE 24000 on the PostgreSQL releases of November 2026), or have no scheduler that runs at
all; so what a job is for is never believed to be done because there is a job.
"""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

import asyncpg

from tradecore.store.candles import WIDTHS
from tradecore.store.chunks import TABLES, Server

_STALLED = timedelta(minutes=15)
_RAN_ALL_THE_SAME = "24000"
_SHOWN = 3

_ORDER = {"raw_trades": "timestamp, trade_id", "tickers": "timestamp"}

DROPPER = "tradecore_drop_expired"
"""Our procedure that drops what the ledger has given up, while no daemon does it."""
_DROP_EVERY = timedelta(hours=1)

# What exists is compared as intervals: the text of a config depends on who wrote it.
_POLICIES = """
SELECT j.hypertable_name AS table, j.proc_name AS proc,
       (j.config ->> 'compress_after')::interval AS after
FROM timescaledb_information.jobs AS j
WHERE j.hypertable_schema = current_schema() AND j.hypertable_name = ANY($1::text[])
  AND j.proc_name IN ('policy_retention', 'policy_compression')
"""
_DROPPERS = f"""
SELECT job_id, schedule_interval = $2::interval
       AND config = $1::jsonb || jsonb_build_object('schema', current_schema()) AS right
FROM timescaledb_information.jobs
WHERE proc_schema = current_schema() AND proc_name = '{DROPPER}'
"""
_ADD_DROPPER = f"""
SELECT {{schema}}.add_job(format('%I.{DROPPER}', current_schema())::regproc, $2::interval,
                        config => $1::jsonb || jsonb_build_object('schema', current_schema()))
"""
_EXTENSION = """
SELECT n.nspname FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace
WHERE e.extname = 'timescaledb'
"""
# Some versions name the view, others the hypertable behind it.
_REFRESHED = """
SELECT coalesce(v.view_name, j.hypertable_name)::text
FROM timescaledb_information.jobs AS j
LEFT JOIN timescaledb_information.continuous_aggregates AS v
    ON v.materialization_hypertable_schema = j.hypertable_schema
   AND v.materialization_hypertable_name = j.hypertable_name
WHERE coalesce(v.view_schema, j.hypertable_schema) = current_schema()
  AND j.proc_name = 'policy_refresh_continuous_aggregate'
"""

# By width: how far a refresh goes back, up to how long ago, how often. None reaches below the
# horizon, the last midnight of a day ago: only one whole day, yesterday, lies in two days.
_REFRESH = {
    "1m": ("2 hours", "1 minute", "1 minute"),
    "5m": ("3 hours", "5 minutes", "5 minutes"),
    "15m": ("4 hours", "15 minutes", "15 minutes"),
    "1h": ("12 hours", "1 hour", "1 hour"),
    "4h": ("20 hours", "4 hours", "4 hours"),
    "1d": ("2 days", "0 days", "1 day"),
}
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
   OR j.proc_schema = current_schema() AND j.proc_name = $2
ORDER BY j.proc_name = 'policy_refresh_continuous_aggregate', j.job_id
"""

JobState = Literal["ok", "waiting", "failed", "stalled", "paused"]
JOB_STATES: tuple[JobState, ...] = ("ok", "waiting", "failed", "stalled", "paused")


class Job(NamedTuple):
    """One policy or job of ours."""

    name: str
    """What it does and to what, such as "compression of raw_trades", or "retention"."""
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
    """All policies and jobs of ours."""

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
    return JobHealth(tuple(map(_job, await conn.fetch(_JOBS, TABLES, DROPPER))))


def _job(row: asyncpg.Record) -> Job:
    kind = row["proc_name"].removeprefix("policy_").replace("_continuous_aggregate", "")
    return Job(
        "retention" if kind == DROPPER else f"{kind} of {row['of']}",
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
    retention: bool,
    compress_after: timedelta | None,
    computed: bool,
) -> list[str]:
    """Bring the server's jobs up to what the settings say; None: none. Return what changed.

    Nothing drops by age: a policy of retention knows neither the ledger nor what candles are still
    to be computed. Our own job drops what the ledger has given up. Candles are refreshed by
    policies once all of them are `computed`: before that, a wider one would be computed from trades
    down to its begin, also where these are gone.
    """
    changed = []
    there = {(row["table"], row["proc"]): row for row in await conn.fetch(_POLICIES, TABLES)}
    for table in TABLES:
        for proc, after in (("policy_retention", None), ("policy_compression", compress_after)):
            found = there.get((table, proc))
            kind = proc.removeprefix("policy_")
            if found and (after is None or after != found["after"]):
                await conn.execute(
                    f"SELECT {server.schema}.remove_{kind}_policy('{table}'::regclass)"
                )
            elif after is None or found:
                continue
            if after is not None:
                await conn.execute(
                    f"SELECT {server.schema}.add_{kind}_policy('{table}'::regclass, $1::interval)",
                    after,
                )
            changed.append(f"{kind} of {table}: {after or 'off'}")
    changed += await _set_dropper(conn, server, wanted=retention)
    if computed:
        changed += await _add_refreshes(conn, server)
    return changed


async def _set_dropper(conn: asyncpg.Connection, server: Server, *, wanted: bool) -> list[str]:
    config = json.dumps({"extension": await conn.fetchval(_EXTENSION)})
    found = await conn.fetch(_DROPPERS, config, _DROP_EVERY)
    if wanted and [row["right"] for row in found] == [True]:
        return []
    for row in found:
        await conn.execute(f"SELECT {server.schema}.delete_job($1::int)", row["job_id"])
    if wanted:
        await conn.execute(_ADD_DROPPER.format(schema=server.schema), config, _DROP_EVERY)
        return [f"retention: each {_DROP_EVERY}"]
    return ["retention: off"] if found else []


async def _add_refreshes(conn: asyncpg.Connection, server: Server) -> list[str]:
    there = {name for (name,) in await conn.fetch(_REFRESHED)}
    missing = [width for width in WIDTHS if f"candles_{width}" not in there]
    for width in missing:
        start, end, every = _REFRESH[width]
        await conn.execute(
            f"SELECT {server.schema}.add_continuous_aggregate_policy('candles_{width}'::regclass,"
            f" start_offset => interval '{start}', end_offset => interval '{end}',"
            f" schedule_interval => interval '{every}')"
        )
    return [f"refresh of candles_{width}: on" for width in missing]
