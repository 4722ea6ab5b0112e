"""From an id to a time: the marks beside the ledger and what is told from them."""

import numpy as np
import pytest
from store_desk import NAMES, NOW_US, Database, trade, trades

from tradecore.errors import TransientStoreError
from tradecore.schema import FLAG_VOID
from tradecore.store import times
from tradecore.store.times import MARK_EVERY, time_window

pytestmark = pytest.mark.every_level

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
        (NAMES[1], 5),
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
    assert await marks(db) == [(NAMES[0], MARK_EVERY - 2), (NAMES[0], 3 * MARK_EVERY)]
    await db.check_ledger()


HOUR_US = 3_600_000_000


def hourly(symbol_id: int, *trades_of: tuple[int, int]) -> np.ndarray:
    """Trades of (id, hour), a second apart."""
    rows = trades(*(trade(symbol_id, trade_id) for trade_id, _ in trades_of))
    begin_us = NOW_US // HOUR_US * HOUR_US
    rows["trade_us"] = [begin_us + hour * HOUR_US + n * 10**6 for n, hour in trades_of]
    return rows


async def test_the_first_trade_of_an_hour_leaves_a_mark(db: Database) -> None:
    btc, eth = NAMES[:2]
    await db.sink.write_trades(hourly(0, (100, 0), (101, 0), (102, 1), (103, 1)))
    assert await marks(db) == [(btc, 100), (btc, 102)]
    both = np.concatenate([hourly(1, (7, 1), (8, 3)), hourly(0, (104, 1), (105, 2), (106, 2))])
    await db.sink.write_trades(both)
    assert await marks(db) == [(btc, 100), (btc, 102), (btc, 105), (eth, 7), (eth, 8)]
    # History from above, page by page, and the feed between the pages.
    await db.sink.write_trades(hourly(0, (90, -3), (91, -2), (92, -2)), filled_by="rest")
    await db.sink.write_trades(hourly(0, (107, 2), (108, 2)))
    await db.sink.write_trades(hourly(0, (88, -3), (89, -3)), filled_by="rest")
    assert [m for m in await marks(db) if m[0] == btc] == [
        *((btc, 90), (btc, 91)),
        *((btc, 100), (btc, 102), (btc, 105)),
    ]
    await db.check_ledger()
    assert await time_window(db.conn, btc, 104) == tuple(
        hourly(0, (102, 1), (105, 2))["trade_us"].tolist()
    )


async def test_a_mark_that_was_not_committed_is_made_again(db: Database) -> None:
    await db.conn.execute("ALTER TABLE trade_gaps ADD CONSTRAINT none CHECK (first_id < 0)")
    await db.sink.write_trades(hourly(0, (100, 0)))
    with pytest.raises(TransientStoreError):
        await db.sink.write_trades(hourly(0, (102, 1)))
    assert await marks(db) == [(NAMES[0], 100)]
    await db.sink.write_trades(hourly(0, (101, 1)))
    assert await marks(db) == [(NAMES[0], 100), (NAMES[0], 101)]


async def test_a_batch_without_a_new_hour_asks_for_no_mark(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await db.sink.write_trades(hourly(0, (100, 0), (101, 0)))
    monkeypatch.setattr(times, "_ADD_MARKS", "SELECT no such thing")
    await db.sink.write_trades(hourly(0, (102, 0), (103, 0)))
    with pytest.raises(TransientStoreError):
        await db.sink.write_trades(hourly(0, (104, 1)))


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
