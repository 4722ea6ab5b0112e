"""What the store tells of holes, and what closes them, against an oracle that keeps every id."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from store_desk import NAMES, Database, batch, trade, trades

from tradecore._symbols import SymbolTable
from tradecore.errors import TransientStoreError
from tradecore.schema import (
    FLAG_AFTER_REFUSED,
    FLAG_FIRST_OF_EPOCH,
    FLAG_FIRST_OF_RUN,
)
from tradecore.settings import load
from tradecore.store.holes import Bounds, HoleSummary, OpenHole, SymbolHoles
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import HoleId, Sink
from tradecore.store.store import Store
from tradecore.store.verify import verify

pytestmark = pytest.mark.every_level


@pytest.fixture
async def store(db: Database) -> AsyncIterator[Store]:
    """The store on the same database as `db`."""
    settings = load({"DATABASE_URL": db.dsn, "DB_POOL_SIZE": "3"})
    store = Store(settings, db.symbols)
    yield store
    await store.close()


def time_of(symbol_id: int, trade_id: int) -> int:
    return trade(symbol_id, trade_id)["trade_us"]


@dataclass
class Oracle:
    """What one symbol's ledger and history must say: one entry for every single id."""

    stored: set[int] = field(default_factory=set)
    fates: dict[int, tuple[str, str | None, str | None]] = field(default_factory=dict)
    """Of ids that were ever missing: state, filled_by, evidence."""

    def store(self, ids: set[int], by: str) -> None:
        before, new = self._missing(), ids - self.stored
        self.stored |= new
        for trade_id in before & new:
            self.fates[trade_id] = ("filled", by, self.fates[trade_id][2])
        for trade_id in self._missing() - before:
            self.fates[trade_id] = ("open", None, None)

    def close(self, ids: set[int], evidence: str) -> int:
        chosen = {i for i in ids if self.fates.get(i, ("",))[0] == "open"}
        self.fates |= dict.fromkeys(chosen, ("absent", None, evidence))
        return len(chosen)

    def _missing(self) -> set[int]:
        if not self.stored:
            return set()
        return set(range(min(self.stored), max(self.stored))) - self.stored

    def open(self) -> list[tuple[int, int]]:
        return spans_of({i for i, fate in self.fates.items() if fate[0] == "open"})


