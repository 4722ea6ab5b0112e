"""Hold raw_trades against the simulated market, row by row and value by value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Protocol

from tradecore.simulate.market import Market
from tradecore.simulate.words import Trade

CHUNK_ROWS = 50_000
SHOWN = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_QUERY = """
    SELECT trade_id, timestamp, price, quantity, side FROM raw_trades
    WHERE symbol = $1 AND trade_id BETWEEN $2 AND $3 ORDER BY trade_id, timestamp
"""
_OTHERS = """
    SELECT count(*), min(trade_id) FROM raw_trades
    WHERE symbol = $1 AND trade_id NOT BETWEEN $2 AND $3
"""


class Connection(Protocol):
    """What the proof needs of an asyncpg connection."""

    async def fetch(self, query: str, *args: Any) -> list[Any]: ...
    async def fetchrow(self, query: str, *args: Any) -> Any: ...


@dataclass
class Proof:
    """The count of what was sent, what is stored, and what of that is equal in every column."""

    sent: int = 0
    stored: int = 0
    equal: int = 0
    missing: int = 0
    doubled: int = 0
    wrong: int = 0
    """Stored with another value, or never sent at all."""
    differences: list[str] = field(default_factory=list)
    """The first few, in words."""

    @property
    def holds(self) -> bool:
        """True when every trade sent is stored once and equal, and nothing else is stored."""
        return self.sent == self.stored == self.equal and not self.differences

    def differ(self, text: str) -> None:
        """Note one difference; only the first few are kept."""
        if len(self.differences) < SHOWN:
            self.differences.append(text)


async def prove(
    conn: Connection, market: Market, sent: Mapping[str, tuple[int, int]]
) -> dict[str, Proof]:
    """Compare the table with the trades `sent`: symbol -> (first id, last id).

    Ids that the market does not have (`Market.absences`) must not be stored.
    """
    proofs = {symbol: Proof() for symbol in sent}
    for symbol, (first_id, last_id) in sent.items():
        proof = proofs[symbol]
        proof.sent = market.count(symbol, first_id, last_id + 1)
        for start in range(first_id, last_id + 1, CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, last_id + 1)
            rows = await conn.fetch(_QUERY, symbol, start, end - 1)
            _compare(proof, symbol, market.trades(symbol, start, end), rows)
        others, example = await conn.fetchrow(
            _OTHERS,
            symbol,
            first_id,
            last_id,
        )
        proof.stored += others
        proof.wrong += others
        if others:
            proof.differ(
                f"{symbol}: {others} rows that were never sent, such as {example};"
                f" sent were {first_id} to {last_id}"
            )
    return proofs


def _compare(proof: Proof, symbol: str, trades: list[Trade], rows: list[Any]) -> None:
    proof.stored += len(rows)
    found: dict[int, Any] = {}
    for row in rows:
        if row["trade_id"] in found:
            proof.doubled += 1
            proof.differ(f"{symbol} {row['trade_id']}: stored twice")
        found[row["trade_id"]] = row
    for trade in trades:
        row = found.pop(trade.trade_id, None)
        if row is None:
            proof.missing += 1
            proof.differ(f"{symbol} {trade.trade_id}: missing")
            continue
        want = (
            _EPOCH + timedelta(microseconds=trade.trade_us),
            Decimal(trade.price_e8).scaleb(-8),
            Decimal(trade.quantity_e8).scaleb(-8),
            trade.side,
        )
        got = (row["timestamp"], row["price"], row["quantity"], row["side"])
        if got == want:
            proof.equal += 1
        else:
            proof.wrong += 1
            proof.differ(f"{symbol} {trade.trade_id}: sent {want}, stored {got}")
    for trade_id in found:
        proof.wrong += 1
        proof.differ(f"{symbol} {trade_id}: stored, and the venue has no such trade")
