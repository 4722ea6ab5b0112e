"""Answers that are made no more often than the loop can afford."""

import asyncio
import time

import pytest
from http_desk import fetch
from snapshots import HEALTHY, changed

from tradecore.http.access import Policy
from tradecore.http.ration import AGE_LIMIT_S, KEPT_MAX, Ration
from tradecore.http.server import SideServer
from tradecore.values import Secret

MS = 10**6


class Desk:
    """A clock, and work that takes `cost_ms` of it."""

    def __init__(self):
        self.now_ns = MS
        self.cost_ms = 2
        self.made = 0
        self.ration = Ration(lambda: self.now_ns)

    async def get(self, key):
        def make():
            self.now_ns += self.cost_ms * MS // 2
            yield
            self.now_ns += self.cost_ms * MS // 2
            self.made += 1
            return self.made

        return await self.ration.get(key, make)


async def test_making_takes_a_tenth_of_the_time_at_most():
    desk = Desk()
    for _ in range(1000):
        await desk.get("a")
        desk.now_ns += MS
    assert desk.made > 50
    assert desk.made * desk.cost_ms <= desk.now_ns / MS / 10 + desk.cost_ms


async def test_who_waits_for_an_answer_takes_the_one_that_is_being_made_however_old_it_gets():
    desk = Desk()
    desk.cost_ms = int(3 * AGE_LIMIT_S * 1000)
    assert await asyncio.gather(*(desk.get("a") for _ in range(6))) == [1] * 6
    desk.now_ns += MS
    assert await desk.get("a") == 2  # asked for after that one was made, and it is too old


async def test_what_takes_long_holds_up_no_other():
    desk, slow = Desk(), asyncio.Event()

    def make_slowly():
        while not slow.is_set():
            yield
        return "slow"

    async with asyncio.timeout(10):
        waiting = asyncio.create_task(desk.ration.get("large", make_slowly))
        await asyncio.sleep(0)
        assert await desk.get("small") == 1
        assert not waiting.done()
        slow.set()
        assert await waiting == "slow"


async def test_what_costs_nothing_is_always_fresh():
    desk = Desk()
    desk.cost_ms = 0
    assert [await desk.get("a") for _ in range(3)] == [1, 2, 3]


async def test_several_share_the_tenth_and_nothing_grows_old():
    desk = Desk()
    assert (await desk.get("a"), await desk.get("b"), await desk.get("a"), await desk.get("b")) == (
        1,
        2,
        1,
        2,
    )
    desk.now_ns += int(AGE_LIMIT_S * 1e9) - 10 * MS
    assert (await desk.get("a"), await desk.get("b")) == (3, 2)  # of b, what is left of its second
    desk.now_ns += 10 * MS
    assert await desk.get("b") == 4


async def test_a_failure_is_not_kept():
    ration = Ration()

    def broken():
        yield
        raise RuntimeError

    def one():
        yield
        return 1

    for _ in range(2):
        with pytest.raises(RuntimeError):
            await ration.get("a", broken)
    assert await ration.get("a", one) == 1


async def test_the_loop_goes_on_while_an_answer_is_made_once_for_all():
    desk, turns = Desk(), 0
    done = asyncio.Event()

    async def turn():
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)

    def make():
        for _ in range(20):
            desk.now_ns += MS
            yield
        desk.made += 1
        return desk.made

    turning = asyncio.create_task(turn())
    answers = await asyncio.gather(*(desk.ration.get("a", make) for _ in range(5)))
    done.set()
    await turning
    assert answers == [1] * 5
    assert turns >= 20
    desk.now_ns += 9 * 20 * MS - 1
    assert await desk.get("a") == 1, "the slices count, and nothing else"
    desk.now_ns += 1
    assert await desk.get("a") == 2


async def test_not_many_are_kept():
    desk = Desk()
    for key in range(3 * KEPT_MAX):
        await desk.get(key)
    assert len(desk.ration._kept) == KEPT_MAX
    assert await desk.get(3 * KEPT_MAX - 1) == 3 * KEPT_MAX, "the latest are"
    assert await desk.get(0) == 3 * KEPT_MAX + 1


async def test_age_counts_from_the_first_moment_of_making():
    desk = Desk()
    desk.cost_ms = 300
    begun_ns = desk.now_ns
    await desk.get("a")
    desk.now_ns = begun_ns + int(AGE_LIMIT_S * 1e9) - 1
    assert await desk.get("a") == 1
    desk.now_ns += 1
    assert await desk.get("a") == 2


@pytest.mark.parametrize("path", ["/metrics", "/ready", "/health", "/health/db", "/health/binance"])
async def test_a_crowd_has_answers_made_no_more_often_than_one(path):
    cost_s = 0.02
    made = 0

    def snapshot():
        nonlocal made
        made += 1
        time.sleep(cost_s)
        return HEALTHY

    server = SideServer("127.0.0.1", 0, snapshot)
    await server.start()
    try:
        begin_s = time.monotonic()
        for _ in range(4):
            # In gzip and plain: it is one answer.
            asked = [{"Accept-Encoding": ("gzip", "identity")[n % 2]} for n in range(12)]
            answers = await asyncio.gather(*(fetch(server, path, headers=one) for one in asked))
            assert [response.status for response, _ in answers] == [200] * 12
            assert len({body for _, body in answers}) == 1
        passed_s = time.monotonic() - begin_s
    finally:
        await server.stop()
    assert 1 <= made <= 1 + passed_s / (cost_s * 10)


async def test_whoever_has_the_token_is_told_apart():
    token = "a-token-of-length"
    server = SideServer("127.0.0.1", 0, slow_snapshot, policy=Policy(token=Secret(token)))
    await server.start()
    try:
        shown = {"Authorization": f"Bearer {token}"}
        for headers, is_told in ((shown, True), ({}, False), (shown, True), ({}, False)):
            _, body = await fetch(server, "/health/db", headers=headers)
            assert (b"hunter2" in body) is is_told
    finally:
        await server.stop()


def slow_snapshot():
    time.sleep(0.01)  # so that all the others are answered from what is kept
    return changed(database__reachable=False, database__last_error="hunter2")
