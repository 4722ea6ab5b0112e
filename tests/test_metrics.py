import os
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from snapshots import HEALTHY, changed

from tradecore.feed.states import State
from tradecore.metric_table import METRICS
from tradecore.metrics import OPENMETRICS, PLAIN, content_type, render
from tradecore.snapshot import (
    CONNECTION_STATES,
    Histogram,
    SymbolState,
    SymbolStates,
    read_process,
)

NAMES = """\
tradecore_ready{}
tradecore_database_up{}
tradecore_feed_data_age_seconds{}
tradecore_symbols_stale{}
tradecore_complete_through_timestamp_seconds{symbol}
tradecore_proven_through_timestamp_seconds{symbol}
tradecore_trades_received_total{symbol}
tradecore_frames_received_total{}
tradecore_frames_refused_total{cause}
tradecore_trades_refused_total{cause}
tradecore_trades_duplicate_total{}
tradecore_trades_out_of_order_total{}
tradecore_trades_far_below_total{}
tradecore_gaps_detected_total{}
tradecore_trades_missing_total{}
tradecore_trades_missing_arrived_total{}
tradecore_tickers_received_total{}
tradecore_klines_received_total{}
tradecore_exchange_receive_latency_seconds{}
tradecore_connection_state{connection,state}
tradecore_reconnects_total{line}
tradecore_connection_reconnects_total{connection}
tradecore_rollovers_total{reason}
tradecore_line_trades_total{line,arrival}
tradecore_line_missing_ids_total{line}
tradecore_line_lag_seconds_total{line}
tradecore_line_lag_samples_total{line}
tradecore_shards_held{}
tradecore_ring_rows{}
tradecore_ring_capacity_rows{}
tradecore_ring_fill_ratio{}
tradecore_ring_absorbable_seconds{}
tradecore_ring_oldest_row_age_seconds{}
tradecore_trades_stored_total{}
tradecore_trades_parked_total{}
tradecore_trades_expired_total{}
tradecore_tickers_stored_total{}
tradecore_klines_stored_total{}
tradecore_klines_dropped_total{}
tradecore_flush_duration_seconds{}
tradecore_flush_rows{}
tradecore_flush_retries_total{reason}
tradecore_receive_commit_latency_seconds{}
tradecore_pool_connections{state}
tradecore_pool_limit_connections{}
tradecore_holes{}
tradecore_holes_ids{}
tradecore_holes_oldest_age_seconds{}
tradecore_holes_closed_total{fate}
tradecore_trades_filled_total{source}
tradecore_backfill_retries_total{reason}
tradecore_backfill_holes_under_way{}
tradecore_rest_requests_total{endpoint,status}
tradecore_rest_used_weight{}
tradecore_rest_limit_weight{}
tradecore_rest_banned_seconds{}
tradecore_klines_proven_total{}
tradecore_klines_mismatched_total{reason}
tradecore_klines_unproven{}
tradecore_audit_age_seconds{}
tradecore_candles_age_seconds{}
tradecore_candles_waiting{}
tradecore_candles_refreshed_total{}
tradecore_candles_failures_total{}
tradecore_retention_horizon_timestamp_seconds{}
tradecore_retention_wait_seconds{}
tradecore_chunks{table,state}
tradecore_chunks_dropped_total{table}
tradecore_chunks_compressed_total{table}
tradecore_compression_saved_ratio{table}
tradecore_timescale_jobs{state}
tradecore_timescale_job_failures_total{}
tradecore_lifecycle_failures_total{step}
tradecore_stream_clients{}
tradecore_stream_events_total{stream}
tradecore_stream_conflated_total{stream}
tradecore_stream_closed_total{reason}
tradecore_redis_up{}
tradecore_redis_age_seconds{}
tradecore_redis_batches_total{}
tradecore_redis_values_total{}
tradecore_redis_conflated_total{}
tradecore_redis_trades_total{}
tradecore_redis_trades_dropped_total{}
tradecore_redis_reconnects_total{}
tradecore_redis_errors_total{reason}
tradecore_http_requests_total{route,status}
tradecore_http_refused_total{reason}
tradecore_clock_offset_seconds{}
tradecore_clock_offset_bound_seconds{}
tradecore_log_records_dropped_total{}
tradecore_start_timestamp_seconds{}
tradecore_loop_lag_seconds{}
tradecore_process_resident_memory_bytes{}
tradecore_process_cpu_seconds_total{}
tradecore_process_open_fds{}
tradecore_build_info{version}
"""
"""What dashboards and alerts rely on: a change here is a change for users."""

