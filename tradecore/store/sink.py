"""Writes batches of rows, each in one transaction, trades exactly once.

A batch of trades, in this order:

    lock     the symbols' rows in trade_symbols, in symbol order: the fence between writers
    read     the ranges of the ledger that touch the batch (a new statement, so a new snapshot)
    cut      what is stored already: duplicates, or rows of a try whose acknowledgement was lost
    COPY     the rest
    extend   the ledger and the history of holes
    COMMIT

When the server refuses a row, or has a row that the ledger does not know, the batch is done again
in smaller transactions through a staging table, where such rows can be told from the others.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from datetime import date
from typing import NamedTuple

import asyncpg
import numpy as np
import numpy.typing as npt

from tradecore._copyenc import mask_rows
from tradecore.errors import StoreError, TransientStoreError
from tradecore.store import coverage, ledger
from tradecore.store import statements as sql
from tradecore.store.batch import (
    Keep,
    Pieces,
    Rows,
    Symbols,
    TradeBatch,
    as_cuts,
    days_of,
    find_pieces,
    join_pieces,
    live_rows,
    look_at_trades,
    mask_impossible,
    names_of,
)
from tradecore.store.failure import Kind, as_transient, classify
from tradecore.store.partitions import Partitions
from tradecore.store.refused import Refusal, park, store_in_parts
from tradecore.store.transaction import copy_slices, transaction

__all__ = ["Sink", "TransientStoreError", "WriteResult"]

LIMIT_S = 45.0
"""Of one transaction, from the pool's connection to the acknowledgement."""

_CAREFUL_ROWS = 2048  # of one transaction that may have to look at each row

log = logging.getLogger(__name__)


class WriteResult(NamedTuple):
    """What became of a batch; void rows are not counted."""

    stored: int = 0
    """In the table now through this batch. Upserts: inserted or updated."""
    duplicate: int = 0
    """There before, or doubled in the batch. Upserts: not newer than what is there."""
    parked: int = 0
    """Refused by the server; kept in dead_letters."""

    def plus(self, other: "WriteResult") -> "WriteResult":
        return WriteResult(*(a + b for a, b in zip(self, other, strict=True)))


class _RowsRefused(Exception):
    """The server does not take the batch as a whole."""


