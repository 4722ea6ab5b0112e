"""The dashboard in deploy/grafana: its layout, and that every question in it can be asked."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml
from prometheus_server import ROOT, RULES, metric_names, needs_promtool, promtool

from tradecore.metric_table import METRICS

DEPLOY = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((DEPLOY / "dashboards" / "tradecore.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
VARIABLES = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
WIDTHS = [one["value"] for one in VARIABLES["width"]["options"]]

PROMETHEUS = {"type": "prometheus", "uid": "${prometheus}"}
POSTGRES = {"type": "grafana-postgresql-datasource", "uid": "${postgres}"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield where it stands and each expression of PromQL, its variables filled in."""
    asked = [
        (panel["title"], target["expr"])
        for panel in PANELS
        for target in panel.get("targets", ())
        if "expr" in target
    ]
    asked += [(one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"]]
    for where, expression in asked:
        for variable, value in {
            "$__rate_interval": "1m",
            "$job": "tradecore",
            "$instance": ".+",
        }.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression, (where, expression)
        yield where, expression


def statements() -> Iterator[tuple[str, str]]:
    """Yield where it stands and each statement of SQL, its variables filled in."""
    asked = [
        (panel["title"], target["rawSql"])
        for panel in PANELS
        for target in panel.get("targets", ())
        if "rawSql" in target
    ]
    asked.append(("symbol", VARIABLES["symbol"]["query"]))
    for where, text in asked:
        text = text.replace("${symbol:sqlstring}", "'BTCUSDT'")
        text = re.sub(
            r"\$__timeFilter\((\w+)\)", r"\1 BETWEEN now() - interval '3 hours' AND now()", text
        )
        for width in WIDTHS if "${width}" in text else [""]:
            yield where, text.replace("${width}", width)


# -- layout ---------------------------------------------------------------------------------------


def test_ids_and_titles_are_unique() -> None:
    assert DASHBOARD["uid"] == DASHBOARD["title"] == "tradecore"
    for key in ("id", "title"):
        values = [panel[key] for panel in PANELS]
        assert len(set(values)) == len(values) and all(values), key


def test_panels_do_not_overlap() -> None:
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0, panel["title"]
    for one, other in combinations(PANELS, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (one["title"], other["title"])


def test_rows_are_full_and_none_is_empty() -> None:
    cells = {
        (x, y)
        for panel in PANELS
        for place in (panel["gridPos"],)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    }
    height = 1 + max(y for _, y in cells)
    assert len(cells) == 24 * height, "there is a hole in the layout"


def test_every_panel_has_a_unit_and_asks_by_variables() -> None:
    kinds = {kind["type"] for kind in (PROMETHEUS, POSTGRES)}
    for panel in PANELS:
        title, kind = panel["title"], panel["type"]
        if kind == "row":
            continue
        assert panel["datasource"] in (PROMETHEUS, POSTGRES), title
        assert panel["targets"], title
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs), title
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], title
        if kind == "heatmap":
            assert panel["options"]["yAxis"]["unit"] == "s", title
        else:
            assert panel["fieldConfig"]["defaults"]["unit"], title
    sources = {one["query"] for one in VARIABLES.values() if one["type"] == "datasource"}
    assert sources == kinds


def test_the_data_sources_are_there_and_hold_no_secret() -> None:
    text = (DEPLOY / "provisioning" / "datasources" / "tradecore.yml").read_text()
    sources = yaml.safe_load(text)["datasources"]
    assert {one["type"] for one in sources} == {PROMETHEUS["type"], POSTGRES["type"]}
    secrets = [value for one in sources for value in one.get("secureJsonData", {}).values()]
    assert secrets and all(re.fullmatch(r"\$__file\{\S+\}", value) for value in secrets)
    (provider,) = yaml.safe_load(
        (DEPLOY / "provisioning" / "dashboards" / "tradecore.yml").read_text()
    )["providers"]
    path = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{path}:ro" in (ROOT / "compose.yaml").read_text()


# -- questions ------------------------------------------------------------------------------------


def test_expressions_name_metrics_that_exist() -> None:
    recorded = {
        rule["record"]
        for path in RULES.glob("*.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    known = {metric.name for metric in METRICS}
    found = list(expressions())
    assert len(found) > 50
    for where, expression in found:
        assert metric_names(expression) <= known, where
        assert set(re.findall(r"\b(?:instance|job):\w+:\w+", expression)) <= recorded, where
    for one in VARIABLES.values():
        if one["type"] == "query" and one["datasource"] == PROMETHEUS:
            assert metric_names(one["definition"]) <= known


@needs_promtool
def test_every_expression_parses(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, (_, expression) in enumerate(expressions())
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", path)


@pytest.mark.every_level
async def test_every_statement_runs(connection: asyncpg.Connection) -> None:
    found = list(statements())
    assert len(found) >= len(WIDTHS) + 4
    for where, statement in found:
        prepared = await connection.prepare(statement)
        await prepared.fetch()
        if where.startswith("$symbol, "):
            columns = [column.name for column in prepared.get_attributes()]
            assert columns == ["time", "open", "high", "low", "close", "volume"]
