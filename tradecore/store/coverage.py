"""Reads and writes the ledger's tables for a transaction that holds the symbols' locks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from tradecore.errors import StoreError
from tradecore.store import ledger
from tradecore.store import statements as sql
from tradecore.store.causes import HoleCauses
from tradecore.store.ledger import HoleId
from tradecore.store.transaction import check_locked

Names = Mapping[int, str]
"""Symbols by symbol id."""


class Origin(NamedTuple):
    """What trade_gaps says of holes that the rows fill, and of holes that they open."""

    filled_by: str
    causes: HoleCauses


class Held(NamedTuple):
    """What a writer that holds the locks of its symbols knows."""

    ranges: dict[int, list[ledger.Range]]
    """By symbol id, those on which the batch bears."""
    raw_from_us: int | None
    """Older trades are below the retention horizon and not stored; None: there is no horizon."""
    candles_through_us: int | None
    """Candles of earlier minutes may be computed already; None: none are."""


async def add_symbols(pool: asyncpg.Pool, symbols: Iterable[str]) -> None:
    """Give the symbols their lock rows.

    In a transaction of its own: a writer that holds locks and waits for another's new row, while
    that one waits for its locks, would be a deadlock.
    """
    await pool.execute(sql.ADD_SYMBOLS, list(symbols))


async def read(
    conn: asyncpg.Connection, names: Names, pieces: Mapping[int, Sequence[ledger.Range]]
) -> Held:
    """Return the ranges on which `pieces` bear, and the store's state.

    The transaction holds the locks of their symbols since an earlier statement.
    """
    if not pieces:
        return Held({}, None, None)
    found: dict[int, set[ledger.Range]] = {symbol_id: set() for symbol_id in pieces}
    raw_from_us = candles_through_us = None
    for symbol_id, row in await _read_around(conn, sql.READ_RANGES, names, pieces):
        if symbol_id is None:
            _, _, _, raw_from_us, candles_through_us = row
        else:
            found[symbol_id].add(ledger.Range(*row[1:]))
    ranges = {symbol_id: sorted(those) for symbol_id, those in found.items()}
    return Held(ranges, raw_from_us, candles_through_us)


async def write(
    conn: asyncpg.Connection,
    names: Names,
    pieces: Mapping[int, Sequence[ledger.Range]],
    stored: Mapping[int, Sequence[ledger.Range]],
    origin: Origin,
) -> list[HoleId]:
    """Enter `pieces`, whose rows this transaction has stored, and the holes they open and fill.

    `stored` are the ranges that `read` gave. Returns the holes that were opened.
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
            opened.append((name, *hole, origin.causes.of(symbol_id, hole)))
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
    return [HoleId(*row[:3]) for row in opened]


async def close_absent(
    conn: asyncpg.Connection, symbol: str, span: ledger.Span, evidence: str
) -> int:
    """Close what is open of the symbol's holes in `span` as absent at the venue.

    The transaction holds its lock. `evidence` is JSON text. Returns how many ids were closed.
    """
    names, spans = {0: symbol}, {0: [span]}
    # As the server prints it: equal evidence is to be known again.
    text = await conn.fetchval("SELECT $1::jsonb::text", evidence)
    gaps = (await _read_gaps(conn, names, spans))[0]
    still_open = [ledger.Span(gap.first_id, gap.last_id) for gap in gaps if gap.state == "open"]
    closed = ledger.overlaps([span], sorted(still_open))
    if closed:
        await _write_gaps(conn, [ledger.close_gaps([span], gaps, text)])
    return sum(part.rows for part in closed)


async def reopen_absent(conn: asyncpg.Connection, symbol: str, span: ledger.Span) -> None:
    """Lock the symbol; open again what of its holes in `span` is closed as absent."""
    check_locked(await conn.execute(sql.LOCK, [symbol]), [symbol])
    gaps = (await _read_gaps(conn, {0: symbol}, {0: [span]}))[0]
    await _write_gaps(conn, [ledger.reopen_gaps([span], gaps)])


async def _read_around(
    conn: asyncpg.Connection,
    query: str,
    names: Names,
    spans: Mapping[int, Sequence[ledger.Range]] | Mapping[int, Sequence[ledger.Span]],
) -> list[tuple[int | None, asyncpg.Record]]:
    """Return the rows around `spans`, each with its symbol id; a row may come twice.

    A row that is about no span, numbered 0, has None.
    """
    places = [(symbol_id, span) for symbol_id, found in spans.items() for span in found]
    rows = await conn.fetch(
        query,
        [names[symbol_id] for symbol_id, _ in places],
        [span.first_id for _, span in places],
        [min(span.last_id + 1, ledger.MAX_ID) for _, span in places],
    )
    return [(places[row["n"] - 1][0] if row["n"] else None, row) for row in rows]


async def _fill_gaps(
    conn: asyncpg.Connection,
    names: Names,
    filled: Mapping[int, Sequence[ledger.Span]],
    filled_by: str,
) -> None:
    gaps = await _read_gaps(conn, names, filled)
    await _write_gaps(
        conn,
        [
            ledger.fill_gaps(spans, gaps[symbol_id], filled_by)
            for symbol_id, spans in filled.items()
        ],
    )


async def _read_gaps(
    conn: asyncpg.Connection, names: Names, spans: Mapping[int, Sequence[ledger.Span]]
) -> dict[int, list[ledger.Gap]]:
    """Return the history around `spans` by symbol id."""
    gaps: dict[int, dict[int, ledger.Gap]] = {symbol_id: {} for symbol_id in spans}
    for symbol_id, row in await _read_around(conn, sql.READ_GAPS, names, spans):
        assert symbol_id is not None
        gaps[symbol_id][row["id"]] = ledger.Gap(
            row["id"],
            row["first_id"],
            row["last_id"],
            (row["cause"], row["detected_at"]),
            row["state"],
            row["filled_by"],
            row["evidence"],
        )
    return {symbol_id: list(found.values()) for symbol_id, found in gaps.items()}


async def _write_gaps(conn: asyncpg.Connection, changes: Sequence[ledger.GapChange]) -> None:
    copied = [gap for change in changes for gap in change.copied]
    altered = [gap for change in changes for gap in change.altered]
    removed = [gap_id for change in changes for gap_id in change.removed]
    for statement, gaps in ((sql.COPY_GAPS, copied), (sql.ALTER_GAPS, altered)):
        if gaps:
            rows: list[tuple[Any, ...]] = [(*gap[:3], *gap[4:]) for gap in gaps]
            await conn.execute(statement, *sql.columns_of(rows))
    if removed:
        await conn.execute(sql.REMOVE_GAPS, removed)
