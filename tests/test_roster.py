"""What a change of the captured symbols does, in which order; the feed is real and not running."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.errors import DataDirError
from tradecore.feed.feed import Feed
from tradecore.ring import Ring
from tradecore.roster import Roster, first_symbols
from tradecore.settings import load
from tradecore.shards import symbols_of

THREE = "BTCUSDT,ETHUSDT,PEPEUSDT"


class Desk:
    """A roster, and what it calls."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.environ = {"SUPPORTED_SYMBOLS": THREE, "DATA_DIR": str(folder), **environ}
        settings = load(self.environ)
        self.ring = Ring(folder / "ring", 1024)
        for symbol in settings.symbols:
            self.ring.intern(symbol)
        self.capture = Capture(self.ring, self.ring.symbols, Conflator(len(self.ring.symbols)))
        self.calls: list[tuple[str, list[str], list[str]]] = []
        self.feed = Feed(
            replace(settings, symbols=first_symbols(settings)),
            lambda owner, line, epoch: None,  # type: ignore[arg-type,return-value]
            symbol_id=self.ring.intern,
            confirm=self._confirm,
        )
        self.roster = Roster(
            settings, self.ring, self.capture, self.feed, self._on_added, self._on_changed
        )

    async def _confirm(self, symbols: Sequence[str]) -> set[str]:
        return set()

    @property
    def subscribed(self) -> list[str]:
        return sorted({symbol for one in self.feed.connections for symbol in one.share.symbols})

    async def _on_added(self, symbols: Sequence[str]) -> None:
        for symbol in symbols:
            self.capture.track(symbol)  # raises for one that the capture does not know
            assert symbol in self.roster.symbols, "its marks could not be taken"
        self.calls.append(("added", list(symbols), self.subscribed))

    def _on_changed(self, symbols: Sequence[str]) -> None:
        self.calls.append(("changed", list(symbols), self.subscribed))

    async def hang_up(self, **changes: str) -> None:
        self.environ |= changes
        await self.roster.reload(self.environ)


async def test_marks_are_taken_before_an_added_symbol_is_subscribed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    await desk.hang_up(SUPPORTED_SYMBOLS="BTCUSDT,LTCUSDT")
    assert desk.roster.symbols == ("BTCUSDT", "LTCUSDT")
    assert desk.calls == [
        ("added", ["LTCUSDT"], sorted(THREE.split(","))),
        ("changed", ["LTCUSDT"], ["BTCUSDT", "LTCUSDT"]),
    ]


async def test_shards_choose_among_the_symbols_of_today(tmp_path: Path) -> None:
    desk = Desk(tmp_path, SHARDS="4")
    assert desk.roster.symbols == ()
    assert desk.feed.connections == ()
    held = frozenset({0, 2})
    await desk.roster.share(held)
    assert desk.roster.symbols == symbols_of(THREE.split(","), 4, held) == ("ETHUSDT", "PEPEUSDT")
    await desk.hang_up(SUPPORTED_SYMBOLS=f"{THREE},BNBUSDT,ADAUSDT")
    assert desk.roster.symbols == ("ETHUSDT", "PEPEUSDT", "BNBUSDT")
    await desk.roster.share(frozenset())
    assert desk.subscribed == []
    assert desk.feed.connections == ()


async def test_a_wrong_setting_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(tmp_path)
    await desk.hang_up(SUPPORTED_SYMBOLS="BTCUSDT", BATCH_SIZE="-1")
    assert desk.roster.symbols == tuple(THREE.split(","))
    assert desk.calls == []
    (record,) = caplog.records
    assert "going on with the present ones" in record.message


async def test_sighup_without_a_change_touches_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(tmp_path)
    caplog.set_level("INFO")
    await desk.hang_up()
    assert desk.calls == []
    assert [record.message for record in caplog.records] == ["SIGHUP: nothing has changed"]


async def test_symbols_that_could_not_be_added_are_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)

    def full(symbol: str) -> int:
        raise DataDirError("the symbol table is full")

    with monkeypatch.context() as patch:
        patch.setattr(desk.roster, "_ring", SimpleNamespace(intern=full))
        for _ in range(2):
            caplog.clear()
            await desk.hang_up(SUPPORTED_SYMBOLS=f"{THREE},LTCUSDT")
            (record,) = caplog.records
            assert "cannot be added" in record.message
    await desk.roster.share(frozenset())
    assert desk.subscribed == sorted(THREE.split(","))
    await desk.hang_up()
    assert desk.subscribed == sorted([*THREE.split(","), "LTCUSDT"])


async def test_what_takes_a_restart_is_named_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(tmp_path)
    for _ in range(2):
        caplog.clear()
        await desk.hang_up(BATCH_SIZE="7", FEED_LINES="2")
        (record,) = [one for one in caplog.records if one.levelname == "WARNING"]
        assert record.__dict__["settings"] == ["FEED_LINES", "BATCH_SIZE"]
    assert desk.subscribed == sorted(THREE.split(","))
