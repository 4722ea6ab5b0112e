"""The rules in deploy/prometheus: checked, tried with made-up series, and against a real daemon."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from prometheus_server import (
    ROOT,
    RULES,
    Prometheus,
    metric_names,
    needs_prometheus,
    needs_promtool,
    prometheus,
    promtool,
)
from redis_desk import needs_redis, redis_server

from tests.daemon import Daemon, daemon
from tests.fakes import simulated_exchange
from tests.test_daemon import venue
from tests.test_grafana import expressions
from tradecore.metric_table import METRICS
from tradecore.store.embedded import EmbeddedPostgres

DEPLOY = ROOT / "deploy" / "prometheus"

NOT_AT_ONCE = {
    "tradecore_compression_saved_ratio",
    "tradecore_retention_horizon_timestamp_seconds",
    "tradecore_proven_through_timestamp_seconds",
}
"""Need TimescaleDB, a day that was given up, a whole minute."""


def rules(kind: str) -> list[dict[str, Any]]:
    return [
        rule
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


# -- what is written ------------------------------------------------------------------------------


@needs_promtool
def test_promtool_finds_nothing() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *sorted(RULES.glob("*.yml")))
    for config in (DEPLOY / "prometheus.yml", DEPLOY / "compose" / "prometheus.yml"):
        promtool("check", "config", config)


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", DEPLOY / "tests" / "alerts.test.yml")


def test_each_alert_is_tried() -> None:
    tests = yaml.safe_load((DEPLOY / "tests" / "alerts.test.yml").read_text())["tests"]
    tried = {
        sample["labels"]
        for test in tests
        for one in test.get("promql_expr_test", ())
        for sample in one.get("exp_samples") or ()
    }
    for rule in rules("alert"):
        scope = rule["labels"].get("scope")
        wanted = f'alertname="{rule["alert"]}"' + (f', scope="{scope}"' if scope else "")
        assert any(wanted in labels for labels in tried), wanted


def test_each_alert_says_what_happened_and_what_to_do() -> None:
    for rule in rules("alert"):
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert "for" in rule, name
        texts = rule["annotations"]
        assert texts.keys() == {"summary", "description", "runbook_url"}, name
        assert "{{" in texts["summary"] or "absent(" in rule["expr"], name
        assert texts["description"].rstrip().endswith((".", "?")), name
        assert texts["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    keys = [(rule["alert"], *sorted(rule["labels"].items())) for rule in rules("alert")]
    assert len(set(keys)) == len(keys)


def test_an_operator_makes_links_of_the_runbook(tmp_path: Path) -> None:
    path = tmp_path / "alerts.yml"
    path.write_text((RULES / "alerts.yml").read_text())
    (command,) = re.findall(r"^#   (sed .+)$", path.read_text(), re.MULTILINE)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    for group in yaml.safe_load(path.read_text())["groups"]:
        for rule in group["rules"]:
            tree, _, rest = rule["annotations"]["runbook_url"].partition("docs/")
            assert tree == "https://git.example.com/tradecore/blob/main/"
            assert rest == f"runbook.md#{rule['alert'].lower()}"


def test_rules_name_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    known = {metric.name for metric in METRICS}
    for rule in (*rules("alert"), *rules("record")):
        text = rule["expr"] + rule.get("annotations", {}).get("description", "")
        assert metric_names(text) <= known, rule
        assert set(re.findall(r"\b(?:instance|job):\w+:\w+", text)) <= recorded, rule


def test_the_file_for_compose_differs_in_the_target_only() -> None:
    here = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    there = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    for one, target in ((here, "localhost:3000"), (there, "tradecore:3000")):
        (job,) = one.pop("scrape_configs")
        assert job == {"job_name": "tradecore", "static_configs": [{"targets": [target]}]}
    assert here == there


# -- a real daemon before a real Prometheus -------------------------------------------------------


def hurried(text: str) -> str:
    """Let alerts fire within seconds."""
    text = re.sub(r"\bfor: \d+[sm]", "for: 1s", text)
    text = re.sub(r" +keep_firing_for: .*\n", "", text)
    assert text.count("_seconds:max > 900") in (0, 1)
    return text.replace("_seconds:max > 900", "_seconds:max > 4")


async def assert_everything_is_there(server: Prometheus) -> None:
    """Each metric that rules and dashboards name has samples, each panel has data."""
    named = metric_names(" ".join(rule["expr"] for rule in (*rules("alert"), *rules("record"))))
    panels = [expression.removesuffix(" > 0") for _, expression in expressions()]
    named |= metric_names(" ".join(panels))
    absent: set[str] = set()

    async def all_there() -> bool:
        there = metric_names(" ".join(await server.get("label/__name__/values") or ()))
        empty = [one for one in panels if not await server.query(one)]
        absent.clear()
        absent.update(named - there, *map(metric_names, empty))
        return absent <= NOT_AT_ONCE

    await server.until(all_there, lambda: f"absent: {sorted(absent - NOT_AT_ONCE)}")


async def assert_quiet(server: Prometheus, seen: Iterable[str], wanted: set[str]) -> None:
    await server.until_firing((), {})
    assert set(seen) == wanted


async def until_proven_to_be_well(one: Daemon) -> None:
    await one.until(lambda health: health["completeness"]["audit"]["age_s"] is not None)
    await one.until(lambda health: health["ready"] and health["counts"]["trades_stored"] > 2000)


@needs_prometheus
@needs_promtool
@needs_redis
async def test_a_real_prometheus_tells_of_each_fault_and_of_nothing_else(
    tmp_path: Path, short_dir: Path, pg_server: EmbeddedPostgres
) -> None:
    async with (
        redis_server(short_dir / "redis") as redis,
        simulated_exchange(symbols="BTCUSDT,ETHUSDT", rate=1000) as exchange,
        daemon(
            tmp_path / "daemon",
            **venue(exchange, SUPPORTED_SYMBOLS="BTCUSDT,ETHUSDT"),
            DATABASE_URL=pg_server.dsn,
            REDIS_URL=redis.url,
            RING_CAPACITY=131072,
        ) as one,
    ):
        await until_proven_to_be_well(one)
        target = f"127.0.0.1:{one.port}"
        async with prometheus(tmp_path / "prometheus", target, hurried) as server:
            await assert_everything_is_there(server)
            (up,) = await server.query("up")
            assert up["value"][1] == "1"
            kinds = await server.get("metadata", metric="tradecore_trades_stored")
            assert kinds["tradecore_trades_stored"][0]["type"] == "counter", "OpenMetrics was taken"
            await server.until_firing((), {})  # before its first scrape it has no target

            # The database stops.
            seen: dict[str, Any] = {}
            await pg_server.stop()
            away = {"TradecoreDatabaseAway", "TradecoreRingFilling filling"}
            await server.until_firing(away, seen)
            assert "room for" in seen["TradecoreDatabaseAway"]["annotations"]["description"]
            await pg_server.start()
            await assert_quiet(server, seen, away)

            # A hole that the venue does not let us fill, and Redis ends.
            seen = {}
            await redis.kill()
            await exchange.fault("rest", mode="500", seconds=600)
            await exchange.fault("drop", n=3)
            both = {"TradecoreHolesOpen", "TradecoreRedisAway"}
            await server.until_firing(both, seen)
            text = seen["TradecoreHolesOpen"]["annotations"]["description"]
            assert "USDT" in text and "ids are missing" in text
            await exchange.fault("rest", mode="ok", seconds=0)
            await redis.start()
            await assert_quiet(server, seen, both)

            # The venue takes no connection any more.
            seen = {}
            await exchange.fault("refuse", n=10_000)
            await exchange.fault("cut")
            silent = {"TradecoreFeedSilent feed", "TradecoreNotReady"}
            await server.until_firing(silent, seen)
            await exchange.fault("refuse", n=0)
            await assert_quiet(server, seen, silent)
        assert await one.terminate() == 0
