"""Candles, trades and prices as clients get them, against a slow oracle, on every level."""

import json
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import market_oracle as oracle
import pytest
from market_oracle import DAY_US, MINUTE_US
from store_desk import NAMES, Database, at, trades

from tradecore.clock import wall_ns
from tradecore.errors import TransientStoreError
from tradecore.schema import FLAG_BUYER_IS_MAKER
from tradecore.store import queries, reader, statistics, ticker_queries, trade_queries
from tradecore.store.candles import read_kind, refresh
from tradecore.store.grids import INTERVALS, grid
from tradecore.store.migrate import detect_level
from tradecore.store.pool import open_reading_pool
from tradecore.store.reader import BusyError, Reader

pytestmark = pytest.mark.every_level

FIRST_US = 1_789_000_000_000_000
BUSY, RARE, ONCE, NEVER = NAMES
ZONES_US = [zone * MINUTE_US for zone in (0, 8 * 60, -60, 5 * 60 + 45, 14 * 60, -12 * 60)]


def made(symbol_id: int, trade_id: int, us: int) -> dict[str, int]:
    rng = random.Random(symbol_id * 1_000_003 + trade_id)
    return {
        "symbol_id": symbol_id,
        "trade_id": trade_id,
        "price_e8": rng.randrange(1, 10**13),
        "quantity_e8": rng.choice([1, rng.randrange(1, 10**12)]),
        "trade_us": us,
        "recv_ns": us * 1000,
        "flags": FLAG_BUYER_IS_MAKER if rng.random() < 0.5 else 0,
    }


