"""Judges a snapshot: what is wrong, how bad it is, and the JSON that the health routes answer.

`assess` looks at what capture does now. What happened once (holes, rows parked an hour ago, refused
frames) is shown as numbers and left to alerts: a hole of last week must not make a good daemon look
sick.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

from tradecore.snapshot import (
    LIVE,
    ConnectionState,
    DatabaseState,
    Lifecycle,
    RedisUse,
    Snapshot,
)

DATABASE_AWAY_LIMIT_S = 30.0
"""How long the database may be away before the daemon is no longer ready."""

PARKED_SHOWN_S = 300.0
"""How long after rows were parked it is a reason: while more come, it stays one."""

RETENTION_WAIT_LIMIT_S = 86_400.0
"""How long the horizon may wait for candles before somebody should know: disk fills meanwhile."""

DISK_LOW_BYTES = 1 << 20
"""Room that DATA_DIR should have for its small files."""

REDIS_AWAY_LIMIT_S = 5.0
"""How long a start or a restart of Redis may take before it is told."""

_EPOCH = datetime(1970, 1, 1)  # of UTC

Status = Literal["ok", "degraded", "failed"]
Part = Literal["database", "feed", "ring", "redis"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that is wrong. `blocks` means: not ready because of it."""

    code: str
    part: Part
    blocks: bool
    text: str


@dataclass(frozen=True, slots=True)
class Health:
    """All that is wrong at one moment; nothing is the good answer."""

    reasons: tuple[Reason, ...]

    @property
    def ready(self) -> bool:
        """True when nothing keeps trades from being captured and stored."""
        return not any(reason.blocks for reason in self.reasons)

    @property
    def status(self) -> Status:
        """Return "failed" when not ready, "degraded" when something else is wrong, else "ok"."""
        if not self.ready:
            return "failed"
        return "degraded" if self.reasons else "ok"

    def of(self, part: Part) -> "Health":
        """Return only what is wrong with one part."""
        return Health(tuple(reason for reason in self.reasons if reason.part == part))


def assess(snapshot: Snapshot) -> Health:
    """Name everything that is wrong with the running capture; pure."""
    reasons = [
        *_database_reasons(snapshot),
        *_feed_reasons(snapshot),
        *_ring_reasons(snapshot),
        *_redis_reasons(snapshot.redis),
    ]
    return Health(tuple(reasons))


def _database_reasons(snapshot: Snapshot) -> list[Reason]:
    database = snapshot.database
    if database.reachable:
        return [*_parked_reasons(database), *_lifecycle_reasons(snapshot.lifecycle)]
    away_s = database.away_s or 0.0
    long = away_s > DATABASE_AWAY_LIMIT_S
    text = f"The database has been away for {away_s:.0f} s; trades wait in the ring."
    return [Reason("database_away", "database", long, text)]


def _parked_reasons(database: DatabaseState) -> Iterator[Reason]:
    if database.parked_age_s is not None and database.parked_age_s < PARKED_SHOWN_S:
        text = "The database refuses rows for good; they are in dead_letters, each with its reason."
        yield Reason("rows_parked", "database", False, text)


def _lifecycle_reasons(lifecycle: Lifecycle) -> Iterator[Reason]:
    for step, error in lifecycle.trouble.items():
        text = f"Old trades are not kept in order, {step} failed: {error}."
        yield Reason(f"lifecycle_{step}", "database", False, text)
    if lifecycle.waits_s > RETENTION_WAIT_LIMIT_S:
        hours = lifecycle.waits_s / 3600
        text = f"For {hours:.0f} h no old trades have been given up: {lifecycle.waits}."
        yield Reason("retention_waits", "database", False, text)
    if lifecycle.job_trouble:
        text = f"{lifecycle.job_trouble}; tradecore does this work itself."
        yield Reason("timescale_jobs", "database", False, text)


