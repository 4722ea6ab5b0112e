"""Gives up old trades and compresses those of past days, by the daemon's own timer.

    policies   what TimescaleDB does by itself while no daemon runs, brought up to the settings
    horizon    moved a day at a time, until it stands where RETENTION puts it; first over days that
               somebody else has dropped
    drop       the days below it
    compress   the days older than COMPRESS_AFTER, where TimescaleDB can (community edition)

Of several daemons with one database one does it; all look at what there is. The jobs of
TimescaleDB alone would not do: their runs may fail, or be reported as failed, on some servers, and
the policies among them know nothing of the ledger.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import asyncpg

from tradecore import clock
from tradecore.backoff import Backoff
from tradecore.errors import TransientStoreError
from tradecore.log import once_per
from tradecore.settings import Settings
from tradecore.store import chunks as chunks_of
from tradecore.store import horizon as horizon_of
from tradecore.store import jobs as jobs_of
from tradecore.store.candle_windows import LOCK_OUT_REFRESH
from tradecore.store.candles import EPOCH
from tradecore.store.chunks import TABLES, Chunk, Server
from tradecore.store.failure import AWAY, TROUBLE, as_transient, classify
from tradecore.store.jobs import JobHealth
from tradecore.store.store import Store
from tradecore.store.transaction import session

log = logging.getLogger(__name__)

FIRST_S = 0.5
"""Soon: what somebody has dropped meanwhile is found before much is made of it."""
INTERVAL_S = 60.0
"""Between two rounds: jobs that fail are told within a minute. Mostly a round only looks."""

_MORE_S = 1.0
_BUDGET_S = 60.0
"""What is begun in one round; then others have the connection for a moment."""

_RETRY_S, _RETRY_CAP_S = 5.0, 300.0
_PATIENCE = 12
"""Rounds in which others may hold what a step needs; more is trouble."""

_RECOMPRESS_S = 3600.0
"""Between two times that one day is compressed again because trades of it were fetched."""

_POLICY_GRACE = timedelta(days=1)
"""How long a policy that works has for a day, before it is compressed from here."""

_COMPRESS_LIMIT_S = 600

_KEY = 0x74636C66  # "tclf"; the second key of the lock is the schema
_TRY = f"SELECT pg_try_advisory_lock({_KEY}, hashtext(current_schema()))"
_UNLOCK = f"SELECT pg_advisory_unlock({_KEY}, hashtext(current_schema()))"
_UNLOCK_REFRESH = LOCK_OUT_REFRESH.replace("pg_advisory_lock", "pg_advisory_unlock")
_LIMITS = "SET lock_timeout = '5s'; SET statement_timeout = '50s'"

STEPS = ("look", "policies", "horizon", "drop", "compress")
"""What can fail by itself."""


@dataclass(slots=True)
class LifecycleStats:
    """What has been done since the start, and what is true now."""

    horizon_us: int | None = None
    """Older trades are no part of the record; None: there is no horizon, or it is not known."""
    waits: str = ""
    """Why the horizon does not stand where RETENTION puts it, "" when it does."""
    waits_since_ns: int = 0
    """Monotonic clock of when that began; 0 when it does not wait."""
    chunks: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Days by table and state (open, compressed, partial)."""
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By table: bytes of heap and index before its compressed days were, and after."""
    jobs: JobHealth = field(default_factory=JobHealth)
    dropped: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TABLES, 0)))
    """Days, by table."""
    compressed: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TABLES, 0)))
    """Days, by table; again each time that one is compressed again."""
    failures: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(STEPS, 0)))
    trouble: dict[str, str] = field(default_factory=dict)
    """Steps that failed the last time, each with the error."""
    rounds: int = 0


class Lifecycle:
    """`run` it until it is cancelled."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.stats = LifecycleStats()
        self._store = store
        self._retention = _delta(settings.retention_s)
        self._compress_after = _delta(settings.compress_after_s)
        self._recompressed_ns: dict[str, int] = {}
        self._busy: Counter[str] = Counter()  # steps that found a lock taken, times in a row
        self._more = False

    async def run(self) -> None:
        """Do a round every few minutes; what fails is tried again with growing pauses."""
        backoff = Backoff(_RETRY_S, _RETRY_CAP_S)
        pause_s = FIRST_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))
            try:
                await self.round()
            except TransientStoreError:
                pause_s = _RETRY_S  # the flusher meets it too, and reports it
                continue
            if self.stats.trouble or self.stats.waits:
                pause_s = min(_RETRY_S + backoff.next_delay_s(), INTERVAL_S)
                continue
            backoff.reset()
            pause_s = (_RETRY_S if self._busy else _MORE_S) if self._more else INTERVAL_S

    async def round(self) -> None:
        """Do what is due, within a minute or so, unless another daemon is at it; then look.

        Raises TransientStoreError when the database is away, which is no trouble of a step.
        """
        self._more = False
        self.stats.trouble.clear()
        pool, level = self._store.pool, self._store.level
        if level is None:
            raise TransientStoreError("down", "the database is not open")
        async with self._step("look"), session(pool, 10) as conn:
            await conn.execute(_LIMITS)
            server = await chunks_of.read_server(conn, level)
            if await conn.fetchval(_TRY):
                try:
                    await self._work(conn, server)
                finally:
                    await conn.execute(_LIMITS)
                    await conn.execute(_UNLOCK)
            else:
                self._wait("")  # or another daemon waits, which says so
            await self._look(conn, server)
            self.stats.rounds += 1

    async def _work(self, conn: asyncpg.Connection, server: Server) -> None:
        began_ns = clock.mono_ns()
        if server.level == "community":
            async with self._step("policies"):
                await self._set_policies(conn, server)
        async with self._step("horizon"):
            if self._retention is not None:
                await self._pass_over_lost(conn, server)
                await self._move(conn, self._retention, began_ns)
            await self._tidy(conn)
        async with self._step("drop"):
            await self._drop(conn, server)
        if server.level == "community" and self._compress_after is not None:
            async with self._step("compress"):
                await self._compress(conn, server, self._compress_after, began_ns)

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[None]:
        """Note what fails in the body, and go on: the other steps do not depend on it."""
        try:
            yield
            self._busy.pop(name, None)
        except TransientStoreError:
            raise
        except TROUBLE as error:
            if isinstance(error, asyncpg.LockNotAvailableError) and self._busy[name] < _PATIENCE:
                self._busy[name] += 1
                self._more = True
                return
            failure = classify(error)
            if failure.reason in AWAY:
                raise as_transient(error, "keep old trades in order") from error
            text = str(error) or type(error).__name__
            remedy = f": {failure.remedy}" if failure.remedy else ""
            self.stats.failures[name] += 1
            self.stats.trouble[name] = f"{text}{remedy}"
            once_per(log, (name, failure.reason)).warning(
                "keeping old trades in order failed and is tried again",
                extra={"step": name, "reason": failure.reason, "error": f"{text}{remedy}"},
            )

    # ---- the steps ---------------------------------------------------------------------------

    async def _pass_over_lost(self, conn: asyncpg.Connection, server: Server) -> None:
        """Take days out of the record that somebody else has dropped: an operator, a policy.

        `_move` goes on where this has raised the horizon to, and trims the ledger.
        """
        await conn.execute(_LIMITS)
        state = await horizon_of.read_state(conn)
        days = (
            one.begin
            for one in await chunks_of.chunks(conn, server)
            if one.table == "raw_trades" and one.end > (state.ledger_from or EPOCH)
        )
        to = await horizon_of.lost_through(conn, state, next(days, None))
        if to is not None and await horizon_of.raise_over_lost(conn, state, to):
            log.warning(
                "days of trades are gone that RETENTION had not given up: somebody else has dropped"
                " them; they are no part of the record any more",
                extra={"before": f"{to:%Y-%m-%d}"},
            )

    async def _tidy(self, conn: asyncpg.Connection) -> None:
        """Let nothing speak of what the ledger has given up; what was broken off is ended here."""
        await conn.execute(_LIMITS)
        ledger_from = (await horizon_of.read_state(conn)).ledger_from
        if ledger_from is not None and await horizon_of.is_untidy(conn, ledger_from):
            from tradecore.store import trim

            await trim.trim_audits(conn, ledger_from)

    def _wait(self, why: str) -> None:
        self.stats.waits = why
        self.stats.waits_since_ns = (self.stats.waits_since_ns or clock.mono_ns()) if why else 0

    async def _move(self, conn: asyncpg.Connection, retention: timedelta, began_ns: int) -> None:
        """Move the horizon a day at a time, and let no refresh of candles be under way below it."""
        await conn.execute(_LIMITS)
        while True:
            state = await horizon_of.read_state(conn)
            wanted = horizon_of.target_of(state, retention, _now())
            target = horizon_of.held_back(state, wanted)
            waits = target < wanted and (state.raw_from or EPOCH) < wanted
            self._wait("candles of older days are still to be computed" if waits else "")
            to = await horizon_of.next_horizon(conn, state, target)
            if to is None:
                return
            if _is_over(began_ns):
                self._more = True
                return
            if not await horizon_of.raise_horizon(conn, to):
                return
            from tradecore.store import trim  # once a day: till then it costs no memory

            found = await trim.survey(conn, state, to)
            await trim.trim(conn, state, to, found)
            log.info(
                "the retention horizon has moved",
                extra={
                    "horizon": f"{to:%Y-%m-%d}",
                    "trades_given_up": sum(one.rows for one in found.gone.values()),
                    "symbols": len(found.gone),
                },
            )

    async def _set_policies(self, conn: asyncpg.Connection, server: Server) -> None:
        await conn.execute(_LIMITS)
        if self._compress_after is not None:
            await jobs_of.enable_compression(conn, server)
        state = await horizon_of.read_state(conn)
        changed = await jobs_of.set_policies(
            conn,
            server,
            retention=self._retention is not None,
            compress_after=self._compress_after,
            computed=state.candles_through is not None and state.waiting is None,
        )
        if changed:
            log.info("jobs of TimescaleDB were set", extra={"jobs": changed})

    async def _drop(self, conn: asyncpg.Connection, server: Server) -> None:
        """Drop what is below the horizon; what it was dropped for is committed long since."""
        await conn.execute(_LIMITS)
        state = await horizon_of.read_state(conn)
        if state.ledger_from is None:
            return
        found = await chunks_of.chunks(conn, server)
        if found and found[0].end <= state.ledger_from:
            # A refresh of candles that began before the horizon moved would delete candles.
            await conn.execute(LOCK_OUT_REFRESH)
            await conn.execute(_UNLOCK_REFRESH)
        for one in await chunks_of.drop_below(conn, server, found, state.ledger_from):
            self.stats.dropped[one.table] += 1
            log.info(
                "a day below the retention horizon was dropped",
                extra={"table": one.table, "day": f"{one.begin:%Y-%m-%d}"},
            )

    async def _compress(
        self, conn: asyncpg.Connection, server: Server, after: timedelta, began_ns: int
    ) -> None:
        """Compress what is due, the oldest day first, one at a time."""
        await conn.execute(_LIMITS)
        now = await conn.fetchval("SELECT clock_timestamp()")
        jobs = await jobs_of.health(conn, server)
        # A policy that works has a day for it.
        due = now - after - (_POLICY_GRACE if jobs.works("compression") else timedelta())
        failed: Exception | None = None
        for one in self._to_compress(await chunks_of.chunks(conn, server), due):
            if _is_over(began_ns):
                self._more = True
                break
            self._recompressed_ns[one.name] = clock.mono_ns()
            try:
                await chunks_of.compress(conn, server, one, _COMPRESS_LIMIT_S)
            except asyncpg.PostgresError as error:
                if not await chunks_of.is_compressed(conn, server, one):  # a policy was first
                    failed = error  # another day may do
                continue
            self.stats.compressed[one.table] += 1
            log.info(
                "a day was compressed",
                extra={"table": one.table, "day": f"{one.begin:%Y-%m-%d}", "was": one.state},
            )
        if failed is not None:
            raise failed

    def _to_compress(self, found: Sequence[Chunk], due: datetime) -> list[Chunk]:
        now_ns = clock.mono_ns()
        recent = {
            name: then_ns
            for name, then_ns in self._recompressed_ns.items()
            if now_ns - then_ns < _RECOMPRESS_S * 1e9
        }
        self._recompressed_ns = recent
        return [
            one
            for one in found
            if one.end <= due
            and not one.frozen
            and (one.state == "open" or (one.state == "partial" and one.name not in recent))
        ]

    # ---- what there is -----------------------------------------------------------------------

    async def _look(self, conn: asyncpg.Connection, server: Server) -> None:
        await conn.execute(_LIMITS)
        state = await horizon_of.read_state(conn)
        found = await chunks_of.chunks(conn, server)
        self.stats.horizon_us = (
            None
            if state.raw_from is None
            else (state.raw_from - EPOCH) // timedelta(microseconds=1)
        )
        self._store.horizon_us = self.stats.horizon_us
        self.stats.chunks = Counter((one.table, one.state) for one in found if not one.pending)
        self.stats.saved = await chunks_of.saved(conn, server)
        self.stats.jobs = await jobs_of.health(conn, server)


def _is_over(began_ns: int) -> bool:
    return clock.mono_ns() - began_ns > _BUDGET_S * 1e9


def _now() -> datetime:
    return datetime.fromtimestamp(clock.wall_ns() / 1e9, UTC)


def _delta(seconds: int | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)