def market() -> list[dict[str, int]]:
    """A busy symbol with bursts and pauses over 70 days, a rare one, and one that traded once."""
    rng = random.Random(4)
    found = []
    for symbol_id, first_id, count in ((0, 5_000, 1500), (1, 1, 40)):
        times = sorted(FIRST_US + rng.randrange(70 * DAY_US) for _ in range(count // 2))
        times += sorted(times[-1] + rng.randrange(90 * MINUTE_US) for _ in range(count // 2))
        times[10:14] = [times[10]] * 4
        found += [made(symbol_id, first_id + n, us) for n, us in enumerate(times)]
    return [*found, made(2, 77, FIRST_US + 3)]


class Desk:
    """A database with the market in it, and a reader."""

    def __init__(self, db: Database, read: Reader) -> None:
        self.db = db
        self.read = read

    async def rows(self, symbol: str) -> list[Any]:
        query = "SELECT * FROM raw_trades WHERE symbol = $1 ORDER BY trade_id"
        return list(await self.db.conn.fetch(query, symbol))

    async def klines(
        self, symbol: str, interval: str, zone_us: int = 0, **options: Any
    ) -> list[Any]:
        async with self.read.session() as conn:
            page = await queries.candles(
                conn, self.read.tables, symbol, grid(interval, zone_us), **options
            )
        assert page is not None
        found = json.loads(page.body)
        assert page.rows == len(found)
        unit = 1 if options.get("micro") else 1000
        assert page.last_us == (found[-1][0] * unit if found else None)
        return list(found)

    async def newest(self, symbol: str, limit: int, micro: bool = False) -> list[Any]:
        async with self.read.session() as conn:
            span = await queries.trade_span(conn, symbol)
            assert span is not None
            page = await trade_queries.newest_trades(
                conn, self.read.tables, symbol, span.last_us, limit, micro=micro
            )
        return list(json.loads(page.body))

    async def trades_from(self, symbol: str, from_id: int, limit: int) -> list[Any]:
        async with self.read.session() as conn:
            page = await trade_queries.trades_from(conn, self.read.tables, symbol, from_id, limit)
        return list(json.loads(page.body))


@pytest.fixture
async def desk(db: Database) -> AsyncIterator[Desk]:
    await db.sink.write_trades(trades(*market()))
    read = Reader(lambda: db.dsn)
    yield Desk(db, read)
    await read.close()


async def make_candles(desk: Desk, closed_us: int | None = None) -> None:
    kind = await read_kind(desk.db.conn, await detect_level(desk.db.conn))
    first, end = at(FIRST_US), at(FIRST_US + 72 * DAY_US)
    closed = None if closed_us is None else at(closed_us)
    await refresh(desk.db.conn, kind, first, end, closed=closed)


async def test_candles_of_all_intervals_and_zones(desk: Desk) -> None:
    await make_candles(desk)
    for symbol in (BUSY, RARE, ONCE):
        rows = await desk.rows(symbol)
        for interval in INTERVALS:
            for zone_us in ZONES_US if symbol == BUSY else (0,):
                for micro in (False, True) if not zone_us else (False,):
                    options: dict[str, Any] = {"micro": micro, "limit": 2000}
                    found = await desk.klines(symbol, interval, zone_us, **options)
                    wanted = oracle.klines(rows, interval, zone_us=zone_us, **options)
                    assert found == wanted, (symbol, interval, zone_us, micro)


async def test_candles_under_way_are_those_of_the_trades(desk: Desk) -> None:
    """Wide aggregates are refreshed when they are over; until then minutes say what is in them."""
    rows = await desk.rows(BUSY)
    last_us = oracle.us_of(rows[-1]["timestamp"])
    await make_candles(desk, last_us - 20 * MINUTE_US)
    for interval in INTERVALS:
        for zone_us in ZONES_US:
            for limit in (1, 7, 1000):
                found = await desk.klines(BUSY, interval, zone_us, limit=limit)
                wanted = oracle.klines(rows, interval, zone_us=zone_us, limit=limit)
                assert found == wanted, (interval, zone_us, limit)


async def test_ranges_and_limits(desk: Desk) -> None:
    """The venue's page "General API Information": which rows two, one or no bound mean."""
    await make_candles(desk)
    rng = random.Random(9)
    for symbol in (BUSY, RARE, ONCE):
        rows = await desk.rows(symbol)
        begins = [oracle.us_of(row["timestamp"]) for row in rows]
        for interval in ("1m", "3m", "15m", "4h", "6h", "1d", "1w", "1M"):
            for _ in range(12):
                edges = sorted(
                    rng.choice(begins) // MINUTE_US * MINUTE_US + rng.choice((-1, 0, 1, DAY_US))
                    for _ in range(2)
                )
                for start_us, end_us in (
                    (edges[0], edges[1]),
                    (edges[0], None),
                    (None, edges[1]),
                    (0, 2**62),
                ):
                    options: dict[str, Any] = {
                        "start_us": start_us,
                        "end_us": end_us,
                        "limit": rng.choice((1, 3, 40, 1000)),
                    }
                    found = await desk.klines(symbol, interval, **options)
                    assert found == oracle.klines(rows, interval, **options), options


async def test_candles_outlive_their_trades(desk: Desk) -> None:
    await make_candles(desk)
    wanted = await desk.klines(BUSY, "1d", limit=1000)
    horizon_us = (FIRST_US + 40 * DAY_US) // DAY_US * DAY_US
    kept = (await desk.rows(BUSY))[-10]["trade_id"]
    await desk.db.conn.execute(
        "UPDATE trade_coverage SET first_id = $2, first_time = $3 WHERE symbol = $1",
        *(BUSY, kept, at(horizon_us)),
    )
    assert await desk.klines(BUSY, "1d", limit=1000) == wanted


async def test_trades_by_id(desk: Desk) -> None:
    await make_candles(desk)
    for symbol in (BUSY, RARE, ONCE):
        wanted = oracle.trades(await desk.rows(symbol))
        first, last = wanted[0]["id"], wanted[-1]["id"]
        for from_id in {0, first, first + 1, (first + last) // 2, last - 3, last, last + 1}:
            for limit in (1, 5, 1000):
                found = await desk.trades_from(symbol, from_id, limit)
                assert found == [t for t in wanted if t["id"] >= from_id][:limit]


async def test_the_newest_trades(desk: Desk) -> None:
    await make_candles(desk)
    for symbol in (BUSY, RARE, ONCE):
        for micro in (False, True):
            wanted = oracle.trades(await desk.rows(symbol), micro=micro)
            for limit in (1, 3, 500, 1000):
                assert await desk.newest(symbol, limit, micro) == wanted[-limit:]


async def test_trades_without_candles(desk: Desk) -> None:
    """What the candles do not know yet is found all the same."""
    for symbol in (BUSY, RARE):
        wanted = oracle.trades(await desk.rows(symbol))
        assert await desk.newest(symbol, 700) == wanted[-700:]
        assert await desk.trades_from(symbol, 0, 700) == wanted[:700]


async def test_trades_around_holes(db: Database) -> None:
    rows = [row for row in market() if row["symbol_id"] == 0 and row["trade_id"] % 100 > 9]
    await db.sink.write_trades(trades(*rows))
    read = Reader(lambda: db.dsn)
    desk = Desk(db, read)
    await make_candles(desk)
    wanted = oracle.trades(await desk.rows(BUSY))
    assert len(wanted) == len(rows)
    for from_id in (5_000, 5_205, 5_210, 6_000, 6_499):
        for limit in (1, 95, 400):
            found = await desk.trades_from(BUSY, from_id, limit)
            assert found == [t for t in wanted if t["id"] >= from_id][:limit], (from_id, limit)
    for limit in (1, 95, 800):
        assert await desk.newest(BUSY, limit) == wanted[-limit:]
    async with read.session() as conn:
        one = await statistics.coverage_of(conn, BUSY)
        assert one is not None
        assert (one["holes"], one["ids_missing"], one["trades"]) == (14, 140, len(rows))
        pages, from_id = [], 0
        while from_id is not None:
            page = await statistics.coverage_page(conn, BUSY, from_id, 4)
            pages.append(page)
            from_id = page["next_id"]
    ranges = [(r["first_id"], r["last_id"]) for page in pages for r in page["ranges"]]
    assert ranges == [(first, first + 89) for first in range(5_010, 6_500, 100)]
    holes = [(h["first_id"], h["last_id"]) for page in pages for h in page["holes"]]
    assert holes == [(first, first + 9) for first in range(5_100, 6_500, 100)]
    await read.close()


async def test_an_id_that_is_kept_for_its_place_only_is_no_trade(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention may leave one below a hole; nobody searches all days for its row."""
    await make_candles(desk)
    await desk.db.conn.execute(
        "INSERT INTO trade_coverage VALUES ($1, 4000, 4000, $2, $2)", BUSY, at(FIRST_US - DAY_US)
    )
    await desk.db.conn.execute("UPDATE store_state SET ledger_from = $1", at(FIRST_US - 60))
    monkeypatch.setattr(trade_queries, "_BY_ID", "SELECT nothing of the kind")
    wanted = oracle.trades(await desk.rows(BUSY))
    assert await desk.trades_from(BUSY, 0, 5) == wanted[:5]
    assert await desk.trades_from(BUSY, 4000, 1000) == wanted[:1000]
    async with desk.read.session() as conn:
        one = await statistics.coverage_of(conn, BUSY)
        assert one is not None
    assert one["trades"] == len(wanted)


async def test_trades_by_time(desk: Desk) -> None:
    rows = await desk.rows(BUSY)
    times = [oracle.us_of(row["timestamp"]) for row in rows]
    async with desk.read.session() as conn:
        for newest in (False, True):
            page = await trade_queries.trades_by_time(
                conn, BUSY, times[300], times[900], 50, newest=newest
            )
            inside = [r for r in rows if times[300] <= oracle.us_of(r["timestamp"]) <= times[900]]
            wanted = inside[-50:] if newest else inside[:50]
            assert json.loads(page.body) == oracle.trades(wanted)


async def test_prices_and_windows(desk: Desk) -> None:
    await make_candles(desk)
    async with desk.read.session() as conn:
        found = await ticker_queries.last_prices(conn, [BUSY, RARE, ONCE, NEVER])
        assert sorted(found) == sorted([BUSY, RARE, ONCE])
        for symbol, body in found.items():
            price = oracle.eight((await desk.rows(symbol))[-1]["price"])
            assert json.loads(body) == {"symbol": symbol, "price": price}
        rows = await desk.rows(BUSY)
        begin_us = oracle.us_of(rows[-200]["timestamp"]) // MINUTE_US * MINUTE_US
        end_us = oracle.us_of(rows[-1]["timestamp"]) // MINUTE_US * MINUTE_US + MINUTE_US
        bodies = await ticker_queries.window_statistics(
            conn, desk.read.tables, [BUSY, NEVER], begin_us, end_us, (1, 2), mini=False
        )
    assert list(bodies) == [BUSY]
    inside = [row for row in rows if oracle.us_of(row["timestamp"]) >= begin_us]
    found_window = json.loads(bodies[BUSY])
    assert found_window["firstId"] == inside[0]["trade_id"]
    assert found_window["lastId"] == rows[-1]["trade_id"]
    assert found_window["count"] == len(inside)
    assert found_window["openPrice"] == oracle.eight(inside[0]["price"])
    assert found_window["lastPrice"] == oracle.eight(rows[-1]["price"])
    assert found_window["highPrice"] == oracle.eight(max(row["price"] for row in inside))
    change = rows[-1]["price"] - inside[0]["price"]
    assert found_window["priceChange"] == oracle.eight(change)
    assert (found_window["openTime"], found_window["closeTime"]) == (1, 2)


async def test_tickers_are_the_newest_of_the_last_day(db: Database) -> None:
    now_us = wall_ns() // 1000
    insert = (
        "INSERT INTO tickers (timestamp, symbol, event_time, last_price, price_change_percent,"
        " open_time, close_time, first_id, last_id, trade_count)"
        " VALUES ($1, $2, $1, $3, -1.5, $1, $1, 1, 2, 2)"
    )
    day = at(now_us).date()
    from tradecore.store.partitions import Partitions

    days = [day - timedelta(days=n) for n in range(4)]
    await Partitions().ensure(db.conn, "tickers", days)
    for symbol, age_s in ((BUSY, 1), (BUSY, 4), (RARE, 4000), (ONCE, 3 * 86_400)):
        await db.conn.execute(insert, at(now_us - age_s * 10**6), symbol, age_s)
    read = Reader(lambda: db.dsn)
    async with read.session() as conn:
        for mini in (False, True):
            found = await ticker_queries.newest_tickers(conn, NAMES, now_us, mini=mini, micro=False)
            shown = {symbol: json.loads(body) for symbol, body in found.items()}
            assert sorted(shown) == sorted([BUSY, RARE])
            assert shown[BUSY]["lastPrice"] == "1.00000000"
            assert shown[RARE]["lastPrice"] == "4000.00000000"
            assert shown[BUSY]["closeTime"] == (now_us - 10**6) // 1000
            assert ("priceChangePercent" in shown[BUSY]) is not mini
            assert mini or shown[BUSY]["priceChangePercent"] == "-1.500"
    await read.close()


async def test_statistics_count_what_is_there(desk: Desk) -> None:
    await make_candles(desk)
    async with desk.read.session() as conn:
        body = await statistics.table_statistics(conn)
        totals = await statistics.totals(conn)
        symbols = json.loads(await statistics.coverage_of_all(conn))
        assert symbols == [await statistics.coverage_of(conn, one["symbol"]) for one in symbols]
    for name in ("trades", "ids_missing"):
        assert totals[name] == sum(one[name] for one in symbols)
    assert totals["trades"] == await desk.db.conn.fetchval("SELECT count(*) FROM raw_trades")
    tables = body["tables"]
    assert list(tables) == list(statistics.TABLES)
    days = await desk.db.conn.fetchval(
        "SELECT count(DISTINCT date_trunc('day', timestamp)) FROM raw_trades"
    )
    raw = tables["raw_trades"]
    assert raw.get("partitions", raw.get("chunks")) >= days
    assert all(one["bytes"] > 0 for name, one in tables.items() if name != "tickers")


async def test_a_symbol_of_which_nothing_is_stored(desk: Desk) -> None:
    async with desk.read.session() as conn:
        assert await queries.trade_span(conn, NEVER) is None
        for start_us, end_us in ((None, None), (0, None), (FIRST_US, FIRST_US + 1), (5, 4)):
            page = await queries.candles(
                *(conn, desk.read.tables, NEVER, grid("1h")), start_us=start_us, end_us=end_us
            )
            assert page is None
        page = await trade_queries.trades_from(conn, desk.read.tables, NEVER, 0, 10)
    assert page.body == b"[]"


@pytest.mark.only_levels("plain", "timescale")
async def test_a_reader_cannot_write(desk: Desk) -> None:
    with pytest.raises(TransientStoreError, match="read-only"):
        async with desk.read.session() as conn:
            await conn.execute("DELETE FROM raw_trades")
    async with desk.read.session() as conn:
        assert await conn.fetchval("SELECT count(*) FROM raw_trades") > 0


@pytest.mark.only_levels("plain")
async def test_a_statement_is_stopped(db: Database) -> None:
    pool = await open_reading_pool(db.dsn, 1, 0.2)
    with pytest.raises(Exception, match="statement timeout"):
        await pool.fetchval("SELECT pg_sleep(30)")
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


@pytest.mark.only_levels("plain")
async def test_a_full_queue_is_told_at_once(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(reader, "WAITING_MAX", 2)
    monkeypatch.setattr(reader, "WAIT_LIMIT_S", 0.3)
    read = Reader(lambda: db.dsn)

    async def ask(seconds: float) -> Any:
        async with read.session() as conn:
            return await conn.fetchval("SELECT pg_sleep($1)::text", seconds)

    busy = [asyncio.create_task(ask(1.0)) for _ in range(reader.READERS)]
    await asyncio.sleep(0.1)
    late = await asyncio.gather(*(ask(0.0) for _ in range(4)), return_exceptions=True)
    assert [type(one) for one in late] == [BusyError] * 4
    assert await asyncio.gather(*busy) == [""] * reader.READERS
    assert await ask(0.0) == ""
    await read.close()


@pytest.mark.only_levels("plain")
async def test_a_database_that_is_away(db: Database) -> None:
    def nowhere() -> str:
        raise TransientStoreError("down", "not open")

    with pytest.raises(TransientStoreError):
        async with Reader(nowhere).session():
            raise AssertionError
    with pytest.raises(TransientStoreError):
        async with Reader(lambda: "postgresql://x@127.0.0.1:1/x").session():
            raise AssertionError
