"""Rows that the server refuses: found by halving the batch, kept in dead_letters."""

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import asyncpg
import numpy as np
import numpy.typing as npt

from tradecore.log import once_per
from tradecore.schema import DECIMAL128, FLAG_BUYER_IS_MAKER, SCALE
from tradecore.store.failure import Kind, classify
from tradecore.store.statements import PARK, Target, columns_of

_LOGGED_ROWS = 5
_PARKED_AT_ONCE = 1024  # of one statement, so that the loop turns in between

log = logging.getLogger(__name__)


class Refusal(NamedTuple):
    """One row that cannot be stored, and why."""

    row: int
    sqlstate: str | None
    """None: found by us before the server saw it."""
    reason: str


async def store_in_parts(
    conn: asyncpg.Connection,
    target: Target,
    indices: npt.NDArray[np.intp],
    put: Callable[[npt.NDArray[np.intp]], Awaitable[int]],
) -> tuple[int, list[Refusal]]:
    """Run `put` on all of `indices`, and on smaller and smaller parts where the server refuses.

    `put` stages and inserts the rows it is given and returns how many went in. Returns their sum
    and what is left: rows that are refused alone. The transaction stays usable.
    """
    stored = 0
    refusals: list[Refusal] = []
    parts = [indices] if len(indices) else []
    while parts:
        part = parts.pop()
        await conn.execute(f"TRUNCATE {target.staging}; SAVEPOINT part")
        try:
            stored += await put(part)
        except asyncpg.PostgresError as exc:
            failure = classify(exc)
            if failure.kind not in (Kind.REFUSED, Kind.REPEATED):
                raise
            await conn.execute("ROLLBACK TO SAVEPOINT part")
            if len(part) == 1:
                refusals.append(Refusal(int(part[0]), failure.reason, str(exc)))
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
        await conn.execute("RELEASE SAVEPOINT part")
    return stored, refusals


async def park(
    conn: asyncpg.Connection,
    target: Target,
    rows: npt.NDArray[Any],
    names: Sequence[str],
    refusals: Sequence[Refusal],
) -> None:
    """Write the refused rows to dead_letters, trades once each; `names` are their symbols."""
    for begin in range(0, len(refusals), _PARKED_AT_ONCE):
        part = refusals[begin : begin + _PARKED_AT_ONCE]
        payloads = _payloads(rows[[refusal.row for refusal in part]])
        letters = [
            (name, payload.get("trade_id"), json.dumps(payload), refusal.sqlstate, refusal.reason)
            for name, payload, refusal in zip(names[begin:], payloads, part, strict=False)
        ]
        await conn.execute(PARK, target.kind, *columns_of(letters))
    for name, refusal in list(zip(names, refusals, strict=True))[:_LOGGED_ROWS]:
        once_per(log, (target.kind, name, refusal.sqlstate or refusal.reason)).error(
            f"{target.kind} refused and parked in dead_letters: see its reason",
            extra={"symbol": name, "sqlstate": refusal.sqlstate, "cause": refusal.reason},
        )
    if len(refusals) > _LOGGED_ROWS:
        once_per(log, target.kind).error(
            "more rows were parked in dead_letters",
            extra={"table": target.table, "rows": len(refusals) - _LOGGED_ROWS},
        )


def _payloads(rows: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Return all that the rows say, decimals as text."""
    payloads: list[dict[str, Any]] = [{} for _ in range(len(rows))]
    for name in rows.dtype.names or ():
        values = rows[name].tolist()
        if rows.dtype[name] == DECIMAL128:
            values = [_decimal_text((hi << 64) + lo) for lo, hi in values]
        elif name.endswith("_e8"):
            values = [_decimal_text(value) for value in values]
        elif name in ("sequence", "checksum"):
            continue
        for payload, value in zip(payloads, values, strict=True):
            payload[name.removesuffix("_e8")] = value
    if "trade_id" in (rows.dtype.names or ()):
        for payload in payloads:
            payload["side"] = "SELL" if payload["flags"] & FLAG_BUYER_IS_MAKER else "BUY"
    return payloads


def _decimal_text(scaled: int) -> str:
    units, rest = divmod(abs(scaled), 10**SCALE)
    return f"{'-' if scaled < 0 else ''}{units}.{rest:0{SCALE}d}"
