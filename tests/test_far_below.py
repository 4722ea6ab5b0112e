"""Rows whose id lies far below the newest one of their symbol: parked, and nothing else."""

import json

import numpy as np
from store_desk import Database, batch, parked, trade, trades

from tradecore.schema import FLAG_FAR_BELOW, FLAG_VOID
from tradecore.store.sink import WriteResult


async def test_they_are_parked_and_the_others_stored(db: Database) -> None:
    await db.sink.write_trades(batch((0, 10_000, 10_010)))
    rows = batch((0, 10_011, 10_013), (0, 1, 4), (1, 7, 9))
    rows["flags"][3:7] |= FLAG_FAR_BELOW
    rows["flags"][6] |= FLAG_VOID
    assert await db.sink.write_trades(rows) == WriteResult(6, 0, 3, ())
    await db.check(batch((0, 10_000, 10_013), (1, 7, 9)))
    assert await db.gaps() == []
    assert await parked(db) == [("trade", "BTCUSDT", i, None) for i in (1, 2, 3)]
    reason, payload = await db.conn.fetchrow(
        "SELECT reason, payload FROM dead_letters ORDER BY id LIMIT 1"
    )
    assert "far below" in reason and "compare it with the venue" in reason
    whole = trade(0, 1)
    said = json.loads(payload)
    assert said["trade_us"] == whole["trade_us"] and said["recv_ns"] == whole["recv_ns"]
    assert said["price"].replace(".", "").lstrip("0") == str(whole["price_e8"])
    assert said["side"] == ("SELL" if whole["flags"] & 1 else "BUY")
    # Offered again, by a retry: parked once.
    assert await db.sink.write_trades(rows) == WriteResult(0, 6, 3, ())
    assert len(await parked(db)) == 3


async def test_a_stored_id_that_comes_again_so_is_parked_too(db: Database) -> None:
    await db.sink.write_trades(batch((0, 1, 3)))
    again = trades(trade(0, 2) | {"flags": FLAG_FAR_BELOW, "price_e8": 5})
    assert await db.sink.write_trades(again) == WriteResult(0, 0, 1, ())
    await db.check(batch((0, 1, 3)))


async def test_a_batch_of_nothing_else(db: Database) -> None:
    rows = batch((0, 0, 4999))
    rows["flags"] |= FLAG_FAR_BELOW
    assert await db.sink.write_trades(np.concatenate([rows, rows])) == WriteResult(0, 0, 10_000, ())
    await db.check()
    assert await db.conn.fetchval("SELECT count(*) FROM dead_letters") == 5000
    assert await db.conn.fetchval("SELECT count(*) FROM trade_times") == 0
