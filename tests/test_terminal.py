import asyncio
from dataclasses import replace

import pytest
from snapshots import HEALTHY

from tradecore import log, terminal
from tradecore.terminal import status_line


def test_line_tells_rate_lag_ring_holes_connections() -> None:
    assert status_line(HEALTHY, 200) == (
        "64 trades/s | lag 0.1 s | ring 25.0% | holes 7 (70 ids, filling 3) | connections 2/2"
        " | streams 6/6 | stored 1,011 | room for 12.0 s"
    )


def test_a_database_that_is_away_comes_right_after_the_rate() -> None:
    away = replace(HEALTHY, database=replace(HEALTHY.database, reachable=False, away_s=200.0))
    assert status_line(away, 200).startswith("64 trades/s | database away 3 min | lag ")


def test_line_fits_the_terminal() -> None:
    for columns in range(120):
        line = status_line(HEALTHY, columns)
        assert len(line) <= columns
        assert status_line(HEALTHY, 200).startswith(line)


def test_no_rate_means_room_for_ever() -> None:
    assert status_line(replace(HEALTHY, received_per_s=0.0), 200).endswith("room for ever")


async def test_show_redraws_until_cancelled_and_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    three = asyncio.Event()

    def draw(text: str) -> None:
        drawn.append(text)
        if len(drawn) == 3:
            three.set()

    monkeypatch.setattr(log, "show_status", draw)
    task = asyncio.create_task(terminal.show(lambda: HEALTHY, interval_s=0.001))
    await asyncio.wait_for(three.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert drawn[0].startswith("64 trades/s")
    assert drawn[-1] == ""
