"""The cross-check on a real PostgreSQL, with klines that are computed trade by trade."""

import asyncio
import json
import random
import time
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from audit_desk import (
    EXACT,
    MINUTE_US,
    SETTLE_S,
    START_US,
    Candle,
    Desk,
    Trade,
    candle,
    candles,
    market,
)
from store_desk import NAMES, Database, at

from tradecore.errors import TransientStoreError
from tradecore.schema import FLAG_CLOSED, KLINE_DECIMALS, KLINE_DTYPE
from tradecore.store import audit as audit_module
from tradecore.store import audit_sql
from tradecore.store.audit import audit, put_klines
from tradecore.store.pool import open_pool

pytestmark = pytest.mark.every_level

BTC, ETH = NAMES[:2]


def us_of(minute: int) -> int:
    return START_US + minute * MINUTE_US


def steady(minutes: int, *, a_minute: int = 5, symbol_id: int = 0, first: int = 100) -> list[Trade]:
    """The same number of trades each minute."""
    return [
        Trade(
            symbol_id,
            first + minute * a_minute + n,
            us_of(minute) + n * 10_000_000 + 1,
            10**12 + minute * 31 + n * 7,
            10**8 + n * 12345,
            n % 2 == 0,
        )
        for minute in range(minutes)
        for n in range(a_minute)
    ]


def rest_rows(items: list[Candle], *, closed: bool = True) -> Any:
    """Klines as REST tells them: without ids."""
    rows = np.zeros(len(items), KLINE_DTYPE)
    names = dict(
        zip(
            KLINE_DECIMALS,
            ("open", "high", "low", "close", "volume", "quote_volume", "taker_base", "taker_quote"),
            strict=True,
        )
    )
    for row, item in zip(rows, items, strict=True):
        row["open_us"], row["close_us"] = item.open_us, item.open_us + MINUTE_US - 1
        row["first_id"] = row["last_id"] = -1
        row["trade_count"] = item.trades
        row["flags"] = FLAG_CLOSED if closed else 0
        for name, ours in names.items():
            scaled = int(EXACT.scaleb(getattr(item, ours), 8))
            row[name]["lo"], row[name]["hi"] = scaled & (2**64 - 1), scaled >> 64
    return rows


async def test_a_market_without_loss_is_proven(db: Database) -> None:
    desk = Desk(db, 30)
    items = market(30)
    await desk.store(items)
    await desk.tell(candles(items, 30))
    report = await desk.audit()
    assert (report.waiting, report.mismatches, report.unproven) == (0, (), 0)
    assert report.proven_us == {BTC: us_of(30), ETH: us_of(30)}
    assert report.checked == report.matched > 50
    assert not report.more and not report.tails and not report.klines_missing
    assert await desk.open_minutes() == {}
    assert await db.conn.fetchval("SELECT count(*) FROM audit_state") == 2
    again = await desk.audit()
    assert (again.checked, again.proven_us) == (0, report.proven_us)


async def test_a_minute_that_is_not_settled_waits(db: Database) -> None:
    desk = Desk(db, 2)
    items = steady(2)
    await desk.store(items)
    await desk.tell(candles(items, 2, symbols=1))
    report = await desk.audit(now_us=desk.now_us - 1)
    assert report.proven_us == {BTC: us_of(1)}
    assert (await desk.audit()).proven_us == {BTC: us_of(2)}


