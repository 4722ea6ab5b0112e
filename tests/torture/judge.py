"""Is everything there again, and is it right? Asks the database, never the daemon alone."""

import asyncio
import json
import sys
from dataclasses import dataclass, field

import asyncpg

from tests.torture.arena import Arena
from tradecore import clock
from tradecore.simulate.market import Market
from tradecore.simulate.proof import Proof, prove

WHOLE_LIMIT_S = 150.0
_POLL_S = 0.1
_CANDLES_LIMIT_S = 30.0
_AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)


@dataclass
class Verdict:
    """The outcome of a round."""

    whole_s: float | None = None
    """From the end of the fault until everything printed by then was stored without a hole."""
    proofs: dict[str, Proof] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What is not as it must be, in words; empty = good."""

    def total(self, name: str) -> int:
        """Return the sum of a field over all symbols."""
        return sum(int(getattr(proof, name)) for proof in self.proofs.values())


async def judge(arena: Arena, limit_s: float = WHOLE_LIMIT_S) -> Verdict:
    """Wait until all that is printed by now is stored, then compare and recount every row."""
    verdict = Verdict()
    await _await_whole(arena, limit_s, verdict)
    try:
        verdict.proofs = await _compared(arena, verdict)
        await _recount(arena, verdict)
        await _hold_candles(arena, verdict)
    except _AWAY as exc:
        verdict.problems.append(f"the database does not answer: {exc!r}")
    verdict.problems += [f"{s}: {proof}" for s, proof in verdict.proofs.items() if not proof.holds]
    return verdict


async def _await_whole(arena: Arena, limit_s: float, verdict: Verdict) -> None:
    begin_ns = clock.mono_ns()
    state = await arena.exchange.state()
    market = Market(**state["market"])
    marks = {symbol: market.next_id(symbol, state["now_us"]) - 1 for symbol in arena.symbols}
    while True:
        try:
            lacking = await _lacking(arena, market, marks)
        except _AWAY as exc:
            lacking = f"the database does not answer: {exc!r}"
        whole_s = (clock.mono_ns() - begin_ns) / 1e9
        if not lacking:
            verdict.whole_s = whole_s
            return
        process = arena.daemon.process
        if process is None or process.returncode is not None:
            verdict.problems.append(f"the daemon ended:\n{arena.daemon.log[-2000:]}")
            return
        if whole_s > limit_s:
            health = json.dumps(await arena.daemon.health(), ensure_ascii=False)
            verdict.problems.append(f"not whole after {limit_s:.0f} s: {lacking}\n{health}")
            return
        await asyncio.sleep(_POLL_S)


async def _lacking(arena: Arena, market: Market, marks: dict[str, int]) -> str:
    """Say what is not stored yet of each symbol from its first id to its mark; "" = nothing."""
    await arena.note_first_ids()
    async with arena.database() as connection:
        holes = await connection.fetch(
            "SELECT symbol, min(first_id) AS id FROM trade_gaps"
            " WHERE state = 'open' GROUP BY symbol"
        )
        open_from = {row["symbol"]: row["id"] for row in holes}
        for symbol, mark in marks.items():
            if symbol not in arena.first_ids:
                if arena.must_be_stored(symbol, market):
                    return f"{symbol}: nothing is stored, and it was printed"
                continue  # it has not traded since the daemon knows it
            missing, last_id = await _missing(arena, connection, market, symbol)
            if missing:
                return f"{symbol}: {missing[:5]} missing"
            if last_id < mark and market.count(symbol, last_id + 1, mark + 1):
                return f"{symbol}: stored up to {last_id}, printed up to {mark}"
            if open_from.get(symbol, mark + 1) <= mark:
                return f"{symbol}: an open hole at {open_from[symbol]}"
    return ""


async def _missing(
    arena: Arena, connection: asyncpg.Connection, market: Market, symbol: str
) -> tuple[list[tuple[int, int]], int]:
    """Return the id ranges that the ledger lacks and the venue has, and the last stored id."""
    next_id = arena.first_ids[symbol]
    missing = []
    for first_id, last_id in await connection.fetch(
        "SELECT first_id, last_id FROM trade_coverage WHERE symbol = $1 ORDER BY first_id", symbol
    ):
        if first_id > next_id and market.count(symbol, next_id, first_id):
            missing.append((next_id, first_id - 1))
        next_id = last_id + 1
    return missing, next_id - 1


async def _compared(arena: Arena, verdict: Verdict) -> dict[str, Proof]:
    """Compare every row of every symbol with the market, in one snapshot of the database."""
    async with (
        arena.database() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        ends = await connection.fetch(
            "SELECT symbol, max(last_id) AS id FROM trade_coverage GROUP BY symbol"
        )
        sent = {row["symbol"]: (arena.first_ids[row["symbol"]], row["id"]) for row in ends}
        if parked := await connection.fetchval("SELECT count(*) FROM dead_letters"):
            verdict.problems.append(f"{parked} rows were parked in dead_letters")
        return await prove(connection, await arena.exchange.truth_now(), sent)


# A candle of a closed minute is what the trades say, or the minute is entered to be computed anew.
# Another way than the daemon's own to compute them.
_WRONG_CANDLES = """
WITH raw AS (
    SELECT symbol, date_trunc('minute', timestamp) AS bucket, count(*) AS n,
           (array_agg(price ORDER BY trade_id))[1] AS open, max(price) AS high, min(price) AS low,
           (array_agg(price ORDER BY trade_id DESC))[1] AS close, sum(quantity) AS volume,
           sum(price * quantity) AS quote, sum(quantity) FILTER (WHERE side = 'BUY') AS base,
           sum(price * quantity) FILTER (WHERE side = 'BUY') AS taker,
           min(trade_id) AS first_id, max(trade_id) AS last_id
    FROM raw_trades WHERE timestamp < (SELECT candles_through FROM store_state) GROUP BY 1, 2
), kept AS (
    SELECT symbol, bucket, trade_count, open, high, low, close, volume, quote_volume,
           taker_buy_base_volume, taker_buy_quote_volume, first_id, last_id
    FROM candles_1m WHERE bucket < (SELECT candles_through FROM store_state)
)
SELECT count(*) FROM raw FULL JOIN kept USING (symbol, bucket)
WHERE (raw.n, raw.open, raw.high, raw.low, raw.close, raw.volume, raw.quote,
       coalesce(raw.base, 0), coalesce(raw.taker, 0), raw.first_id, raw.last_id)
    IS DISTINCT FROM
      (kept.trade_count, kept.open, kept.high, kept.low, kept.close, kept.volume,
       kept.quote_volume, kept.taker_buy_base_volume, kept.taker_buy_quote_volume, kept.first_id,
       kept.last_id)
"""


async def _hold_candles(arena: Arena, verdict: Verdict) -> None:
    """Compare the candles of closed minutes with the trades, once none waits."""
    try:
        async with asyncio.timeout(_CANDLES_LIMIT_S), arena.database() as connection:
            while True:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    if not await connection.fetchval("SELECT count(*) FROM candle_windows"):
                        wrong = await connection.fetchval(_WRONG_CANDLES)
                        break
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        verdict.problems.append(f"candles were not computed within {_CANDLES_LIMIT_S:.0f} s")
        return
    if wrong:
        verdict.problems.append(f"{wrong} candles are not what the trades say")


async def _recount(arena: Arena, verdict: Verdict) -> None:
    """Run `tradecore verify`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tradecore", "verify"),
        env={**arena.daemon.inherited(), "DATABASE_URL": arena.dsn, "LOG_LEVEL": "error"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        text = output.decode()[-2000:]
        verdict.problems.append(f"tradecore verify ended with {process.returncode}:\n{text}")
