"""Marks of the ring: when the sockets are paused, and when everything is as before."""

import asyncio
from pathlib import Path

import pytest

from tests.test_capture import trade
from tradecore import backpressure
from tradecore.backpressure import Backpressure
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.ring import Ring

CAPACITY = 1024
SOCKET_ROWS = 100


class Desk:
    """A back-pressure over a real ring; notes what is asked of the feed."""

    def __init__(self, path: Path) -> None:
        self.ring = Ring(path, CAPACITY)
        self.ring.intern("BTCUSDT")
        self.capture = Capture(self.ring, self.ring.symbols, Conflator(1))
        self.sockets = 1
        self.paused: list[bool] = []
        self.next_id = 1
        self.pressure = Backpressure(self.ring, self.capture, self, lambda: self.sockets)

    def pause_reading(self) -> None:
        self.paused.append(True)

    def resume_reading(self) -> None:
        self.paused.append(False)

    def fill(self, rows: int) -> None:
        """Receive trades until so many wait."""
        while self.ring.pending < rows:
            self.capture.feed(trade(self.next_id))
            self.next_id += 1

    def drain(self, rows: int) -> None:
        """Store trades until so many wait."""
        self.ring.release(self.ring.pending - rows)
        self.pressure.after_release()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(backpressure, "ROWS_PER_SOCKET", SOCKET_ROWS)
    return Desk(tmp_path / "ring")


async def test_sockets_are_paused_at_the_mark_and_read_again_at_half_of_it(desk: Desk) -> None:
    high = CAPACITY - SOCKET_ROWS
    desk.fill(high - 1)
    assert desk.paused == []
    desk.fill(high)
    assert desk.paused == [True]
    desk.drain(high // 2 + 1)
    assert desk.paused == [True]
    desk.drain(high // 2)
    assert desk.paused == [True, False]
    desk.fill(high)
    assert desk.paused == [True, False, True]


async def test_more_sockets_need_more_room(desk: Desk) -> None:
    desk.sockets = 3
    desk.pressure.watch()
    desk.fill(CAPACITY - 3 * SOCKET_ROWS)
    assert desk.paused == [True]


async def test_a_change_while_paused_does_not_forget_that(desk: Desk) -> None:
    desk.fill(CAPACITY - SOCKET_ROWS)
    desk.sockets = 3
    desk.pressure.watch()
    assert desk.capture.above_high_water
    desk.drain(10)
    assert desk.paused == [True, False]
    desk.fill(CAPACITY - 3 * SOCKET_ROWS)
    assert desk.paused == [True, False, True], "the new mark holds"


async def test_reading_goes_on_when_the_pause_has_lasted(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backpressure, "PAUSE_LIMIT_S", 0.0)
    desk.fill(CAPACITY - SOCKET_ROWS)
    async with asyncio.timeout(10):
        while desk.paused != [True, False]:
            await asyncio.sleep(0)
    desk.fill(CAPACITY)
    before = desk.capture.counters()["ring_full"]
    desk.capture.feed(trade(desk.next_id))
    assert desk.capture.counters()["ring_full"] == before + 1