SMALLEST = Decimal("0.00000001")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trades": 4}, "count"),
        ({"trades": 6}, "count"),
        ({"first_id": 106}, "time"),  # 105 is of this minute, and not of its kline
        ({"open": SMALLEST}, "open"),
        ({"high": SMALLEST}, "high"),
        ({"low": SMALLEST}, "low"),
        ({"close": SMALLEST}, "close"),
        ({"volume": SMALLEST}, "volume"),
        ({"volume": -SMALLEST}, "volume"),
        ({"quote_volume": 6 * SMALLEST}, "quote_volume"),
        ({"quote_volume": -11 * SMALLEST}, "quote_volume"),
        ({"taker_base": SMALLEST}, "taker_base"),
        ({"taker_quote": 11 * SMALLEST}, "taker_quote"),
    ],
)
async def test_a_wrong_value_is_told_once(
    db: Database, changes: dict[str, Any], reason: str
) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    await desk.store(items)
    told = candles(items, 4, symbols=1)
    right = told[1]
    wrong = {
        name: getattr(right, name) + value if isinstance(value, Decimal) else value
        for name, value in changes.items()
    }
    told[1] = right.but(**wrong)
    await desk.tell(told)
    report = await desk.audit()
    (mismatch,) = report.mismatches
    assert mismatch[:3] == (BTC, us_of(1), reason)
    assert mismatch.detail
    assert (report.matched, report.unproven, report.mismatching) == (3, 1, 1)
    assert report.proven_us == {BTC: us_of(1)}
    await desk.run("UPDATE trade_audits SET retry_at = now()")
    again = await desk.audit()
    assert (again.checked, again.mismatches, again.mismatching) == (1, (), 1)
    await desk.run("DELETE FROM klines WHERE timestamp = $1", at(us_of(1)))
    await desk.tell([right])
    await desk.run("UPDATE trade_audits SET retry_at = now()")
    healed = await desk.audit()
    assert (healed.matched, healed.unproven, healed.proven_us) == (1, 0, {BTC: us_of(4)})


async def test_rounding_of_quotes_is_forgiven(db: Database) -> None:
    desk = Desk(db, 2)
    items = steady(2)
    await desk.store(items)
    told = candles(items, 2, symbols=1)
    for away in (4, -4):  # and one that the rounding of the oracle may have used up
        moved = told[0].quote_volume + away * SMALLEST
        await desk.run("DELETE FROM klines")
        await desk.run("DELETE FROM audit_state")
        await desk.tell([told[0].but(quote_volume=moved), told[1]])
        assert (await desk.audit()).unproven == 0


async def test_sums_of_any_size_are_exact(db: Database) -> None:
    greatest = 2**63 - 1
    items = [
        Trade(0, 10 + n, us_of(0) + n, greatest - n, greatest - n, n % 2 > 0) for n in range(9)
    ]
    desk = Desk(db, 1)
    await desk.store(items)
    await desk.tell(candles(items, 1, symbols=1))
    assert (await desk.audit()).proven_us == {BTC: us_of(1)}
    await desk.run("UPDATE klines SET volume = volume + 0.00000001")
    await desk.run("DELETE FROM audit_state")
    assert [m.reason for m in (await desk.audit()).mismatches] == ["volume"]


async def test_a_lost_row_that_the_ledger_knows(db: Database) -> None:
    desk = Desk(db, 3)
    items = steady(3)
    await desk.store(items)
    await desk.tell(candles(items, 3, symbols=1))
    await desk.run("DELETE FROM raw_trades WHERE trade_id = 107")
    (mismatch,) = (await desk.audit()).mismatches
    assert mismatch == (BTC, us_of(1), "count", "count: the venue says 5, stored is 4")


async def test_a_doubled_row(db: Database) -> None:
    desk = Desk(db, 3)
    items = steady(3)
    await desk.store(items)
    await desk.tell(candles(items, 3, symbols=1))
    await desk.run(
        "INSERT INTO raw_trades SELECT timestamp + interval '1 us', symbol, price, quantity, side,"
        " trade_id FROM raw_trades WHERE trade_id = 107"
    )
    await desk.run("DELETE FROM raw_trades WHERE trade_id = 108")
    assert [m.reason for m in (await desk.audit()).mismatches] == ["ids"]


async def test_a_trade_with_the_time_of_another_minute(db: Database) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    await desk.store(items)
    await desk.tell(candles(items, 4, symbols=1))
    await desk.run(
        "UPDATE raw_trades SET timestamp = timestamp + interval '1 minute' WHERE trade_id = 109"
    )
    report = await desk.audit()
    assert [m[:3] for m in report.mismatches] == [
        (BTC, us_of(1), "time"),
        (BTC, us_of(2), "time"),
    ]
    assert report.proven_us == {BTC: us_of(1)}


async def test_a_hole_waits_and_its_fill_is_audited_at_once(db: Database) -> None:
    desk = Desk(db, 6)
    items = steady(6)
    hole = items[12:18]  # the minutes 2 and 3
    await desk.store([item for item in items if item not in hole])
    await desk.tell(candles(items, 6, symbols=1))
    report = await desk.audit()
    assert (report.matched, report.waiting, report.mismatches) == (4, 2, ())
    assert report.proven_us == {BTC: us_of(2)}
    expected = {(BTC, 2): ("waiting", "hole"), (BTC, 3): ("waiting", "hole")}
    assert await desk.open_minutes() == expected
    assert (await desk.audit()).checked == 0, "nothing has changed"
    await desk.store(hole[:3])
    assert (await desk.audit()).proven_us == {BTC: us_of(3)}
    await desk.store(hole[3:])
    healed = await desk.audit()
    assert (healed.matched, healed.unproven, healed.proven_us) == (1, 0, {BTC: us_of(6)})


