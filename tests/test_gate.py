"""When a connection may be asked for: refusals, their scope, and what outlives the process."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tradecore import clock
from tradecore.backoff import AttemptBudget
from tradecore.datadir import LOCK_NAME, DataDir
from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
from tradecore.feed.gate import ATTEMPTS_NAME, STATE_NAME, Gate
from tradecore.rest.budget import STATE_NAME as REST_STATE_NAME
from tradecore.rest.budget import Budget

S = 10**9
HERE, PORT, THERE = (Endpoint.parse(url) for url in ("wss://a:9443", "wss://a:443", "wss://b:443"))


class Clocks:
    """Both clocks, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mono_s = 1000.0
        self.wall_s = 1_800_000_000.0
        monkeypatch.setattr(clock, "mono_ns", lambda: int(self.mono_s * S))
        monkeypatch.setattr(clock, "wall_ns", lambda: int(self.wall_s * S))

    def tick(self, seconds: float) -> None:
        self.mono_s += seconds
        self.wall_s += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    return Clocks(monkeypatch)


def refuse(gate: Gate, endpoint: Endpoint, status: int, told_s: float = 0.0) -> None:
    gate.refused(endpoint, UpgradeRefusedError("refused", status, told_s))


def silences(gate: Gate) -> list[float]:
    return [round(gate.silent_s(endpoint)) for endpoint in (HERE, PORT, THERE)]


@pytest.mark.parametrize(
    ("status", "told_s", "expected"),
    [
        (418, 0, [121, 121, 121]),
        (418, 7200, [7201, 7201, 7201]),
        (418, 9e9, [259200, 259200, 259200]),
        (429, 0, [61, 61, 0]),
        (429, 300, [301, 301, 0]),
        (403, 0, [301, 301, 0]),
        (451, 0, [61, 61, 0]),
        (503, 30, [31, 0, 0]),
        (503, 86400, [901, 0, 0]),
        (503, 0, [0, 0, 0]),
        (404, 0, [0, 0, 0]),
    ],
)
def test_how_long_nobody_asks_and_where(
    clocks: Clocks, tmp_path: Path, status: int, told_s: float, expected: list[int]
) -> None:
    gate = Gate(tmp_path)
    refuse(gate, HERE, status, told_s)
    assert silences(gate) == expected
    assert round(gate.take_s(HERE)) == expected[0]
    remembered = expected if status != 503 else [0, 0, 0]
    clocks.tick(10)
    assert silences(Gate(tmp_path)) == [max(left_s - 10, 0) for left_s in remembered]
    clocks.tick(max(expected))
    assert silences(gate) == silences(Gate(tmp_path)) == [0, 0, 0]


def test_answers_to_attempts_under_way_are_one_ban(clocks: Clocks) -> None:
    gate = Gate()
    for _ in range(6):
        refuse(gate, HERE, 418)
        clocks.tick(0.01)
    assert silences(gate) == [121] * 3
    refuse(gate, HERE, 418, 500)  # the longer word counts
    refuse(gate, HERE, 418, 200)
    assert silences(gate) == [501] * 3


def test_bans_without_a_length_double_over_restarts_until_a_day_of_peace(
    clocks: Clocks, tmp_path: Path
) -> None:
    for expected in (121, 241, 481):
        gate = Gate(tmp_path)
        refuse(gate, HERE, 418)
        assert silences(gate)[0] == expected
        clocks.tick(expected)
    clocks.tick(90_000)
    refuse(gate, HERE, 418)
    assert silences(gate)[0] == 121


