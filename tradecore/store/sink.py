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
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple, Protocol

import asyncpg
import numpy as np
import numpy.typing as npt
from asyncpg.protocol import NO_TIMEOUT

from tradecore._copyenc import RUN_DTYPE, CopySlices, find_runs, mask_rows
from tradecore.errors import StoreError, TransientStoreError
from tradecore.schema import FLAG_VOID
from tradecore.store import coverage, ledger
from tradecore.store import statements as sql
from tradecore.store.failure import Kind, as_transient, classify
from tradecore.store.partitions import Partitions
from tradecore.store.refused import Refusal, park, store_in_parts

__all__ = ["Sink", "TransientStoreError", "WriteResult"]

LIMIT_S = 45.0
"""Of one transaction, from the pool's connection to the acknowledgement."""

_ROLLBACK_LIMIT_S = 5.0
_CAREFUL_ROWS = 2048  # of one transaction that may have to look at each row
_DAY_US = 86_400_000_000
# Partitions are made by calendar date; datetime ends with the year 9999.
_LAST_US = 253_402_214_400_000_000
_EPOCH_DAY = date(1970, 1, 1).toordinal()

log = logging.getLogger(__name__)

Rows = npt.NDArray[Any]
Pieces = dict[int, list[ledger.Range]]


class Symbols(Protocol):
    """What the sink needs of a SymbolTable."""

    def __len__(self) -> int: ...
    def name(self, symbol_id: int) -> str: ...
    def utf8(self, symbol_id: int) -> bytes: ...


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