async def test_ids_above_all_stored_are_a_tail(db: Database) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    await desk.store(items[:8])
    await desk.tell(candles(items, 4, symbols=1))
    report = await desk.audit()
    assert report.tails == ((BTC, items[-1].trade_id),)
    assert (report.waiting, report.mismatches, report.unproven) == (3, (), 3)
    assert (await desk.audit()).tails == report.tails, "told until it is there"
    await desk.store(items[15:])
    report = await desk.audit()
    assert report.tails == ()
    assert report.proven_us == {BTC: us_of(1)}
    await desk.store(items[8:15])
    assert (await desk.audit()).proven_us == {BTC: us_of(4)}


async def test_ids_that_the_venue_does_not_have(db: Database) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    there = [item for item in items if item.trade_id not in (106, 107, 115)]
    await desk.store(there)
    await desk.tell(candles(there, 4, symbols=1))
    report = await desk.audit()
    assert report.proven_us == {BTC: us_of(4)}, "the venue counts what is stored: nothing is lost"


async def test_absent_ids_that_the_venue_counts(db: Database) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    await desk.store([item for item in items if item.trade_id != 107])
    await desk.run("UPDATE trade_gaps SET state = 'absent'")
    await desk.run("UPDATE trade_gaps SET evidence = '7', filled_at = now() - interval '1 hour'")
    await desk.tell(candles(items, 4, symbols=1))
    report = await desk.audit()
    assert [m[:3] for m in report.reopened] == [(BTC, us_of(1), "hole")]
    assert (report.waiting, report.mismatches) == (1, ())
    gap = "SELECT first_id, last_id, state, evidence, filled_at FROM trade_gaps"
    assert tuple(await db.conn.fetchrow(gap)) == (107, 107, "open", "7", None)
    await db.check_ledger()
    assert (await desk.audit()).checked == 0, "until it is filled, or closed again"
    assert await db.sink.close_absent(BTC, 107, 107, {"seen": "again"}) == 1
    report = await desk.audit()
    assert [m[1:3] for m in report.mismatches] == [(us_of(1), "count")], "now it is an alarm"
    assert report.reopened == ()
    assert (await db.conn.fetchrow(gap))["state"] == "absent"
    await desk.run("UPDATE trade_audits SET retry_at = now()")
    assert (await desk.audit()).reopened == ()
    await desk.store([items[7]])
    assert (await desk.audit()).proven_us == {BTC: us_of(4)}, "a fill is looked at at once"


async def test_only_what_a_kline_counts_is_opened_again(db: Database) -> None:
    desk = Desk(db, 6)
    items = steady(6)
    absent = items[8:22]  # from the minute 1 to the minute 4
    there = [item for item in items if item not in absent]
    await desk.store(there)
    await desk.run("UPDATE trade_gaps SET state = 'absent', evidence = '{}', filled_at = now()")
    told = candles(there, 6, symbols=1)
    told[2] = candles(items, 6, symbols=1)[2]
    await desk.tell(told)
    report = await desk.audit()
    assert [m[:3] for m in report.reopened] == [(BTC, us_of(2), "hole")]
    assert (report.matched, report.mismatches) == (5, ())
    assert [gap[:2] + gap[3:4] for gap in await db.gaps()] == [
        (108, 109, "absent"),
        (110, 114, "open"),
        (115, 121, "absent"),
    ]
    await db.check_ledger()


async def test_the_first_minute_may_be_cut(db: Database) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    await desk.store(items[2:])
    await desk.tell(candles(items, 4, symbols=1))
    report = await desk.audit()
    assert (report.checked, report.matched, report.mismatches, report.unproven) == (4, 3, (), 0)
    assert report.proven_us == {BTC: us_of(4)}
    assert await db.conn.fetchval("SELECT max(proven_from) FROM audit_state") == at(us_of(1))