def _feed_reasons(snapshot: Snapshot) -> list[Reason]:
    if snapshot.shards.total and not snapshot.streams_wanted:
        if snapshot.shards.settled:
            return []  # the others capture all of them, and we stand by
        text = "Which symbols are ours is not known yet: the database has to tell; see the log."
        return [Reason("share_unknown", "feed", True, text)]
    if snapshot.live_streams == 0:
        text = f"None of {snapshot.streams_wanted} streams is live; no trade comes in."
        return [Reason("no_live_stream", "feed", True, text)]
    reasons = []
    # A draining connection has handed its streams over to a newer one.
    waiting = [c for c in snapshot.connections if c.state not in (LIVE, "draining", "closed")]
    if waiting:
        names = ", ".join(f"{c.name} {c.state}" for c in waiting)
        reasons.append(Reason("connection_not_live", "feed", False, f"Not live: {names}."))
    if snapshot.live_streams < snapshot.streams_wanted:
        text = f"Only {snapshot.live_streams} of {snapshot.streams_wanted} streams are live."
        reasons.append(Reason("streams_missing", "feed", False, text))
    if stale := snapshot.stale:
        shown = ", ".join(stale[:5]) + (f" and {len(stale) - 5} more" if len(stale) > 5 else "")
        text = f"The venue prints trades that do not come: {shown}; connections are replaced."
        reasons.append(Reason("symbols_stale", "feed", False, text))
    if snapshot.counters.trades_far_below:
        text = "Trade ids far below the last ones came: has the venue begun them anew? See the log."
        reasons.append(Reason("ids_far_below", "feed", False, text))
    return reasons


def _ring_reasons(snapshot: Snapshot) -> list[Reason]:
    ring = snapshot.ring
    reasons = []
    if ring.above_high_water:
        text = f"{ring.rows} of {ring.capacity} ring slots are taken; sockets are paused."
        reasons.append(Reason("ring_above_high_water", "ring", True, text))
    if ring.disk_free_bytes < DISK_LOW_BYTES:
        text = "The disk of DATA_DIR is full: bans are not remembered over a restart. Make room."
        reasons.append(Reason("disk_full", "ring", False, text))
    return reasons


def _redis_reasons(redis: RedisUse | None) -> list[Reason]:
    if redis is None or redis.away_s is None or redis.away_s < REDIS_AWAY_LIMIT_S:
        return []
    text = f"Redis has taken no values for {redis.away_s:.0f} s: {redis.last_error or 'no answer'}."
    return [Reason("redis_away", "redis", False, text)]


def overall_json(snapshot: Snapshot, health: Health) -> dict[str, Any]:
    """Return the body of /health."""
    counters = snapshot.counters
    return {
        **_verdict(health),
        "ready": health.ready,
        "version": snapshot.version,
        "uptime_s": round(snapshot.uptime_s, 1),
        "feed": _feed(snapshot),
        "ring": _ring(snapshot),
        "database": asdict(snapshot.database),
        "redis": asdict(snapshot.redis) if snapshot.redis else None,
        "counts": {
            "frames_received": counters.frames_received,
            "frames_refused": sum(counters.frames_refused.values()),
            "trades_received": snapshot.trades_received,
            "trades_stored": counters.trades_stored,
            "trades_duplicate": counters.trades_duplicate,
            "trades_refused": sum(counters.trades_refused.values()),
            "trades_parked": counters.trades_parked,
            "tickers_stored": counters.tickers_stored,
            "klines_stored": counters.klines_stored,
            "reconnects": sum(counters.reconnects.values()),
            "gaps_detected": counters.gaps_detected,
            "trades_missing": counters.trades_missing,
            "trades_missing_arrived": counters.trades_missing_arrived,
            "trades_far_below": counters.trades_far_below,
            "trades_filled": sum(snapshot.repair.trades_filled.values()),
            "rollovers": sum(counters.rollovers.values()),
            "holes": snapshot.holes.open,
        },
        "completeness": _completeness(snapshot),
        "rates": {
            "trades_received_per_s": round(snapshot.received_per_s, 1),
            "trades_stored_per_s": round(snapshot.stored_per_s, 1),
        },
    }


def database_json(snapshot: Snapshot, health: Health) -> dict[str, Any]:
    """Return the body of /health/db."""
    return {
        **_verdict(health.of("database")),
        **asdict(snapshot.database),
        "pool": asdict(snapshot.pool),
        **_lifecycle(snapshot.lifecycle),
        "lag_s": round(snapshot.ring.oldest_age_s, 3),
    }


def _lifecycle(lifecycle: Lifecycle) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = {}
    for (table, state), days in sorted(lifecycle.chunks.items()):
        tables.setdefault(table, {})[state] = days
    for table, (before, after) in lifecycle.saved.items():
        tables.setdefault(table, {})["compression"] = {
            "heap_and_index_bytes_before": before,
            "bytes_after": after,
            "saved_ratio": round(1 - after / before, 4),
        }
    return {
        "retention": {
            "horizon": _iso(lifecycle.horizon_us),
            "waits": lifecycle.waits or None,
            "days_dropped": dict(lifecycle.dropped),
        },
        "days": tables,
        "days_compressed": dict(lifecycle.compressed),
        "jobs": dict(lifecycle.jobs),
        "job_failures": lifecycle.job_failures,
    }


