"""The queries of docs/ run on every level, and answer what Python computes from the rows."""

import json
import random
import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, localcontext
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from candle_desk import Candles, candles_of
from store_desk import Database, trades

from tradecore.schema import FLAG_BUYER_IS_MAKER
from tradecore.store.candles import read_kind, refresh
from tradecore.store.migrate import detect_level
from tradecore.store.partitions import Partitions

pytestmark = pytest.mark.every_level

PAGES = Path(__file__).parents[1] / "docs"
TEXT = "".join((PAGES / name).read_text() for name in ("data.md", "queries.md"))
QUERIES = dict(re.findall(r"<!-- query: (\w+) -->\n```sql\n(.*?)```", TEXT, re.DOTALL))

DAY = datetime(2026, 11, 27, tzinfo=UTC)
NEXT = DAY + timedelta(days=1)
TEN = DAY + timedelta(hours=10)
MINUTE = timedelta(minutes=1)
FIRST_ID = 1000
MISSING = range(1240, 1250)
SYMBOL = "BTCUSDT"
OTHER = "ETHUSDT"
NEAR = Decimal("1e-12")
"""Divisions: PostgreSQL gives at least 16 significant digits."""


def us(time: datetime) -> int:
    return round((time - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


def market() -> list[dict[str, int]]:
    """Two symbols over three days, most of it between ten and two o'clock of DAY."""
    found = []
    for symbol_id in (0, 1):
        rng = random.Random(symbol_id)
        begin = us(DAY)
        times = [begin + rng.randrange(-86_400, 0) * 10**6 for _ in range(50)]
        times += [begin + rng.randrange(86_400 * 10**6) for _ in range(100)]
        times += [us(TEN) + rng.randrange(4 * 3600 * 10**6) for _ in range(250)]
        times += [us(TEN) + rng.randrange(15 * 60 * 10**6) for _ in range(100)]
        times += [us(NEXT) + rng.randrange(86_400 * 10**6) for _ in range(50)]
        for trade_id, time_us in enumerate(sorted(times), FIRST_ID):
            delay_us = rng.choice([900, 40_000, 3_000_000])
            found.append(
                {
                    "symbol_id": symbol_id,
                    "trade_id": trade_id,
                    "price_e8": rng.randrange(1, 10**13),
                    "quantity_e8": rng.randrange(1, 10**11),
                    "trade_us": time_us,
                    "recv_ns": 0 if trade_id % 9 == 0 else (time_us + delay_us) * 1000,
                    "flags": FLAG_BUYER_IS_MAKER if rng.random() < 0.5 else 0,
                }
            )
    return found


class Desk:
    """The database with the market in it, the rows of SYMBOL, and its candles of a minute."""

    def __init__(self, conn: asyncpg.Connection, rows: list[Any]) -> None:
        self.conn = conn
        self.rows = rows
        self.minutes: Candles = candles_of(rows, MINUTE)

    async def ask(self, name: str) -> list[Any]:
        return list(await self.conn.fetch(QUERIES[name]))

    def between(self, begin: datetime, end: datetime) -> list[Any]:
        return [row for row in self.rows if begin <= row["timestamp"] < end]

    def candles(self, width: timedelta, begin: datetime = DAY, end: datetime = NEXT) -> Any:
        """Begin and candle, of SYMBOL, in order."""
        found = candles_of(self.between(begin, end), width)
        return sorted((bucket, candle) for (bucket, _), candle in found.items())


@pytest.fixture
async def desk(db: Database) -> Desk:
    rows = [row for row in market() if row["symbol_id"] or row["trade_id"] not in MISSING]
    await db.sink.write_trades(trades(*rows))
    level = await detect_level(db.conn)
    kind = await read_kind(db.conn, level)
    await refresh(db.conn, kind, DAY - timedelta(days=1), NEXT + timedelta(days=1))
    stored = await db.conn.fetch("SELECT * FROM raw_trades WHERE symbol = $1", SYMBOL)
    stored.sort(key=lambda row: row["trade_id"])
    return Desk(db.conn, stored)


def near(found: Decimal, expected: Decimal) -> bool:
    return abs(found - expected) <= NEAR * abs(expected)


async def test_every_query_runs(desk: Desk) -> None:
    assert len(QUERIES) == TEXT.count("```sql"), "a block without a name"
    level = await detect_level(desk.conn)
    foreign = "room_timescale" if level == "plain" else "room_plain"
    for name in QUERIES:
        if name != foreign:
            await desk.ask(name)


async def test_every_query_of_the_other_pages_runs(desk: Desk) -> None:
    queries = [
        query
        for page in PAGES.glob("*.md")
        if page.name not in ("data.md", "queries.md")
        for query in re.findall(r"^```sql\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert queries
    for query in queries:
        await desk.conn.fetch(query)


async def test_candles_of_any_width(desk: Desk) -> None:
    expected = [
        (bucket, *candle[:5], candle[6]) for bucket, candle in desk.candles(timedelta(minutes=5))
    ]
    assert [tuple(row) for row in await desk.ask("candles")] == expected
    expected = [
        (bucket, *candle[:5], candle[6])
        for bucket, candle in desk.candles(timedelta(minutes=7), TEN, DAY + timedelta(hours=14))
    ]
    found = [tuple(row) for row in await desk.ask("odd_width")]
    assert found == expected
    assert len(found) > 30


async def test_a_grid_shows_quiet_minutes(desk: Desk) -> None:
    expected = []
    for n in range(60):
        minute = TEN + n * MINUTE
        candle = desk.minutes.get((minute, SYMBOL))
        if candle is not None:
            expected.append((minute, candle[0], candle[3], candle[4]))
        else:
            last = desk.between(DAY, minute)[-1]["price"]
            expected.append((minute, last, last, 0))
    assert [tuple(row) for row in await desk.ask("grid")] == expected
    assert 0 in [row[3] for row in expected], "no quiet minute was tried"


async def test_prices_weighted_by_volume_and_time(desk: Desk) -> None:
    with localcontext(Context(prec=100)):
        hours: dict[datetime, list[Any]] = defaultdict(list)
        for row in desk.between(DAY, NEXT):
            hours[row["timestamp"].replace(minute=0, second=0, microsecond=0)].append(row)
        found = await desk.ask("vwap")
        assert [row["hour"] for row in found] == sorted(hours)
        for hour, vwap in found:
            assert near(vwap, _vwap(hours[hour]))

        members = desk.between(TEN, TEN + timedelta(minutes=12, seconds=30))
        ((vwap, count),) = await desk.ask("vwap_seconds")
        assert count == len(members) > 50
        assert near(vwap, _vwap(members))

        end = TEN + timedelta(hours=1)
        members = desk.between(TEN, end)
        ends = [row["timestamp"] for row in members[1:]] + [end]
        held = [us(until) - us(row["timestamp"]) for row, until in zip(members, ends, strict=True)]
        expected = sum(row["price"] * us_held for row, us_held in zip(members, held, strict=True))
        ((twap,),) = await desk.ask("twap")
        assert near(twap, expected / sum(held))


def _vwap(rows: list[Any]) -> Decimal:
    quote = sum((row["price"] * row["quantity"] for row in rows), Decimal(0))
    return quote / sum((row["quantity"] for row in rows), Decimal(0))


async def test_order_flow(desk: Desk) -> None:
    expected = []
    cumulative = Decimal(0)
    for bucket, candle in desk.candles(timedelta(minutes=15)):
        members = desk.between(bucket, bucket + timedelta(minutes=15))
        delta = sum(r["quantity"] if r["side"] == "BUY" else -r["quantity"] for r in members)
        cumulative += delta
        expected.append((bucket, delta, cumulative))
        assert len(members) == candle[6]
    assert [tuple(row) for row in await desk.ask("order_flow")] == expected


async def test_trades_by_id_and_as_of_the_ticker(desk: Desk) -> None:
    found = await desk.ask("by_id")
    expected = [row for row in desk.rows if 1200 <= row["trade_id"] <= 1300]
    columns = ("trade_id", "timestamp", "price", "quantity", "side")
    assert [tuple(row) for row in found] == [tuple(row[c] for c in columns) for row in expected]
    assert len(found) == 101 - len(MISSING)

    await Partitions().ensure(desk.conn, "tickers", [DAY.date()])
    shown = []
    rng = random.Random(3)
    for second in range(0, 600, 7):
        if rng.random() < 0.6:
            event = TEN + timedelta(seconds=second, milliseconds=rng.randrange(1000))
            shown.append((event, Decimal(second), Decimal(second) + 1))
    await desk.conn.executemany(
        "INSERT INTO tickers (timestamp, symbol, event_time, best_bid_price, best_ask_price)"
        f" VALUES (date_trunc('second', $1::timestamptz), '{SYMBOL}', $1, $2, $3)",
        shown,
    )
    expected = []
    for row in desk.between(TEN, TEN + timedelta(minutes=10)):
        limit = row["timestamp"] - timedelta(seconds=10)
        known = [
            one for one in shown
            if one[0] <= row["timestamp"] and one[0].replace(microsecond=0) > limit
        ]  # fmt: skip
        expected.append((row["trade_id"], *(known[-1][1:] if known else (None, None))))
    found = await desk.ask("as_of")
    assert [(row["trade_id"], row[3], row[4]) for row in found] == expected
    assert {bid is None for _, bid, _ in expected} == {True, False}


async def test_late_and_fetched_trades(desk: Desk) -> None:
    hours: dict[datetime, list[Any]] = defaultdict(list)
    for row in desk.between(DAY, NEXT):
        hours[row["timestamp"].replace(minute=0, second=0, microsecond=0)].append(row)
    expected = []
    for hour, rows in sorted(hours.items()):
        waits = sorted(r["received_at"] - r["timestamp"] for r in rows if r["received_at"])
        late = sum(wait > timedelta(seconds=2) for wait in waits)
        expected.append((hour, len(rows), late, len(rows) - len(waits)))
    assert [tuple(row)[:4] for row in await desk.ask("late")] == expected
    assert sum(one[2] for one in expected) > 10


async def test_holes_and_the_candles_that_lack_them(desk: Desk) -> None:
    below, above = (
        next(row for row in desk.rows if row["trade_id"] == wanted)["timestamp"]
        for wanted in (MISSING[0] - 1, MISSING[-1] + 1)
    )
    (hole,) = await desk.ask("holes")
    assert tuple(hole)[:5] == (SYMBOL, MISSING[0], MISSING[-1], len(MISSING), "unknown")
    assert (hole["after"], hole["before"]) == (below, above)

    touched = {time.replace(second=0, microsecond=0): None for time in (below, above)}
    found = await desk.ask("incomplete")
    assert [row["bucket"] for row in found] == list(touched)
    assert sum(row["missing_inside"] for row in found) == (len(MISSING) if len(found) == 1 else 0)

    ((*fate, _),) = [tuple(row) for row in await desk.ask("fates")]
    assert fate == ["unknown", "open", None, 1, len(MISSING)]


async def test_what_is_proven(desk: Desk) -> None:
    await desk.conn.execute(
        "INSERT INTO audit_state (symbol, proven_from, proven_through, audited_through, no_kline)"
        " VALUES ($1, $2, $3, $4, tstzmultirange(tstzrange($5, $4)))",
        *(SYMBOL, DAY, TEN, TEN + 3 * MINUTE, TEN + MINUTE),
    )
    await desk.conn.execute(
        "INSERT INTO trade_audits (symbol, open_time, state, reason)"
        " VALUES ($1, $2, 'waiting', 'hole')",
        *(SYMBOL, TEN),
    )
    below = next(row for row in desk.rows if row["trade_id"] == MISSING[0] - 1)
    other = await desk.conn.fetchrow(
        "SELECT count(*), max(timestamp) FROM raw_trades WHERE symbol = $1", OTHER
    )
    assert [tuple(row) for row in await desk.ask("proof")] == [
        (SYMBOL, len(desk.rows), below["timestamp"], DAY, TEN, TEN + 3 * MINUTE, 1),
        (OTHER, *other, None, None, None, 0),
    ]
    assert [tuple(row)[:4] for row in await desk.ask("unproven")] == [
        (SYMBOL, TEN, "waiting", "hole")
    ]
    assert [tuple(row) for row in await desk.ask("no_kline")] == [
        (SYMBOL, TEN + MINUTE, TEN + 3 * MINUTE)
    ]


async def test_klines_that_differ_from_candles(desk: Desk) -> None:
    rows = [
        (bucket, *candle) for (bucket, _), candle in desk.minutes.items() if DAY <= bucket < NEXT
    ]
    wrong, lacking = rows[20], rows[30]
    rows[20] = (*wrong[:5], wrong[5] + Decimal("1e-8"), *wrong[6:])
    await desk.conn.executemany(
        "INSERT INTO klines (timestamp, symbol, open, high, low, close, volume, quote_volume,"
        " trade_count, taker_buy_base_volume, taker_buy_quote_volume, first_id, last_id, is_closed)"
        f" VALUES ($1, '{SYMBOL}', $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, true)",
        rows,
    )
    assert [row["timestamp"] for row in await desk.ask("against_klines")] == [wrong[0]]
    await desk.conn.execute(
        "UPDATE klines SET timestamp = '2026-11-27 09:59:30Z' WHERE timestamp = $1", lacking[0]
    )
    found = await desk.ask("against_klines")
    assert {tuple(row)[:3] for row in found} == {
        (wrong[0], wrong[7], wrong[7]), (DAY + timedelta(hours=9, minutes=59, seconds=30),
                                         lacking[7], None),
    }  # fmt: skip


@pytest.mark.only_levels("plain", "apache")
async def test_questions_about_a_day_open_that_day_only(desk: Desk) -> None:
    """And they find their rows by a key: nothing scans a whole day for some minutes of it."""
    parts = dict(
        await desk.conn.fetch(
            "SELECT relname, inhparent::regclass::text FROM pg_inherits"
            " JOIN pg_class ON pg_class.oid = inhrelid"
        )
    )
    of_the_day = await desk.conn.fetchval(
        "SELECT relname FROM raw_trades AS t JOIN pg_class AS c ON c.oid = t.tableoid"
        " WHERE timestamp >= $1 AND timestamp < $2 LIMIT 1",
        *(DAY, NEXT),
    )
    await desk.conn.execute("SET enable_seqscan = off")
    reading = 0
    for name, query in QUERIES.items():
        if name.startswith("room"):
            continue
        plan = json.loads(await desk.conn.fetchval(f"EXPLAIN (FORMAT JSON) {query}"))
        nodes = list(_nodes(plan[0]["Plan"]))
        read = {
            node["Relation Name"]: node["Node Type"] for node in nodes
            if parts.get(node.get("Relation Name")) == "raw_trades"
        }  # fmt: skip
        if read and name != "by_id":  # which opens the days that its minutes name
            assert set(read) == {of_the_day}, (name, read)
            reading += 1
        assert "Seq Scan" not in read.values(), name
    assert reading >= 4


def _nodes(plan: dict[str, Any]) -> Any:
    yield plan
    for one in plan.get("Plans", ()):
        yield from _nodes(one)
