"""What is told of holes, by a ledger that changes between the looks."""

import asyncio
from typing import Any

import pytest

from tradecore import hole_news
from tradecore.errors import TransientStoreError
from tradecore.hole_news import HoleNews
from tradecore.store.holes import HoleFate


class Desk:
    """A ledger with its rows, and what was told."""

    def __init__(self) -> None:
        self.rows: list[HoleFate] = []
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.told: list[tuple[Any, ...]] = []
        self.fails = False
        self.news = HoleNews(self, self.wanted, lambda hole: self.told.append(tuple(hole)))

    async def newest_open(self, limit: int) -> list[HoleFate]:
        if self.fails:
            raise TransientStoreError("down", "down")
        return [row for row in reversed(self.rows) if row.state == "open"][:limit]

    async def hole_fates(self, symbol: str, first_id: int, last_id: int) -> list[HoleFate]:
        return [
            row
            for row in self.rows
            if row.symbol == symbol and row.first_id <= last_id and row.last_id >= first_id
        ]

    def write(self, *rows: tuple[int, int, str]) -> None:
        self.rows = [HoleFate("BTCUSDT", a, b, "disconnect", state) for a, b, state in rows]

    async def look(self) -> list[tuple[int, int, str]]:
        """Look; return what is told by it: first id, last id, state."""
        await self.news.look()
        told, self.told = self.told, []
        assert all(one[0] == "BTCUSDT" and one[3] == "disconnect" for one in told)
        return [(one[1], one[2], one[4]) for one in told]


@pytest.fixture
async def desk() -> Desk:
    return Desk()


async def test_what_was_open_before_is_no_news_but_its_end_is(desk: Desk) -> None:
    desk.write((10, 19, "open"), (50, 50, "absent"))
    assert await desk.look() == []
    desk.write((10, 19, "filled"), (50, 50, "absent"))
    assert await desk.look() == [(10, 19, "filled")]
    assert await desk.look() == []


async def test_a_hole_opens_shrinks_and_ends(desk: Desk) -> None:
    assert await desk.look() == []
    desk.write((10, 19, "open"))
    assert await desk.look() == [(10, 19, "open")]
    desk.write((10, 14, "open"), (15, 19, "filled"))
    assert await desk.look() == [(15, 19, "filled")]
    desk.write((10, 11, "absent"), (12, 12, "open"), (13, 14, "filled"), (15, 19, "filled"))
    assert await desk.look() == [(10, 11, "absent"), (13, 14, "filled")]
    desk.write((10, 12, "absent"), (13, 19, "filled"))
    assert await desk.look() == [(12, 12, "absent")]


async def test_a_hole_that_was_filled_before_the_look_is_told_all_the_same(desk: Desk) -> None:
    desk.news.opened([("BTCUSDT", 10, 19)])
    desk.write((10, 19, "filled"))
    assert await desk.look() == [(10, 19, "open"), (10, 19, "filled")]
    desk.news.opened([("BTCUSDT", 30, 39)])
    desk.write((10, 19, "filled"), (30, 34, "filled"), (35, 39, "open"))
    assert await desk.look() == [(30, 39, "open"), (30, 34, "filled")]
    desk.news.opened([("BTCUSDT", 35, 39)])
    assert await desk.look() == []


async def test_ids_that_are_opened_again_are_told_again(desk: Desk) -> None:
    desk.write((10, 19, "absent"))
    assert await desk.look() == []
    desk.write((10, 19, "open"))
    assert await desk.look() == [(10, 19, "open")]


async def test_nothing_is_lost_or_doubled_while_the_database_is_away(desk: Desk) -> None:
    desk.write((10, 19, "open"))
    assert await desk.look() == []
    desk.news.opened([("BTCUSDT", 30, 39)])
    desk.write((10, 19, "filled"), (30, 39, "open"))
    desk.fails = True
    with pytest.raises(TransientStoreError):
        await desk.look()
    assert desk.told == []
    desk.fails = False
    assert await desk.look() == [(30, 39, "open"), (10, 19, "filled")]


async def test_old_holes_that_come_into_view_are_no_news(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(hole_news, "MAX_OPEN", 2)
    desk.write((10, 10, "open"), (20, 20, "open"), (30, 30, "open"))
    assert await desk.look() == []
    desk.write((10, 10, "open"), (20, 20, "open"), (30, 30, "filled"))
    assert await desk.look() == [(30, 30, "filled")]


async def test_nothing_is_noted_while_nobody_wants_to_know(desk: Desk) -> None:
    desk.wanted.clear()
    desk.news.opened([("BTCUSDT", 10, 19)])
    desk.news.changed()
    desk.write((10, 19, "open"))
    running = asyncio.create_task(desk.news.run())
    desk.wanted.set()
    async with asyncio.timeout(20):
        while desk.news._known is None:
            await asyncio.sleep(0)
        desk.write((10, 19, "filled"))
        while not desk.told:
            desk.news.changed()
            await asyncio.sleep(0.01)
    running.cancel()
    assert [one[1:] for one in desk.told] == [(10, 19, "disconnect", "filled")]