@pytest.mark.parametrize("cut", [0, 2])
async def test_the_first_minute_by_a_kline_without_ids(db: Database, cut: int) -> None:
    desk = Desk(db, 4)
    items = steady(4)
    await desk.store(items[cut:])
    assert await put_klines(db.pool, BTC, rest_rows(candles(items, 4, symbols=1))) == 4
    report = await desk.audit()
    assert (report.mismatches, report.unproven, report.proven_us) == ((), 0, {BTC: us_of(4)})
    begin = us_of(1 if cut else 0)
    assert await db.conn.fetchval("SELECT max(proven_from) FROM audit_state") == at(begin)


async def test_klines_without_ids(db: Database) -> None:
    desk = Desk(db, 6)
    items = steady(6)
    hole = items[12:18]
    await desk.store([item for item in items[:28] if item not in hole])
    await put_klines(db.pool, BTC, rest_rows(candles(items, 6, symbols=1)))
    report = await desk.audit()
    assert (report.matched, report.waiting, report.mismatches) == (3, 3, ())
    assert report.proven_us == {BTC: us_of(2)}
    assert await desk.open_minutes() == {
        (BTC, 2): ("waiting", "hole"),
        (BTC, 3): ("waiting", "hole"),
        (BTC, 5): ("waiting", "tail"),
    }
    await desk.store(hole)
    await desk.audit()
    assert await desk.open_minutes() == {(BTC, 5): ("waiting", "tail")}
    later = replace(items[-1], trade_id=items[-1].trade_id + 1, us=us_of(6))
    await desk.store([*items[28:], later])
    assert (await desk.audit()).proven_us == {BTC: us_of(6)}
    await desk.run("DELETE FROM audit_state")
    await desk.run("UPDATE klines SET open = open + 1 WHERE timestamp = $1", at(us_of(2)))
    await desk.run("UPDATE klines SET close = close + 1 WHERE timestamp = $1", at(us_of(3)))
    await desk.run("UPDATE klines SET trade_count = 4 WHERE timestamp = $1", at(us_of(4)))
    reasons = [m.reason for m in (await desk.audit()).mismatches]
    assert reasons == ["open", "close", "count"]


async def test_old_fills_cost_nothing(db: Database) -> None:
    """Waiting minutes are held against the latest fill of their symbol, not against each."""
    minutes, fills = 1000, 50_000
    desk = Desk(db, minutes)
    await desk.store(steady(1, first=100 - fills))
    await desk.store(steady(1, first=10_000_000))
    await desk.run(
        "INSERT INTO trade_gaps (symbol, first_id, last_id, cause, state, filled_at)"
        " SELECT $1, -2 * i, -2 * i, 'disconnect', 'filled', $2 FROM generate_series(1, $3::int) i",
        *(BTC, at(START_US), fills),
    )
    await desk.run("INSERT INTO audit_state VALUES ($1, $2, $2, $3)", BTC, at(0), at(desk.now_us))
    await desk.run(
        "INSERT INTO trade_audits (symbol, open_time, state, reason)"
        " SELECT $1, $2::timestamptz + i * interval '1 minute', 'waiting', 'hole'"
        " FROM generate_series(0, $3::int) i",
        *(BTC, at(START_US), minutes - 1),
    )
    await desk.run("ANALYZE trade_gaps, trade_audits")
    plan = await db.conn.fetchval(
        f"EXPLAIN (ANALYZE, FORMAT JSON) {audit_sql.DUE}", [BTC], at(desk.now_us), 100
    )
    assert json.loads(plan)[0]["Execution Time"] < 200
    assert (await desk.audit(1)).unproven == minutes


async def test_quiet_minutes_are_proven_too(db: Database) -> None:
    desk = Desk(db, 5)
    items = steady(5)
    there = [item for item in items if item.minute in (0, 3)]
    there = [replace(item, trade_id=100 + n) for n, item in enumerate(there)]
    await desk.store(there)
    await desk.tell(candles(there, 5))
    report = await desk.audit()
    assert report.proven_us == {BTC: us_of(5), ETH: us_of(5)}
    assert report.unproven == 0


async def test_a_trade_in_a_minute_that_the_venue_calls_quiet(db: Database) -> None:
    desk = Desk(db, 3)
    items = steady(3)
    await desk.store(items)
    told = candles(items, 3, symbols=1)
    told[1] = candle(0, 1, [])
    await desk.tell(told)
    assert [m.reason for m in (await desk.audit()).mismatches] == ["count"]