def binance_json(snapshot: Snapshot, health: Health) -> dict[str, Any]:
    """Return the body of /health/binance, with every connection and symbol."""
    return {
        **_verdict(health.of("feed")),
        **_feed(snapshot),
        "connections": [_connection(connection) for connection in snapshot.connections],
        "lines": [asdict(line) for line in snapshot.lines],
        "shards": asdict(snapshot.shards),
        "symbols": {
            state.symbol: {
                "trades_received": state.trades_received,
                "last_trade_id": state.last_trade_id,
                "last_trade_age_s": _rounded(state.last_trade_age_s),
                "complete_through": _iso(state.complete_through_us),
                "proven_through": _iso(state.proven_through_us),
                "holes": state.holes,
                "ids_missing": state.ids_missing,
                "stale": state.stale,
            }
            for state in snapshot.symbols
        },
    }


def _completeness(snapshot: Snapshot) -> dict[str, Any]:
    known = [one.complete_through_us for one in snapshot.symbols if one.complete_through_us]
    proven = [one.proven_through_us for one in snapshot.symbols if one.proven_through_us]
    repair, rest, audit = snapshot.repair, snapshot.rest, snapshot.audit
    return {
        "complete_through": _iso(min(known, default=None)),
        "proven_through": _iso(min(proven, default=None)),
        "holes": snapshot.holes.open,
        "ids_missing": snapshot.holes.ids_missing,
        "oldest_hole_age_s": _rounded(snapshot.holes.oldest_age_s),
        "symbols_stale": len(snapshot.stale),
        "backfill": {
            "under_way": repair.under_way,
            "trades_filled": dict(repair.trades_filled),
            "holes_closed": dict(repair.holes_closed),
            "last_error": repair.last_error,
        },
        "rest": {
            "used_weight": rest.used_weight,
            "limit_weight": rest.limit_weight,
            "banned_s": round(rest.banned_s, 1),
        },
        "audit": {
            "klines_proven": audit.matched,
            "klines_mismatched": {reason: n for reason, n in audit.mismatches.items() if n},
            "klines_unproven": audit.unproven,
            "age_s": _rounded(audit.age_s),
        },
    }


def ready_json(health: Health) -> dict[str, Any]:
    """Return the body of /ready."""
    return {"ready": health.ready, **_verdict(health)}


def _verdict(health: Health) -> dict[str, Any]:
    reasons = [{"code": reason.code, "text": reason.text} for reason in health.reasons]
    return {"status": health.status, "reasons": reasons}


def _feed(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "connections_live": sum(c.state == LIVE for c in snapshot.connections),
        "connections_total": len(snapshot.connections),
        "streams_live": snapshot.live_streams,
        "streams_wanted": snapshot.streams_wanted,
        "data_age_s": _rounded(snapshot.data_age_s),
    }


def _connection(connection: ConnectionState) -> dict[str, Any]:
    return {
        "name": connection.name,
        "line": connection.line,
        "state": connection.state,
        "endpoint": connection.endpoint,
        "data_age_s": _rounded(connection.data_age_s),
        "reconnects": dict(connection.reconnects),
        "last_end": connection.last_end,
        "last_end_age_s": _rounded(connection.last_end_age_s),
        "streams": connection.streams,
        "symbols": connection.symbols,
    }


def _ring(snapshot: Snapshot) -> dict[str, Any]:
    ring = snapshot.ring
    return {
        "rows": ring.rows,
        "capacity": ring.capacity,
        "fill_ratio": round(ring.rows / ring.capacity, 6),
        "above_high_water": ring.above_high_water,
        "oldest_age_s": round(ring.oldest_age_s, 3),
        # JSON has no infinity: null means that nothing comes in, so no outage fills the ring.
        "absorbable_s": _rounded(snapshot.absorbable_s),
    }


def _iso(time_us: int | None) -> str | None:
    if time_us is None:
        return None
    time_s, fraction_us = divmod(time_us, 1_000_000)
    return f"{_iso_s(time_s)}.{fraction_us // 1000:03}+00:00"


@lru_cache(maxsize=256)  # of 1,400 symbols most have the same few seconds
def _iso_s(time_s: int) -> str:
    return (_EPOCH + timedelta(seconds=time_s)).isoformat()


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None or not math.isfinite(value_s) else round(value_s, 3)
