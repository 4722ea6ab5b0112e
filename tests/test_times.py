"""From an id to a time: the marks beside the ledger and what is told from them."""

import numpy as np
import pytest
from store_desk import NAMES, NOW_US, Database, trade, trades

from tradecore.schema import FLAG_VOID
from tradecore.store.times import MARK_EVERY, time_window

STEP_US = 1000


def ascending(symbol_id: int, *spans: tuple[int, int]) -> np.ndarray:
    """Trades whose times ascend with their ids."""
    rows = trades(*(trade(symbol_id, i) for first, last in spans for i in range(first, last + 1)))
    rows["trade_us"] = NOW_US + rows["trade_id"] * STEP_US
    return rows


def us(trade_id: int) -> int:
    return NOW_US + trade_id * STEP_US


async def marks(db: Database) -> list[tuple[str, int]]:
    rows = await db.conn.fetch("SELECT symbol, trade_id FROM trade_times ORDER BY 1, 2")
    return [(row[0], row[1]) for row in rows]


async def test_marks_come_with_their_rows(db: Database) -> None:
    near = (MARK_EVERY - 3, MARK_EVERY + 3)
    await db.sink.write_trades(ascending(0, (0, 2), near))
    await db.sink.write_trades(ascending(1, (5, 9)))
    await db.sink.write_trades(ascending(2, (2 * MARK_EVERY, 2 * MARK_EVERY)))
    assert await marks(db) == [
        (NAMES[0], 0),
        (NAMES[0], MARK_EVERY),
        (NAMES[2], 2 * MARK_EVERY),
    ]
    # Offered again with other times, as a duplicate and as a void row: the mark stays.
    again = ascending(0, near)
    again["trade_us"] += 1
    await db.sink.write_trades(again)
    void = ascending(0, (MARK_EVERY, MARK_EVERY), (MARK_EVERY + 4, MARK_EVERY + 5))
    void["trade_us"] += 2
    void["flags"][0] = FLAG_VOID
    await db.sink.write_trades(void)
    await db.check_ledger()


async def test_marks_of_a_careful_batch(db: Database) -> None:
    await db.conn.execute("ALTER TABLE raw_trades ADD CONSTRAINT odd CHECK (quantity <> 13)")
    rows = ascending(0, (MARK_EVERY - 2, MARK_EVERY + 1), (3 * MARK_EVERY, 3 * MARK_EVERY))
    rows["quantity_e8"][2] = 13 * 10**8
    assert (await db.sink.write_trades(rows))[:3] == (4, 0, 1)
    assert await marks(db) == [(NAMES[0], 3 * MARK_EVERY)]
    await db.check_ledger()


@pytest.fixture
async def sparse(db: Database) -> Database:
    """A ledger with one range of 300,000 ids and one of ten, as if all of their rows were there."""
    await db.conn.executemany(
        "INSERT INTO trade_coverage SELECT $1, $2, $3,"
        " timestamptz 'epoch' + $4 * interval '1 us', timestamptz 'epoch' + $5 * interval '1 us'",
        [
            ("BTCUSDT", 1000, 300_000, us(1000), us(300_000)),
            ("BTCUSDT", 300_010, 300_019, us(300_010), us(300_019)),
        ],
    )
    await db.conn.executemany(
        "INSERT INTO trade_times SELECT 'BTCUSDT', $1, timestamptz 'epoch' + $2 * interval '1 us'",
        [(n * MARK_EVERY, us(n * MARK_EVERY)) for n in range(1, 5)],
    )
    return db


@pytest.mark.parametrize(
    ("trade_id", "first_id", "last_id"),
    [
        (1000, 1000, MARK_EVERY),
        (MARK_EVERY - 1, 1000, MARK_EVERY),
        (MARK_EVERY, MARK_EVERY, MARK_EVERY),
        (MARK_EVERY + 1, MARK_EVERY, 2 * MARK_EVERY),
        (299_000, 4 * MARK_EVERY, 300_000),
        (300_000, 4 * MARK_EVERY, 300_000),
        (300_015, 300_010, 300_019),
    ],
)
async def test_the_window_of_an_id(
    sparse: Database, trade_id: int, first_id: int, last_id: int
) -> None:
    window = await time_window(sparse.conn, "BTCUSDT", trade_id)
    assert window == (us(first_id), us(last_id))
    ends = (1000, 300_000) if trade_id <= 300_000 else (300_010, 300_019)
    whole = await time_window(sparse.conn, "BTCUSDT", trade_id, whole_range=True)
    assert whole == (us(ends[0]), us(ends[1]))


@pytest.mark.parametrize(
    ("symbol", "trade_id"),
    [("BTCUSDT", 999), ("BTCUSDT", 300_005), ("BTCUSDT", 300_020), ("ETHUSDT", 1000)],
)
async def test_no_window_for_what_is_not_stored(
    sparse: Database, symbol: str, trade_id: int
) -> None:
    assert await time_window(sparse.conn, symbol, trade_id) is None


async def test_times_that_do_not_ascend(db: Database) -> None:
    """The narrow window may be wrong then, the wide one never."""
    rows = ascending(0, (MARK_EVERY - 2, MARK_EVERY + 2))
    rows["trade_us"][4] = NOW_US
    await db.sink.write_trades(rows)
    narrow = await time_window(db.conn, "BTCUSDT", MARK_EVERY + 2)
    assert narrow == (us(MARK_EVERY), us(MARK_EVERY + 1))
    wide = await time_window(db.conn, "BTCUSDT", MARK_EVERY + 2, whole_range=True)
    assert wide == (NOW_US, us(MARK_EVERY + 1))