async def test_nothing_is_stored_yet(db: Database) -> None:
    desk = Desk(db, 3)
    items = steady(3)
    await desk.tell(candles(items, 3, symbols=1))
    for _ in range(2):
        report = await desk.audit()
        assert report.tails == ((BTC, 104),)
        assert (report.mismatches, report.unproven, report.proven_us) == ((), 0, {})
    await desk.store(items)
    report = await desk.audit()
    assert (report.tails, report.proven_us) == ((), {BTC: us_of(3)})


async def test_the_very_first_trades_were_missed(db: Database) -> None:
    desk = Desk(db, 4)
    items = [item for item in steady(4) if item.minute > 0]
    told = candles(items, 4, symbols=1)
    await desk.tell(told[:1])
    begin = await desk.audit(now_us=us_of(1) + int(SETTLE_S * 1e6))
    assert begin.proven_us == {BTC: us_of(1)}, "it was quiet"
    await desk.store(items[7:])
    await desk.tell(told[1:])
    report = await desk.audit()
    assert report.tails == ((BTC, items[6].trade_id),)
    assert [m[1:3] for m in report.mismatches] == [(us_of(1), "ids"), (us_of(2), "ids")]
    await desk.store(items[:7])
    await desk.run("UPDATE trade_audits SET retry_at = now()")
    assert (await desk.audit()).proven_us == {BTC: us_of(4)}


async def test_missing_klines_are_named_and_fetched(db: Database) -> None:
    desk = Desk(db, 12)
    items = steady(12)
    told = candles(items, 12, symbols=1)
    await desk.store(items)
    await desk.tell([c for c in told if c.minute in (0, 1, 4, 5, 6, 9, 10)])
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(7), us_of(8)), (BTC, us_of(2), us_of(3)))
    assert (report.matched, report.unproven, report.proven_us) == (7, 4, {BTC: us_of(2)})
    assert await put_klines(db.pool, BTC, rest_rows(told[2:4])) == 2
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(7), us_of(8)),)
    assert (report.matched, report.proven_us) == (2, {BTC: us_of(7)})
    # The venue has none of them.
    asked_us = us_of(7), us_of(9)
    assert await put_klines(db.pool, BTC, rest_rows([]), asked_us=asked_us) == 0
    report = await desk.audit()
    assert report.klines_missing == ()
    assert [m[1:3] for m in report.mismatches] == [(us_of(7), "count"), (us_of(8), "count")]
    await put_klines(db.pool, BTC, rest_rows(told))
    await desk.run("UPDATE trade_audits SET retry_at = now()")
    assert (await desk.audit()).proven_us == {BTC: us_of(12)}


async def test_the_venue_stood_still(db: Database) -> None:
    desk = Desk(db, 6)
    items = [item for item in steady(6) if item.minute not in (2, 3)]
    items = [replace(item, trade_id=100 + n) for n, item in enumerate(items)]
    told = candles(items, 6, symbols=1)
    await desk.store(items)
    await desk.tell([c for c in told if c.minute not in (2, 3)])
    assert (await desk.audit()).klines_missing == ((BTC, us_of(2), us_of(3)),)
    await put_klines(db.pool, BTC, rest_rows([]), asked_us=(us_of(2), us_of(4)))
    assert (await desk.audit()).proven_us == {BTC: us_of(6)}


async def test_klines_that_end_are_missed_without_a_later_one(db: Database) -> None:
    desk = Desk(db, 10)
    items = steady(11)
    told = candles(items, 10, symbols=1)
    await desk.store(items)
    await desk.tell(told[:2])
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(2), us_of(7)),), "two minutes' patience"
    assert (report.matched, report.unproven, report.late) == (2, 6, 1)
    assert report.proven_us == {BTC: us_of(2)}
    assert (await desk.audit()).checked == 0
    asked_us = us_of(2), us_of(8)
    assert await put_klines(db.pool, BTC, rest_rows(told[2:8]), asked_us=asked_us) == 6
    report = await desk.audit()
    assert (report.matched, report.unproven, report.late) == (6, 0, 0)
    assert report.proven_us == {BTC: us_of(8)}
    # The stream is back.
    await desk.tell(told[8:])
    assert (await desk.audit()).proven_us == {BTC: us_of(10)}