VALUES = {
    "ready": 1,
    "feed_data_age_seconds": 0.25,
    'trades_received_total{symbol="BTCUSDT"}': 1001,
    'trades_received_total{symbol="ETHUSDT"}': 0,
    "frames_received_total": 1002,
    'frames_refused_total{cause="truncated"}': 1003,
    'frames_refused_total{cause="unknown_event"}': 0,
    'trades_refused_total{cause="ring_full"}': 1004,
    "trades_duplicate_total": 1005,
    "trades_out_of_order_total": 1006,
    "gaps_detected_total": 1007,
    "trades_missing_total": 1008,
    "trades_missing_arrived_total": 1017,
    "trades_far_below_total": 0,
    "tickers_received_total": 1009,
    "klines_received_total": 1010,
    "trades_stored_total": 1011,
    "trades_parked_total": 1012,
    "trades_expired_total": 1049,
    "tickers_stored_total": 1013,
    "klines_stored_total": 1014,
    "klines_dropped_total": 1041,
    "ring_rows": 256,
    "ring_capacity_rows": 1024,
    "ring_fill_ratio": 0.25,
    "ring_absorbable_seconds": 12,
    "ring_oldest_row_age_seconds": 0.125,
    'flush_duration_seconds_bucket{le="0.001"}': 1,
    'flush_duration_seconds_bucket{le="0.01"}': 3,
    'flush_duration_seconds_bucket{le="+Inf"}': 6,
    "flush_duration_seconds_count": 6,
    "flush_duration_seconds_sum": 0.5,
    'flush_rows_bucket{le="10.0"}': 4,
    'flush_rows_bucket{le="100.0"}': 9,
    'flush_rows_bucket{le="+Inf"}': 15,
    "flush_rows_count": 15,
    "flush_rows_sum": 789,
    'flush_retries_total{reason="08"}': 1015,
    'flush_retries_total{reason="40"}': 0,
    'exchange_receive_latency_seconds_bucket{le="0.05"}': 7,
    'exchange_receive_latency_seconds_bucket{le="+Inf"}': 15,
    "exchange_receive_latency_seconds_count": 15,
    "exchange_receive_latency_seconds_sum": 1.5,
    'receive_commit_latency_seconds_bucket{le="0.1"}': 90,
    'receive_commit_latency_seconds_bucket{le="0.15"}': 99,
    'receive_commit_latency_seconds_bucket{le="+Inf"}': 100,
    "receive_commit_latency_seconds_count": 100,
    "receive_commit_latency_seconds_sum": 2.5,
    'reconnects_total{line="A"}': 1016,
    'reconnects_total{line="B"}': 0,
    'connection_reconnects_total{connection="A0"}': 1015,
    'connection_reconnects_total{connection="B0"}': 0,
    **{
        f'connection_state{{connection="{name}",state="{state}"}}': float(state == "live")
        for name in ("A0", "B0")
        for state in CONNECTION_STATES
    },
    'pool_connections{state="idle"}': 3,
    'pool_connections{state="used"}': 1,
    "pool_limit_connections": 20,
    "database_up": 1,
    "holes": 7,
    "holes_ids": 70,
    "holes_oldest_age_seconds": 33.5,
    'holes_closed_total{fate="filled"}': 1021,
    'holes_closed_total{fate="absent"}': 1022,
    'trades_filled_total{source="rest"}': 1019,
    'trades_filled_total{source="dump"}': 1020,
    'backfill_retries_total{reason="lag"}': 1023,
    "backfill_holes_under_way": 3,
    'rest_requests_total{endpoint="historicalTrades",status="200"}': 1025,
    "rest_used_weight": 1024,
    "rest_limit_weight": 6000,
    "rest_banned_seconds": 0,
    "klines_proven_total": 1026,
    'klines_mismatched_total{reason="volume"}': 1027,
    "klines_unproven": 4,
    "audit_age_seconds": 1.5,
    "symbols_stale": 0,
    'complete_through_timestamp_seconds{symbol="BTCUSDT"}': 1_700_000_001.25,
    'proven_through_timestamp_seconds{symbol="BTCUSDT"}': 1_699_999_980,
    'line_trades_total{arrival="first",line="A"}': 1028,
    'line_trades_total{arrival="late",line="A"}': 1029,
    'line_trades_total{arrival="first",line="B"}': 1032,
    'line_trades_total{arrival="late",line="B"}': 1033,
    'line_missing_ids_total{line="A"}': 1030,
    'line_missing_ids_total{line="B"}': 1034,
    'line_lag_seconds_total{line="A"}': 0.75,
    'line_lag_seconds_total{line="B"}': 2.75,
    'line_lag_samples_total{line="A"}': 1031,
    'line_lag_samples_total{line="B"}': 1035,
    'rollovers_total{reason="age"}': 1018,
    'rollovers_total{reason="stale"}': 0,
    "shards_held": 5,
    "candles_age_seconds": 3.25,
    "candles_waiting": 1036,
    "candles_refreshed_total": 1037,
    "candles_failures_total": 1038,
    "stream_clients": 6,
    'stream_events_total{stream="trade"}': 1042,
    'stream_conflated_total{stream="ticker"}': 1043,
    'stream_closed_total{reason="slow"}': 1044,
    'stream_closed_total{reason="client"}': 0,
    "redis_up": 1,
    "redis_age_seconds": 0.75,
    "redis_batches_total": 1062,
    "redis_values_total": 1063,
    "redis_conflated_total": 1064,
    "redis_trades_total": 1065,
    "redis_trades_dropped_total": 1066,
    "redis_reconnects_total": 1061,
    'redis_errors_total{reason="auth"}': 1067,
    'redis_errors_total{reason="closed"}': 0,
    'http_requests_total{route="/ready",status="2xx"}': 1049,
    'http_requests_total{route="none",status="4xx"}': 1050,
    'http_refused_total{reason="host"}': 1051,
    'http_refused_total{reason="rate"}': 0,
    "retention_wait_seconds": 0,
    "retention_horizon_timestamp_seconds": 1_600_000_000,
    'chunks{state="open",table="raw_trades"}': 8,
    'chunks{state="compressed",table="raw_trades"}': 9,
    'chunks_dropped_total{table="raw_trades"}': 1045,
    'chunks_dropped_total{table="tickers"}': 0,
    'chunks_compressed_total{table="raw_trades"}': 1046,
    'chunks_compressed_total{table="tickers"}': 0,
    'compression_saved_ratio{table="raw_trades"}': 0.92,
    'timescale_jobs{state="ok"}': 10,
    'timescale_jobs{state="waiting"}': 0,
    'timescale_jobs{state="failed"}': 0,
    'timescale_jobs{state="stalled"}': 0,
    'timescale_jobs{state="paused"}': 0,
    "timescale_job_failures_total": 1047,
    'lifecycle_failures_total{step="drop"}': 1048,
    "clock_offset_seconds": -0.004,
    "clock_offset_bound_seconds": 0.003,
    "log_records_dropped_total": 1050,
    "start_timestamp_seconds": 1_700_000_000.5,
    'loop_lag_seconds_bucket{le="0.005"}': 1052,
    'loop_lag_seconds_bucket{le="+Inf"}': 1053,
    "loop_lag_seconds_count": 1053,
    "loop_lag_seconds_sum": 3.5,
    "process_resident_memory_bytes": 50_000_000,
    "process_cpu_seconds_total": 1.25,
    "process_open_fds": 17,
    'build_info{version="0.1.0"}': 1,
}


