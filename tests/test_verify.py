import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from tradecore.errors import DifferenceError, StoreError
from tradecore.store.partitions import Partitions
from tradecore.store.verify import Difference, Hole, VerifyReport, verify

pytestmark = pytest.mark.every_level

START = datetime(2024, 8, 8, 23, 0, tzinfo=UTC)


def at(trade_id: int) -> datetime:
    """One trade a minute: id 60 is the first of the next day."""
    return START + timedelta(minutes=trade_id)


class Recorder:
    """Writes rows and ledger as the sink would, and wrong when told so."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def rows(self, symbol: str, first_id: int, last_id: int) -> None:
        ids = range(first_id, last_id + 1)
        await self.connection.executemany(
            "INSERT INTO raw_trades (timestamp, symbol, price, quantity, side, trade_id)"
            " VALUES ($1, $2, 1, 1, 'BUY', $3)",
            [(at(trade_id), symbol, trade_id) for trade_id in ids],
        )

    async def ledger(self, symbol: str, first_id: int, last_id: int) -> None:
        await self.connection.execute(
            "INSERT INTO trade_coverage VALUES ($1, $2, $3, $4, $5)",
            *(symbol, first_id, last_id, at(first_id), at(last_id)),
        )

    async def gap(self, symbol: str, first_id: int, last_id: int, state: str = "open") -> None:
        await self.connection.execute(
            "INSERT INTO trade_gaps (symbol, first_id, last_id, cause, state)"
            " VALUES ($1, $2, $3, 'test', $4)",
            *(symbol, first_id, last_id, state),
        )

    async def both(self, symbol: str, first_id: int, last_id: int) -> None:
        await self.rows(symbol, first_id, last_id)
        await self.ledger(symbol, first_id, last_id)

    async def run(self, sql: str) -> None:
        await self.connection.execute(sql)

    async def differences(self) -> list[tuple[str, str, int, int]]:
        report = await verify(self.connection)
        assert report.difference_count == len(report.differences)
        return [(d.kind, d.symbol, d.first_id, d.last_id) for d in report.differences]


@pytest.fixture
async def recorder(connection: asyncpg.Connection) -> AsyncIterator[Recorder]:
    days = [START.date() + timedelta(days=n) for n in range(5)]
    await Partitions().ensure(connection, "raw_trades", days)
    yield Recorder(connection)


async def test_table_and_ledger_agree(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 3000)
    await recorder.both("ETHUSDT", 50, 70)
    await recorder.both("ETHUSDT", 100, 100)
    await recorder.gap("ETHUSDT", 71, 99)
    calls: list[tuple[int, int]] = []
    report = await verify(
        recorder.connection, progress=lambda done, total: calls.append((done, total))
    )
    report.raise_if_different()
    assert report.differences == []
    assert report.holes == [Hole("ETHUSDT", 71, 99, absent=False)]
    assert (report.symbols, report.ranges) == (2, 3)
    assert report.rows == report.expected_rows == 3022
    assert calls[-1] == (3022, 3022)
    assert len(calls) == 4  # one a day
    assert calls == sorted(calls)


async def test_one_symbol_only(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 100)
    await recorder.both("ETHUSDT", 1, 10)
    await recorder.rows("ETHUSDT", 20, 20)
    report = await verify(recorder.connection, symbol="BTCUSDT")
    assert (report.rows, report.difference_count) == (100, 0)
    report = await verify(recorder.connection, symbol="ETHUSDT")
    assert (report.rows, report.difference_count) == (11, 1)


async def test_nothing_recorded(recorder: Recorder) -> None:
    assert await verify(recorder.connection) == VerifyReport()


async def test_missing_rows_are_named_to_the_id(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 300)
    await recorder.run(
        "DELETE FROM raw_trades WHERE trade_id IN (1, 59, 60, 61, 100, 102, 299, 300)"
    )
    assert await recorder.differences() == [
        ("missing", "BTCUSDT", 1, 1),
        ("missing", "BTCUSDT", 59, 61),
        ("missing", "BTCUSDT", 100, 100),
        ("missing", "BTCUSDT", 102, 102),
        ("missing", "BTCUSDT", 299, 300),
    ]


async def test_a_whole_day_is_missing(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 3000)
    await recorder.run(
        "DELETE FROM raw_trades WHERE timestamp BETWEEN '2024-08-09Z' AND '2024-08-09 23:59:59Z'"
    )
    assert await recorder.differences() == [("missing", "BTCUSDT", 60, 1499)]


async def test_rows_that_the_ledger_does_not_know(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 10, 80)
    await recorder.rows("BTCUSDT", 5, 6)
    await recorder.rows("BTCUSDT", 81, 90)
    await recorder.rows("ETHUSDT", 2000, 2001)
    assert await recorder.differences() == [
        ("stray", "BTCUSDT", 5, 6),
        ("stray", "BTCUSDT", 81, 90),
        ("stray", "ETHUSDT", 2000, 2001),
    ]


async def test_doubled_rows_of_one_day_and_of_two(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 200)
    await recorder.run(
        "INSERT INTO raw_trades SELECT timestamp + interval '1 second', symbol, price, quantity,"
        " side, trade_id FROM raw_trades WHERE trade_id IN (10, 11, 30)"
    )
    await recorder.run(
        "INSERT INTO raw_trades SELECT timestamp + interval '1 day', symbol, price, quantity,"
        " side, trade_id FROM raw_trades WHERE trade_id IN (40, 41, 42)"
    )
    # As many rows as the ledger says, all the same:
    await recorder.run("DELETE FROM raw_trades WHERE trade_id BETWEEN 101 AND 106")
    report = await verify(recorder.connection)
    assert report.rows == report.expected_rows
    assert [str(difference) for difference in report.differences][:4] == [
        "BTCUSDT 10..11: in raw_trades more than once",
        "BTCUSDT 30..30: in raw_trades more than once",
        "BTCUSDT 40..42: in raw_trades more than once",
        "BTCUSDT 101..106: in the ledger and not in raw_trades",
    ]
    with pytest.raises(DifferenceError, match=r"BTCUSDT 10\.\.11"):
        report.raise_if_different()


async def test_times_that_run_back_over_midnight_are_right(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 100)
    # Ids 58 and 61 change places: the venue's times need not follow its ids.
    await recorder.run("DELETE FROM raw_trades WHERE trade_id IN (58, 61)")
    await recorder.run(
        "INSERT INTO raw_trades VALUES"
        " ('2024-08-09 00:01Z', 'BTCUSDT', 1, 1, 'BUY', 58),"
        " ('2024-08-08 23:58Z', 'BTCUSDT', 1, 1, 'BUY', 61)"
    )
    assert await recorder.differences() == []


async def test_a_wrong_time_in_the_ledger(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 100)
    await recorder.run("UPDATE trade_coverage SET last_time = last_time + interval '1 us'")
    assert await recorder.differences() == [("time", "BTCUSDT", 1, 100)]


async def test_ranges_that_should_be_one(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 100)
    await recorder.both("BTCUSDT", 101, 110)
    await recorder.ledger("ETHUSDT", 1, 20)
    await recorder.rows("ETHUSDT", 1, 30)
    await recorder.ledger("ETHUSDT", 15, 30)
    kinds = [difference[:2] for difference in await recorder.differences()]
    assert ("ledger", "BTCUSDT") in kinds
    assert ("ledger", "ETHUSDT") in kinds
    assert not {"missing", "stray", "duplicate"} & {kind for kind, _ in kinds}


async def test_the_history_of_holes(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 10)
    await recorder.both("BTCUSDT", 20, 30)
    await recorder.both("BTCUSDT", 40, 50)
    await recorder.gap("BTCUSDT", 11, 15)
    await recorder.gap("BTCUSDT", 25, 35, "absent")
    await recorder.gap("BTCUSDT", 36, 39, "absent")
    await recorder.gap("BTCUSDT", 5, 9, "filled")
    await recorder.both("ETHUSDT", 1, 1)
    await recorder.both("ETHUSDT", 9, 9)
    await recorder.gap("ETHUSDT", 2, 8)
    await recorder.gap("ETHUSDT", 4, 5, "absent")
    report = await verify(recorder.connection)
    assert report.holes[:2] == [Hole("BTCUSDT", 11, 19, False), Hole("BTCUSDT", 31, 39, True)]
    assert report.differences == [
        Difference("history", "BTCUSDT", 16, 19),
        Difference("history", "BTCUSDT", 25, 30),
        Difference("history", "ETHUSDT", 4, 5),
    ]


async def test_open_and_absent_parts_are_told_apart(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 10)
    await recorder.both("BTCUSDT", 20, 30)
    await recorder.gap("BTCUSDT", 11, 13)
    await recorder.gap("BTCUSDT", 14, 15, "absent")
    await recorder.gap("BTCUSDT", 16, 19)
    report = await verify(recorder.connection)
    report.raise_if_different()
    assert report.open_holes == [Hole("BTCUSDT", 11, 13, False), Hole("BTCUSDT", 16, 19, False)]
    assert report.absent_holes == [Hole("BTCUSDT", 14, 15, True)]
    assert report.holes == sorted(report.holes, key=lambda hole: hole.first_id)


async def test_marks_are_held_against_their_rows(recorder: Recorder) -> None:
    await recorder.both("BTCUSDT", 1, 100)
    await recorder.both("ETHUSDT", 1, 100)
    await recorder.connection.executemany(
        "INSERT INTO trade_times VALUES ($1, $2, $3)",
        [
            ("BTCUSDT", 10, at(10)),
            ("BTCUSDT", 20, at(20) + timedelta(microseconds=1)),
            ("BTCUSDT", 101, at(101)),
            ("ETHUSDT", 30, at(30)),
            ("NONEUSDT", 10, at(10)),
        ],
    )
    assert await recorder.differences() == [
        ("mark", "BTCUSDT", 20, 20),
        ("mark", "BTCUSDT", 101, 101),
        ("mark", "NONEUSDT", 10, 10),
    ]
    assert (await verify(recorder.connection, symbol="ETHUSDT")).difference_count == 0


async def test_many_differences_are_counted_not_kept(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tradecore.store.verify.MAX_LISTED", 10)
    await recorder.both("BTCUSDT", 1, 200)
    await recorder.run("DELETE FROM raw_trades WHERE trade_id % 2 = 0")
    report = await verify(recorder.connection)
    assert len(report.differences) == 10
    assert report.difference_count == 100


@pytest.mark.two_sessions
async def test_one_snapshot_while_others_write(
    recorder: Recorder, migrated_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tradecore.store.verify._ROWS_PER_PIECE", 10)
    await recorder.both("BTCUSDT", 1, 200)
    other = await asyncpg.connect(migrated_database)
    pieces = 0

    def write_meanwhile(done: int, total: int) -> None:
        nonlocal pieces
        pieces += 1

    async with other.transaction():
        await Recorder(other).both("ETHUSDT", 150, 160)
        report = await verify(recorder.connection, progress=write_meanwhile)
    assert pieces == 4  # hours
    assert (report.rows, report.difference_count) == (200, 0)
    assert (await verify(recorder.connection)).rows == 211
    await other.close()


async def test_random_damage_against_an_oracle(recorder: Recorder) -> None:
    rng = random.Random(7)
    await recorder.both("BTCUSDT", 1, 2000)
    lost = sorted(rng.sample(range(2, 2000), 300))
    await recorder.connection.execute("DELETE FROM raw_trades WHERE trade_id = ANY($1)", lost)
    stray = sorted(rng.sample(range(2100, 3000), 200))
    for trade_id in stray:
        await recorder.rows("BTCUSDT", trade_id, trade_id)
    ids: dict[str, list[int]] = {"missing": [], "stray": []}
    for kind, _, first_id, last_id in await recorder.differences():
        ids[kind] += range(first_id, last_id + 1)
    assert ids == {"missing": lost, "stray": stray}


async def test_without_tables(database: str) -> None:
    connection = await asyncpg.connect(database)
    with pytest.raises(StoreError, match="tradecore migrate"):
        await verify(connection)
    await connection.close()
