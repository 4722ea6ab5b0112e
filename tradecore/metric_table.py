"""The one table of metrics: names, types, labels, meanings, and where in a snapshot they are."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Literal, NamedTuple

from tradecore.http.health import assess
from tradecore.snapshot import CONNECTION_STATES, Histogram, RedisUse, Snapshot

Labelled = Iterable[tuple[tuple[str, ...], float]]


class Metric(NamedTuple):
    """One exposed metric; `read` gives a number, labelled numbers, or a `Histogram`."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    read: Callable[[Snapshot], float | Labelled | Histogram]


def _keyed(counts: Mapping[str, int]) -> Labelled:
    return [((key,), value) for key, value in counts.items()]


def _of_redis(read: Callable[[RedisUse], float]) -> Callable[[Snapshot], Labelled]:
    """Nothing is there without REDIS_URL."""
    return lambda snapshot: [((), read(snapshot.redis))] if snapshot.redis else []


def _connection_states(snapshot: Snapshot) -> Labelled:
    for connection in snapshot.connections:
        for state in CONNECTION_STATES:
            yield (connection.name, state), float(state == connection.state)


def _data_age_s(snapshot: Snapshot) -> Labelled:
    if snapshot.connections:
        age_s = snapshot.data_age_s
        yield (), float("inf") if age_s is None else age_s


def _line_trades(snapshot: Snapshot) -> Labelled:
    for line in snapshot.lines:
        yield (line.name, "first"), line.first
        yield (line.name, "late"), line.late


TRADES_RECEIVED = Metric(
    "tradecore_trades_received_total",
    "counter",
    ("symbol",),
    "Trades taken into the ring, duplicates left out.",
    lambda s: [((state.symbol,), state.trades_received) for state in s.symbols],
)

COMPLETE_THROUGH = Metric(
    "tradecore_complete_through_timestamp_seconds",
    "gauge",
    ("symbol",),
    "Time up to which every trade is stored, since 1970.",
    lambda s: [
        ((state.symbol,), state.complete_through_us / 1e6)
        for state in s.symbols
        if state.complete_through_us is not None
    ],
)

PROVEN_THROUGH = Metric(
    "tradecore_proven_through_timestamp_seconds",
    "gauge",
    ("symbol",),
    "Time up to which every minute equals the venue's kline, since 1970.",
    lambda s: [
        ((state.symbol,), state.proven_through_us / 1e6)
        for state in s.symbols
        if state.proven_through_us is not None
    ],
)


