"""A short seeded run of the torture suite; its link that cuts, its clock that steps."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import asyncpg
import pytest

from tests.torture.arena import NEWCOMER, Arena
from tests.torture.clock_shim import clock_shim
from tests.torture.faults import FAULTS, MIXED, SHORT
from tests.torture.link import Link
from tests.torture.rounds import Outcome, Plan, Tally, run
from tradecore.store.embedded import EmbeddedPostgres


@pytest.mark.timeout(300)
async def test_a_short_mix_of_faults_loses_nothing() -> None:
    outcome = await run(Plan(len(SHORT) + 1, seed=3, faults=(*SHORT, MIXED)), print)
    assert outcome.good, "\n".join(outcome.failures)
    assert all(tally.rounds for tally in outcome.tallies.values()), outcome.last_word


@pytest.mark.timeout(200)
async def test_what_is_lost_or_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that never fails would prove nothing."""

    async def steal(arena: Arena, random: Random) -> None:
        async with arena.database() as connection:
            for statement in (
                "DELETE FROM raw_trades WHERE symbol = 'BTCUSDT' AND trade_id = "
                "(SELECT min(trade_id) FROM raw_trades WHERE symbol = 'BTCUSDT')",
                "UPDATE raw_trades SET price = price + 0.00000001 WHERE symbol = 'ETHUSDT' "
                "AND trade_id = (SELECT min(trade_id) FROM raw_trades WHERE symbol = 'ETHUSDT')",
            ):
                assert (await connection.execute(statement)).endswith(" 1")

    monkeypatch.setitem(FAULTS, "steal", steal)
    outcome = await run(Plan(1, 1, ("steal",)), print)
    tally = outcome.tallies["steal"]
    assert (tally.failed, tally.missing, tally.doubled, tally.wrong) == (1, 1, 0, 1)
    (failure,) = outcome.failures
    assert "tradecore verify ended with 5" in failure
    assert "--seed 1 --rate 500 --lines 1,2 --faults steal --only 0" in failure
    folder = re.search(r"logs: (\S+)", failure)
    assert folder
    assert "capturing" in (Path(folder[1]) / "daemon.log").read_text()
    shutil.rmtree(folder[1])


@pytest.mark.timeout(200)
async def test_a_symbol_that_is_never_recorded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forget(arena: Arena, random: Random) -> None:
        arena.symbols.append(NEWCOMER)  # and nobody tells the daemon

    monkeypatch.setitem(FAULTS, "forget", forget)
    outcome = await run(Plan(1, 1, ("forget",), limit_s=10), print)
    (failure,) = outcome.failures
    assert f"{NEWCOMER}: nothing is stored, and it was printed" in failure
    assert outcome.last_word == "NOT WHOLE."
    folder = re.search(r"logs: (\S+)", failure)
    assert folder
    shutil.rmtree(folder[1])


def test_what_was_skipped_is_said_last() -> None:
    tallies = {"kill9": Tally(rounds=1), "disk_full": Tally(skipped="no mount")}
    outcome = Outcome(Plan(2, 1, tuple(tallies)), tallies)
    assert outcome.last_word == "every round is whole; SKIPPED: disk_full (no mount)."


def test_a_round_follows_from_the_seed_alone() -> None:
    names = (*FAULTS, MIXED)
    plan = Plan(100, 7, names)
    assert [plan.fault_of(n) for n in range(100)] == [plan.fault_of(n) for n in range(100)]
    assert {plan.fault_of(n) for n in range(len(names))} == set(names)
    assert plan.numbers() == range(100)


async def test_the_answer_to_a_commit_is_lost_and_the_commit_is_not(
    short_dir: Path, pg_server: EmbeddedPostgres
) -> None:
    link = Link(short_dir / "link", pg_server.dsn)
    await link.open()
    witness = await asyncpg.connect(pg_server.dsn)
    try:
        await witness.execute("CREATE TABLE kept (way text)")
        for way, kept in (("before_commit", 0), ("after_commit", 1), ("none", 1)):
            daemon = await asyncpg.connect(link.dsn)
            if way != "none":
                link.arm(way)
            await daemon.execute("BEGIN")
            await daemon.execute("INSERT INTO kept VALUES ($1)", way)
            if way == "none":
                await daemon.execute("COMMIT")
                await daemon.close()
            else:
                with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
                    await daemon.execute("COMMIT")
                assert link.done[way] == 1
            found = await witness.fetchval("SELECT count(*) FROM kept WHERE way = $1", way)
            assert found == kept, way
        daemon = await asyncpg.connect(link.dsn)
        link.stall()
        asking = asyncio.create_task(daemon.fetchval("SELECT 1"))
        await asyncio.wait({asking}, timeout=0.3)
        assert not asking.done()
        link.flow()
        assert await asking == 1
        link.arm("in_copy")
        with pytest.raises((asyncpg.PostgresConnectionError, OSError)):
            await daemon.copy_records_to_table("kept", records=[("copied",)])
        assert await witness.fetchval("SELECT count(*) FROM kept WHERE way = 'copied'") == 0
    finally:
        await witness.close()
        await link.close()


def test_the_clock_of_one_process_steps(tmp_path: Path) -> None:
    shim = clock_shim(tmp_path)
    if shim is None:
        pytest.skip("there is no C compiler")
    ask = "import time; print(time.time(), time.monotonic())"

    def times() -> list[float]:
        return [
            float(word)
            for word in subprocess.check_output(
                [sys.executable, "-c", ask], env={**os.environ, **shim.environ}
            ).split()
        ]

    before = times()
    shim.step(-3600)
    back = times()
    assert -3600 <= back[0] - before[0] < -3500
    assert 0 <= back[1] - before[1] < 100
    shim.step(0)
    assert 0 <= times()[0] - before[0] < 100
