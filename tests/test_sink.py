"""The sink on a real PostgreSQL: what it writes, what it cuts, what it parks."""

import asyncio

import numpy as np
import pytest
from store_desk import (
    EXTREME,
    NAMES,
    Database,
    batch,
    parked,
    trade,
    trades,
)

from tradecore.errors import TransientStoreError
from tradecore.schema import (
    FLAG_VOID,
)
from tradecore.store.partitions import Partitions
from tradecore.store.pool import open_pool
from tradecore.store.sink import HoleId, Sink, WriteResult

pytestmark = pytest.mark.every_level


async def test_trades_are_stored_as_they_are(db: Database) -> None:
    rows = batch((0, 1, 300), (2, 2**32, 2**32 + 50), (1, 0, 0))
    assert await db.sink.write_trades(rows) == WriteResult(352, 0, 0)
    await db.check(rows)


async def test_extremes(db: Database) -> None:
    rows = trades(
        trade(0, 7) | {"price_e8": EXTREME, "quantity_e8": EXTREME},
        trade(0, 8) | {"price_e8": 0, "quantity_e8": 0},
        trade(0, 9) | {"price_e8": 1, "quantity_e8": 10**16},
        trade(1, EXTREME) | {"trade_us": 0, "recv_ns": 1},
        trade(1, EXTREME - 2) | {"recv_ns": EXTREME},
        trade(3, 0) | {"trade_us": 7_258_118_399_999_999},
    )
    hole = HoleId("ETHUSDT", EXTREME - 1, EXTREME - 1)
    assert await db.sink.write_trades(rows) == WriteResult(6, 0, 0, (hole,))
    await db.check(rows)
    text = await db.conn.fetchval("SELECT quantity::text FROM raw_trades WHERE trade_id = 7")
    assert text == "92233720368.54775807"


@pytest.mark.only_levels("plain")
async def test_days_get_their_partitions(db: Database) -> None:
    midnight = 20_000 * 86_400_000_000
    rows = trades(
        trade(0, 1) | {"trade_us": midnight - 1},
        trade(0, 2) | {"trade_us": midnight},
        trade(0, 3) | {"trade_us": midnight + 86_400_000_000 * 40},
        trade(0, 4) | {"trade_us": 0, "flags": FLAG_VOID},
    )
    assert await db.sink.write_trades(rows) == WriteResult(3, 0, 0)
    await db.check(rows)
    days = await db.conn.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits"
        " WHERE inhparent = 'raw_trades'::regclass ORDER BY 1"
    )
    assert [day[0][-8:] for day in days] == ["20241003", "20241004", "20241113"]


@pytest.mark.only_levels("plain")
async def test_a_partition_that_was_dropped_comes_back(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 5)))
    for (name,) in await db.conn.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'raw_trades'::regclass"
    ):
        await db.conn.execute(f"DROP TABLE {name}")
    await db.conn.execute("TRUNCATE trade_coverage, trade_times")
    with pytest.raises(TransientStoreError) as caught:
        await db.sink.write_trades(batch((0, 6, 9)))
    assert (caught.value.reason, caught.value.fatal_looking) == ("23514", False)
    await db.sink.write_trades(batch((0, 6, 9)))
    await db.check(batch((0, 6, 9)))


async def test_nothing_to_store(db: Database) -> None:
    void = trades(trade(0, 1) | {"flags": FLAG_VOID})
    assert await db.sink.write_trades(void[:0]) == WriteResult(0, 0, 0)
    assert await db.sink.write_trades(void) == WriteResult(0, 0, 0)
    await db.check()


async def test_duplicates_are_cut(db: Database) -> None:
    first = batch((0, 10, 20), (1, 5, 6))
    again = trades(*(trade(0, i) | {"price_e8": 1} for i in (15, 21, 20, 22, 21)), trade(1, 4))
    assert await db.sink.write_trades(first) == WriteResult(13, 0, 0)
    assert await db.sink.write_trades(again) == WriteResult(3, 3, 0)
    assert await db.sink.write_trades(first) == WriteResult(0, 13, 0)
    await db.check(first, again)


