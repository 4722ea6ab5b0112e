"""The cross-check: stored trades against the venue's closed 1-minute klines.

    todo     klines that nobody looked at, oldest first; minutes that may be proven by now
    round    one minute of many symbols, in one transaction: lock the symbols' rows in audit_state,
             read klines, sum up the trades in one scan, compare, write down what is not proven
    pass     minutes whose kline does not come are noted down as such, and the symbol goes on
    report   what was found now, and what is not proven in all

The trades and the ledger were committed before a round reads them, and its findings commit with
the step of audit_state: a crash costs a round that is done again. Two daemons share the work, a
symbol whose row is locked is the other's. A minute that is proven leaves no row behind.
"""

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from tradecore import clock
from tradecore.store import audit_sql as sql
from tradecore.store import coverage
from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.klines import put_klines
from tradecore.store.ledger import Span
from tradecore.store.transaction import transaction
from tradecore.store.verdict import (
    AuditReport,
    Kline,
    Known,
    Minute,
    Mismatch,
    Verdict,
    compare,
    explain,
)

__all__ = ["AuditReport", "Mismatch", "audit", "put_klines"]

MAX_MINUTES = 200
LIMIT_S = 30.0

MINUTE_US = 60_000_000
_MINUTE = timedelta(minutes=1)
_PATIENCE = 2 * _MINUTE  # with a kline, once its minute is over
_LATE = 3 * _MINUTE
_NOTHING = asyncpg.Range(empty=True)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROUND_LIMIT_S = 55.0
_RETRY_S, _RETRY_CAP_S = 60.0, 6 * 3600.0
_BREATH_ROWS = 200
_TO_DO_ROWS, _MIN_MINUTES = 20_000, 5  # of one call: in all, and of each symbol at least
_MAX_RANGES = 5000  # of missing klines in one report, two of each symbol

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tally:
    checked: int = 0
    matched: int = 0
    waiting: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    reopened: list[Mismatch] = field(default_factory=list)
    tails: dict[str, int] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    """Symbols whose next minute has to wait: another daemon has them, or nothing is stored yet."""


async def audit(
    pool: asyncpg.Pool,
    *,
    now_us: int,
    settle_s: float,
    symbols: Collection[str],
    max_minutes: int = MAX_MINUTES,
    limit_s: float = LIMIT_S,
) -> AuditReport:
    """Compare minutes that ended `settle_s` before `now_us` or earlier; report.

    Give only symbols whose trades are captured. One call scans `max_minutes` minutes at most and
    begins no other after `limit_s`; the next call goes on. Raises TransientStoreError when the
    database is away; what was found until then is kept.
    """
    begun_ns = clock.mono_ns()
    end_us = (now_us - int(settle_s * 1e6)) // MINUTE_US * MINUTE_US
    names = sorted(set(symbols))
    tally = _Tally()
    try:
        async with asyncio.timeout(_ROUND_LIMIT_S):
            rounds, more = await _find_work(pool, names, end_us, max_minutes)
        done = 0
        for open_us, fresh, again in rounds:
            if clock.mono_ns() - begun_ns > limit_s * 1e9:
                break
            async with asyncio.timeout(_ROUND_LIMIT_S):
                await _audit_minute(pool, open_us, fresh, again, tally)
            done += 1
        more = more or done < len(rounds)
        async with asyncio.timeout(_ROUND_LIMIT_S):
            await _pass_over(pool, names, _at(end_us))
            return await _report(pool, names, _at(end_us) - _LATE, tally, more)
    except TROUBLE as exc:
        raise as_transient(exc, "audit stored trades") from exc


async def read_proven(pool: asyncpg.Pool, symbols: Collection[str]) -> dict[str, int]:
    """Return up to which time, in us, each symbol was proven when it was last looked at.

    Raises TransientStoreError when the database is away.
    """
    try:
        async with asyncio.timeout(_ROUND_LIMIT_S), transaction(pool, _ROUND_LIMIT_S) as conn:
            return _proven_us(await conn.fetch(sql.STATE, sorted(set(symbols)), _EPOCH))
    except TROUBLE as exc:
        raise as_transient(exc, "read what is proven") from exc