async def test_klines_that_never_came_are_missed(db: Database) -> None:
    desk = Desk(db, 10)
    items = steady(11)
    await desk.store(items[2:])
    assert (await desk.audit(now_us=us_of(3) + int(SETTLE_S * 1e6))).klines_missing == ()
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(1), us_of(7)),), "from the first whole minute on"
    assert (report.unproven, report.late) == (7, 1)
    await put_klines(db.pool, BTC, rest_rows(candles(items, 10, symbols=1)))
    assert (await desk.audit()).proven_us == {BTC: us_of(10)}
    assert await db.conn.fetchval("SELECT max(proven_from) FROM audit_state") == at(us_of(1))


async def test_klines_of_a_long_history_are_not_missed(db: Database) -> None:
    desk = Desk(db, 3000)
    await desk.store(steady(3001, a_minute=1))
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(2998 - 1440), us_of(2997)),)


async def test_a_minute_is_missed_by_the_clock_of_the_venue(db: Database) -> None:
    desk = Desk(db, 60)  # the host's clock is far ahead
    items = steady(5)
    await desk.store(items)
    await desk.tell(candles(items, 2, symbols=1))
    report = await desk.audit()
    assert report.klines_missing == ()
    assert report.late == 1
    await desk.tell(candles([], 20, symbols=2)[-1:], closed=False)  # of another symbol
    assert (await desk.audit()).klines_missing == ((BTC, us_of(2), us_of(16)),)


async def test_klines_inside_an_open_hole_are_not_asked_for(db: Database) -> None:
    desk = Desk(db, 12)
    items = steady(12)
    hole = items[12:38]  # from the minute 2 to the minute 7
    await desk.store([item for item in items if item not in hole])
    told = candles(items, 12, symbols=1)
    await desk.tell([c for c in told if c.minute not in range(1, 9)])
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(7), us_of(8)), (BTC, us_of(1), us_of(2)))
    assert (report.unproven, report.proven_us, report.late) == (8, {BTC: us_of(1)}, 0)
    await desk.store(hole)
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(1), us_of(8)),)
    asked_us = us_of(1), us_of(9)
    await put_klines(db.pool, BTC, rest_rows(told), asked_us=asked_us)
    assert (await desk.audit()).proven_us == {BTC: us_of(12)}


async def test_many_symbols_that_were_away_for_days(db: Database) -> None:
    """A gap costs by the symbols, not by its minutes: 2.9 million of them here."""
    names, days = [f"S{n:04}USDT" for n in range(1000)], 2
    away = days * 1440
    begin, end = at(us_of(0)), at(us_of(away))
    await db.conn.execute(
        "INSERT INTO trade_coverage"
        " SELECT symbol, 1, 100, $2::timestamptz, $2 + interval '1 minute'"
        " FROM unnest($1::text[]) AS symbol",
        *(names, begin),
    )
    await db.conn.execute(
        "INSERT INTO audit_state SELECT symbol, $2::timestamptz, $2, $2"
        " FROM unnest($1::text[]) AS symbol",
        *(names, begin),
    )
    await db.conn.execute(
        "INSERT INTO klines (timestamp, symbol, open, high, low, close, volume, quote_volume,"
        " taker_buy_base_volume, taker_buy_quote_volume, trade_count, first_id, last_id, is_closed)"
        " SELECT $2, symbol, 1, 1, 1, 1, 0, 0, 0, 0, 0, -1, -1, true"
        " FROM unnest($1::text[]) AS symbol",
        *(names, end),
    )
    now_us = us_of(away + 1) + int(SETTLE_S * 1e6)
    for checked in (len(names), 0):
        begun_s = time.monotonic()
        report = await audit(db.pool, now_us=now_us, settle_s=SETTLE_S, symbols=names)
        assert time.monotonic() - begun_s < 5
        assert (report.checked, report.unproven) == (checked, len(names) * away)
    assert [one[0] for one in report.klines_missing] == names, "none hides another"
    assert set(report.proven_us.values()) == {us_of(0)}
    assert await db.conn.fetchval("SELECT count(*) FROM trade_audits") == 0


