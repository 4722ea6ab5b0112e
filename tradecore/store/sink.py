"""Writes batches of rows, each in one transaction, trades exactly once.

A batch of trades, in this order:

    lock     the symbols' rows in trade_symbols, in symbol order: the fence between writers
    read     the ranges of the ledger that touch the batch (a new statement, so a new snapshot)
    cut      what is stored already: duplicates, or rows of a try whose acknowledgement was lost;
             and what is older than the retention horizon
    COPY     the rest
    extend   the ledger and the history of holes
    note     the minutes of late rows, whose candles are computed already
    COMMIT

When the server refuses a row, or has a row that the ledger does not know, the batch is done again
in smaller transactions through a staging table, where such rows can be told from the others.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import date
from typing import Any, NamedTuple, TypeVar

import asyncpg
import numpy as np
import numpy.typing as npt

from tradecore._walks import mask_rows
from tradecore.errors import StoreError, TransientStoreError
from tradecore.log import once_per
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
    days_of_batch,
    find_pieces,
    live_rows,
    look_at_trades,
    mask_impossible,
    mask_older,
    minutes_before,
    names_of,
)
from tradecore.store.causes import HoleCauses
from tradecore.store.failure import Kind, as_transient, classify
from tradecore.store.ledger import HoleId
from tradecore.store.partitions import Partitions
from tradecore.store.refused import Refusal, park, store_in_parts
from tradecore.store.times import Hours, write_marks
from tradecore.store.transaction import copy_slices, transaction
from tradecore.store.unreported import Unreported

__all__ = ["HoleId", "Sink", "TransientStoreError", "WriteResult"]

LIMIT_S = 45.0
"""Of one transaction, from the pool's connection to the acknowledgement."""

_CAREFUL_ROWS = 2048  # of one transaction that may have to look at each row

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class WriteResult(NamedTuple):
    """What became of a batch; void rows are not counted."""

    stored: int = 0
    """In the table now through this batch. Upserts: inserted or updated."""
    duplicate: int = 0
    """There before, or doubled in the batch. Upserts: not newer than what is there."""
    parked: int = 0
    """Refused by the server, or by us before it saw them; kept in dead_letters."""
    opened: tuple[HoleId, ...] = ()
    """Holes that these trades opened; some may be filled or closed by the time this is read."""
    expired: int = 0
    """Trades below the retention horizon, which are not stored."""

    def plus(self, other: "WriteResult") -> "WriteResult":
        return WriteResult(
            self.stored + other.stored,
            self.duplicate + other.duplicate,
            self.parked + other.parked,
            self.opened + other.opened,
            self.expired + other.expired,
        )


class _Call:
    """One call of `write_trades`: what it is about, and what it has given to the server so far."""

    def __init__(self, symbols: Symbols, filled_by: str, hole_cause: str | None) -> None:
        self.symbols = symbols
        self.filled_by = filled_by
        self.hole_cause = hole_cause
        self.offered: dict[str, list[ledger.Range]] = {}
        self.stored: dict[str, list[ledger.Range]] = {}
        self.opened: set[HoleId] = set()

    def offer(self, batch: TradeBatch) -> None:
        _add(self.offered, batch.names, batch.pieces)

    def store(self, names: Mapping[int, str], pieces: Pieces, opened: Iterable[HoleId]) -> None:
        _add(self.stored, names, pieces)
        self.opened.update(opened)