GROUPS: dict[str, tuple[Metric, ...]] = {
    "At a glance": (
        Metric(
            "tradecore_ready",
            "gauge",
            (),
            "1 while trades are captured and stored, as /ready says; 0 when not.",
            lambda s: float(assess(s).ready),
        ),
        Metric(
            "tradecore_database_up",
            "gauge",
            (),
            "1 while the database answers, 0 while it is away.",
            lambda s: float(s.database.reachable),
        ),
        Metric(
            "tradecore_feed_data_age_seconds",
            "gauge",
            (),
            "Time since any connection brought market data; +Inf before the first, absent while no"
            " connection is wanted.",
            _data_age_s,
        ),
        Metric(
            "tradecore_symbols_stale",
            "gauge",
            (),
            "Symbols whose trades do not come although the venue prints them.",
            lambda s: len(s.stale),
        ),
        COMPLETE_THROUGH,
        PROVEN_THROUGH,
    ),
    "Capture": (
        TRADES_RECEIVED,
        Metric(
            "tradecore_frames_received_total",
            "counter",
            (),
            "WebSocket messages received, of any kind.",
            lambda s: s.counters.frames_received,
        ),
        Metric(
            "tradecore_frames_refused_total",
            "counter",
            ("cause",),
            "Messages that were not understood and not stored.",
            lambda s: _keyed(s.counters.frames_refused),
        ),
        Metric(
            "tradecore_trades_refused_total",
            "counter",
            ("cause",),
            "Trades that were understood and not taken in; their ids are a known hole.",
            lambda s: _keyed(s.counters.trades_refused),
        ),
        Metric(
            "tradecore_trades_duplicate_total",
            "counter",
            (),
            "Trades that had come before: the other line, an overlap of connections, a retry.",
            lambda s: s.counters.trades_duplicate,
        ),
        Metric(
            "tradecore_trades_out_of_order_total",
            "counter",
            (),
            "Trades whose id is below the last one of their symbol.",
            lambda s: s.counters.trades_out_of_order,
        ),
        Metric(
            "tradecore_trades_far_below_total",
            "counter",
            (),
            "Trades far below the last id of their symbol: the venue may have begun its ids anew.",
            lambda s: s.counters.trades_far_below,
        ),
        Metric(
            "tradecore_gaps_detected_total",
            "counter",
            (),
            "Jumps in the trade ids of a symbol.",
            lambda s: s.counters.gaps_detected,
        ),
        Metric(
            "tradecore_trades_missing_total",
            "counter",
            (),
            "Trade ids inside the detected gaps.",
            lambda s: s.counters.trades_missing,
        ),
        Metric(
            "tradecore_trades_missing_arrived_total",
            "counter",
            (),
            "Missing trade ids that came late after all, by the other line or an older connection.",
            lambda s: s.counters.trades_missing_arrived,
        ),
        Metric(
            "tradecore_tickers_received_total",
            "counter",
            (),
            "Ticker events received.",
            lambda s: s.counters.tickers_received,
        ),
        Metric(
            "tradecore_klines_received_total",
            "counter",
            (),
            "Kline events received.",
            lambda s: s.counters.klines_received,
        ),
        Metric(
            "tradecore_exchange_receive_latency_seconds",
            "histogram",
            (),
            "From the venue's event time to the socket read, by the host clock.",
            lambda s: s.exchange_receive_latency,
        ),
    ),
    "Connections to the venue": (
        Metric(
            "tradecore_connection_state",
            "gauge",
            ("connection", "state"),
            "1 for the present state of the connection, 0 for the others.",
            _connection_states,
        ),
        Metric(
            "tradecore_reconnects_total",
            "counter",
            ("line",),
            "Connections to the venue that were opened again.",
            lambda s: _keyed(s.counters.reconnects),
        ),
        Metric(
            "tradecore_connection_reconnects_total",
            "counter",
            ("connection",),
            "The same by connection; it ends with a connection that is needed no more.",
            lambda s: [((one.name,), sum(one.reconnects.values())) for one in s.connections],
        ),
        Metric(
            "tradecore_rollovers_total",
            "counter",
            ("reason",),
            "Connections that were replaced without a break.",
            lambda s: _keyed(s.counters.rollovers),
        ),
        Metric(
            "tradecore_line_trades_total",
            "counter",
            ("line", "arrival"),
            "Trades by feed line: first, or late because they had come before.",
            _line_trades,
        ),
        Metric(
            "tradecore_line_missing_ids_total",
            "counter",
            ("line",),
            "Trade ids that a feed line jumped over.",
            lambda s: [((line.name,), line.missing) for line in s.lines],
        ),
        Metric(
            "tradecore_line_lag_seconds_total",
            "counter",
            ("line",),
            "Sum of how long trades came after the other line's; see the samples.",
            lambda s: [((line.name,), line.lag_s_sum) for line in s.lines],
        ),
        Metric(
            "tradecore_line_lag_samples_total",
            "counter",
            ("line",),
            "Trades in that sum.",
            lambda s: [((line.name,), line.lag_count) for line in s.lines],
        ),
        Metric(
            "tradecore_shards_held",
            "gauge",
            (),
            "Parts of the symbols that this daemon captures; 0 when they are not shared.",
            lambda s: s.shards.held,
        ),
    ),
    "Ring": (
        Metric(
            "tradecore_ring_rows",
            "gauge",
            (),
            "Trades in the ring that wait for their commit.",
            lambda s: s.ring.rows,
        ),
        Metric(
            "tradecore_ring_capacity_rows",
            "gauge",
            (),
            "Trades the ring can hold.",
            lambda s: s.ring.capacity,
        ),
        Metric(
            "tradecore_ring_fill_ratio",
            "gauge",
            (),
            "Part of the ring that is taken, 0 to 1.",
            lambda s: s.ring.rows / s.ring.capacity,
        ),
        Metric(
            "tradecore_ring_absorbable_seconds",
            "gauge",
            (),
            "Outage of the database that the free slots hold at the present rate.",
            lambda s: s.absorbable_s,
        ),
        Metric(
            "tradecore_ring_oldest_row_age_seconds",
            "gauge",
            (),
            "Age of the oldest trade that waits for its commit.",
            lambda s: s.ring.oldest_age_s,
        ),
    ),
    "Database": (
        Metric(
            "tradecore_trades_stored_total",
            "counter",
            (),
            "Trades committed to raw_trades.",
            lambda s: s.counters.trades_stored,
        ),
        Metric(
            "tradecore_trades_parked_total",
            "counter",
            (),
            "Trades that the database refused and dead_letters holds.",
            lambda s: s.counters.trades_parked,
        ),
        Metric(
            "tradecore_trades_expired_total",
            "counter",
            (),
            "Trades that came live and were not stored: they are older than RETENTION.",
            lambda s: s.counters.trades_expired,
        ),
        Metric(
            "tradecore_tickers_stored_total",
            "counter",
            (),
            "Ticker rows committed.",
            lambda s: s.counters.tickers_stored,
        ),
        Metric(
            "tradecore_klines_stored_total",
            "counter",
            (),
            "Kline rows committed.",
            lambda s: s.counters.klines_stored,
        ),
        Metric(
            "tradecore_klines_dropped_total",
            "counter",
            (),
            "Closed klines that found no room while the database was away.",
            lambda s: s.counters.klines_dropped,
        ),
        Metric(
            "tradecore_flush_duration_seconds",
            "histogram",
            (),
            "Time of one flush, from the first encoded row to the commit.",
            lambda s: s.flush_duration,
        ),
        Metric(
            "tradecore_flush_rows",
            "histogram",
            (),
            "Rows of one flush.",
            lambda s: s.flush_rows,
        ),
        Metric(
            "tradecore_flush_retries_total",
            "counter",
            ("reason",),
            "Flushes tried again, by the class of the error.",
            lambda s: _keyed(s.counters.flush_retries),
        ),
        Metric(
            "tradecore_receive_commit_latency_seconds",
            "histogram",
            (),
            "From the socket read of a trade to its commit.",
            lambda s: s.receive_commit_latency,
        ),
        Metric(
            "tradecore_pool_connections",
            "gauge",
            ("state",),
            "Open connections to the database.",
            lambda s: [(("idle",), s.pool.idle), (("used",), s.pool.used)],
        ),
        Metric(
            "tradecore_pool_limit_connections",
            "gauge",
            (),
            "Connections to the database that may be open at once, DB_POOL_SIZE.",
            lambda s: s.pool.limit,
        ),
    ),
    "Holes and back-fill": (
        Metric(
            "tradecore_holes",
            "gauge",
            (),
            "Open holes in the stored trade ids.",
            lambda s: s.holes.open,
        ),
        Metric(
            "tradecore_holes_ids",
            "gauge",
            (),
            "Trade ids missing in the open holes.",
            lambda s: s.holes.ids_missing,
        ),
        Metric(
            "tradecore_holes_oldest_age_seconds",
            "gauge",
            (),
            "Time since the oldest open hole was detected; 0 without one.",
            lambda s: s.holes.oldest_age_s or 0.0,
        ),
        Metric(
            "tradecore_holes_closed_total",
            "counter",
            ("fate",),
            "Holes that were closed by the back-fill: filled, or absent at the venue.",
            lambda s: _keyed(s.repair.holes_closed),
        ),
        Metric(
            "tradecore_trades_filled_total",
            "counter",
            ("source",),
            "Missing trades that the back-fill has stored.",
            lambda s: _keyed(s.repair.trades_filled),
        ),
        Metric(
            "tradecore_backfill_retries_total",
            "counter",
            ("reason",),
            "Requests of the back-fill that had to be repeated.",
            lambda s: _keyed(s.repair.retries),
        ),
        Metric(
            "tradecore_backfill_holes_under_way",
            "gauge",
            (),
            "Holes that are being filled now.",
            lambda s: s.repair.under_way,
        ),
        Metric(
            "tradecore_rest_requests_total",
            "counter",
            ("endpoint", "status"),
            "Requests to the venue's REST interface.",
            lambda s: s.rest.requests.items(),
        ),
        Metric(
            "tradecore_rest_used_weight",
            "gauge",
            (),
            "Request weight used in the present minute, by the venue's count.",
            lambda s: s.rest.used_weight,
        ),
        Metric(
            "tradecore_rest_limit_weight",
            "gauge",
            (),
            "Request weight that the venue allows in a minute.",
            lambda s: s.rest.limit_weight,
        ),
        Metric(
            "tradecore_rest_banned_seconds",
            "gauge",
            (),
            "Time until the venue's REST interface may be asked again; 0 when it may be now.",
            lambda s: s.rest.banned_s,
        ),
    ),
    "Cross-check with the venue's klines": (
        Metric(
            "tradecore_klines_proven_total",
            "counter",
            (),
            "Closed klines that the stored trades of their minute equal.",
            lambda s: s.audit.matched,
        ),
        Metric(
            "tradecore_klines_mismatched_total",
            "counter",
            ("reason",),
            "Closed klines that the stored trades of their minute contradict.",
            lambda s: _keyed(s.audit.mismatches),
        ),
        Metric(
            "tradecore_klines_unproven",
            "gauge",
            (),
            "Klines that are not proven yet, those included that did not come.",
            lambda s: s.audit.unproven,
        ),
        Metric(
            "tradecore_audit_age_seconds",
            "gauge",
            (),
            "Time since a cross-check left out no recent minute of any symbol; +Inf before the"
            " first.",
            lambda s: float("inf") if s.audit.age_s is None else s.audit.age_s,
        ),
    ),
    "Candles": (
        Metric(
            "tradecore_candles_age_seconds",
            "gauge",
            (),
            "Time since the candles under way were computed by this daemon; +Inf before the first.",
            lambda s: float("inf") if s.candles.age_s is None else s.candles.age_s,
        ),
        Metric(
            "tradecore_candles_waiting",
            "gauge",
            (),
            "Closed one-minute candles that late trades touched and that are not computed anew"
            " yet.",
            lambda s: s.candles.minutes_waiting,
        ),
        Metric(
            "tradecore_candles_refreshed_total",
            "counter",
            (),
            "Closed minutes whose candles were computed, all symbols of a minute as one.",
            lambda s: s.candles.minutes_refreshed,
        ),
        Metric(
            "tradecore_candles_failures_total",
            "counter",
            (),
            "Refreshes of candles that failed and were tried again.",
            lambda s: s.candles.failures,
        ),
    ),
    "Retention and compression": (
        Metric(
            "tradecore_retention_horizon_timestamp_seconds",
            "gauge",
            (),
            "Older trades are given up, since 1970; absent while none are.",
            lambda s: (
                [] if s.lifecycle.horizon_us is None else [((), s.lifecycle.horizon_us / 1e6)]
            ),
        ),
        Metric(
            "tradecore_retention_wait_seconds",
            "gauge",
            (),
            "How long the retention horizon has not stood where RETENTION puts it; 0 when it does.",
            lambda s: s.lifecycle.waits_s,
        ),
        Metric(
            "tradecore_chunks",
            "gauge",
            ("table", "state"),
            "Days of a table, each a partition or chunk: open, compressed, or partial, which is"
            " compressed with rows that came later.",
            lambda s: s.lifecycle.chunks.items(),
        ),
        Metric(
            "tradecore_chunks_dropped_total",
            "counter",
            ("table",),
            "Days below the retention horizon that this daemon has dropped.",
            lambda s: _keyed(s.lifecycle.dropped),
        ),
        Metric(
            "tradecore_chunks_compressed_total",
            "counter",
            ("table",),
            "Days that this daemon has compressed, again and again where trades came later.",
            lambda s: _keyed(s.lifecycle.compressed),
        ),
        Metric(
            "tradecore_compression_saved_ratio",
            "gauge",
            ("table",),
            "Part of the disk space of heap and index that compression has saved, of the days that"
            " are compressed, 0 to 1.",
            lambda s: [
                ((table,), 1 - after / before)
                for table, (before, after) in s.lifecycle.saved.items()
            ],
        ),
        Metric(
            "tradecore_timescale_jobs",
            "gauge",
            ("state",),
            "Background jobs of TimescaleDB on our tables: ok, waiting for their first run, failed,"
            " stalled, paused.",
            lambda s: _keyed(s.lifecycle.jobs),
        ),
        Metric(
            "tradecore_timescale_job_failures_total",
            "counter",
            (),
            "Runs of these jobs that failed, by the server's count.",
            lambda s: s.lifecycle.job_failures,
        ),
        Metric(
            "tradecore_lifecycle_failures_total",
            "counter",
            ("step",),
            "Steps of retention and compression that failed and were tried again.",
            lambda s: _keyed(s.lifecycle.failures),
        ),
    ),
    "Live streams for clients": (
        Metric(
            "tradecore_stream_clients",
            "gauge",
            (),
            "Clients of the live streams that are connected.",
            lambda s: s.fan_out.clients,
        ),
        Metric(
            "tradecore_stream_events_total",
            "counter",
            ("stream",),
            "Events sent to clients of the live streams; one for all clients.",
            lambda s: _keyed(s.fan_out.events),
        ),
        Metric(
            "tradecore_stream_conflated_total",
            "counter",
            ("stream",),
            "Events that a slow client of the live streams did not get, but a newer one.",
            lambda s: _keyed(s.fan_out.conflated),
        ),
        Metric(
            "tradecore_stream_closed_total",
            "counter",
            ("reason",),
            "Connections of clients of the live streams that ended.",
            lambda s: _keyed(s.fan_out.closed),
        ),
    ),
    "Redis": (
        Metric(
            "tradecore_redis_up",
            "gauge",
            (),
            "1 while Redis takes what is published, 0 while it does not; absent without REDIS_URL.",
            _of_redis(lambda redis: float(redis.up)),
        ),
        Metric(
            "tradecore_redis_age_seconds",
            "gauge",
            (),
            "Time since Redis last answered; it is asked each second at least.",
            _of_redis(lambda redis: redis.age_s),
        ),
        Metric(
            "tradecore_redis_batches_total",
            "counter",
            (),
            "Batches of newest values that Redis has taken.",
            _of_redis(lambda redis: redis.batches),
        ),
        Metric(
            "tradecore_redis_values_total",
            "counter",
            (),
            "Values in these batches that were newer than what Redis had.",
            _of_redis(lambda redis: redis.values),
        ),
        Metric(
            "tradecore_redis_conflated_total",
            "counter",
            (),
            "Values that were not sent since a newer one of their stream came first.",
            _of_redis(lambda redis: redis.conflated),
        ),
        Metric(
            "tradecore_redis_trades_total",
            "counter",
            (),
            "Trades in the stream of all trades (REDIS_TRADES).",
            _of_redis(lambda redis: redis.trades),
        ),
        Metric(
            "tradecore_redis_trades_dropped_total",
            "counter",
            (),
            "Trades that this stream lacks, since Redis was slow or away; the tables have them.",
            _of_redis(lambda redis: redis.trades_dropped),
        ),
        Metric(
            "tradecore_redis_reconnects_total",
            "counter",
            (),
            "Connections to Redis that were opened again.",
            _of_redis(lambda redis: redis.reconnects),
        ),
        Metric(
            "tradecore_redis_errors_total",
            "counter",
            ("reason",),
            "Why Redis could not be used, each time.",
            lambda s: _keyed(s.redis.errors) if s.redis else (),
        ),
    ),
    "The side server": (
        Metric(
            "tradecore_http_requests_total",
            "counter",
            ("route", "status"),
            "Requests answered, by route (none: there is no such path) and class of status.",
            lambda s: s.http.requests.items(),
        ),
        Metric(
            "tradecore_http_refused_total",
            "counter",
            ("reason",),
            "Requests and connections refused, or cut off for being slow.",
            lambda s: _keyed(s.http.refused),
        ),
    ),
    "Host and process": (
        Metric(
            "tradecore_clock_offset_seconds",
            "gauge",
            (),
            "How far the host clock is ahead of the venue's; absent while that is not known.",
            lambda s: [] if s.clock is None else [((), s.clock.offset_s)],
        ),
        Metric(
            "tradecore_clock_offset_bound_seconds",
            "gauge",
            (),
            "The offset is wrong by so much at most: half of the round trip.",
            lambda s: [] if s.clock is None else [((), s.clock.bound_s)],
        ),
        Metric(
            "tradecore_log_records_dropped_total",
            "counter",
            (),
            "Log records that were lost because whoever reads the log is too slow.",
            lambda s: s.log_records_dropped,
        ),
        Metric(
            "tradecore_start_timestamp_seconds",
            "gauge",
            (),
            "Host clock when the daemon started, since 1970.",
            lambda s: s.started_s,
        ),
        Metric(
            "tradecore_loop_lag_seconds",
            "histogram",
            (),
            "How late the loop comes to what is due; so long a frame may wait before it is read.",
            lambda s: s.loop_lag,
        ),
        Metric(
            "tradecore_process_resident_memory_bytes",
            "gauge",
            (),
            "Resident memory of the daemon, the database left out.",
            lambda s: s.process.resident_bytes,
        ),
        Metric(
            "tradecore_process_cpu_seconds_total",
            "counter",
            (),
            "User and system CPU time of the daemon.",
            lambda s: s.process.cpu_s,
        ),
        Metric(
            "tradecore_process_open_fds",
            "gauge",
            (),
            "Open file descriptors of the daemon.",
            lambda s: s.process.open_fds,
        ),
        Metric(
            "tradecore_build_info",
            "gauge",
            ("version",),
            "Always 1; the labels tell what runs.",
            lambda s: [((s.version,), 1)],
        ),
    ),
}
"""Every metric by what it is about, in the order of the exposition."""

METRICS: tuple[Metric, ...] = tuple(chain.from_iterable(GROUPS.values()))
