import json
import re
from pathlib import Path

import pytest
import yaml
from http_desk import fetch, serving
from snapshots import changed

from tradecore.http.health import assess
from tradecore.snapshot import ConnectionState

AWAY = {"database__reachable": False, "database__last_error": "connection refused"}
STANDBY = {"connections": (), "streams_wanted": 0}
DEAD_FEED = {
    "connections": (
        ConnectionState(name="A0", line="A", state="backing_off", streams=6, data_age_s=None),
    )
}


def connection(state: str, streams: int) -> ConnectionState:
    return ConnectionState(name="A0", line="A", state=state, streams=streams, data_age_s=1.0)


@pytest.mark.parametrize(
    ("changes", "status", "codes"),
    [
        ({}, "ok", []),
        ({"holes__open": 99, "counters__trades_parked": 5}, "ok", []),
        ({"database__parked_age_s": 299.0}, "degraded", ["rows_parked"]),
        ({"database__parked_age_s": 301.0}, "ok", []),
        ({"ring__disk_free_bytes": 1 << 19}, "degraded", ["disk_full"]),
        ({"stale": ("ETHUSDT",)}, "degraded", ["symbols_stale"]),
        ({"counters__trades_far_below": 1}, "degraded", ["ids_far_below"]),
        ({**STANDBY, "shards__held": 0}, "ok", []),
        ({**STANDBY, "shards__held": 3}, "ok", []),  # that no symbol is in
        ({**STANDBY, "shards__held": 0, "shards__settled": False}, "failed", ["share_unknown"]),
        ({"shards__settled": False}, "ok", []),  # it captures on while shards move
        ({**AWAY, "database__away_s": 0.0}, "degraded", ["database_away"]),
        ({**AWAY, "database__away_s": 30.0}, "degraded", ["database_away"]),
        ({**AWAY, "database__away_s": 30.1}, "failed", ["database_away"]),
        ({"connections": (), "shards__total": 0}, "failed", ["no_live_stream"]),
        (DEAD_FEED, "failed", ["no_live_stream"]),
        ({"connections": (connection("stale", 6),)}, "failed", ["no_live_stream"]),
        ({"connections": (connection("live", 0),)}, "failed", ["no_live_stream"]),
        ({"connections": (connection("live", 5),)}, "degraded", ["streams_missing"]),
        (
            {"connections": (connection("live", 6), connection("draining", 6))},
            "ok",
            [],
        ),
        (
            {"connections": (connection("live", 6), connection("connecting", 6))},
            "degraded",
            ["connection_not_live"],
        ),
        ({"lifecycle__job_trouble": "Jobs fail: x"}, "degraded", ["timescale_jobs"]),
        ({"lifecycle__trouble": {"drop": "why"}}, "degraded", ["lifecycle_drop"]),
        ({"lifecycle__waits": "candles", "lifecycle__waits_s": 86_000.0}, "ok", []),
        (
            {"lifecycle__waits": "candles", "lifecycle__waits_s": 87_000.0},
            "degraded",
            ["retention_waits"],
        ),
        ({"redis": None}, "ok", []),
        ({"redis__up": False, "redis__away_s": 4.0}, "ok", []),
        ({"redis__up": False, "redis__away_s": 86_400.0}, "degraded", ["redis_away"]),
        ({"ring__above_high_water": True}, "failed", ["ring_above_high_water"]),
        (
            {**AWAY, "database__away_s": 31.0, **DEAD_FEED, "ring__above_high_water": True},
            "failed",
            ["database_away", "no_live_stream", "ring_above_high_water"],
        ),
    ],
)
async def test_every_reason_reaches_assess_and_ready(changes, status, codes):
    snapshot = changed(**changes)
    verdict = assess(snapshot)
    assert verdict.status == status
    assert [reason.code for reason in verdict.reasons] == codes
    async with serving(snapshot) as server:
        response, body = await fetch(server, "/ready")
        overall, _ = await fetch(server, "/health")
    assert response.status == overall.status == (503 if status == "failed" else 200)
    answer = json.loads(body)
    assert answer["ready"] is (status != "failed")
    assert [reason["code"] for reason in answer["reasons"]] == codes