def test_the_first_attempt_after_a_ban_goes_alone(clocks: Clocks, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    refuse(gate, HERE, 418)
    clocks.tick(122)
    assert gate.take_s(HERE) == 0
    assert [gate.take_s(one) for one in (HERE, PORT, THERE)] == [5, 5, 5]
    refuse(gate, HERE, 418)
    assert gate.take_s(THERE) == pytest.approx(241)
    clocks.tick(242)
    assert gate.take_s(THERE) == 0
    clocks.tick(5)  # nothing was said against it
    assert [gate.take_s(one) for one in (HERE, PORT, THERE)] == [0, 0, 0]


def test_two_processes_share_what_the_venue_said(clocks: Clocks, tmp_path: Path) -> None:
    one, other = Gate(tmp_path), Gate(tmp_path)
    assert other.take_s(HERE) == 0
    refuse(one, HERE, 418)
    assert other.take_s(HERE) == pytest.approx(121)


def test_a_wrong_wall_clock_ends_no_ban_while_the_machine_runs(
    clocks: Clocks, tmp_path: Path
) -> None:
    refuse(Gate(tmp_path), HERE, 418, 1000)
    clocks.wall_s += 86_400
    assert silences(Gate(tmp_path)) == [1001] * 3


def test_attempts_of_former_runs_count(clocks: Clocks, tmp_path: Path) -> None:
    """Ten connections, and a restart every ten seconds."""
    made: list[float] = []
    while clocks.mono_s < 1600:
        gate = Gate(tmp_path)
        made += [clocks.mono_s for _ in range(10) if gate.take_s(HERE) == 0]
        clocks.tick(10)
    for start in made:
        assert sum(start <= at < start + 300 for at in made) <= 270
    assert len(made) > 260


def test_planned_attempts_leave_some_for_breaks(clocks: Clocks) -> None:
    gate = Gate(budget=AttemptBudget(7, 300, margin=0))
    taken = [gate.take_s(HERE, planned=True) == 0 for _ in range(4)]
    assert taken == [True, True, True, False]
    assert gate.take_s(HERE) == 0


@pytest.mark.parametrize("content", [b"", b"x", b"\xff", b"99999999999999999999999999"])
def test_an_unreadable_count_of_attempts_is_an_empty_bucket(
    clocks: Clocks, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / ATTEMPTS_NAME).write_bytes(content)
    assert 0 < Gate(tmp_path).take_s(HERE) < 2.3


def test_a_damaged_file_of_bans_may_have_held_one(
    clocks: Clocks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs two minutes once, however often we are started in them, and none later."""
    (tmp_path / STATE_NAME).write_bytes(b"{")
    for passed_s in (0, 50, 100):
        assert silences(Gate(tmp_path)) == [120 - passed_s] * 3
        clocks.tick(50)
    assert silences(Gate(tmp_path)) == [0] * 3
    (record,) = caplog.records
    told = record.getMessage()
    assert str(tmp_path / STATE_NAME) in told and "120 s" in told and "delete it" in told


def test_a_damaged_entry_costs_no_ban_of_another_host(clocks: Clocks, tmp_path: Path) -> None:
    refuse(Gate(tmp_path), THERE, 403, 1000)
    content = json.loads((tmp_path / STATE_NAME).read_bytes())
    (tmp_path / STATE_NAME).write_text(json.dumps(content | {HERE.host: 7}))
    assert silences(Gate(tmp_path)) == [120, 120, 1001]
    clocks.tick(121)
    assert silences(Gate(tmp_path)) == [0, 0, 880]


def test_no_folder_is_made_for_attempts_and_none_is_needed(clocks: Clocks, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "none")
    assert gate.take_s(HERE) == 0
    assert list(tmp_path.iterdir()) == []
    refuse(gate, HERE, 418)
    assert silences(Gate(tmp_path / "none")) == [121] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="is about what root does for another OS user")
async def test_what_root_leaves_belongs_to_the_daemon(clocks: Clocks, tmp_path: Path) -> None:
    """A file that the daemon cannot read is a ban that it does not keep."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 54321, 54322)
    gate = Gate(folder)
    assert gate.take_s(HERE) == 0
    refuse(gate, HERE, 418)
    budget = Budget.of(folder, "https://api")
    budget.save()
    DataDir(folder).close()
    left = {path.name: path.stat() for path in folder.iterdir()}
    assert {ATTEMPTS_NAME, STATE_NAME, REST_STATE_NAME, LOCK_NAME} < set(left)
    for name, found in left.items():
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (54321, 54322, 0o600), name
