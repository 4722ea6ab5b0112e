"""The cross-check of the running daemon: rows that change behind its back do not go unseen."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from audit_desk import START_US, candles, market
from audit_desk import Desk as MadeUp
from fill_desk import Desk, desk
from scene import assert_readable, metrics
from store_desk import NAMES as STORE_NAMES
from store_desk import Database

from tests.daemon import daemon
from tradecore import auditor as auditor_module
from tradecore import clock
from tradecore.auditor import Auditor, FetchKlines
from tradecore.errors import TransientStoreError
from tradecore.rest import trades
from tradecore.rest.budget import RestError
from tradecore.schema import KLINE_DTYPE
from tradecore.store.audit import AuditReport, Mismatch, put_klines

MINUTE_US = 60_000_000
SYMBOLS = ("BTCUSDT", "ETHUSDT", "PEPEUSDT")
NAMES = ",".join(SYMBOLS)
MADE_UP = STORE_NAMES[:3]

_CHANGE = """
    UPDATE raw_trades SET price = price * 2 WHERE symbol = $1 AND trade_id = (
        SELECT trade_id FROM raw_trades WHERE symbol = $1 AND timestamp > $2
        AND timestamp < $2 + interval '1 minute' ORDER BY trade_id OFFSET 5 LIMIT 1)
"""
_DELETE = """
    DELETE FROM raw_trades WHERE symbol = $1 AND trade_id = (
        SELECT trade_id FROM raw_trades WHERE symbol = $1 AND timestamp > $2
        AND timestamp < $2 + interval '1 minute' ORDER BY trade_id OFFSET 5 LIMIT 1)