@dataclass(slots=True)
class _Batch:
    """Trades of one transaction, before the ledger was asked."""

    rows: Rows
    keep: npt.NDArray[np.uint8]
    pieces: Pieces
    names: dict[int, str]
    """Symbols of the pieces by symbol id."""
    repeats: int
    refusals: list[Refusal]
    origin: coverage.Origin


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
            batch = self._look_at(part, origin)
            if not (batch.pieces or batch.refusals):
                return WriteResult()
            return await self._transact(
                sql.TRADES,
                _days_of(part, sql.TRADES, batch.keep),
                batch.names.values(),
                lambda conn: self._store_trades(conn, batch, earlier, careful),
            )

        result = await _write_or_split(rows, write)
        self._unreported = {}
        return result

    def _look_at(self, rows: Rows, origin: coverage.Origin) -> _Batch:
        keep = np.ones(len(rows), np.uint8)
        refusals = self._mask_impossible(rows, sql.TRADES, keep)
        runs = find_runs(rows, len(self._symbols), keep if refusals else None)
        pieces, repeated = ledger.join_runs(runs)
        repeats = 0
        if repeated:
            repeats = ledger.mask_repeats(rows, keep)
            pieces, _ = ledger.join_runs(find_runs(rows, len(self._symbols), keep))
        names = {symbol_id: self._symbols.name(symbol_id) for symbol_id in pieces}
        return _Batch(rows, keep, pieces, names, repeats, refusals, origin)

    async def _store_trades(
        self, conn: asyncpg.Connection, batch: _Batch, earlier: Pieces, careful: bool
    ) -> WriteResult:
        keep, pieces, refusals = batch.keep.copy(), batch.pieces, list(batch.refusals)
        names = batch.names
        stored_before = await coverage.lock_and_read(conn, names, pieces)
        cuts = {s: ledger.overlaps(found, stored_before[s]) for s, found in pieces.items()}
        cut = mask_rows(batch.rows, _as_runs(cuts), keep) if any(cuts.values()) else 0
        # Rows that a failed call stored after all are no duplicates: nobody was told of them yet.
        confirmed = sum(
            span.rows
            for symbol_id in cuts.keys() & earlier.keys()
            for span in ledger.overlaps(earlier[symbol_id], cuts[symbol_id])
        )
        if cut:
            pieces = self._pieces(batch.rows, keep)
        expected = stored = sum(piece.rows for found in pieces.values() for piece in found)
        if pieces and careful:
            stored, refused = await self._store_staged(conn, sql.TRADES, batch.rows, keep)
            refusals += refused
            keep[[refusal.row for refusal in refused]] = 0
            expected -= len(refused)
            pieces = self._pieces(batch.rows, keep)
        elif pieces:
            await self._copy_trades(conn, batch.rows, keep, expected)
        if refusals:
            await park(conn, sql.TRADES, batch.rows, self._names(batch.rows, refusals), refusals)
        parked = {
            (
                int(batch.rows["symbol_id"][refusal.row]),
                int(batch.rows["trade_id"][refusal.row]),
            )
            for refusal in refusals
        }
        await coverage.write(conn, names, pieces, stored_before, batch.origin, parked)
        self._unreported = _union(self._unreported, pieces)
        duplicate = batch.repeats + cut - confirmed + expected - stored
        return WriteResult(stored + confirmed, duplicate, len(refusals))

    def _pieces(self, rows: Rows, keep: npt.NDArray[np.uint8]) -> Pieces:
        return ledger.join_runs(find_runs(rows, len(self._symbols), keep))[0]

    async def _copy_trades(
        self, conn: asyncpg.Connection, rows: Rows, keep: npt.NDArray[np.uint8], expected: int
    ) -> None:
        slices = sql.TRADES.encode(rows, self._symbols, keep)
        try:
            copied = await _copy(conn, sql.TRADES.table, sql.TRADES.columns, slices)
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
            keep = np.ones(len(part), np.uint8)
            refusals = self._mask_impossible(part, target, keep)
            return await self._transact(
                target,
                _days_of(part, target, keep),
                (),
                lambda conn: self._store_states(conn, target, part, keep, refusals, careful),
            )

        return await _write_or_split(rows, write)

    async def _store_states(
        self,
        conn: asyncpg.Connection,
        target: sql.Target,
        rows: Rows,
        keep: npt.NDArray[np.uint8],
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
            await park(conn, target, rows, self._names(rows, refused), refused)
        return WriteResult(stored, len(rows) - stored - len(refused), len(refused))

    # ---- what both have in common ------------------------------------------------------------

    async def _store_staged(
        self,
        conn: asyncpg.Connection,
        target: sql.Target,
        rows: Rows,
        keep: npt.NDArray[np.uint8],
        *,
        careful: bool = True,
    ) -> tuple[int, list[Refusal]]:
        """Store through the staging table; `careful` finds the rows that are refused."""

        async def put(part: npt.NDArray[np.intp]) -> int:
            chosen = np.zeros(len(rows), np.uint8)
            chosen[part] = 1
            slices = target.encode(rows, self._symbols, chosen)
            await _copy(conn, target.staging, target.columns, slices)
            return sql.affected(await conn.execute(target.insert_staged))

        await conn.execute(target.make_staging)
        live = np.flatnonzero((keep != 0) & ~_void(rows, target))
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
                async with self._transaction() as conn:
                    return await body(conn)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as exc:
            if classify(exc).kind is Kind.NO_PARTITION:
                self._partitions.forget(target.table)
            self._lockable.clear()
            raise as_transient(exc) from exc
        except (StoreError, OSError, TimeoutError) as exc:
            self._lockable.clear()
            raise as_transient(exc) from exc

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[asyncpg.Connection]:
        conn = await self._pool.acquire(timeout=self._limit_s)
        try:
            await conn.execute(sql.BEGIN)
            yield conn
            await conn.execute("COMMIT")
        except Exception as exc:
            if not _is_open(conn):
                # Whatever asyncpg made of it: a statement on a connection that is gone.
                raise TransientStoreError("connection", f"the connection ended: {exc}") from exc
            await _roll_back(conn)
            raise
        except BaseException:
            # Cancelled: nothing may be awaited now, and the session must not outlive us.
            if _is_open(conn):
                conn.terminate()
            raise
        finally:
            await self._pool.release(conn)

    def _mask_impossible(
        self, rows: Rows, target: sql.Target, keep: npt.NDArray[np.uint8]
    ) -> list[Refusal]:
        """Clear `keep` of rows that no server can be asked to store."""
        strangers = rows["symbol_id"] >= len(self._symbols)
        times = rows[target.time_field]
        timeless = (times < 0) | (times >= _LAST_US)
        if not (strangers.any() or timeless.any()):
            return []
        void = _void(rows, target)
        refusals = [
            Refusal(int(i), None, "the symbol id is unknown" if strangers[i] else "absurd time")
            for i in np.flatnonzero((strangers | timeless) & ~void)
        ]
        keep[[refusal.row for refusal in refusals]] = 0
        return refusals

    def _names(self, rows: Rows, refusals: list[Refusal]) -> list[str]:
        ids = [int(rows["symbol_id"][refusal.row]) for refusal in refusals]
        return [self._symbols.name(i) if i < len(self._symbols) else f"#{i}" for i in ids]


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


async def _copy(
    conn: asyncpg.Connection, table: str, columns: tuple[str, ...], slices: CopySlices
) -> int:
    """COPY the slices into `table`; return how many rows the server took."""

    async def one_by_one() -> AsyncIterator[memoryview]:
        for piece in slices:
            yield piece

    # Without a limit of its own: asyncpg would make a task for each slice. The caller has one.
    status = await conn.copy_to_table(
        table, source=one_by_one(), columns=columns, format="binary", timeout=NO_TIMEOUT
    )
    return sql.affected(status)


async def _roll_back(conn: asyncpg.Connection) -> None:
    """End the transaction; a connection that cannot even do that is dropped."""
    try:
        await conn.execute("ROLLBACK", timeout=_ROLLBACK_LIMIT_S)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
        if _is_open(conn):
            conn.terminate()


def _is_open(conn: asyncpg.Connection) -> bool:
    try:
        return not conn.is_closed()
    except asyncpg.InterfaceError:  # the pool has taken the dead connection back already
        return False


def _void(rows: Rows, target: sql.Target) -> npt.NDArray[np.bool_]:
    if target is not sql.TRADES:
        return np.zeros(len(rows), np.bool_)
    return (rows["flags"] & FLAG_VOID) != 0  # type: ignore[no-any-return]


def _days_of(rows: Rows, target: sql.Target, keep: npt.NDArray[np.uint8]) -> set[date]:
    """Return the UTC days of the rows that are to be stored."""
    times = rows[target.time_field]
    first, last = int(times.min()) // _DAY_US, int(times.max()) // _DAY_US
    days = [first]
    if first != last:
        days = np.unique(times[(keep != 0) & ~_void(rows, target)] // _DAY_US).tolist()
    return {date.fromordinal(_EPOCH_DAY + day) for day in days if 0 <= day < _LAST_US // _DAY_US}


def _as_runs(cuts: dict[int, list[ledger.Span]]) -> Rows:
    """Return the cuts as `mask_rows` takes them."""
    ordered = [(*span, symbol_id) for symbol_id in sorted(cuts) for span in cuts[symbol_id]]
    runs = np.zeros(len(ordered), RUN_DTYPE)
    for name, column in zip(
        ("first_id", "last_id", "symbol_id"), zip(*ordered, strict=True), strict=True
    ):
        runs[name] = column
    return runs


def _union(a: Pieces, b: Pieces) -> Pieces:
    return {
        symbol_id: sorted([*a.get(symbol_id, ()), *b.get(symbol_id, ())])
        for symbol_id in a.keys() | b.keys()
    }