async def test_order_does_not_matter(db: Database) -> None:
    rows = batch((0, 1, 500), (1, 1, 300), (2, 40, 90))
    random = np.random.default_rng(5)
    shuffled = random.permutation(rows)
    for at_row in range(0, len(rows), 97):
        await db.sink.write_trades(shuffled[at_row : at_row + 97])
    await db.check(rows)
    assert not await db.conn.fetchval("SELECT count(*) FROM trade_gaps WHERE state = 'open'")


async def test_holes_open_and_fill(db: Database) -> None:
    stored = [batch((0, 1, 10)), batch((0, 21, 30))]
    await db.sink.write_trades(stored[0])
    await db.sink.write_trades(stored[1], hole_cause="disconnect")
    await db.check(*stored)
    assert await db.gaps() == [(11, 20, "disconnect", "open", None)]

    stored.append(batch((0, 14, 15)))
    await db.sink.write_trades(stored[-1], filled_by="rest")
    await db.check(*stored)
    assert await db.gaps() == [
        (11, 13, "disconnect", "open", None),
        (14, 15, "disconnect", "filled", "rest"),
        (16, 20, "disconnect", "open", None),
    ]
    for first_id, last_id in ((16, 18), (11, 13), (19, 20)):
        stored.append(batch((0, first_id, last_id)))
        await db.sink.write_trades(stored[-1], filled_by="rest")
        await db.check(*stored)
    ranges = await db.gaps()
    assert {row[2:] for row in ranges} == {("disconnect", "filled", "rest")}
    assert sum(row[1] - row[0] + 1 for row in ranges) == 10
    filled_at = await db.conn.fetch("SELECT filled_at FROM trade_gaps")
    assert all(row[0] is not None for row in filled_at)


async def test_random_batches_equal_the_oracle(db: Database) -> None:
    random = np.random.default_rng(11)
    batches = []
    for _ in range(40):
        rows = []
        for _ in range(int(random.integers(1, 6))):
            first = int(random.integers(0, 120))
            rows += [
                trade(int(random.integers(0, 4)), first + i)
                for i in range(int(random.integers(1, 25)))
            ]
        array = trades(*rows)
        batches.append(random.permutation(array) if random.random() < 0.3 else array)
    for rows in batches:
        result = await db.sink.write_trades(rows)
        assert sum(result[:3]) == len(rows)
        await db.check_ledger()
    await db.check(*batches)


async def test_two_hosts_store_each_trade_once(db: Database) -> None:
    other_pool = await open_pool(db.dsn, 4)
    sinks = [db.sink, Sink(other_pool, db.symbols, Partitions())]
    random = np.random.default_rng(3)
    whole = {symbol_id: batch((symbol_id, 1, 400)) for symbol_id in range(4)}

    async def host(sink: Sink, seed: int) -> WriteResult:
        own = np.random.default_rng(seed)
        total = WriteResult()
        position = 0
        while position < 400:
            size = int(own.integers(1, 60))
            chosen = own.permutation(4)[: int(own.integers(1, 5))]
            parts = [whole[int(s)][max(0, position - 30) : position + size] for s in chosen]
            total = total.plus(await sink.write_trades(np.concatenate(parts)))
            position += size // 2
        return total

    seeds = random.integers(0, 1000, 4).tolist()
    results = await asyncio.gather(*(host(sink, seed) for sink in sinks for seed in seeds[:2]))
    for rows in whole.values():
        await sinks[0].write_trades(rows)
    await db.check(*whole.values())
    assert sum(result.stored for result in results) <= 1600
    await asyncio.wait_for(other_pool.close(), 10)


# ---- rows that the server has or does not take -----------------------------------------------