async def test_a_kline_that_is_gone_is_missed_again(db: Database) -> None:
    """As when klines are dropped by age: the minute must not be looked at for ever."""
    desk = Desk(db, 4)
    items = steady(5)
    told = candles(items, 4, symbols=1)
    await desk.store([item for item in items if item.trade_id not in (107, 112)])
    await desk.tell(told)
    assert (await desk.audit()).waiting == 2
    await desk.run("DELETE FROM klines WHERE timestamp <= $1", at(us_of(2)))
    await desk.run("UPDATE trade_audits SET retry_at = now() WHERE open_time = $1", at(us_of(1)))
    await desk.store([items[12]])
    report = await desk.audit()
    assert report.klines_missing == ((BTC, us_of(1), us_of(2)),)
    assert (report.unproven, report.proven_us) == (2, {BTC: us_of(1)})
    assert (await desk.audit()).checked == 0
    await desk.store([items[7]])
    await put_klines(db.pool, BTC, rest_rows(told), asked_us=(us_of(1), us_of(3)))
    assert (await desk.audit()).proven_us == {BTC: us_of(4)}


async def test_klines_by_rest_do_not_replace_those_of_the_stream(db: Database) -> None:
    desk = Desk(db, 3)
    told = candles(steady(3), 3, symbols=1)
    await desk.tell(told[:1])
    await desk.tell(told[1:2], closed=False)
    forged = [c.but(volume=Decimal(f"{2**100}e-8")) for c in told]
    assert await put_klines(db.pool, BTC, rest_rows(forged)) == 2
    rows = await db.conn.fetch(
        "SELECT volume, first_id, is_closed, close_time FROM klines ORDER BY timestamp"
    )
    assert [row["is_closed"] for row in rows] == [True] * 3
    exact = Decimal("12676506002282294014967.03205376")
    assert [row["volume"] for row in rows] == [told[0].volume, exact, exact]
    assert [row["first_id"] for row in rows] == [100, None, None]
    assert rows[2]["close_time"] == at(us_of(3) - 1)
    assert await put_klines(db.pool, ETH, rest_rows(told, closed=False)) == 0
    assert await put_klines(db.pool, BTC, rest_rows(told)) == 0


async def test_work_is_bounded_and_goes_on(db: Database) -> None:
    desk = Desk(db, 20)
    items = market(20, a_minute=4)
    await desk.store(items)
    await desk.tell(candles(items, 20))
    seen = []
    for _ in range(10):
        report = await desk.audit(max_minutes=6)
        seen.append(report.checked)
        assert report.checked <= 12
        if not report.more:
            break
    assert report.proven_us == {BTC: us_of(20), ETH: us_of(20)}
    assert len(seen) >= 4
    assert (await desk.audit(limit_s=-1.0)).checked == 0