def samples(text: str, parse=parse_plain) -> dict[str, float]:
    found = {}
    for family in parse(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


FORMS = pytest.mark.parametrize(
    ("form", "parse"), [(PLAIN, parse_plain), (OPENMETRICS, parse_openmetrics)]
)


def test_names_and_labels_are_the_promised_ones():
    assert "".join(f"{m.name}{{{','.join(m.labels)}}}\n" for m in METRICS) == NAMES


def test_connection_states_are_those_of_the_feed():
    assert tuple(State) == CONNECTION_STATES


def test_names_follow_the_rules():
    for metric in METRICS:
        assert (metric.type == "counter") == metric.name.endswith("_total"), metric.name
        assert metric.help.endswith("."), metric.name
        assert len({m.help for m in METRICS}) == len(METRICS)


@pytest.mark.parametrize(
    ("form", "parse"), [(PLAIN, parse_plain), (OPENMETRICS, parse_openmetrics)]
)
def test_every_value_of_the_snapshot_is_exposed(form, parse):
    assert samples(render(HEALTHY, form).decode(), parse) == {
        f"tradecore_{k}": v for k, v in VALUES.items()
    }


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", PLAIN),
        ("*/*", PLAIN),
        ("text/html", PLAIN),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5,*/*;q=0.1", OPENMETRICS),
        ("Application/OpenMetrics-Text; Version=1.0.0; Q=0.5, text/plain; q=0.5", OPENMETRICS),
        # What Prometheus 2.42 and 3 send.
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;"
            "q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            OPENMETRICS,
        ),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,"
            "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,"
            "*/*;q=0.1",
            OPENMETRICS,
        ),
        ("application/openmetrics-text;version=0.0.1,text/plain;q=0.5", PLAIN),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.5", PLAIN),
        ("application/openmetrics-text;q=0.2,*/*", PLAIN),
        ("application/openmetrics-text;q=0", PLAIN),
        ("application/openmetrics-text;q=nonsense", PLAIN),
        (";;,=;q=;,", PLAIN),
    ],
)
def test_content_type_follows_accept(accept, form):
    assert content_type(accept) == form


