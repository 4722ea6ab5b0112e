"""The lag of the loop: a loop that is held shows."""

import asyncio
import time

from tradecore.loop_lag import BOUNDS_S, INTERVAL_S, LoopLag

HELD_S = 0.5
LONG = BOUNDS_S.index(0.2) + 1
"""The first place of `counts` for what is longer than 0.2 s."""


async def until_looked(lag: LoopLag, times: int) -> None:
    goal = sum(lag.counts) + times
    while sum(lag.counts) < goal:
        await asyncio.sleep(INTERVAL_S / 10)


async def test_a_held_loop_shows() -> None:
    lag = LoopLag()
    watching = asyncio.create_task(lag.run())
    await until_looked(lag, 2)
    long, sum_s = sum(lag.counts[LONG:]), lag.sum_s
    time.sleep(HELD_S)  # noqa: ASYNC251 - that is what is tested
    await until_looked(lag, 1)
    watching.cancel()
    # The look came when the loop was free again: late by all but the rest of its own pause.
    assert sum(lag.counts[LONG:]) > long
    assert lag.sum_s - sum_s >= HELD_S - INTERVAL_S