def test_reasons_say_how_much():
    verdict = assess(changed(**AWAY, database__away_s=42.4, ring__above_high_water=True))
    assert [reason.text for reason in verdict.reasons] == [
        "The database has been away for 42 s; trades wait in the ring.",
        "256 of 1024 ring slots are taken; sockets are paused.",
    ]


async def test_health_tells_everything():
    async with serving() as server:
        response, body = await fetch(server, "/health")
    assert response.content_type == "application/json"
    assert json.loads(body) == {
        "status": "ok",
        "reasons": [],
        "ready": True,
        "version": "0.1.0",
        "uptime_s": 12.3,
        "feed": {
            "connections_live": 2,
            "connections_total": 2,
            "streams_live": 6,
            "streams_wanted": 6,
            "data_age_s": 0.25,
        },
        "ring": {
            "rows": 256,
            "capacity": 1024,
            "fill_ratio": 0.25,
            "above_high_water": False,
            "oldest_age_s": 0.125,
            "absorbable_s": 12.0,
        },
        "database": {
            "embedded": True,
            "reachable": True,
            "away_s": None,
            "server_version": "18.6",
            "edition": "timescale-community",
            "level": "plain",
            "schema_version": 3,
            "last_error": None,
            "parked_age_s": None,
        },
        "redis": {
            "up": True,
            "away_s": None,
            "age_s": 0.75,
            "reconnects": 1061,
            "batches": 1062,
            "values": 1063,
            "conflated": 1064,
            "trades": 1065,
            "trades_dropped": 1066,
            "errors": {"auth": 1067, "closed": 0},
            "last_error": None,
        },
        "counts": {
            "frames_received": 1002,
            "frames_refused": 1003,
            "trades_received": 1001,
            "trades_stored": 1011,
            "trades_duplicate": 1005,
            "trades_refused": 1004,
            "trades_parked": 1012,
            "tickers_stored": 1013,
            "klines_stored": 1014,
            "reconnects": 1016,
            "gaps_detected": 1007,
            "trades_missing": 1008,
            "trades_missing_arrived": 1017,
            "trades_far_below": 0,
            "trades_filled": 2039,
            "rollovers": 1018,
            "holes": 7,
        },
        "completeness": {
            "complete_through": "2023-11-14T22:13:21.250+00:00",
            "proven_through": "2023-11-14T22:13:00.000+00:00",
            "holes": 7,
            "ids_missing": 70,
            "oldest_hole_age_s": 33.5,
            "symbols_stale": 0,
            "backfill": {
                "under_way": 3,
                "trades_filled": {"rest": 1019, "dump": 1020},
                "holes_closed": {"filled": 1021, "absent": 1022},
                "last_error": None,
            },
            "rest": {"used_weight": 1024, "limit_weight": 6000, "banned_s": 0.0},
            "audit": {
                "klines_proven": 1026,
                "klines_mismatched": {"volume": 1027},
                "klines_unproven": 4,
                "age_s": 1.5,
            },
        },
        "rates": {"trades_received_per_s": 64.0, "trades_stored_per_s": 32.0},
    }


async def test_database_health_is_503_as_soon_as_it_is_away():
    async with serving(changed(**AWAY, database__away_s=1.0)) as server:
        response, body = await fetch(server, "/health/db")
        feed, _ = await fetch(server, "/health/binance")
    answer = json.loads(body)
    assert response.status == 503
    assert (answer["status"], answer["last_error"]) == ("degraded", "connection refused")
    assert answer["pool"] == {"idle": 3, "used": 1, "limit": 20}
    assert feed.status == 200


