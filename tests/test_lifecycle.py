from datetime import timedelta
from typing import Any

import pytest
from lifecycle_desk import (
    DAY,
    START,
    Trade,
    candles_done,
    check,
    expected,
    history,
    put,
    shuffled,
    unfilled,
    us,
)
from store_desk import Database

from tradecore._symbols import SymbolTable
from tradecore.store import horizon
from tradecore.store.verify import verify

pytestmark = pytest.mark.every_level


async def give_up(db: Database, to: Any) -> int:
    """Move the horizon step by step to `to`; return the number of steps."""
    steps = 0
    while True:
        state = await horizon.read_state(db.conn)
        step = await horizon.next_horizon(db.conn, state, to)
        if step is None:
            return steps
        assert await horizon.raise_horizon(db.conn, step)
        found = await horizon.survey(db.conn, state, step)
        await horizon.trim(db.conn, state, step, found)
        await horizon.trim_audits(db.conn, step)
        steps += 1


async def test_the_ledger_is_that_of_the_rows_above_the_horizon(db: Database) -> None:
    trades = [
        *history("BTCUSDT", days=3.5, every_s=60),
        *history("ETHUSDT", days=3.5, every_s=900, first_id=500),
        *history("OLDUSDT", days=1.5, every_s=900),
        *history("NEWUSDT", days=1, every_s=900, begin=START + 2.5 * DAY),
    ]
    await put(db, trades)
    await candles_done(db.conn)
    gaps = await unfilled(db.conn)
    assert gaps == {}
    for days in (1, 2, 3):
        to = START + days * DAY
        assert await give_up(db, to) >= 1
        await check(db, expected(trades, gaps, to), to)
    assert await give_up(db, START + 3 * DAY) == 0


async def test_holes_and_times_that_do_not_ascend(db: Database) -> None:
    midnight = START + DAY
    stored, missing = [], []
    for seed in range(60):
        some, lacking = shuffled(seed, f"S{seed:03}USDT", midnight)
        stored += some
        missing += lacking
    await put(db, stored)
    for one in missing[::3]:
        await db.sink.close_absent(one.symbol, one.trade_id, one.trade_id, {"source": "test"})
    await candles_done(db.conn)
    gaps = await unfilled(db.conn)
    assert set(gaps.values()) == {"open", "absent"}
    await give_up(db, midnight)
    await check(db, expected(stored, gaps, midnight), midnight)
    # What was missing and comes after all is stored as far as it is young enough.
    result = [one for one in missing if one.us >= us(midnight)]
    symbols = SymbolTable()
    await put(db, missing, symbols)
    both = [*stored, *result]
    kept = {(one.symbol, one.trade_id) for one in both if one.us >= us(midnight)}
    rows = await db.conn.fetch(
        "SELECT symbol, trade_id FROM raw_trades WHERE timestamp >= $1", midnight
    )
    assert {(row[0], row[1]) for row in rows} == kept
    assert (await verify(db.conn)).differences == []
    await candles_done(db.conn)
    later = midnight + DAY
    await give_up(db, later)
    assert (await verify(db.conn)).differences == []


async def test_a_silent_symbol_keeps_its_last_id(db: Database) -> None:
    await put(db, history("OLDUSDT", days=0.5, every_s=3600, first_id=100))
    await put(db, history("BTCUSDT", days=3, every_s=3600))
    await candles_done(db.conn)
    await give_up(db, START + 2 * DAY)
    ranges = "SELECT first_id, last_id FROM trade_coverage WHERE symbol = 'OLDUSDT' ORDER BY 1"
    assert await db.conn.fetch(ranges) == [(111, 111)]
    # It trades again: what it printed meanwhile is a hole, and the next id is none.
    symbols = SymbolTable()
    await put(db, [Trade("OLDUSDT", 120, us(START + 2.5 * DAY))], symbols)
    assert await db.gaps() == [(112, 119, "unknown", "open", None)]
    await put(db, [Trade("OLDUSDT", 112, us(START + 2.2 * DAY))], symbols)
    assert await db.conn.fetch(ranges) == [(111, 112), (120, 120)]
    report = await verify(db.conn)
    assert report.differences == [], [str(one) for one in report.differences]
    await candles_done(db.conn)
    await give_up(db, START + 3 * DAY)
    assert await db.conn.fetch(ranges) == [(120, 120)]
    assert (await verify(db.conn)).differences == []


async def test_the_horizon_waits_for_candles(db: Database) -> None:
    await put(db, history("BTCUSDT", days=3, every_s=3600))
    await candles_done(db.conn, START + 1.5 * DAY)
    state = await horizon.read_state(db.conn)
    assert horizon.held_back(state, START + 2 * DAY) == START + DAY
    assert not await horizon.raise_horizon(db.conn, START + 2 * DAY)
    await candles_done(db.conn)
    await put(db, [Trade("ETHUSDT", 1, us(START + 1.2 * DAY))])  # a late one
    state = await horizon.read_state(db.conn)
    assert horizon.held_back(state, START + 2 * DAY) == START + DAY
    assert not await horizon.raise_horizon(db.conn, START + 2 * DAY)
    assert await horizon.raise_horizon(db.conn, START + DAY)


def test_a_clock_that_is_ahead_costs_nothing() -> None:
    newest = START + 2.7 * DAY
    state = horizon.State(None, None, None, START + 3000 * DAY, newest, None)
    assert horizon.target_of(state, DAY, START + 2000 * DAY) == START + DAY
    state = state._replace(newest=START + 4000 * DAY)
    assert horizon.target_of(state, DAY, START + 3 * DAY) == START + 2 * DAY
    assert horizon.target_of(state, timedelta(days=1.5), START + 3 * DAY) == START + DAY
