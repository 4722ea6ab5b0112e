"""The refresher beside others, over failures, and with much to compute anew."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from candle_desk import check_candles
from store_desk import NAMES, Database, at, trades
from test_candles import DAY_US, START_US, made, market

from tradecore.clock import wall_ns
from tradecore.refresher import Refresher
from tradecore.settings import Settings
from tradecore.store import candle_windows
from tradecore.store.store import Store
from tradecore.values import Secret

Running = tuple[Refresher, "asyncio.Task[None]"]


@pytest.fixture
async def store(db: Database) -> AsyncIterator[Store]:
    one = Store(Settings(database_url=Secret(db.dsn), symbols=NAMES[:2]), db.symbols)
    await one.open()
    yield one
    await one.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


async def nothing_waits(db: Database) -> bool:
    return not await db.conn.fetchval("SELECT count(*) FROM candle_windows")


async def test_of_two_one_works_and_the_other_takes_over(db: Database, store: Store) -> None:
    first, second = Refresher(store), Refresher(store)
    tasks = [asyncio.create_task(one.run()) for one in (first, second)]
    await db.sink.write_trades(trades(*market(START_US, START_US + DAY_US // 24, 50)))

    async def equal() -> bool:
        try:
            await check_candles(db.conn)
        except AssertionError:
            return False
        return await nothing_waits(db)

    await until(equal)
    worker, idle = (0, 1) if first.stats.rounds >= second.stats.rounds else (1, 0)
    tasks[worker].cancel()
    rounds = (first, second)[idle].stats.rounds

    async def taken_over() -> bool:
        return (first, second)[idle].stats.rounds > rounds

    await until(taken_over)
    await db.sink.write_trades(trades(*market(START_US - DAY_US, START_US, 50, first_id=1000)))
    await until(equal)
    tasks[idle].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_failure_is_counted_and_what_waits_is_done_afterwards(
    db: Database, store: Store
) -> None:
    refresher = Refresher(store)
    await candle_windows.move_fence(db.conn, timedelta())
    await db.sink.write_trades(trades(*market(START_US, START_US + DAY_US // 24, 50)))
    await db.conn.execute("ALTER TABLE candles_1h ADD CONSTRAINT no CHECK (false) NOT VALID")
    task = asyncio.create_task(refresher.run())

    async def failed() -> bool:
        return refresher.stats.failures > 1

    await until(failed)
    assert not await nothing_waits(db)
    assert await db.conn.fetchval("SELECT count(*) FROM candles_1m") == 0, "all widths, or none"
    await db.conn.execute("ALTER TABLE candles_1h DROP CONSTRAINT no")
    await until(lambda: nothing_waits(db))
    await check_candles(db.conn)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_much_history_is_done_in_slices_beside_the_present(
    db: Database, store: Store
) -> None:
    refresher = Refresher(store)
    await candle_windows.move_fence(db.conn, timedelta())
    await db.sink.write_trades(trades(*market(START_US, START_US + 20 * DAY_US, 500)))
    task = asyncio.create_task(refresher.run())
    now_us = wall_ns() // 1000
    await db.sink.write_trades(trades(made(0, 9000, now_us), made(1, 9000, now_us + 1)))

    async def present_is_there() -> bool:
        return bool(
            await db.conn.fetchval(
                "SELECT count(*) = 2 FROM candles_1d WHERE last_id = 9000 AND bucket > $1",
                at(START_US + 20 * DAY_US),
            )
        )

    await until(present_is_there)
    await until(lambda: nothing_waits(db))
    await check_candles(db.conn)
    assert refresher.stats.minutes_refreshed > 20 * 1400
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_slices_are_the_newest_minutes_and_no_more(store: Store) -> None:
    refresher = Refresher(store)
    minute = timedelta(minutes=1)
    spans = [(at(START_US) + n * minute, at(START_US) + (n + 1) * minute) for n in (0, 30, 59, 90)]
    assert refresher._last_slice(spans) == (spans[2][0], spans[3][1])
    assert refresher._last_slice(spans[:1]) == spans[0]
    day = (at(START_US), at(START_US + DAY_US))
    assert refresher._last_slice([day]) == (day[1] - timedelta(hours=1), day[1])


async def test_the_newest_minutes_come_first_however_many_wait(db: Database, store: Store) -> None:
    await db.conn.execute(
        "INSERT INTO candle_windows (minutes) SELECT tstzmultirange(tstzrange(m, m + '1 minute'))"
        " FROM generate_series($1::timestamptz, $1 + interval '1000 minutes', '1 minute') AS m",
        at(START_US),
    )
    ids, spans = await candle_windows.read_waiting(db.conn)
    assert len(ids) == 500
    assert spans[-1][1] == at(START_US) + timedelta(minutes=1001)
    assert await candle_windows.count_waiting(db.conn) == 1001