"""


def environ(one: Desk, folder: Path) -> dict[str, Any]:
    return {
        **one.environ,
        "DATA_DIR": folder / "data",
        "BINANCE_WEBSOCKET_URL": one.exchange.ws,
        "SUPPORTED_SYMBOLS": NAMES,
    }


def at(us: int) -> datetime:
    return datetime.fromtimestamp(us / 1e6, UTC)


async def store_past(one: Desk, from_us: int, to_us: int) -> None:
    """Store the trades of a span of time, as if a daemon had captured them."""
    for symbol in SYMBOLS:
        first_id = one.market.next_id(symbol, from_us)
        end_id = one.market.next_id(symbol, to_us)
        await one.capture(symbol, (first_id, end_id - 1))


async def missing_klines(db: Database, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """Ten minutes of three symbols without a kline, and the clock at their end."""
    made_up = MadeUp(db, 10)
    items = market(11, symbols=3)
    await made_up.store(items)
    await made_up.tell([c for c in candles(items, 10, symbols=3) if c.minute == 0])
    monkeypatch.setattr(clock, "wall_ns", lambda: made_up.now_us * 1000)
    return made_up


def auditor(db: Database, fetch: FetchKlines) -> Auditor:
    store: Any = SimpleNamespace(pool=db.pool)
    return Auditor(store, lambda: MADE_UP, lambda *_: True, lambda *_: None, fetch)


async def test_a_symbol_that_the_venue_refuses_keeps_no_other_waiting(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await missing_klines(db, monkeypatch)
    asked = []

    async def fetch(symbol: str, first_us: int, end_us: int) -> Any:
        asked.append(symbol)
        if symbol == MADE_UP[0]:
            raise RestError("broken", "klines of other minutes than were asked for")
        return np.zeros(0, KLINE_DTYPE)

    one = auditor(db, fetch)
    for _ in range(3):
        await one.step()
        await one.ask()
    assert asked[:3] == sorted(MADE_UP)
    assert asked.count(MADE_UP[0]) == 1, "it has to wait"


async def test_a_symbol_that_the_venue_does_not_know_counts_as_asked(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = await missing_klines(db, monkeypatch)

    async def fetch(symbol: str, first_us: int, end_us: int) -> Any:
        raise RestError("refused", "Invalid symbol.", status=400, code=-1121)

    one = auditor(db, fetch)
    await one.step()
    made_up.now_us += 5 * MINUTE_US
    await one.ask()
    report = await one.step()
    assert report.checked and not report.klines_missing
    assert {m.reason for m in report.mismatches} == {"count"}, "trades that the venue denies"


async def test_a_venue_that_gives_nothing_is_asked_in_turn(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await missing_klines(db, monkeypatch)
    asked = []

    async def fetch(symbol: str, first_us: int, end_us: int) -> Any:
        asked.append(symbol)
        raise RestError("unreachable", "no answer")

    one = auditor(db, fetch)
    for _ in range(4):
        await one.step()
        with pytest.raises(RestError):
            await one.ask()
    assert asked == [*sorted(MADE_UP), sorted(MADE_UP)[0]]


async def test_ids_that_were_held_absent_are_told_of_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(Mismatch(MADE_UP[0], START_US, "hole", "the venue counts them"),), ()]

    async def report(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(
            **{"matched": 0, "unproven": 0, "proven_us": {}, "late": 0, "mismatches": ()},
            **{"tails": (), "klines_missing": (), "reopened": found.pop(0)},
        )

    monkeypatch.setattr(auditor_module, "audit", report)
    told: list[int] = []
    store: Any = SimpleNamespace(pool=None)
    one = Auditor(
        store, lambda: MADE_UP, lambda *_: True, lambda *_: None, None, lambda: told.append(1)
    )
    await one.step()
    assert len(told) == 1
    await one.step()
    assert len(told) == 1


async def test_rest_that_lags_is_asked_again(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await missing_klines(db, monkeypatch)
    answers = [[5], [6, 7]]

    async def fetch(symbol: str, first_us: int, end_us: int) -> Any:
        rows = np.zeros(len(answers[0]), KLINE_DTYPE)
        rows["open_us"] = START_US + np.array(answers[0]) * MINUTE_US
        return rows

    one = auditor(db, fetch)
    await one.step()
    await one.ask()
    missing = {first_us for _, first_us, _ in (await one.step()).klines_missing}
    assert missing == {START_US + 6 * MINUTE_US}, "not held to be without trades"
    answers.pop(0)
    await one.ask()
    assert not (await one.step()).klines_missing


@pytest.mark.parametrize("broken", ["check", "ask"])
async def test_what_fails_again_and_again_is_told(
    broken: str, db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await missing_klines(db, monkeypatch)
    monkeypatch.setattr(auditor_module, "INTERVAL_S", 0.01)
    monkeypatch.setattr(auditor_module, "KLINES_INTERVAL_S", 0.1)
    asked = []

    async def fetch(symbol: str, first_us: int, end_us: int) -> Any:
        asked.append(symbol)
        raise RestError("unreachable", "no answer")

    async def fails(*_: Any, **__: Any) -> AuditReport:
        raise TransientStoreError("57P01", "gone")

    if broken == "check":
        monkeypatch.setattr(auditor_module, "audit", fails)
    one = auditor(db, fetch)
    task = asyncio.create_task(one.run())
    async with asyncio.timeout(10):
        while one.stats.failures < 6:
            await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    words = {"check": "fails again and again", "ask": "cannot be fetched"}[broken]
    assert len([record for record in caplog.records if words in record.message]) == 1
    assert bool(asked) == (broken == "ask")


async def test_a_long_run_of_missing_klines_is_asked_for_page_by_page(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = await missing_klines(db, monkeypatch)
    made_up.now_us += 2500 * MINUTE_US
    await made_up.tell(candles([], 2511, symbols=1)[-1:], closed=False)
    asked = []

    async def fetch(symbol: str, first_us: int, end_us: int) -> Any:
        asked.append((symbol, first_us, end_us))
        rows = np.zeros((end_us - first_us) // MINUTE_US, KLINE_DTYPE)
        rows["open_us"] = np.arange(first_us, end_us, MINUTE_US)
        return rows

    one = auditor(db, fetch)
    for _ in range(4):
        await one.step()
        await one.ask()
    for symbol in MADE_UP:
        spans = [span[1:] for span in asked if span[0] == symbol]
        assert [(end - first) // MINUTE_US for first, end in spans] == [1000, 1000, 507]
        assert spans[0][0] == spans[1][1] and spans[1][0] == spans[2][1]


async def test_what_was_proven_is_known_from_the_start_on(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = MadeUp(db, 3)
    items = market(4, symbols=3)
    await made_up.store(items)
    await made_up.tell(candles(items, 3, symbols=3))
    monkeypatch.setattr(clock, "wall_ns", lambda: made_up.now_us * 1000)
    monkeypatch.setattr(auditor_module, "INTERVAL_S", 3600.0)

    async def fetch(*_: object) -> Any:
        return np.zeros(0, KLINE_DTYPE)

    before, after = auditor(db, fetch), auditor(db, fetch)
    await before.step()
    assert set(before.stats.proven_us) == set(MADE_UP)
    running = asyncio.create_task(after.run())
    async with asyncio.timeout(10):
        while after.stats.proven_us != before.stats.proven_us:
            await asyncio.sleep(0.01)
    running.cancel()
    assert after.stats.matched == 0, "no look of its own"


async def test_altered_rows_and_missing_klines_of_the_past_are_seen_at_the_start(
    tmp_path: Path, migrated_database: str
) -> None:
    async with desk(migrated_database, tmp_path, symbols=NAMES) as one:
        now_us = (await one.exchange.state())["now_us"]
        begin_us = now_us // MINUTE_US * MINUTE_US - 6 * MINUTE_US
        await store_past(one, begin_us - 10_000_000, begin_us + 4 * MINUTE_US)
        for symbol in SYMBOLS:
            rows = await trades.klines(one.client, symbol, begin_us, begin_us + 4 * MINUTE_US)
            assert len(rows) == 4
            await put_klines(one.store.pool, symbol, rows)
        # One kline has never come; it is fetched, and its minute proven by it.
        gone_us = begin_us + 2 * MINUTE_US
        assert (
            await one.conn.execute(
                "DELETE FROM klines WHERE symbol = 'PEPEUSDT' AND timestamp = $1", at(gone_us)
            )
            == "DELETE 1"
        )
        assert await one.conn.execute(_CHANGE, "BTCUSDT", at(begin_us + MINUTE_US)) == "UPDATE 1"
        assert await one.conn.execute(_DELETE, "ETHUSDT", at(begin_us + MINUTE_US)) == "DELETE 1"

        async with daemon(tmp_path / "daemon", **environ(one, tmp_path)) as running:
            health = await running.until(
                lambda health: sum(health["completeness"]["audit"]["klines_mismatched"].values())
            )
            await running.until(
                lambda body: (
                    (body["symbols"]["PEPEUSDT"]["proven_through"] or "")
                    >= at(begin_us + 4 * MINUTE_US).isoformat(timespec="milliseconds")
                ),
                "/health/binance",
            )
            health = await running.health()
            found = health["completeness"]["audit"]
            assert found["klines_mismatched"] == {"count": 1, "high": 1}
            assert found["klines_proven"] >= 3 + 3 + 4
            assert found["age_s"] < 10
            assert health["status"] == "ok", health["reasons"]
            values = await metrics(running)
            assert values["tradecore_klines_mismatched_total{count}"] == 1
            assert values["tradecore_klines_mismatched_total{high}"] == 1
            assert values["tradecore_klines_unproven"] >= 2
            assert values["tradecore_audit_age_seconds"] < 10
            kline = await one.conn.fetchrow(
                "SELECT trade_count FROM klines WHERE symbol = 'PEPEUSDT' AND timestamp = $1",
                at(gone_us),
            )
            assert kline["trade_count"] > 0
            assert await running.terminate() == 0
            assert running.log.count("does not equal the venue's kline") == 2
            assert_readable(running, most=2)


async def test_a_row_that_changes_in_the_present_minute_is_seen_soon_after_its_end(
    tmp_path: Path, migrated_database: str
) -> None:
    """With the venue's own klines, over a real end of a minute: 70 s at most."""
    async with desk(migrated_database, tmp_path, symbols=NAMES) as one:
        while time.time() % 60 > 48:  # else there is no time to alter something
            await asyncio.sleep(0.1)
        minute_us = int(time.time()) // 60 * MINUTE_US
        # What was captured before makes the present minute a whole one: the rest is filled.
        await store_past(one, minute_us - 2 * MINUTE_US, minute_us - MINUTE_US)
        async with daemon(tmp_path / "daemon", **environ(one, tmp_path)) as running:
            await running.until(
                lambda health: (
                    health["completeness"]["backfill"]["holes_closed"]["filled"] == len(SYMBOLS)
                )
            )
            health = await running.until(lambda health: health["completeness"]["holes"] == 0)
            assert health["counts"]["trades_filled"] > 0
            through = health["completeness"]["complete_through"]
            assert through > at(minute_us).isoformat()
            assert await one.conn.execute(_CHANGE, "BTCUSDT", at(minute_us)) == "UPDATE 1"
            assert await one.conn.execute(_DELETE, "ETHUSDT", at(minute_us)) == "DELETE 1"
            async with asyncio.timeout(75):
                while True:
                    body = (await running.get("/health/binance"))[1]["symbols"]
                    found = (await running.health())["completeness"]["audit"]
                    proven = body["PEPEUSDT"]["proven_through"] or ""
                    if len(found["klines_mismatched"]) == 2 and proven > at(minute_us).isoformat():
                        break
                    await asyncio.sleep(0.1)
            seen_s = time.time() - (minute_us + MINUTE_US) / 1e6
            assert seen_s < 30
            assert found["klines_mismatched"] == {"count": 1, "high": 1}
            for symbol in ("BTCUSDT", "ETHUSDT"):
                assert (body[symbol]["proven_through"] or "") < at(minute_us + 1).isoformat()
                assert body[symbol]["complete_through"] > at(minute_us + MINUTE_US).isoformat()
            assert await running.terminate() == 0
            assert_readable(running, most=2)
