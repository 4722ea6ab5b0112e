"""The database as the daemon sees it: opened when needed, opened again when it was away."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import numpy as np
from numpy.typing import NDArray

from tradecore._symbols import SymbolTable
from tradecore.errors import StoreError, TradecoreError, TransientStoreError
from tradecore.settings import Settings
from tradecore.store import holes, times
from tradecore.store.candles import CandleKind, read_kind
from tradecore.store.dsn import Dsn, parse_dsn
from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.migrate import Level, bring_up_to_date, detect_level
from tradecore.store.partitions import Partitions
from tradecore.store.pool import (
    CONNECT_LIMIT_S,
    ServerInfo,
    classify_connect_error,
    describe_server,
    open_pool,
)
from tradecore.store.sink import Sink, WriteResult
from tradecore.store.transaction import session, transaction

if TYPE_CHECKING:
    from tradecore.store.embedded import EmbeddedPostgres

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

# It warns with a traceback each time the database is away; what that means is said here.
logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)

PING_LIMIT_S = 5.0
READ_LIMIT_S = 30.0
CLOSE_LIMIT_S = 5.0


class Store:
    """Opens the embedded or the given database, brings its schema up to date, and writes to it.

    Every write opens it first if it is not open, so a database that is down at the start, or goes
    away later, is only a failed write to whoever calls: TransientStoreError, try again.
    """

    def __init__(self, settings: Settings, symbols: SymbolTable) -> None:
        """Take the settings; nothing is opened yet. Raises StoreError for a malformed DSN."""
        self._settings = settings
        self._symbols = symbols
        self._dsn = parse_dsn(settings.database_url.reveal()) if settings.database_url else None
        self._embedded = _own_postgres(settings.data_dir) if self._dsn is None else None
        self._pool: asyncpg.Pool | None = None
        self._sink: Sink | None = None
        self._opening = asyncio.Lock()
        self.server: ServerInfo | None = None
        self.level: Level | None = None
        """What the tables are; None until they were seen."""
        self.candle_kind = CandleKind(aggregates=False)
        self.schema_version: int | None = None
        for warning in self._dsn.warnings if self._dsn else ():
            log.warning(warning)

    @property
    def embedded(self) -> bool:
        """Whether the database is our own under DATA_DIR."""
        return self._embedded is not None

    @property
    def is_new(self) -> bool:
        """Whether the database is our own and has still to be made."""
        return self._embedded is not None and not self._embedded.made

    @property
    def name(self) -> str:
        """The DSN without its password."""
        return str(self._dsn) if self._dsn else "embedded PostgreSQL"

    def pool_use(self) -> tuple[int, int]:
        """Return (idle, used) connections."""
        if self._pool is None:
            return 0, 0
        size, idle = self._pool.get_size(), self._pool.get_idle_size()
        return idle, size - idle

    async def open(self) -> None:
        """Open the database if it is not open.

        Raises StoreError or DataDirError when trying again cannot help, TransientStoreError when
        the database is down.
        """
        async with self._opening:
            if self._sink is None:
                await self._open()

    @property
    def is_opening(self) -> bool:
        """Whether it is being opened now, which has no time limit when the schema is behind."""
        return self._opening.locked()

    async def _open(self) -> None:
        dsn = await self._embedded.start() if self._embedded else self._dsn
        assert dsn is not None
        pool: asyncpg.Pool | None = None
        try:
            pool = await open_pool(dsn, self._settings.db_pool_size)
            async with session(pool, CONNECT_LIMIT_S) as conn:
                await bring_up_to_date(conn, auto_migrate=self._settings.auto_migrate)
                self.schema_version = await conn.fetchval(
                    "SELECT max(version) FROM schema_migrations"
                )
                self.server = await describe_server(conn)
                await self.read_level(conn)
                horizon_us = await conn.fetchval(holes.HORIZON)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as exc:
            if pool is not None:
                pool.terminate()
            failure = classify_connect_error(exc)
            if failure.kind == "fatal":
                raise StoreError(f"{self.name}: {failure.sentence}") from exc
            raise TransientStoreError("down", f"{self.name}: {failure.sentence}") from exc
        except BaseException:
            if pool is not None:
                pool.terminate()
            raise
        self._pool = pool
        self._sink = Sink(pool, self._symbols, Partitions())
        self.horizon_us = horizon_us
        log.info(
            "database is open",
            extra={
                "database": self.name,
                "edition": self.server.edition,
                "version": self.server.version,
            },
        )

    async def read_level(self, conn: asyncpg.Connection) -> None:
        """Look at what the tables are; they may have been raised to another level."""
        self.level = await detect_level(conn)
        self.candle_kind = await read_kind(conn, self.level)

    async def _opened(self) -> Sink:
        """Return the sink; a failure to open is one to try again, however it looks."""
        if self._embedded and not self._embedded.running:
            await self._drop_pool()
        if self._sink is None:
            try:
                await self.open()
            except TransientStoreError:
                raise
            except TradecoreError as exc:
                raise TransientStoreError("refused", str(exc), fatal_looking=True) from exc
        assert self._sink is not None
        return self._sink

    @property
    def is_open(self) -> bool:
        """Whether there is a pool; it may be that nobody answers."""
        return self._pool is not None

    def reading_dsn(self) -> str | Dsn:
        """Return where to read from; raises TransientStoreError while nothing is open."""
        if self._pool is None:
            raise TransientStoreError("down", f"{self.name} is not open")
        dsn = self._embedded.dsn if self._embedded else self._dsn
        assert dsn is not None
        return dsn

    @property
    def pool(self) -> asyncpg.Pool:
        """The open pool; raises TransientStoreError while there is none."""
        if self._pool is None:
            raise TransientStoreError("down", f"{self.name} is not open")
        return self._pool

    @property
    def horizon_us(self) -> int | None:
        """The retention horizon, as far as is known: older trades are not stored."""
        return self._sink.horizon_us if self._sink is not None else None

    @horizon_us.setter
    def horizon_us(self, horizon_us: int | None) -> None:
        if self._sink is not None:
            self._sink.horizon_us = horizon_us

    async def ping(self) -> None:
        """Have it answer; raises TransientStoreError when it does not within `PING_LIMIT_S`."""
        await self._opened()
        try:
            async with asyncio.timeout(PING_LIMIT_S):
                await self.pool.execute("SELECT 1")
        except TROUBLE as exc:
            raise as_transient(exc, "answer") from exc

    # ---- writing -----------------------------------------------------------------------------

    async def write_trades(
        self,
        rows: NDArray[np.void],
        *,
        symbols: SymbolTable | None = None,
        filled_by: str = "feed",
        hole_cause: str | None = None,
    ) -> WriteResult:
        """Store trades exactly once; see `Sink.write_trades`."""
        sink = await self._opened()
        return await sink.write_trades(
            rows, symbols=symbols, filled_by=filled_by, hole_cause=hole_cause
        )

    async def close_absent(
        self, symbol: str, first_id: int, last_id: int, evidence: Mapping[str, Any]
    ) -> int:
        """Close holes as absent at the venue; see `Sink.close_absent`."""
        return await (await self._opened()).close_absent(symbol, first_id, last_id, evidence)

    async def write_tickers(self, rows: NDArray[np.void]) -> WriteResult:
        """Upsert tickers; see `Sink.write_tickers`."""
        return await (await self._opened()).write_tickers(rows)

    async def write_klines(self, rows: NDArray[np.void]) -> WriteResult:
        """Upsert klines; see `Sink.write_klines`."""
        return await (await self._opened()).write_klines(rows)

    # ---- reading: all of it raises TransientStoreError when the database is away --------------

    async def open_holes(
        self, *, symbol: str | None = None, limit: int = 1000
    ) -> list[holes.OpenHole]:
        """Return at most `limit` open holes, those with the newest trade above first."""
        return await self._read(lambda conn: holes.open_holes(conn, symbol, limit))

    async def newest_open(self, limit: int) -> list[holes.HoleFate]:
        """Return at most `limit` open holes, those that were detected last first."""
        return await self._read(lambda conn: holes.newest_open(conn, limit))

    async def hole_fates(self, symbol: str, first_id: int, last_id: int) -> list[holes.HoleFate]:
        """Return what has become of the ids first_id..last_id that were missing."""
        return await self._read(lambda conn: holes.hole_fates(conn, symbol, first_id, last_id))

    async def hole_times(
        self, symbol: str, spans: Sequence[tuple[int, int]]
    ) -> dict[int, tuple[int, int]]:
        """Return by its first id the times around each hole (first id, last id) of a symbol."""
        return await self._read(lambda conn: holes.hole_times(conn, symbol, spans))

    async def is_counted(self, symbol: str, first_id: int, last_id: int) -> bool:
        """Tell whether a stored kline proves that the venue had some of the ids of a hole."""
        return await self._read(lambda conn: holes.is_counted(conn, symbol, first_id, last_id))

    async def is_parked(self, symbol: str, first_id: int, last_id: int) -> bool:
        """Tell whether all trades of a hole lie in dead_letters."""
        return await self._read(lambda conn: holes.is_parked(conn, symbol, first_id, last_id))

    async def trades_between(self, symbol: str, from_us: int, to_us: int) -> int:
        """Count the stored trades of `from_us` <= time < `to_us`."""
        return await self._read(lambda conn: holes.trades_between(conn, symbol, from_us, to_us))

    async def hole_summary(self) -> holes.HoleSummary:
        """Count the open holes of all symbols."""
        return await self._read(holes.hole_summary)

    async def bounds(self, symbol: str | None = None) -> dict[str, holes.Bounds]:
        """Return what is stored of each symbol, or of one, from end to end."""
        return await self._read(lambda conn: holes.bounds(conn, symbol))

    async def covered(self, symbol: str, first_id: int, last_id: int) -> list[tuple[int, int]]:
        """Return which of the ids first_id..last_id are stored, as ascending disjoint ranges."""
        return await self._read(lambda conn: holes.covered(conn, symbol, first_id, last_id))

    async def time_window(
        self, symbol: str, trade_id: int, *, whole_range: bool = False
    ) -> tuple[int, int] | None:
        """Return between which times a stored trade is; see `times.time_window`."""
        return await self._read(
            lambda conn: times.time_window(conn, symbol, trade_id, whole_range=whole_range)
        )

    async def count_holes(self) -> int | None:
        """Return how many holes are open; None when it is not known now."""
        if self._pool is None:
            return None
        try:
            return int(await self._pool.fetchval(holes.COUNT_OPEN, timeout=PING_LIMIT_S))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            return None

    async def _read(self, body: Callable[[asyncpg.Connection], Awaitable[Answer]]) -> Answer:
        """Run `body` in a transaction, whose settings keep the planner to the indexes."""
        await self._opened()
        try:
            async with (
                asyncio.timeout(READ_LIMIT_S),
                transaction(self.pool, READ_LIMIT_S) as conn,
            ):
                return await body(conn)
        except (
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
            OSError,
            TimeoutError,
        ) as exc:
            raise as_transient(exc, "answer a question about the ledger") from exc

    async def close(self) -> None:
        """Close the pool and stop the embedded database; bounded in time."""
        await self._drop_pool()
        if self._embedded:
            await self._embedded.stop()

    async def _drop_pool(self) -> None:
        pool, self._pool, self._sink = self._pool, None, None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), CLOSE_LIMIT_S)
        except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            pool.terminate()


def _own_postgres(data_dir: Path) -> "EmbeddedPostgres":
    from tradecore.store.embedded import EmbeddedPostgres  # late: most have a DATABASE_URL

    return EmbeddedPostgres(data_dir)
