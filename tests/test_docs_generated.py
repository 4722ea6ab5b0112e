"""docs/metrics.md and docs/settings.md are what the code says."""

import re

import pytest

from tools import docs
from tradecore.metric_table import METRICS
from tradecore.settings import VARIABLES, load


@pytest.mark.parametrize("name", docs.PAGES)
def test_the_pages_are_fresh(name: str) -> None:
    path = docs.DOCS / name
    assert path.exists() and path.read_text() == docs.PAGES[name](), "run `make docs`"


def test_each_metric_and_setting_is_there_once() -> None:
    for page, names in (
        (docs.metrics(), [metric.name for metric in METRICS]),
        (docs.settings(), [variable.name for variable in VARIABLES.values()]),
    ):
        assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(names)


def test_what_is_accepted_is_no_complaint() -> None:
    for variable in VARIABLES.values():
        text = docs.accepted(variable)
        assert text and docs._NONSENSE not in text and not text.startswith("give"), text


def test_the_defaults_of_the_page_work() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", docs.settings(), re.MULTILINE)
    assert len(rows) > 20
    load(dict(rows))


def test_every_link_leads_somewhere() -> None:
    for page in docs.PAGES.values():
        for target in re.findall(r"\]\(([^)#]+)", page()):
            assert (docs.DOCS / target).exists(), target