async def test_refused_rows_are_parked_and_the_rest_goes_in(db: Database) -> None:
    await db.conn.execute("ALTER TABLE raw_trades ADD CONSTRAINT odd CHECK (quantity <> 13)")
    rows = batch((0, 1, 900), (1, 1, 900))
    bad = [0, 77, 78, 1300, 1799]
    rows["quantity_e8"][bad] = 13 * 10**8
    result = await db.sink.write_trades(rows)
    assert result[:3] == (1795, 0, 5)
    assert HoleId("BTCUSDT", 78, 79) in result.opened and len(result.opened) == 2
    await db.check(np.delete(rows, bad))
    assert await parked(db) == [
        ("trade", NAMES[int(row["symbol_id"])], int(row["trade_id"]), "23514") for row in rows[bad]
    ]
    assert (78, 79, "refused", "open", None) in await db.gaps()
    payload = await db.conn.fetchval("SELECT payload FROM dead_letters ORDER BY id LIMIT 1")
    assert '"quantity": "13.00000000"' in payload
    # Offered again: still refused, told once; the others are duplicates.
    assert await db.sink.write_trades(rows) == WriteResult(0, 1795, 5)
    assert len(await parked(db)) == 5
    # Mended: they go in and the holes close.
    await db.conn.execute("ALTER TABLE raw_trades DROP CONSTRAINT odd")
    assert await db.sink.write_trades(rows) == WriteResult(5, 1795, 0)
    await db.check(rows)


async def test_a_batch_of_refused_rows_only(db: Database) -> None:
    await db.conn.execute("ALTER TABLE raw_trades ADD CONSTRAINT none CHECK (false)")
    assert await db.sink.write_trades(batch((0, 1, 60))) == WriteResult(0, 0, 60)
    await db.check()


async def test_rows_that_no_server_can_store(db: Database) -> None:
    rows = batch((0, 1, 6))
    rows["trade_us"][1] = 2**62
    rows["trade_us"][2] = -1
    rows["symbol_id"][4] = 99
    holes = (HoleId("BTCUSDT", 2, 3), HoleId("BTCUSDT", 5, 5))
    assert await db.sink.write_trades(rows) == WriteResult(3, 0, 3, holes)
    await db.check(rows[[0, 3, 5]])
    assert await parked(db) == [
        ("trade", "BTCUSDT", 2, None),
        ("trade", "BTCUSDT", 3, None),
        ("trade", "#99", 5, None),
    ]


async def test_rows_that_the_ledger_does_not_know(db: Database) -> None:
    rows = batch((0, 1, 50), (1, 1, 50))
    await db.sink.write_trades(rows[20:40])
    await db.conn.execute("TRUNCATE trade_coverage, trade_gaps, trade_symbols")
    assert await db.sink.write_trades(rows) == WriteResult(80, 20, 0)
    await db.check(rows)
    assert not await parked(db)


async def test_lock_rows_that_vanished_are_made_anew(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 5)))
    await db.conn.execute("TRUNCATE trade_symbols")
    with pytest.raises(TransientStoreError) as caught:
        await db.sink.write_trades(batch((0, 6, 9)))
    assert (caught.value.reason, caught.value.fatal_looking) == ("symbols", False)
    await db.sink.write_trades(batch((0, 6, 9)))
    await db.check(batch((0, 1, 9)))


async def test_another_unique_key_parks_instead_of_losing(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 3)))
    (name,) = await db.conn.fetchrow(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'raw_trades'::regclass"
    )
    await db.conn.execute(f"CREATE UNIQUE INDEX ON {name} (trade_id)")
    assert await db.sink.write_trades(batch((1, 2, 5))) == WriteResult(2, 0, 2)
    await db.check(batch((0, 1, 3)), batch((1, 4, 5)))
    assert [row[3] for row in await parked(db)] == ["23505", "23505"]


async def test_a_trigger_that_leaves_rows_out_is_no_silent_loss(db: Database) -> None:
    await db.conn.execute(
        """
        CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN IF NEW.trade_id = 3 THEN RETURN NULL; END IF; RETURN NEW; END';
        CREATE TRIGGER skip BEFORE INSERT ON raw_trades FOR EACH ROW EXECUTE FUNCTION skip()
        """
    )
    with pytest.raises(TransientStoreError, match="stored 4 of 5") as caught:
        await db.sink.write_trades(batch((0, 1, 5)))
    assert caught.value.fatal_looking
    await db.check()
