"""A healthy snapshot with distinct values everywhere, to be changed by tests."""

from dataclasses import replace
from typing import Any

from tradecore.snapshot import (
    Audit,
    Candles,
    ConnectionState,
    Counters,
    DatabaseState,
    FanOut,
    Histogram,
    Holes,
    HostClock,
    HttpUse,
    Lifecycle,
    Line,
    PoolUse,
    ProcessUse,
    RedisUse,
    Repair,
    RingUse,
    Shards,
    Snapshot,
    SymbolState,
    SymbolStates,
    VenueRest,
)

HEALTHY = Snapshot(
    version="0.1.0",
    started_s=1_700_000_000.5,
    uptime_s=12.34,
    connections=(
        ConnectionState(
            name="A0",
            line="A",
            state="live",
            streams=4,
            data_age_s=0.25,
            reconnects={"lost": 1000, "silent": 15},
            last_end="lost: connection reset by 192.0.2.7",
            last_end_age_s=77.5,
            endpoint="stream.example:9443",
            symbols=("BTCUSDT", "ETHUSDT"),
        ),
        ConnectionState(name="B0", line="B", state="live", streams=2, data_age_s=0.5),
    ),
    streams_wanted=6,
    symbols=SymbolStates(
        (
            SymbolState(
                "BTCUSDT",
                1001,
                5_000_000_001,
                0.25,
                holes=2,
                ids_missing=30,
                complete_through_us=1_700_000_001_250_000,
                proven_through_us=1_699_999_980_000_000,
            ),
            SymbolState("ETHUSDT", 0, None, None),
        )
    ),
    ring=RingUse(
        rows=256, capacity=1024, above_high_water=False, oldest_age_s=0.125, disk_free_bytes=1 << 30
    ),
    database=DatabaseState(
        embedded=True,
        reachable=True,
        away_s=None,
        server_version="18.6",
        edition="timescale-community",
        level="plain",
        schema_version=3,
        last_error=None,
        parked_age_s=None,
    ),
    pool=PoolUse(idle=3, used=1, limit=20),
    counters=Counters(
        frames_received=1002,
        frames_refused={"truncated": 1003, "unknown_event": 0},
        trades_refused={"ring_full": 1004},
        trades_duplicate=1005,
        trades_out_of_order=1006,
        gaps_detected=1007,
        trades_missing=1008,
        trades_missing_arrived=1017,
        trades_far_below=0,
        tickers_received=1009,
        klines_received=1010,
        trades_stored=1011,
        trades_parked=1012,
        trades_expired=1049,
        tickers_stored=1013,
        klines_stored=1014,
        klines_dropped=1041,
        flush_retries={"08": 1015, "40": 0},
        reconnects={"A": 1016, "B": 0},
        rollovers={"age": 1018, "stale": 0},
    ),
    holes=Holes(open=7, ids_missing=70, oldest_age_s=33.5),
    repair=Repair(
        trades_filled={"rest": 1019, "dump": 1020},
        holes_closed={"filled": 1021, "absent": 1022},
        retries={"lag": 1023},
        under_way=3,
        last_error=None,
    ),
    rest=VenueRest(
        used_weight=1024,
        limit_weight=6000,
        banned_s=0.0,
        requests={("historicalTrades", "200"): 1025},
    ),
    audit=Audit(matched=1026, mismatches={"volume": 1027}, unproven=4, age_s=1.5),
    lines=(
        Line(name="A", first=1028, late=1029, missing=1030, lag_s_sum=0.75, lag_count=1031),
        Line(name="B", first=1032, late=1033, missing=1034, lag_s_sum=2.75, lag_count=1035),
    ),
    shards=Shards(held=5, total=8),
    candles=Candles(minutes_waiting=1036, minutes_refreshed=1037, failures=1038, age_s=3.25),
    lifecycle=Lifecycle(
        horizon_us=1_600_000_000_000_000,
        waits="",
        waits_s=0.0,
        chunks={("raw_trades", "open"): 8, ("raw_trades", "compressed"): 9},
        dropped={"raw_trades": 1045, "tickers": 0},
        compressed={"raw_trades": 1046, "tickers": 0},
        saved={"raw_trades": (1000, 80)},
        jobs={"ok": 10, "waiting": 0, "failed": 0, "stalled": 0, "paused": 0},
        job_failures=1047,
        job_trouble="",
        failures={"drop": 1048},
        trouble={},
    ),
    fan_out=FanOut(
        clients=6,
        events={"trade": 1042},
        conflated={"ticker": 1043},
        closed={"slow": 1044, "client": 0},
    ),
    redis=RedisUse(
        up=True,
        away_s=None,
        age_s=0.75,
        reconnects=1061,
        batches=1062,
        values=1063,
        conflated=1064,
        trades=1065,
        trades_dropped=1066,
        errors={"auth": 1067, "closed": 0},
        last_error=None,
    ),
    http=HttpUse(
        requests={("/ready", "2xx"): 1049, ("none", "4xx"): 1050},
        refused={"host": 1051, "rate": 0},
    ),
    received_per_s=64.0,
    stored_per_s=32.0,
    flush_duration=Histogram((0.001, 0.01), (1, 2, 3), 0.5),
    flush_rows=Histogram((10, 100), (4, 5, 6), 789.0),
    exchange_receive_latency=Histogram((0.05,), (7, 8), 1.5),
    receive_commit_latency=Histogram((0.1, 0.15), (90, 9, 1), 2.5),
    loop_lag=Histogram((0.005,), (1052, 1), 3.5),
    clock=HostClock(offset_s=-0.004, bound_s=0.003),
    log_records_dropped=1050,
    process=ProcessUse(resident_bytes=50_000_000, cpu_s=1.25, open_fds=17),
)


def changed(**changes: Any) -> Snapshot:
    """Return `HEALTHY` with fields replaced; `ring__rows=1` reaches into a nested one."""
    flat = {key: value for key, value in changes.items() if "__" not in key}
    for path, value in changes.items():
        if "__" in path:
            outer, inner = path.split("__")
            flat[outer] = replace(flat.get(outer, getattr(HEALTHY, outer)), **{inner: value})
    return replace(HEALTHY, **flat)
