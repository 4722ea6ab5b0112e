"""The table held against the simulated market, every row and column of it, by arrays.

It proves what `tradecore.simulate.proof` does, for millions of rows in seconds, and names one
difference instead of several.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg
import numpy as np
from _processes import Running
from numpy.typing import NDArray

from tradecore.schema import TRADE_DTYPE
from tradecore.simulate.market import Market

# Numbers of a fixed width, so that the binary rows are an array. Exact: no column has more than
# eight decimals, and what does not fit into eight bytes is an error of the server.
_QUERY = """
    SELECT trade_id, (extract(epoch FROM timestamp) * 1000000)::int8, (price * 100000000)::int8,
           (quantity * 100000000)::int8, (side = 'SELL')::int::int8
    FROM raw_trades WHERE symbol = $1
"""
_COLUMNS = ("trade_id", "trade_us", "price_e8", "quantity_e8", "is_sell")
_ROW = np.dtype(
    [("fields", ">i2"), *((n, t) for c in _COLUMNS for n, t in ((f"{c} size", ">i4"), (c, ">i8")))]
)
_HEAD, _TAIL = 19, 2  # bytes around the rows of a binary COPY


async def compare(connection: asyncpg.Connection, venue: Running) -> int:
    """Assert that exactly what the exchange has sent is stored; return how many trades that is."""
    state = json.loads(await venue.get("/sim/state"))
    market = Market(**state["market"])
    symbols = [row[0] for row in await connection.fetch("SELECT symbol FROM trade_symbols")]
    count = 0
    for symbol in {*symbols, *state["symbols"]}:
        stored = await _stored(connection, symbol)
        ids = state["symbols"].get(symbol)
        sent = _sent(market, symbol, ids["first_id"], ids["last_id"]) if ids else stored[:, :0]
        assert stored.shape == sent.shape, (
            f"{symbol}: {stored.shape[1]} trades are stored, {sent.shape[1]} were sent"
        )
        for name, have, want in zip(_COLUMNS, stored, sent, strict=True):
            if (wrong := np.flatnonzero(have != want)).size:
                at = wrong[0]
                raise AssertionError(
                    f"{symbol}: {wrong.size} times another {name}, first of trade {sent[0, at]}:"
                    f" {have[at]} is stored, {want[at]} was sent"
                )
        count += sent.shape[1]
    return count


async def _stored(connection: asyncpg.Connection, symbol: str) -> NDArray[np.int64]:
    """Return the columns of a symbol's rows, in order of their ids."""
    pieces: list[bytes] = []

    async def take(piece: bytes) -> None:
        pieces.append(piece)

    await connection.copy_from_query(_QUERY, symbol, output=take, format="binary", timeout=120)
    data = b"".join(pieces)
    rows: NDArray[Any] = np.frombuffer(data[_HEAD : len(data) - _TAIL], _ROW)
    assert (rows["fields"] == len(_COLUMNS)).all()
    rows = rows[np.argsort(rows["trade_id"], kind="stable")]
    return np.array([rows[name] for name in _COLUMNS], np.int64)


def _sent(market: Market, symbol: str, first_id: int, last_id: int) -> NDArray[np.int64]:
    """Return the same columns as the market printed them."""
    profile = market.profile(symbol)
    tick_e8, step_e8 = 10 ** (8 - profile.tick_decimals), 10 ** (8 - profile.step_decimals)
    return np.hstack(
        [
            np.array([p.ids, p.times, p.ticks * tick_e8, p.steps * step_e8, p.maker], np.int64)
            for p in market.parts(symbol, first_id, last_id + 1)
        ]
    )


def sent_rows(
    market: Market, symbols: Sequence[str], ids: Mapping[str, Mapping[str, int]]
) -> NDArray[np.void]:
    """Return what the market has printed as rows of TRADE_DTYPE, in order of time; the symbol ids
    are the places in `symbols`."""
    parts = []
    for number, symbol in enumerate(symbols):
        sent = _sent(market, symbol, ids[symbol]["first_id"], ids[symbol]["last_id"])
        rows = np.zeros(sent.shape[1], TRADE_DTYPE)
        for name, column in zip((*_COLUMNS[:-1], "flags"), sent, strict=True):
            rows[name] = column
        rows["symbol_id"] = number
        parts.append(rows)
    rows = np.concatenate(parts)
    return rows[np.argsort(rows["trade_us"], kind="stable")]