def _add(to: dict[str, list[ledger.Range]], names: Mapping[int, str], pieces: Pieces) -> None:
    for symbol_id, found in pieces.items():
        before = to.get(names[symbol_id])
        to[names[symbol_id]] = ledger.join([*before, *found]) if before else found


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
        self._unreported = Unreported()
        self._hours = Hours()
        self.horizon_us: int | None = None
        """Older trades are not stored, as far as is known here; the database decides."""
        self._lockable: set[str] = set()  # symbols that have their row in trade_symbols

    # ---- trades ------------------------------------------------------------------------------

    async def write_trades(
        self,
        rows: Rows,
        *,
        symbols: Symbols | None = None,
        filled_by: str = "feed",
        hole_cause: str | None = None,
    ) -> WriteResult:
        """Store each trade of `rows` (TRADE_DTYPE) that is not stored yet, with the ledger.

        `symbols` is the table of the rows' symbol ids when it is not the sink's own. `filled_by`
        goes into trade_gaps when the batch fills a hole, `hole_cause` when it opens one; None: see
        `HoleCauses`. Raises TransientStoreError when the batch has to be offered again.
        """
        call = _Call(symbols or self._symbols, filled_by, hole_cause)

        async def write(part: Rows, careful: bool) -> WriteResult:
            batch = look_at_trades(part, call.symbols)
            if not (batch.pieces or batch.refusals):
                return WriteResult()
            call.offer(batch)
            return await self._transact(
                sql.TRADES,
                days_of_batch(batch, self.horizon_us),
                batch.names.values(),
                lambda conn: self._store_trades(conn, batch, call, careful),
            )

        try:
            result = await _write_or_split(rows, write)
        except BaseException:
            self._unreported.note(call.stored, call.opened)
            self._hours.forget()
            raise
        earlier = [hole for hole in self._unreported.take(call.offered) if hole not in call.opened]
        return result._replace(opened=(*earlier, *result.opened))

    async def _store_trades(
        self, conn: asyncpg.Connection, batch: TradeBatch, call: "_Call", careful: bool
    ) -> WriteResult:
        rows, keep, pieces, names = batch.rows, batch.keep, batch.pieces, batch.names
        refusals = batch.refusals
        stored_before, raw_from_us, candles_through_us = await coverage.read(conn, names, pieces)
        if raw_from_us is not None:  # not known of a batch of refusals only
            self.horizon_us = raw_from_us
        expired = mask_older(batch, raw_from_us)
        if expired:
            pieces = find_pieces(rows, keep, call.symbols)
        cuts = {s: ledger.overlaps(found, stored_before[s]) for s, found in pieces.items()}
        cut = mask_rows(rows, as_cuts(cuts), keep) if any(cuts.values()) else 0
        # Rows that a failed call stored after all are no duplicates: nobody was told of them yet.
        confirmed = sum(
            self._unreported.count(names[s], found) for s, found in cuts.items() if found
        )
        if cut:
            pieces = find_pieces(rows, keep, call.symbols)
        expected = stored = sum(piece.rows for found in pieces.values() for piece in found)
        if pieces and careful:
            stored, refused = await self._store_staged(
                conn, sql.TRADES, rows, keep, call.symbols, careful=True
            )
            refusals = refusals + refused
            keep[[refusal.row for refusal in refused]] = 0
            expected -= len(refused)
            pieces = find_pieces(rows, keep, call.symbols)
        elif pieces:
            await self._copy_trades(conn, rows, keep, call.symbols, expected)
        if refusals:
            await park(conn, sql.TRADES, rows, names_of(rows, refusals, call.symbols), refusals)
        await write_marks(conn, names, pieces, rows, keep, self._hours)
        causes = HoleCauses(rows, keep, len(call.symbols), refusals, call.hole_cause)
        origin = coverage.Origin(call.filled_by, causes)
        opened = await coverage.write(conn, names, pieces, stored_before, origin)
        if minutes := minutes_before(batch, candles_through_us):
            await conn.execute(sql.ADD_WINDOW, minutes)
        call.store(names, pieces, opened)
        duplicate = batch.repeats + cut - confirmed + expected - stored
        return WriteResult(stored + confirmed, duplicate, len(refusals), tuple(opened), expired)

    async def close_absent(
        self, symbol: str, first_id: int, last_id: int, evidence: Mapping[str, Any]
    ) -> int:
        """Close what is still open of the ids first_id..last_id: the venue has no such trades.

        `evidence` goes into trade_gaps as JSON. Stored ids are left alone, and a trade that comes
        after all is stored and fills its place. Returns how many ids were closed. Raises
        TransientStoreError when it has to be tried again.
        """
        span, text = ledger.Span(first_id, last_id), json.dumps(evidence, sort_keys=True)
        return await self._transact(
            sql.TRADES,
            set(),
            (symbol,),
            lambda conn: coverage.close_absent(conn, symbol, span, text),
        )

    async def _copy_trades(
        self, conn: asyncpg.Connection, rows: Rows, keep: Keep, symbols: Symbols, expected: int
    ) -> None:
        slices = sql.TRADES.encode(rows, symbols, keep)
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
            stored, refused = await self._store_staged(
                conn, target, rows, keep, self._symbols, careful=careful
            )
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
        symbols: Symbols,
        *,
        careful: bool,
    ) -> tuple[int, list[Refusal]]:
        """Store through the staging table; `careful` finds the rows that are refused."""

        async def put(part: npt.NDArray[np.intp]) -> int:
            chosen = np.zeros(len(rows), np.uint8)
            chosen[part] = 1
            slices = target.encode(rows, symbols, chosen)
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
        body: Callable[[asyncpg.Connection], Awaitable[Result]],
    ) -> Result:
        """Run `body` in a transaction, all in limited time.

        Rows of `days` have a place in the table then, and `symbols` are locked.
        """
        try:
            async with asyncio.timeout(self._limit_s):
                await self._partitions.ensure(self._pool, target.table, days)
                if not self._lockable.issuperset(symbols):
                    await coverage.add_symbols(self._pool, symbols)
                    self._lockable.update(symbols)
                async with transaction(self._pool, self._limit_s, symbols) as conn:
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
        once_per(log, "as a whole").warning(
            "the server does not take a batch as a whole; its rows are looked at one by one",
            extra={"rows": len(rows), "cause": str(exc.__cause__)},
        )
    result = WriteResult()
    for at in range(0, len(rows), _CAREFUL_ROWS):
        result = result.plus(await write(rows[at : at + _CAREFUL_ROWS], True))
    return result
