"""Frames and rows that look like a busy minute of the venue, from a seed."""

import random

import numpy as np
from numpy.typing import NDArray

from tradecore._symbols import SymbolTable
from tradecore.schema import TRADE_DTYPE

SYMBOLS = ("BTCUSDT", "ETHUSDT", "BNBUSDT", "SOLUSDT", "ADAUSDT", "XRPUSDT", "DOGEUSDT")
FIRST_US = 1_750_000_000_000_000
FIRST_ID = 5_000_000_000


def symbol_table() -> SymbolTable:
    """Return a table of SYMBOLS; the ids are their places."""
    table = SymbolTable()
    for symbol in SYMBOLS:
        table.add(symbol)
    return table


def trade_rows(count: int, first_id: int = FIRST_ID, seed: int = 1) -> NDArray[np.void]:
    """Return `count` trades; each symbol's ids are contiguous from `first_id` on."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, TRADE_DTYPE)
    rows["symbol_id"] = rng.integers(0, len(SYMBOLS), count)
    for symbol_id in range(len(SYMBOLS)):
        of_symbol = rows["symbol_id"] == symbol_id
        rows["trade_id"][of_symbol] = first_id + np.arange(np.count_nonzero(of_symbol))
    rows["sequence"] = np.arange(1, count + 1)
    # As on the venue: prices of a few ticks, quantities of a few lots, trailing zeros.
    rows["price_e8"] = rng.integers(10_000, 9_999_999, count) * 1_000_000
    rows["quantity_e8"] = rng.integers(1, 900_000, count) * 1_000
    rows["trade_us"] = FIRST_US + np.sort(rng.integers(0, 60_000, count)) * 1000
    rows["recv_ns"] = rows["trade_us"] * 1000 + 7_654_321
    rows["flags"] = rng.integers(0, 2, count)
    return rows


def trade_frames(rows: NDArray[np.void], seed: int = 1) -> list[bytes]:
    """Return the rows as the venue's combined-stream frames, with times in milliseconds."""
    rng = random.Random(seed)
    frames = []
    for row in rows:
        symbol = SYMBOLS[row["symbol_id"]]
        time_ms = int(row["trade_us"]) // 1000
        frames.append(
            f'{{"stream":"{symbol.lower()}@trade","data":{{"e":"trade",'
            f'"E":{time_ms + rng.randrange(3)},"s":"{symbol}","t":{row["trade_id"]},'
            f'"p":"{_decimal(row["price_e8"])}","q":"{_decimal(row["quantity_e8"])}",'
            f'"T":{time_ms},"m":{"true" if row["flags"] & 1 else "false"},"M":true}}}}'.encode()
        )
    return frames


def _decimal(value_e8: int) -> str:
    whole, part = divmod(int(value_e8), 10**8)
    return f"{whole}.{part:08d}"
