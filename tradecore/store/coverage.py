"""Reads and writes the ledger's tables for a transaction that holds the symbols' locks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from tradecore.errors import StoreError, TransientStoreError
from tradecore.store import ledger
from tradecore.store import statements as sql

Names = Mapping[int, str]
"""Symbols by symbol id."""


class Origin(NamedTuple):
    """What trade_gaps says of holes that the rows fill, and of holes that they open."""

    filled_by: str
    hole_cause: str


async def add_symbols(pool: asyncpg.Pool, symbols: Iterable[str]) -> None:
    """Give the symbols their lock rows.

    In a transaction of its own: a writer that holds locks and waits for another's new row, while
    that one waits for its locks, would be a deadlock.
    """
    await pool.execute(sql.ADD_SYMBOLS, list(symbols))


async def lock_and_read(
    conn: asyncpg.Connection, names: Names, pieces: Mapping[int, Sequence[ledger.Range]]
) -> dict[int, list[ledger.Range]]:
    """Lock the symbols of `pieces`; return, by symbol id, the ranges on which they bear.

    Raises TransientStoreError when a symbol has no lock row (see `add_symbols`).
    """
    found: dict[int, set[ledger.Range]] = {symbol_id: set() for symbol_id in pieces}
    if not pieces:
        return {}
    symbols = [names[symbol_id] for symbol_id in pieces]
    if await conn.fetchval(sql.LOCK, symbols) < len(symbols):
        raise TransientStoreError(
            "symbols", "rows of trade_symbols are missing: they are made anew"
        )
    for symbol_id, row in await _read_around(conn, sql.READ_RANGES, names, pieces):
        found[symbol_id].add(
            ledger.Range(row["first_id"], row["last_id"], row["first_us"], row["last_us"])
        )
    return {symbol_id: sorted(ranges) for symbol_id, ranges in found.items()}


async def write(
    conn: asyncpg.Connection,
    names: Names,
    pieces: Mapping[int, Sequence[ledger.Range]],
    stored: Mapping[int, Sequence[ledger.Range]],
    origin: Origin,
    parked: set[tuple[int, int]],
) -> None:
    """Enter `pieces`, whose rows this transaction has stored, and the holes they open and fill.

    `stored` is what `lock_and_read` gave, `parked` the (symbol id, trade id) of refused rows.
    """
    removed: list[tuple[Any, ...]] = []
    extended: list[tuple[Any, ...]] = []
    added: list[tuple[Any, ...]] = []
    opened: list[tuple[Any, ...]] = []
    filled: dict[int, list[ledger.Span]] = {}
    for symbol_id, found in pieces.items():
        name = names[symbol_id]
        change = ledger.add_pieces(found, stored[symbol_id])
        removed += [(name, first_id) for first_id in change.removed]
        extended += [(name, *item) for item in change.extended]
        added += [(name, *item) for item in change.added]
        for hole in change.opened:
            # Longer than all parked rows: no need to look at each id of what may be millions.
            refused = hole.rows <= len(parked) and all(
                (symbol_id, i) in parked for i in range(hole.first_id, hole.last_id + 1)
            )
            opened.append((name, *hole, "refused" if refused else origin.hole_cause))
        if change.filled:
            filled[symbol_id] = change.filled
    for statement, rows in (
        (sql.REMOVE_RANGES, removed),
        (sql.EXTEND_RANGES, extended),
        (sql.ADD_RANGES, added),
        (sql.OPEN_GAPS, opened),
    ):
        if rows:
            status = await conn.execute(statement, *sql.columns_of(rows))
            if sql.affected(status) != len(rows):
                raise StoreError(
                    "the ledger changed under its lock: something else writes to trade_coverage;"
                    " stop it and run `tradecore verify`"
                )
    if filled:
        await _fill_gaps(conn, names, filled, origin.filled_by)


async def _read_around(
    conn: asyncpg.Connection,
    query: str,
    names: Names,
    spans: Mapping[int, Sequence[ledger.Range]] | Mapping[int, Sequence[ledger.Span]],
) -> list[tuple[int, asyncpg.Record]]:
    """Return the rows around `spans`, each with its symbol id; a row may come twice."""
    places = [(symbol_id, span) for symbol_id, found in spans.items() for span in found]
    rows = await conn.fetch(
        query,
        [names[symbol_id] for symbol_id, _ in places],
        [span.first_id for _, span in places],
        [min(span.last_id + 1, ledger.MAX_ID) for _, span in places],
    )
    return [(places[row["n"] - 1][0], row) for row in rows]


async def _fill_gaps(
    conn: asyncpg.Connection,
    names: Names,
    filled: Mapping[int, Sequence[ledger.Span]],
    filled_by: str,
) -> None:
    gaps: dict[int, dict[int, ledger.Gap]] = {symbol_id: {} for symbol_id in filled}
    for symbol_id, row in await _read_around(conn, sql.READ_GAPS, names, filled):
        gaps[symbol_id][row["id"]] = ledger.Gap(
            row["id"],
            row["first_id"],
            row["last_id"],
            (row["cause"], row["detected_at"]),
            row["filled_by"],
        )
    copied: list[tuple[Any, ...]] = []
    altered: list[tuple[Any, ...]] = []
    removed: list[int] = []
    for symbol_id, spans in filled.items():
        change = ledger.fill_gaps(spans, list(gaps[symbol_id].values()), filled_by)
        copied += change.copied
        altered += change.altered
        removed += change.removed
    for statement, writes in ((sql.COPY_GAPS, copied), (sql.ALTER_GAPS, altered)):
        if writes:
            await conn.execute(statement, *sql.columns_of(writes), filled_by)
    if removed:
        await conn.execute(sql.REMOVE_GAPS, removed)
