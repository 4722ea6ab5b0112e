"""What the pages name is there: files, headings, commands, settings, metrics, alerts."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tradecore import cli
from tradecore.metric_table import METRICS
from tradecore.settings import VARIABLES

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
)
OTHER_NAMES = {
    "tradecore_drop_expired",  # a procedure in the database
    "tradecore_name",  # a credential of systemd
}
OTHER_VARIABLES = {
    *("TRADECORE_PG_BIN", "TEST_TIMESCALE_URL"),
    *("SET_PROPERTY", "GET_PROPERTY", "LIST_SUBSCRIPTIONS", "API_URL"),
    "SUPPORTED_SYMBOL",  # misspelt on purpose
    "NAME_FILE",
}


@cache
def text(page: Path) -> str:
    return page.read_text()


def spans(page: Path) -> Iterator[str]:
    """Yield what stands in code blocks and between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)
    yield from blocks
    prose = re.sub(r"^```\w*\n.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", prose)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    prose = re.sub(r"^```\w*\n.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE):
        words = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```\w*\n.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "`", prose)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_are_those_of_the_code(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {metric.name for metric in METRICS}
    settings = {variable.name for variable in VARIABLES.values()}
    settings |= {f"{variable.name}_FILE" for variable in VARIABLES.values() if variable.secret}
    code = "\n".join(spans(page))
    for name in re.findall(r"\btradecore_[a-z_]*[a-z]\b(?![\w.*{/]*\*)", code):
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        assert {name, bare} & (metrics | OTHER_NAMES), f"{name} is no metric"
    if page.name not in ("ARCHITECTURE.md", "CHANGELOG.md"):  # they name constants as well
        names = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text(page)))
        assert names <= settings | OTHER_VARIABLES, names - settings - OTHER_VARIABLES
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    commands.add("tradecore")  # the command in a container of that name
    for name in re.findall(r"(?:^|[`\s/])tradecore ([a-z]+)\b(?=[` \n]|$)", code, re.MULTILINE):
        assert name in commands, f"tradecore {name} is no command of {sorted(commands)}"


def test_each_alert_has_its_section_in_the_runbook() -> None:
    rules = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    if not rules:
        pytest.skip("there are no rules in deploy/prometheus")
    alerts = {name for file in rules for name in re.findall(r"- alert: (\w+)", file.read_text())}
    runbook = text(ROOT / "docs" / "runbook.md")
    assert alerts == set(re.findall(r"^## (Tradecore\w+)$", runbook, re.MULTILINE))
    urls = {u for file in rules for u in re.findall(r" runbook_url: (\S+)", file.read_text())}
    assert {url.rpartition("#")[2] for url in urls} <= anchors(ROOT / "docs" / "runbook.md")
    assert f" {len(alerts)} alerts" in text(ROOT / "CHANGELOG.md")


def test_each_page_is_in_the_index() -> None:
    index = text(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def _code_words() -> set[tuple[str, ...]]:
    """All runs of four words in the strings of the code; what an f-string inserts ends a run."""
    found: set[tuple[str, ...]] = set()
    for file in (ROOT / "tradecore").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            for part in parts:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.update(_runs(part.value))
    return found


def _runs(message: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[\w'/]+", message)
    return zip(*(words[n:] for n in range(4)), strict=False)


def test_messages_of_troubleshooting_are_those_of_the_program() -> None:
    page = text(ROOT / "docs" / "troubleshooting.md")
    cells = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    messages = [m for cell in cells for m in re.findall(r"`([^`]+)`", cell)]
    ours = _code_words()
    tried = 0
    for message in messages:
        runs = [set(_runs(piece)) for piece in message.split("…")]
        if any(runs):
            tried += 1
            assert any(run & ours for run in runs), f"nobody says: {message}"
    assert tried > 30