async def _find_work(
    pool: asyncpg.Pool, names: list[str], end_us: int, max_minutes: int
) -> tuple[list[tuple[int, set[str], set[str]]], bool]:
    """Return minutes to look at: (open time, symbols that come to it, symbols to look at again).

    The second value tells whether there are more of them.
    """
    fresh: dict[int, set[str]] = defaultdict(set)
    again: dict[int, set[str]] = defaultdict(set)
    async with transaction(pool, _ROUND_LIMIT_S) as conn:
        await conn.execute(sql.ADD_SYMBOLS, names)
        end = _at(end_us)
        limit = min(max_minutes, max(_TO_DO_ROWS // max(len(names), 1), _MIN_MINUTES))
        found = Counter[str]()
        async for symbol, open_time in _rows(conn, sql.TO_DO, names, end, limit):
            fresh[_us(open_time)].add(symbol)
            found[symbol] += 1
        more = max(found.values(), default=0) >= limit
        for query in (sql.DUE, sql.LATE_KLINES):
            for symbol, open_time in await conn.fetch(query, names, end, max_minutes * 20):
                again[_us(open_time)].add(symbol)
    # Most of the work goes on in time; some is kept for what was left behind, newest first.
    share = max_minutes - min(len(again), max_minutes // 4)
    chosen = set(sorted(fresh)[:share])
    for open_us in sorted(again, reverse=True):
        if len(chosen) >= max_minutes:
            break
        chosen.add(open_us)
    rounds = [(open_us, fresh[open_us], again[open_us]) for open_us in sorted(chosen)]
    return rounds, more or len(rounds) >= max_minutes


async def _audit_minute(
    pool: asyncpg.Pool, open_us: int, fresh: set[str], again: set[str], tally: _Tally
) -> None:
    """Do one round."""
    fresh = fresh - tally.stuck
    open_time = _at(open_us)
    async with transaction(pool, _ROUND_LIMIT_S) as conn:
        await conn.execute(sql.LIMITS)
        both = [*fresh, *again]
        locked = {row["symbol"]: row for row in await conn.fetch(sql.LOCK, both, open_time)}
        tally.stuck |= fresh - locked.keys()
        fresh, behind = await _in_turn(conn, open_time, fresh & locked.keys(), locked, tally)
        symbols = sorted(fresh | (again & locked.keys()))
        earlier = {row["symbol"]: row for row in await conn.fetch(sql.EARLIER, open_time, symbols)}
        symbols = [s for s in symbols if s in fresh or s in earlier or locked[s]["had_no_kline"]]
        if not symbols:
            return
        klines = {row[0]: Kline(*row) async for row in _rows(conn, sql.KLINES, open_time, symbols)}
        minute = asyncpg.Range(open_time, open_time + _MINUTE)
        gone = [s for s in earlier if s not in klines and not earlier[s]["asked_at"]]
        if gone:
            await conn.execute(sql.GONE, gone, minute)
        symbols = [s for s in symbols if s in klines or (s in earlier and earlier[s]["asked_at"])]
        minutes = await _minutes(conn, open_time, symbols, klines)
        started = {s for s in symbols if locked[s]["proven_from"] is not None or s in behind}
        reopened = {s for s, row in earlier.items() if row["reopened_at"] is not None}
        verdicts = await _judge(conn, open_us, symbols, klines, minutes, started, reopened)
        unready = {s for s, verdict in verdicts.items() if verdict.state == "unready"}
        partial = {s for s, verdict in verdicts.items() if verdict.state == "partial"}
        open_rows = {s: v for s, v in verdicts.items() if v.state in ("waiting", "mismatch")}
        proven = [symbol for symbol in symbols if symbol not in verdicts]
        for symbol in (s for s, verdict in sorted(verdicts.items()) if verdict.reopen):
            first_id, last_id = klines[symbol].first_id, klines[symbol].last_id
            assert first_id is not None and last_id is not None
            await coverage.reopen_absent(conn, symbol, Span(first_id, last_id))
        await conn.execute(sql.PROVEN, open_time, [s for s in proven if s in earlier])
        await _write_down(conn, open_time, open_rows, klines, earlier)
        done = [s for s in symbols if s not in unready]
        begins = [behind.get(s, None if s in partial else open_time) for s in done]
        await _advance(conn, done, open_time + _MINUTE, begins, behind, minute)
    # Committed: now it may be told.
    tally.stuck |= unready
    tally.checked += len(symbols)
    tally.matched += len(proven)
    for symbol, verdict in verdicts.items():
        tally.waiting += verdict.state in ("waiting", "unready")
        if verdict.fetch_id is not None:
            tally.tails[symbol] = max(verdict.fetch_id, tally.tails.get(symbol, -1))
        before = earlier.get(symbol)
        known = before and (before["state"], before["reason"]) == ("mismatch", verdict.reason)
        finding = Mismatch(symbol, open_us, verdict.reason, verdict.detail)
        if verdict.state == "mismatch" and not known:
            tally.mismatches.append(finding)
        if verdict.reopen:
            tally.reopened.append(finding)


def _rows(conn: asyncpg.Connection, query: str, *values: Any) -> AsyncIterator[asyncpg.Record]:
    """Give the rows of a long answer, a few at a time: turning all at once into Python's numbers
    would block the event loop for 15 ms at 1,400 symbols.
    """
    rows: AsyncIterator[asyncpg.Record] = aiter(conn.cursor(query, *values, prefetch=_BREATH_ROWS))
    return rows


async def _in_turn(
    conn: asyncpg.Connection,
    open_time: datetime,
    fresh: set[str],
    locked: dict[str, Any],
    tally: _Tally,
) -> tuple[set[str], dict[str, datetime]]:
    """Return which of `fresh` are really next, and since when they had no kline, if so.

    Another daemon may have been here, and an earlier minute may have been left to it.
    """
    through = {symbol: locked[symbol]["audited_through"] for symbol in fresh}
    behind = {s: since for s, since in through.items() if since and since < open_time}
    if behind:
        skipped = await conn.fetch(sql.SKIPPED, list(behind), list(behind.values()), open_time)
        for row in skipped:
            tally.stuck.add(row["symbol"])
            del behind[row["symbol"]]
    in_turn = {s for s, since in through.items() if not since or since == open_time}
    return in_turn | behind.keys(), behind


async def _minutes(
    conn: asyncpg.Connection, open_time: datetime, symbols: list[str], klines: dict[str, Kline]
) -> dict[str, Minute]:
    """Sum up what is stored with a time in the minute."""
    bounds = open_time, open_time + _MINUTE
    ids = [(k.first_id, k.last_id) if (k := klines.get(s)) else (None, None) for s in symbols]
    await conn.execute(sql.NO_LOOPS)
    rows = _rows(
        conn, sql.MINUTES, *bounds, symbols, [pair[0] for pair in ids], [pair[1] for pair in ids]
    )
    found = dict.fromkeys(symbols, Minute())
    async for row in rows:
        found[row[0]] = Minute(row[1], row[2], row[3], int(row[4]), *row[5:])
    edges = [
        (symbol, trade_id)
        for symbol, minute in found.items()
        for trade_id, price in ((minute.first_id, minute.open), (minute.last_id, minute.close))
        if trade_id is not None and price is None
    ]
    if edges:
        prices = {
            (row[0], row[1]): row[2]
            for row in await conn.fetch(sql.PRICES, *bounds, *map(list, zip(*edges, strict=True)))
        }
        for symbol in {symbol for symbol, _ in edges}:
            minute = found[symbol]
            first = prices.get((symbol, minute.first_id), minute.open)
            last = prices.get((symbol, minute.last_id), minute.close)
            found[symbol] = minute._replace(open=first, close=last)
    await conn.execute(sql.LOOPS)
    return found


async def _judge(
    conn: asyncpg.Connection,
    open_us: int,
    symbols: list[str],
    klines: dict[str, Kline],
    minutes: dict[str, Minute],
    started: set[str],
    reopened: set[str],
) -> dict[str, Verdict]:
    """Return a verdict for each symbol whose minute is not proven."""
    verdicts: dict[str, Verdict] = {}
    for count, symbol in enumerate(symbols, 1):
        if count % _BREATH_ROWS == 0:
            await asyncio.sleep(0)
        if symbol in klines:
            verdict = compare(klines[symbol], minutes[symbol])
        elif minutes[symbol].trades:
            verdict = Verdict(
                "mismatch",
                "count",
                f"count: the venue has no kline of this minute, stored is {minutes[symbol].trades}",
            )
        else:
            verdict = None
        if verdict is not None:
            verdicts[symbol] = verdict
    doubtful = [s for s, v in verdicts.items() if v.reason in ("count", "ids") and s in klines]
    if not doubtful:
        return verdicts
    ids = [klines[s].first_id for s in doubtful], [klines[s].last_id for s in doubtful]
    bounds = _at(open_us), _at(open_us) + _MINUTE
    for row in await conn.fetch(sql.KNOWN, doubtful, *ids, *bounds):
        symbol = row[0]
        verdicts[symbol] = explain(
            klines[symbol],
            minutes[symbol],
            verdicts[symbol],
            Known(*row[1:]),
            open_us,
            started=symbol in started,
            reopened=symbol in reopened,
        )
    odd = [s for s in doubtful if verdicts[s].state == "mismatch" and klines[s].span is not None]
    if odd:
        ids = [klines[s].first_id for s in odd], [klines[s].last_id for s in odd]
        for symbol, strays, elsewhere in await conn.fetch(sql.MISPLACED, odd, *ids, *bounds):
            if strays or elsewhere:
                detail = (
                    f"{strays} trades of this minute are not in its kline,"
                    f" {elsewhere} of the kline have a time outside of it"
                )
                verdicts[symbol] = verdicts[symbol]._replace(reason="time", detail=detail)
    return verdicts


async def _write_down(
    conn: asyncpg.Connection,
    open_time: datetime,
    verdicts: dict[str, Verdict],
    klines: dict[str, Kline],
    earlier: dict[str, Any],
) -> None:
    if not verdicts:
        return
    rows = []
    for symbol, verdict in sorted(verdicts.items()):
        kline = klines.get(symbol)
        tries = earlier[symbol]["tries"] + 1 if symbol in earlier else 0
        delay_s = min(_RETRY_S * 2.0 ** min(tries, 20), _RETRY_CAP_S) * random.uniform(0.75, 1.25)
        ids = (kline.first_id, kline.last_id) if kline else (None, None)
        what = verdict.state, verdict.reason, verdict.detail
        rows.append((symbol, *what, *ids, tries, delay_s, verdict.reopen))
    await conn.execute(sql.UNPROVEN, open_time, *map(list, zip(*rows, strict=True)))


async def _advance(
    conn: asyncpg.Connection,
    symbols: list[str],
    through: datetime,
    begins: Sequence[datetime | None],
    passed: Mapping[str, datetime],
    looked_at: asyncpg.Range,
) -> None:
    """Move the symbols' rows in audit_state to `through`; never back.

    `begins`: where the proof begins, if it does now. `passed`: since when a symbol had no kline,
    up to the minute `looked_at`, or to `through` when it is empty.
    """
    end = through if looked_at.isempty else looked_at.lower
    ranges = [asyncpg.Range(passed[s], end) if s in passed else _NOTHING for s in symbols]
    await conn.execute(sql.ADVANCE, symbols, [through] * len(symbols), begins, ranges, looked_at)


async def _pass_over(pool: asyncpg.Pool, names: list[str], end: datetime) -> None:
    """Go on where the next kline does not come; note down which minutes have none."""
    async with transaction(pool, _ROUND_LIMIT_S) as conn:
        await conn.execute(sql.LIMITS)
        behind = [row[0] for row in await conn.fetch(sql.LOCK_BEHIND, names, end - _PATIENCE)]
        rows = await conn.fetch(sql.SILENT, behind, end, _PATIENCE) if behind else []
        if rows:
            since = {row["symbol"]: row["since"] for row in rows}
            until = rows[0]["until"]
            await _advance(conn, list(since), until, list(since.values()), since, _NOTHING)


async def _report(
    pool: asyncpg.Pool, names: list[str], until: datetime, tally: _Tally, more: bool
) -> AuditReport:
    async with transaction(pool, _ROUND_LIMIT_S) as conn:
        state = await conn.fetch(sql.STATE, names, until)
        counts = await conn.fetchrow(sql.UNPROVEN_COUNTS, names)
        tails = dict(await conn.fetch(sql.TAILS, names))
        missing = await conn.fetch(sql.KLINES_MISSING, names, _MAX_RANGES)
    assert counts is not None
    for symbol, last_id in tally.tails.items():
        tails[symbol] = max(last_id, tails.get(symbol, -1))
    return AuditReport(
        checked=tally.checked,
        matched=tally.matched,
        waiting=tally.waiting,
        mismatches=tuple(tally.mismatches),
        reopened=tuple(tally.reopened),
        tails=tuple(sorted(tails.items())),
        proven_us=_proven_us(state),
        unproven=counts["unproven"],
        mismatching=counts["mismatching"],
        klines_missing=tuple((row[0], row[1], row[2]) for row in missing),
        late=sum(row["late"] for row in state),
        more=more,
    )


def _proven_us(state: list[asyncpg.Record]) -> dict[str, int]:
    return {row["symbol"]: row["proven_us"] for row in state if row["proven_us"]}


def _at(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)


def _us(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)
