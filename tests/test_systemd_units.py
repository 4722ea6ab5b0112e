"""The units as systemd reads them, without booting anything."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[1] / "deploy" / "systemd"
NAMES = ["tradecore.service", "tradecore@.service"]


@pytest.fixture(autouse=True)
def analyzer() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: apt-get install systemd")


@pytest.fixture(params=NAMES)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit whose program exists here; of the template an instance."""
    text = (UNITS / request.param).read_text()
    path = tmp_path / request.param.replace("@", "@a")
    path.write_text(text.replace("/opt/tradecore/bin/python", "/bin/true"))
    return path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60
    )


def test_systemd_has_nothing_to_say_about_them(unit: Path) -> None:
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_word_that_systemd_does_not_know_is_found(unit: Path) -> None:
    """Guards the test above: the exit code alone would not tell."""
    unit.write_text(unit.read_text().replace("[Service]", "[Service]\nWatchDog=1"))
    assert "'WatchDog'" in analyze("verify", "--man=no", unit).stderr


def test_they_are_exposed_no_more_than_needed(unit: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=15", unit)
    assert done.returncode == 0, done.stdout[-2000:]


def settings(name: str) -> Iterator[str]:
    for line in (UNITS / name).read_text().splitlines():
        if line and not line.startswith("#"):
            yield line


def test_the_template_differs_in_its_names_only() -> None:
    common = [line.replace("-%i", "") for line in settings(NAMES[1])]
    own = [
        "Description=tradecore %i, recorder of a share of Binance market data",
        "EnvironmentFile=/etc/tradecore/tradecore.conf",
        "Environment=SETTINGS_FILE=/etc/tradecore/%i.conf",
        "Environment=NODE_NAME=%H",  # and -%i
    ]
    assert [line for line in common if line not in own] == [
        line
        for line in settings(NAMES[0])
        if not line.startswith(("Description=", "Environment=SETTINGS_FILE="))
    ]
    assert set(own) <= set(common)