def test_openmetrics_ends_with_its_mark():
    body = render(HEALTHY, OPENMETRICS)
    assert body.endswith(b"# EOF\n")
    assert body.count(b"# EOF") == 1
    assert b"# EOF" not in render(HEALTHY)


@pytest.mark.parametrize(
    ("form", "parse"), [(PLAIN, parse_plain), (OPENMETRICS, parse_openmetrics)]
)
def test_any_symbol_is_a_valid_label(form, parse):
    names = ["币安人生USDT", 'A"B', "A\\B", "A\nB", "A\\nB"]
    snapshot = changed(symbols=SymbolStates(SymbolState(name, 1, 1, 0.0) for name in names))
    families = parse(render(snapshot, form).decode())
    found = [
        sample.labels["symbol"]
        for family in families
        for sample in family.samples
        if sample.name == "tradecore_trades_received_total"
    ]
    assert found == names


def test_a_daemon_that_has_seen_nothing_can_be_scraped():
    snapshot = changed(symbols=SymbolStates(()), connections=(), received_per_s=0.0)
    found = samples(render(snapshot).decode())
    assert found["tradecore_ring_absorbable_seconds"] == float("inf")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (apt: prometheus) is absent")
def test_promtool_finds_nothing():
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=render(HEALTHY), capture_output=True, timeout=30
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_histogram_refuses_counts_that_do_not_fit():
    with pytest.raises(ValueError, match="2 bounds need 3 counts"):
        Histogram((1, 2), (0, 0), 0.0)


def test_process_use_is_read_from_proc():
    before = read_process()
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
    assert abs(before.resident_bytes - resident) < 4 << 20
    pipe = os.pipe()
    assert read_process().open_fds == before.open_fds + 2
    for fd in pipe:
        os.close(fd)
    while read_process().cpu_s <= before.cpu_s:  # burn until the counter moves
        pass