def spans_of(ids: set[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for trade_id in sorted(ids):
        if spans and spans[-1][1] + 1 == trade_id:
            spans[-1] = (spans[-1][0], trade_id)
        else:
            spans.append((trade_id, trade_id))
    return spans


async def history(db: Database, symbol: str) -> dict[int, tuple[str, str | None, str | None]]:
    """What trade_gaps says of each id; no id is told twice."""
    told: dict[int, tuple[str, str | None, str | None]] = {}
    for row in await db.conn.fetch(
        "SELECT first_id, last_id, state, filled_by, evidence ->> 'n', filled_at FROM trade_gaps"
        " WHERE symbol = $1",
        symbol,
    ):
        assert (row["filled_at"] is None) == (row["state"] == "open")
        for trade_id in range(row["first_id"], row["last_id"] + 1):
            assert trade_id not in told
            told[trade_id] = tuple(row)[2:5]
    return told


async def check(db: Database, store: Store, oracles: list[Oracle]) -> None:
    """Everything that the store tells is what the oracles say."""
    await db.check_ledger()
    (await verify(db.conn)).raise_if_different()
    expected: list[tuple[str, int, int]] = []
    bounds: dict[str, tuple[int, int]] = {}
    for name, oracle in zip(NAMES, oracles, strict=False):
        assert await history(db, name) == oracle.fates
        expected += [(name, *span) for span in oracle.open()]
        if oracle.stored:
            bounds[name] = (min(oracle.stored), max(oracle.stored))
            assert await store.covered(name, 5, 60) == spans_of(oracle.stored & set(range(5, 61)))
    found = await store.open_holes()
    assert sorted(hole[:3] for hole in found) == sorted(expected)
    assert [hole.above_us for hole in found] == sorted((h.above_us for h in found), reverse=True)
    assert {name: each[:2] for name, each in (await store.bounds()).items()} == bounds
    summary = await store.hole_summary()
    assert summary.holes == len(expected) == await store.count_holes()
    assert summary.ids_missing == sum(hole.ids for hole in found)
    assert {name: each[:2] for name, each in summary.by_symbol.items()} == {
        name: (len(spans), sum(last - first + 1 for first, last in spans))
        for name, oracle in zip(NAMES, oracles, strict=False)
        if (spans := oracle.open())
    }


async def test_random_fills_closings_and_late_arrivals(db: Database, store: Store) -> None:
    random = np.random.default_rng(41)
    oracles = [Oracle() for _ in range(3)]
    for number in range(60):
        symbol_id = int(random.integers(0, 3))
        first = int(random.integers(0, 70))
        ids = set(range(first, first + int(random.integers(1, 20))))
        if random.random() < 0.4:
            evidence = {"n": str(number % 3)}
            closed = await store.close_absent(NAMES[symbol_id], min(ids), max(ids), evidence)
            assert closed == oracles[symbol_id].close(ids, evidence["n"])
        else:
            by = ("feed", "rest", "dump")[int(random.integers(0, 3))]
            ids -= set(random.integers(0, 90, 12).tolist())
            rows = trades(*(trade(symbol_id, trade_id) for trade_id in ids))
            await store.write_trades(random.permutation(rows), filled_by=by)
            oracles[symbol_id].store(ids, by)
        await check(db, store, oracles)


async def test_two_writers_at_once(db: Database, store: Store) -> None:
    """Each closes, fills and stores what it likes; the end is that of all ids in any order."""
    pool = await open_pool(db.dsn, 3)
    other = Sink(pool, db.symbols, Partitions())
    closed: set[int] = set()

    async def write(seed: int, target: Sink | Store) -> set[int]:
        random = np.random.default_rng(seed)
        stored: set[int] = set()
        for _ in range(40):
            first = int(random.integers(0, 150))
            last = first + int(random.integers(0, 12))
            if random.random() < 0.5:
                await target.close_absent("BTCUSDT", first, last, {"n": "1"})
                closed.update(range(first, last + 1))
            else:
                ids = set(range(first, last + 1)) - set(random.integers(0, 160, 30).tolist())
                rows = trades(*(trade(0, trade_id) for trade_id in sorted(ids)))
                await target.write_trades(rows)
                stored |= ids
        return stored

    results = await asyncio.gather(write(1, store), write(2, other), write(3, other))
    stored = set[int]().union(*results)
    await db.check_ledger()
    (await verify(db.conn)).raise_if_different()
    assert await store.covered("BTCUSDT", 0, 1000) == spans_of(stored)
    told = await history(db, "BTCUSDT")
    assert {i for i, fate in told.items() if fate[0] != "filled"} == set(
        range(min(stored), max(stored))
    ) - stored
    assert {i for i, fate in told.items() if fate[0] == "absent"} <= closed
    await asyncio.wait_for(pool.close(), 10)


async def test_an_absent_id_that_comes_after_all(db: Database, store: Store) -> None:
    await store.write_trades(batch((0, 1, 10), (0, 21, 30)))
    assert await store.close_absent("BTCUSDT", 5, 25, {"source": "rest", "asked": 11}) == 10
    assert await store.close_absent("BTCUSDT", 1, 99, {"source": "rest"}) == 0
    assert await store.open_holes() == []
    assert await store.count_holes() == 0
    await store.write_trades(batch((0, 15, 15)), filled_by="dump")
    rows = await db.conn.fetch(
        "SELECT first_id, last_id, state, filled_by, evidence FROM trade_gaps ORDER BY first_id"
    )
    assert [tuple(row)[:4] for row in rows] == [
        (11, 14, "absent", None),
        (15, 15, "filled", "dump"),
        (16, 20, "absent", None),
    ]
    # The row tells both: what was held to prove that there is none, and who brought it.
    assert {json.dumps(json.loads(row[4])) for row in rows} == {'{"asked": 11, "source": "rest"}'}
    await db.check_ledger()


async def test_pages_that_are_closed_alike_become_one_row(db: Database, store: Store) -> None:
    await store.write_trades(batch((0, 1, 1), (0, 100, 100)))
    for first in (2, 52, 27, 77):
        last = min(first + 24, 99)
        assert await store.close_absent("BTCUSDT", first, last, {"b": 1, "a": [2]}) > 0
    assert await db.gaps() == [(2, 99, "unknown", "absent", None)]


async def test_times_around_a_hole(db: Database, store: Store) -> None:
    await store.write_trades(batch((0, 1, 10)))
    await store.write_trades(batch((0, 20, 29)))
    await store.write_trades(batch((0, 40, 40), (1, 8, 8), (1, 10, 10)))
    await store.close_absent("BTCUSDT", 13, 14, {})
    detected = {
        (row[0], row[1]): row[2]
        for row in await db.conn.fetch(
            "SELECT symbol, first_id, (extract(epoch FROM detected_at) * 1000000)::int8"
            " FROM trade_gaps"
        )
    }
    below = max(time_of(0, i) for i in range(1, 11))
    above = min(time_of(0, i) for i in range(20, 30))
    expected = [
        OpenHole(name, first, last, "unknown", detected[name, first], below_us, above_us)
        for name, first, last, below_us, above_us in (
            ("BTCUSDT", 11, 12, below, above),
            ("BTCUSDT", 15, 19, below, above),
            (
                *("BTCUSDT", 30, 39, max(time_of(0, i) for i in range(20, 30))),
                time_of(0, 40),
            ),
            ("ETHUSDT", 9, 9, time_of(1, 8), time_of(1, 10)),
        )
    ]
    expected.sort(key=lambda hole: (-hole.above_us, hole.symbol, -hole.first_id))
    assert await store.open_holes() == expected
    assert await store.open_holes(limit=2) == expected[:2]
    assert await store.open_holes(symbol="ETHUSDT") == [expected[-1]]
    assert await store.open_holes(symbol="NONEUSDT") == []
    assert await store.hole_summary() == HoleSummary(
        4,
        18,
        min(detected.values()),
        {"BTCUSDT": SymbolHoles(3, 17, below), "ETHUSDT": SymbolHoles(1, 1, time_of(1, 8))},
    )
    eth = Bounds(8, 10, time_of(1, 10), time_of(1, 8))  # these times do not ascend
    assert await store.bounds("ETHUSDT") == {"ETHUSDT": eth}
    assert (await store.bounds())["ETHUSDT"] == eth
    assert await store.bounds("NONEUSDT") == {}


async def test_nothing_is_stored(store: Store) -> None:
    assert await store.open_holes() == []
    assert await store.hole_summary() == HoleSummary(0, 0, None, {})
    assert await store.bounds() == {}
    assert await store.covered("BTCUSDT", 0, 9) == []
    assert await store.time_window("BTCUSDT", 1) is None
    assert await store.close_absent("BTCUSDT", 0, 9, {}) == 0


async def test_a_database_that_is_away(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Store(load({"DATABASE_URL": "postgresql://u:p@127.0.0.1:1/d"}), db.symbols)
    calls: list[Callable[[], Any]] = [
        away.open_holes,
        away.hole_summary,
        away.bounds,
        lambda: away.covered("BTCUSDT", 1, 2),
        lambda: away.time_window("BTCUSDT", 1),
        lambda: away.close_absent("BTCUSDT", 1, 2, {}),
    ]
    for call in calls:
        with pytest.raises(TransientStoreError):
            await call()
    with pytest.raises(TransientStoreError):
        _ = away.pool
    assert await away.count_holes() is None


async def test_a_connection_that_is_cut_while_open(db: Database, store: Store) -> None:
    await store.open()
    await store.bounds()
    await db.conn.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    failures = 0
    async with asyncio.timeout(10):
        while True:
            try:
                assert await store.open_holes() == []
                break
            except TransientStoreError as error:
                assert not error.fatal_looking
                failures += 1
    assert failures <= 3


# ---- causes ----------------------------------------------------------------------------------


async def test_each_hole_has_the_cause_that_its_own_row_tells(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 1), (1, 1, 1)))
    rows = batch((0, 10, 12), (0, 20, 22), (1, 30, 31), (0, 40, 41), (0, 50, 50), (1, 60, 60))
    flags = {
        (0, 10): FLAG_FIRST_OF_RUN,
        (0, 11): FLAG_AFTER_REFUSED,  # no hole before it
        (0, 20): FLAG_AFTER_REFUSED | FLAG_FIRST_OF_EPOCH,
        (1, 30): FLAG_FIRST_OF_EPOCH,
        (0, 50): FLAG_FIRST_OF_EPOCH,
    }
    for row in rows:
        row["flags"] |= flags.get((int(row["symbol_id"]), int(row["trade_id"])), 0)
    result = await db.sink.write_trades(np.random.default_rng(2).permutation(rows))
    causes = {
        HoleId(*row[:3]): row[3]
        for row in await db.conn.fetch("SELECT symbol, first_id, last_id, cause FROM trade_gaps")
    }
    assert causes == {
        HoleId("BTCUSDT", 2, 9): "restart",
        HoleId("BTCUSDT", 13, 19): "overload",
        HoleId("BTCUSDT", 23, 39): "unknown",
        HoleId("BTCUSDT", 42, 49): "disconnect",
        HoleId("ETHUSDT", 2, 29): "disconnect",
        HoleId("ETHUSDT", 32, 59): "unknown",
    }
    assert sorted(result.opened) == sorted(causes)


async def test_late_rows_do_not_hide_why_the_ids_jumped(db: Database) -> None:
    """The other line brings the end of the hole after the jump, in the same batch."""
    await db.sink.write_trades(batch((0, 1, 90)))
    rows = batch((0, 100, 103), (0, 97, 99), (0, 95, 96), (0, 104, 104), (1, 95, 99))
    rows["flags"][0] |= FLAG_FIRST_OF_EPOCH
    await db.sink.write_trades(rows)
    assert await db.gaps() == [(91, 94, "disconnect", "open", None)]


async def test_a_given_cause_wins(db: Database) -> None:
    rows = batch((0, 100, 101), (0, 110, 110))
    rows["flags"] |= FLAG_FIRST_OF_RUN
    await db.sink.write_trades(rows[:2])
    await db.sink.write_trades(rows[2:], hole_cause="import")
    result = await db.sink.write_trades(batch((0, 1, 5)), hole_cause="history")
    assert result.opened == (HoleId("BTCUSDT", 6, 99),)
    assert [gap[2] for gap in await db.gaps()] == ["history", "import"]


async def test_rows_with_ids_of_another_table(db: Database, store: Store) -> None:
    """A back-fill need not know the ring's symbol ids, nor the ring the back-fill's symbols."""
    table = SymbolTable()
    for name in ("NEWUSDT", "ETHUSDT"):
        table.add(name)
    rows = batch((0, 1, 3), (1, 5, 6))
    assert (await store.write_trades(rows, symbols=table, filled_by="rest"))[:3] == (5, 0, 0)
    assert (await store.write_trades(batch((1, 4, 7))))[:3] == (2, 2, 0)
    found = await store.bounds()
    assert {name: each[:2] for name, each in found.items()} == {
        "ETHUSDT": (4, 7),
        "NEWUSDT": (1, 3),
    }
    (await verify(db.conn)).raise_if_different()