async def test_many_symbols_are_read_in_small_parts(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_TO_DO_ROWS", 14)
    desk = Desk(db, 20)
    items = market(20)
    await desk.store(items)
    await desk.tell(candles(items, 20))
    reports = [await desk.audit() for _ in range(3)]
    assert [report.checked for report in reports] == [14, 14, 12]
    assert [report.more for report in reports] == [True, True, False]
    assert reports[-1].unproven == 0


async def test_what_was_left_behind_is_not_starved(db: Database) -> None:
    desk = Desk(db, 20)
    items = steady(20)
    await desk.store([item for item in items if item.minute != 1])
    await desk.tell(candles(items, 20, symbols=1))
    await desk.audit(max_minutes=4)
    await desk.store([item for item in items if item.minute == 1])
    report = await desk.audit(max_minutes=4)
    assert report.more
    assert report.unproven == 0


async def test_daemons_that_audit_at_once(db: Database) -> None:
    desk = Desk(db, 15)
    items = market(15, symbols=4)
    kept = [item for item in items if item.trade_id % 17]
    await desk.store(kept)
    await desk.tell(candles(items, 15, symbols=4))
    reports = await asyncio.gather(*(desk.audit(4) for _ in range(3)))
    reports.append(await desk.audit(4))
    alone = await (await Desk(db, 15).fresh()).audit(4)
    assert sum(report.checked for report in reports) == alone.checked
    assert (reports[-1].proven_us, reports[-1].unproven) == (alone.proven_us, alone.unproven)
    told = [m for report in reports for m in report.mismatches]
    assert len(told) == len(set(told)) == len(alone.mismatches)


@pytest.mark.parametrize("seed", range(3))
async def test_daemons_that_audit_while_klines_come_by_rest(db: Database, seed: int) -> None:
    rng = random.Random(seed)
    minutes = 40
    desk = Desk(db, minutes)
    items = market(minutes + 1, seed=seed, symbols=4)
    told = candles([item for item in items if item.minute < minutes], minutes, symbols=4)
    await desk.store(items)
    await desk.tell([c for c in told if rng.random() < 0.5 and c.minute < 30])

    async def one_daemon() -> None:
        while True:
            report = await desk.audit(4)
            # A round that finds all symbols in other hands ends early: it says so by `late`.
            if not (report.unproven or report.more or report.late):
                return
            for symbol, first_us, last_us in report.klines_missing[:3]:
                span_us = first_us, last_us + MINUTE_US
                rows = [c for c in told if c.symbol == symbol and first_us <= c.open_us <= last_us]
                await put_klines(db.pool, symbol, rest_rows(rows), asked_us=span_us)

    async with asyncio.timeout(30):
        await asyncio.gather(*(one_daemon() for _ in range(3)))
    report = await desk.audit(4)
    assert report.proven_us == dict.fromkeys(NAMES, us_of(minutes - 2))
    assert (report.mismatching, report.unproven, report.late) == (0, 0, 0)
    assert await desk.open_minutes() == {}


async def test_a_call_that_is_cut_anywhere_leaves_nothing_wrong(db: Database) -> None:
    """As a crash does: what was committed stands, what was not is done again."""
    rng = random.Random(3)
    desk = Desk(db, 30)
    items = market(30)
    await desk.store([item for item in items if item.trade_id % 19])
    await desk.tell([c for c in candles(items, 30) if c.minute % 11 != 5])
    cut = 0
    for _ in range(200):
        try:
            async with asyncio.timeout(rng.uniform(0.005, 0.06)):
                report = await desk.audit()
        except TimeoutError:
            cut += 1
        except TransientStoreError:  # cut while it took a connection back
            cut += 1
        else:
            if report.checked == 0:
                break
    report, minutes = await desk.audit(), await desk.open_minutes()
    assert cut > 0
    await desk.fresh()
    alone = await desk.audit()
    assert minutes == await desk.open_minutes()
    assert (report.proven_us, report.unproven) == (alone.proven_us, alone.unproven)
    assert report.klines_missing == alone.klines_missing


@pytest.mark.parametrize("seed", range(6))
async def test_random_loss_against_an_oracle(db: Database, seed: int) -> None:
    """A minute is proven exactly when its kline is there and all its trades are stored."""
    rng = random.Random(seed)
    minutes = 25
    desk = Desk(db, minutes)
    items = market(minutes, seed=seed, a_minute=6)
    told = candles(items, minutes)
    # The first and the last minute are whole and not quiet: every loss lies between.
    lost = {item for item in items if 0 < item.minute < minutes - 1 and rng.random() < 0.15}
    silent = {c for c in told if 0 < c.minute < minutes - 1 and rng.random() < 0.15}
    await desk.store([item for item in items if item not in lost])
    await desk.tell([c for c in told if c not in silent])

    def expected() -> set[tuple[str, int]]:
        bad = {(NAMES[item.symbol_id], item.minute) for item in lost}
        return bad | {(c.symbol, c.minute) for c in silent}

    report = await desk.audit()
    assert set(await desk.open_minutes()) == expected()
    assert report.mismatches == ()
    while lost or silent:
        for item in rng.sample(sorted(lost, key=str), len(lost) // 2 + len(lost) % 2):
            await desk.store([item])
            lost.remove(item)
        for c in rng.sample(sorted(silent, key=str), len(silent) // 2 + len(silent) % 2):
            await put_klines(db.pool, c.symbol, rest_rows([c]))
            silent.remove(c)
        await desk.run("UPDATE trade_audits SET retry_at = now()")
        report = await desk.audit()
        assert set(await desk.open_minutes()) == expected()
        for symbol, through in report.proven_us.items():
            first_bad = min((m for s, m in expected() if s == symbol), default=minutes)
            assert through == us_of(first_bad)
    assert report.unproven == 0


async def test_the_database_is_away(migrated_database: str) -> None:
    pool = await open_pool(migrated_database, 2)
    await pool.close()
    with pytest.raises(TransientStoreError):
        await audit(pool, now_us=us_of(0), settle_s=SETTLE_S, symbols=[BTC])
    with pytest.raises(TransientStoreError):
        await put_klines(pool, BTC, rest_rows([]))


async def test_no_symbols(db: Database) -> None:
    assert (await Desk(db, 1).audit(0)).checked == 0
