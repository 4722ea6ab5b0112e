"""Tickers and klines: the newest wins, a closed candle is final."""

import asyncio
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from store_desk import (
    NAMES,
    NOW_US,
    Database,
    at,
    decimal,
    parked,
)

from tradecore.schema import (
    FLAG_CLOSED,
    KLINE_DECIMALS,
    KLINE_DTYPE,
    TICKER_DECIMALS,
    TICKER_DTYPE,
)
from tradecore.store.sink import WriteResult

pytestmark = pytest.mark.every_level


def states(dtype: Any, decimals: tuple[str, ...], *rows: dict[str, int]) -> Any:
    """Rows whose decimals all hold `value`."""
    array = np.zeros(len(rows), dtype)
    for row, values in zip(array, rows, strict=True):
        for key, number in values.items():
            for name in decimals if key == "value" else ():
                row[name]["lo"], row[name]["hi"] = number % 2**64, number >> 64
            if key != "value":
                row[key] = number
    return array


def ticker(event_us: int, value: int, symbol_id: int = 0) -> dict[str, int]:
    common = {"open_us": 1, "close_us": 2, "first_id": -1, "last_id": 2**40, "trade_count": 5}
    return {"event_us": event_us, "value": value, "symbol_id": symbol_id, **common}


async def test_tickers_keep_the_newest_of_a_second(db: Database) -> None:
    big = 123456789012345678901234567890123456
    rows = states(
        TICKER_DTYPE,
        TICKER_DECIMALS,
        ticker(NOW_US + 900_000, big),
        ticker(NOW_US + 200_000, -5),
        ticker(NOW_US + 1_000_000, 7),
        ticker(NOW_US, 0, 2),
    )
    assert await db.sink.write_tickers(rows) == WriteResult(3, 1, 0)
    older = states(TICKER_DTYPE, TICKER_DECIMALS, ticker(NOW_US + 899_999, 1))
    assert await db.sink.write_tickers(older) == WriteResult(0, 1, 0)
    newer = states(TICKER_DTYPE, TICKER_DECIMALS, ticker(NOW_US + 999_999, 2))
    assert await db.sink.write_tickers(newer) == WriteResult(1, 0, 0)
    stored = await db.conn.fetch(
        f"SELECT timestamp, symbol, event_time, {', '.join(TICKER_DECIMALS)}, open_time,"
        " close_time, first_id, last_id, trade_count, received_at FROM tickers ORDER BY 2, 1"
    )
    tail = (at(1), at(2), -1, 2**40, 5, None)
    assert [tuple(row) for row in stored] == [
        (at(NOW_US), NAMES[0], at(NOW_US + 999_999), *[decimal(2)] * 15, *tail),
        (at(NOW_US + 1_000_000), NAMES[0], at(NOW_US + 1_000_000), *[decimal(7)] * 15, *tail),
        (at(NOW_US), NAMES[2], at(NOW_US), *[decimal(0)] * 15, *tail),
    ]


def kline(open_us: int, event_us: int, value: int, flags: int = 0) -> dict[str, int]:
    return {"open_us": open_us, "event_us": event_us, "value": value, "flags": flags}


async def stored_klines(db: Database) -> list[tuple[Any, ...]]:
    rows = await db.conn.fetch(
        "SELECT timestamp, event_time, volume, is_closed FROM klines ORDER BY timestamp"
    )
    return [tuple(row) for row in rows]


async def test_a_closed_kline_is_final(db: Database) -> None:
    def klines(*rows: dict[str, int]) -> Any:
        return states(KLINE_DTYPE, KLINE_DECIMALS, *rows)

    first, second = NOW_US, NOW_US + 60_000_000
    big = 123456789012345678901234567890123456
    assert await db.sink.write_klines(
        klines(
            kline(first, first + 5, 1),
            kline(first, first + 9, big, FLAG_CLOSED),
            kline(first, first + 10, 3),
            kline(second, second + 5, 4),
        )
    ) == WriteResult(2, 2, 0)
    assert await db.sink.write_klines(
        klines(
            kline(first, first + 99, 5),
            kline(first, first + 99, 6, FLAG_CLOSED),
            kline(second, second + 4, 7),
        )
    ) == WriteResult(0, 3, 0)
    assert await db.sink.write_klines(klines(kline(second, second + 6, 8))) == WriteResult(1, 0, 0)
    assert await stored_klines(db) == [
        (at(first), at(first + 9), Decimal("1234567890123456789012345678.90123456"), True),
        (at(second), at(second + 6), decimal(8), False),
    ]
    # Closed late, by an event that is older than what is stored: still the final word.
    assert await db.sink.write_klines(
        klines(kline(second, second + 5, 9, FLAG_CLOSED))
    ) == WriteResult(1, 0, 0)
    assert (await stored_klines(db))[1] == (at(second), at(second + 5), decimal(9), True)


async def test_refused_states_are_parked(db: Database) -> None:
    too_big = 2**127 - 1
    rows = states(
        KLINE_DTYPE,
        KLINE_DECIMALS,
        *(kline(NOW_US + n * 60_000_000, NOW_US, too_big if n == 3 else n) for n in range(9)),
    )
    assert await db.sink.write_klines(rows) == WriteResult(8, 0, 1)
    assert [row[2] for row in await stored_klines(db)] == [decimal(n) for n in range(9) if n != 3]
    assert await parked(db) == [("kline", NAMES[0], None, "22003")]
    letter = await db.conn.fetchval("SELECT payload FROM dead_letters")
    assert '"volume": "1701411834604692317316873037158.84105727"' in letter
    stranger = states(TICKER_DTYPE, TICKER_DECIMALS, ticker(NOW_US, 1, 77), ticker(NOW_US, 1))
    assert await db.sink.write_tickers(stranger) == WriteResult(1, 0, 1)


async def test_states_of_two_hosts_meet(db: Database) -> None:
    async def host(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(15):
            rows = states(
                TICKER_DTYPE,
                TICKER_DECIMALS,
                *(
                    ticker(NOW_US + int(n) * 1000, int(n), int(random.integers(0, 4)))
                    for n in random.permutation(3000)[:20]
                ),
            )
            await db.sink.write_tickers(rows)

    await asyncio.gather(*(host(seed) for seed in range(3)))
    wrong = await db.conn.fetchval(
        "SELECT count(*) FROM tickers WHERE timestamp <> date_trunc('second', event_time)"
        " OR last_price <> extract(epoch FROM event_time - $1) * 1000 / 100000000",
        at(NOW_US),
    )
    assert wrong == 0