class Sink:
    """The database as the flusher sees it. Calls may overlap; each takes a connection."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        symbols: Symbols,
        partitions: Partitions,
        *,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._pool = pool
        self._symbols = symbols
        self._partitions = partitions
        self._limit_s = limit_s
        # What calls that failed may have stored all the same: the next call reports it as stored.
        self._unreported: Pieces = {}
        self._lockable: set[str] = set()  # symbols that have their row in trade_symbols

    # ---- trades ------------------------------------------------------------------------------

    async def write_trades(
        self, rows: Rows, *, filled_by: str = "feed", hole_cause: str = "unknown"
    ) -> WriteResult:
        """Store each trade of `rows` (TRADE_DTYPE) that is not stored yet, with the ledger.

        `filled_by` and `hole_cause` go into trade_gaps when the batch fills or opens a hole.
        Raises TransientStoreError when the batch has to be offered again.
        """
        earlier = self._unreported
        origin = coverage.Origin(filled_by, hole_cause)

        async def write(part: Rows, careful: bool) -> WriteResult:
            batch = look_at_trades(part, self._symbols)
            if not (batch.pieces or batch.refusals):
                return WriteResult()
            return await self._transact(
                sql.TRADES,
                days_of(part, sql.TRADES, batch.keep),
                batch.names.values(),
                lambda conn: self._store_trades(conn, batch, origin, earlier, careful),
            )

        result = await _write_or_split(rows, write)
        self._unreported = {}
        return result

    async def _store_trades(
        self,
        conn: asyncpg.Connection,
        batch: TradeBatch,
        origin: coverage.Origin,
        earlier: Pieces,
        careful: bool,
    ) -> WriteResult:
        rows, keep, pieces, names = batch.rows, batch.keep, batch.pieces, batch.names
        refusals = batch.refusals
        stored_before = await coverage.lock_and_read(conn, names, pieces)
        cuts = {s: ledger.overlaps(found, stored_before[s]) for s, found in pieces.items()}
        cut = mask_rows(rows, as_cuts(cuts), keep) if any(cuts.values()) else 0
        # Rows that a failed call stored after all are no duplicates: nobody was told of them yet.
        confirmed = sum(
            span.rows
            for symbol_id in cuts.keys() & earlier.keys()
            for span in ledger.overlaps(earlier[symbol_id], cuts[symbol_id])
        )
        if cut:
            pieces = find_pieces(rows, keep, self._symbols)
        expected = stored = sum(piece.rows for found in pieces.values() for piece in found)
        if pieces and careful:
            stored, refused = await self._store_staged(conn, sql.TRADES, rows, keep)
            refusals = refusals + refused
            keep[[refusal.row for refusal in refused]] = 0
            expected -= len(refused)
            pieces = find_pieces(rows, keep, self._symbols)
        elif pieces:
            await self._copy_trades(conn, rows, keep, expected)
        if refusals:
            await park(conn, sql.TRADES, rows, names_of(rows, refusals, self._symbols), refusals)
        parked = {
            (int(rows["symbol_id"][refusal.row]), int(rows["trade_id"][refusal.row]))
            for refusal in refusals
        }
        await coverage.write(conn, names, pieces, stored_before, origin, parked)
        self._unreported = join_pieces(self._unreported, pieces)
        duplicate = batch.repeats + cut - confirmed + expected - stored
        return WriteResult(stored + confirmed, duplicate, len(refusals))

    async def _copy_trades(
        self, conn: asyncpg.Connection, rows: Rows, keep: Keep, expected: int
    ) -> None:
        slices = sql.TRADES.encode(rows, self._symbols, keep)
        try:
            copied = await copy_slices(conn, sql.TRADES.table, sql.TRADES.columns, slices)
        except asyncpg.PostgresError as exc:
            if classify(exc).kind in (Kind.REFUSED, Kind.REPEATED):
                raise _RowsRefused from exc
            raise
        if copied != expected:
            raise StoreError(
                f"the server stored {copied} of {expected} trades without an error:"
                " remove the trigger or rule on raw_trades that leaves rows out"
            )

    # ---- tickers and klines ------------------------------------------------------------------

    async def write_tickers(self, rows: Rows) -> WriteResult:
        """Upsert `rows` (TICKER_DTYPE): one a symbol and second, the newest event wins.

        Raises TransientStoreError when the batch has to be offered again.
        """
        return await self._upsert(sql.TICKERS, rows)

    async def write_klines(self, rows: Rows) -> WriteResult:
        """Upsert `rows` (KLINE_DTYPE): the newest event wins, a closed candle is final.

        Raises TransientStoreError when the batch has to be offered again.
        """
        return await self._upsert(sql.KLINES, rows)

    async def _upsert(self, target: sql.Target, rows: Rows) -> WriteResult:
        async def write(part: Rows, careful: bool) -> WriteResult:
            keep, refusals = mask_impossible(part, target, self._symbols)
            return await self._transact(
                target,
                days_of(part, target, keep),
                (),
                lambda conn: self._store_states(conn, target, part, keep, refusals, careful),
            )

        return await _write_or_split(rows, write)

    async def _store_states(
        self,
        conn: asyncpg.Connection,
        target: sql.Target,
        rows: Rows,
        keep: Keep,
        refusals: list[Refusal],
        careful: bool,
    ) -> WriteResult:
        try:
            stored, refused = await self._store_staged(conn, target, rows, keep, careful=careful)
        except asyncpg.PostgresError as exc:
            if not careful and classify(exc).kind in (Kind.REFUSED, Kind.REPEATED):
                raise _RowsRefused from exc
            raise
        refused = refusals + refused
        if refused:
            await park(conn, target, rows, names_of(rows, refused, self._symbols), refused)
        return WriteResult(stored, len(rows) - stored - len(refused), len(refused))

    # ---- what both have in common ------------------------------------------------------------

    async def _store_staged(
        self,
        conn: asyncpg.Connection,
        target: sql.Target,
        rows: Rows,
        keep: Keep,
        *,
        careful: bool = True,
    ) -> tuple[int, list[Refusal]]:
        """Store through the staging table; `careful` finds the rows that are refused."""

        async def put(part: npt.NDArray[np.intp]) -> int:
            chosen = np.zeros(len(rows), np.uint8)
            chosen[part] = 1
            slices = target.encode(rows, self._symbols, chosen)
            await copy_slices(conn, target.staging, target.columns, slices)
            return sql.affected(await conn.execute(target.insert_staged))

        await conn.execute(target.make_staging)
        live = np.flatnonzero((keep != 0) & live_rows(rows, target))
        if careful:
            return await store_in_parts(conn, target, live, put)
        return await put(live), []

    async def _transact(
        self,
        target: sql.Target,
        days: set[date],
        symbols: Collection[str],
        body: Callable[[asyncpg.Connection], Awaitable[WriteResult]],
    ) -> WriteResult:
        """Run `body` in a transaction, all in limited time.

        Rows of `days` have a place in the table then, and `symbols` have their lock rows.
        """
        try:
            async with asyncio.timeout(self._limit_s):
                await self._partitions.ensure(self._pool, target.table, days)
                if not self._lockable.issuperset(symbols):
                    await coverage.add_symbols(self._pool, symbols)
                    self._lockable.update(symbols)
                async with transaction(self._pool, self._limit_s) as conn:
                    return await body(conn)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as exc:
            if classify(exc).kind is Kind.NO_PARTITION:
                self._partitions.forget(target.table)
            self._lockable.clear()
            raise as_transient(exc) from exc
        except (StoreError, OSError, TimeoutError) as exc:
            self._lockable.clear()
            raise as_transient(exc) from exc


async def _write_or_split(
    rows: Rows, write: Callable[[Rows, bool], Awaitable[WriteResult]]
) -> WriteResult:
    """Write all rows at once, or in small careful parts when the server does not take them so."""
    if len(rows) == 0:
        return WriteResult()
    try:
        return await write(rows, False)
    except _RowsRefused as exc:
        log.warning(
            "the server does not take a batch as a whole; its rows are looked at one by one",
            extra={"rows": len(rows), "cause": str(exc.__cause__)},
        )
    result = WriteResult()
    for at in range(0, len(rows), _CAREFUL_ROWS):
        result = result.plus(await write(rows[at : at + _CAREFUL_ROWS], True))
    return result