async def test_database_health_tells_what_becomes_of_old_trades():
    trouble = "Jobs of TimescaleDB are reported as failed: compression of raw_trades (why)"
    async with serving(changed(lifecycle__job_trouble=trouble)) as server:
        response, body = await fetch(server, "/health/db")
        ready, _ = await fetch(server, "/ready")
    answer = json.loads(body)
    assert (response.status, ready.status, answer["status"]) == (200, 200, "degraded")
    assert answer["reasons"] == [
        {"code": "timescale_jobs", "text": f"{trouble}; tradecore does this work itself."}
    ]
    assert answer["retention"] == {
        "horizon": "2020-09-13T12:26:40.000+00:00",
        "waits": None,
        "days_dropped": {"raw_trades": 1045, "tickers": 0},
    }
    assert answer["days"] == {
        "raw_trades": {
            "open": 8,
            "compressed": 9,
            "compression": {
                "heap_and_index_bytes_before": 1000,
                "bytes_after": 80,
                "saved_ratio": 0.92,
            },
        }
    }
    assert answer["days_compressed"] == {"raw_trades": 1046, "tickers": 0}
    assert (answer["jobs"]["ok"], answer["job_failures"]) == (10, 1047)


async def test_binance_health_lists_connections_and_symbols():
    async with serving(changed(received_per_s=0.0)) as server:
        response, body = await fetch(server, "/health/binance")
        _, overall = await fetch(server, "/health")
    answer = json.loads(body)
    assert response.status == 200
    assert answer["connections"][0] == {
        "name": "A0",
        "line": "A",
        "state": "live",
        "endpoint": "stream.example:9443",
        "data_age_s": 0.25,
        "reconnects": {"lost": 1000, "silent": 15},
        "last_end": "lost: connection reset by 192.0.2.7",
        "last_end_age_s": 77.5,
        "streams": 4,
        "symbols": ["BTCUSDT", "ETHUSDT"],
    }
    assert answer["connections"][1]["last_end"] is None
    assert answer["symbols"]["BTCUSDT"] == {
        "trades_received": 1001,
        "last_trade_id": 5_000_000_001,
        "last_trade_age_s": 0.25,
        "complete_through": "2023-11-14T22:13:21.250+00:00",
        "proven_through": "2023-11-14T22:13:00.000+00:00",
        "holes": 2,
        "ids_missing": 30,
        "stale": False,
    }
    assert answer["lines"][0]["first"] == 1028
    assert answer["shards"] == {"held": 5, "total": 8, "settled": True}
    assert answer["symbols"]["ETHUSDT"]["last_trade_id"] is None
    assert json.loads(overall)["ring"]["absorbable_s"] is None
    async with serving(changed(**DEAD_FEED)) as server:
        response, body = await fetch(server, "/health/binance")
        database, _ = await fetch(server, "/health/db")
    assert (response.status, json.loads(body)["status"]) == (503, "failed")
    assert database.status == 200


ALERTS = Path(__file__).parents[1] / "deploy/prometheus/rules/alerts.yml"

NAMED = {
    ("TradecoreNotReady", "/ready"): ("reasons",),
    ("TradecoreNotReady", "/health"): ("reasons",),
    ("TradecoreDatabaseAway", "/health/db"): ("last_error",),
    ("TradecoreRetentionFailing", "/health/db"): ("reasons", "retention.waits"),
    ("TradecoreCompressionFailing", "/health/db"): ("reasons",),
    ("TradecoreFeedSilent", "/health/binance"): (
        *("connections.0.state", "connections.0.last_end", "connections.0.symbols"),
        *("symbols.BTCUSDT.stale", "data_age_s", "symbols.BTCUSDT.last_trade_age_s"),
    ),
    ("TradecoreReconnectStorm", "/health/binance"): (
        *("connections.0.reconnects", "connections.0.last_end", "connections.0.endpoint"),
    ),
    ("TradecoreRedisAway", "/health"): ("redis.last_error",),
}
"""What an alert tells to look at, and where it is."""


async def test_what_alerts_tell_to_look_at_is_there():
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    told = {
        (rule["alert"], path)
        for group in groups
        for rule in group["rules"]
        for path in re.findall(r"/(?:health(?:/\w+)?|ready)\b", rule["annotations"]["description"])
    }
    assert told == set(NAMED)
    async with serving() as server:
        for (_, path), names in NAMED.items():
            _, body = await fetch(server, path)
            for name in names:
                found = json.loads(body)
                for key in name.split("."):
                    found = found[int(key) if key.isdigit() else key]
