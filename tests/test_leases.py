"""Shard leases on a real PostgreSQL. A node that stops ticking stands for one that was killed."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any
from unittest.mock import AsyncMock

import asyncpg
import pytest

from tradecore import clock, sharing
from tradecore.errors import TransientStoreError
from tradecore.sharing import Sharing
from tradecore.store.leases import Leases
from tradecore.store.pool import open_pool

TTL_S = 0.6
TICK_S = 0.1
SHARDS = 8
ALL = frozenset(range(SHARDS))

Make = Callable[..., Leases]


class Clock:
    """A steady clock that stands still when told so, as that of a frozen process seems to."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def __call__(self) -> int:
        return REAL_NS() + self.ahead_ns


REAL_NS = clock.mono_ns


@pytest.fixture
async def pool(migrated_database: str) -> AsyncIterator[asyncpg.Pool]:
    pool = await open_pool(migrated_database, 12)
    yield pool
    await asyncio.wait_for(pool.close(), 10)


@pytest.fixture
def make(pool: asyncpg.Pool) -> Make:
    def build(node: str, shards: int = SHARDS, ttl_s: float = TTL_S) -> Leases:
        return Leases(lambda: pool, node, shards, ttl_s=ttl_s)

    return build


async def until(condition: Callable[[], bool], nodes: Iterable[Leases], limit_s: float) -> float:
    """Let `nodes` tick until `condition`; return how long it took."""
    begun = REAL_NS()
    async with asyncio.timeout(limit_s):
        while True:
            for node in nodes:
                await node.tick()
            if condition():
                return (REAL_NS() - begun) / 1e9
            await asyncio.sleep(TICK_S / 4)


def parted(*nodes: Leases) -> bool:
    """Each shard belongs to one of the nodes, and none has more than its fair share."""
    held = [node.held() for node in nodes]
    share = -(-SHARDS // len(nodes))
    whole = frozenset().union(*held) == ALL and sum(map(len, held)) == SHARDS
    return whole and max(map(len, held)) <= share


async def test_one_node_holds_everything_at_once(make: Make) -> None:
    node = make("a")
    assert node.held() == frozenset()
    assert await node.tick() == ALL == node.held()
    assert node.live_nodes == 1


@pytest.mark.parametrize("count", [2, 3])
async def test_nodes_balance(make: Make, count: int) -> None:
    nodes = [make(f"node-{n}") for n in range(count)]
    await nodes[0].tick()
    await until(lambda: parted(*nodes), nodes, 5)
    shares = [node.held() for node in nodes]
    for _ in range(5):
        for node in nodes:
            await node.tick()
    assert [node.held() for node in nodes] == shares, "a fair share stays where it is"
    assert all(node.live_nodes == count for node in nodes)


async def test_a_node_more_than_shards_holds_nothing(make: Make) -> None:
    nodes = [make(name, shards=2) for name in "abc"]
    await until(lambda: nodes[0].live_nodes == nodes[1].live_nodes == 3, nodes, 5)
    held = sorted(sorted(node.held()) for node in nodes)
    assert held == [[], [0], [1]]


async def test_a_killed_node_is_replaced(make: Make) -> None:
    nodes = a, b, c = make("a"), make("b"), make("c")
    await until(lambda: parted(*nodes), nodes, 5)
    took_s = await until(lambda: parted(a, b), (a, b), 5)
    assert took_s <= TTL_S + 2 * TICK_S + 1.0  # a second for a machine under load
    assert c.held() == frozenset(), "it stopped believing before or when it was replaced"


async def test_a_frozen_node_stops_believing(
    make: Make, monkeypatch: pytest.MonkeyPatch, pool: asyncpg.Pool
) -> None:
    steady = Clock()
    monkeypatch.setattr(clock, "mono_ns", steady)
    node = make("a", ttl_s=30)
    assert await node.tick() == ALL
    steady.ahead_ns += int(29e9)
    assert node.held() == ALL
    steady.ahead_ns += int(1e9)
    assert node.held() == frozenset()
    assert await node.tick() == ALL, "nobody took them meanwhile"


async def test_frozen_while_the_renewal_was_under_way(
    make: Make, monkeypatch: pytest.MonkeyPatch, pool: asyncpg.Pool
) -> None:
    steady = Clock()
    monkeypatch.setattr(clock, "mono_ns", steady)
    node = make("a", ttl_s=30)
    await node.tick()
    async with pool.acquire() as conn:
        async with conn.transaction():
            await conn.execute("SELECT FROM leases FOR UPDATE")
            ticking = asyncio.create_task(node.tick())
            while not await conn.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            steady.ahead_ns += int(30e9)
        assert await ticking == frozenset()


async def test_a_frozen_node_that_wakes_does_not_fight(make: Make) -> None:
    a, b = make("a"), make("b")
    await until(lambda: parted(a, b), (a, b), 5)
    await until(lambda: b.held() == ALL, (b,), 5)
    assert a.held() == frozenset()
    assert not (await a.tick()) & b.held(), "what b took is b's"
    await until(lambda: parted(a, b), (a, b), 5)


async def test_release_hands_over_at_once(make: Make, pool: asyncpg.Pool) -> None:
    a, b = make("a", ttl_s=60), make("b", ttl_s=60)
    assert await a.tick() == ALL
    assert await b.tick() == frozenset()
    await a.release()
    assert a.held() == frozenset()
    assert await b.tick() == ALL
    assert b.live_nodes == 1
    await b.release()
    assert await pool.fetchval("SELECT count(*) FROM nodes") == 0


async def test_a_released_node_may_come_back(make: Make) -> None:
    a, b = make("a", ttl_s=60), make("b", ttl_s=60)
    await a.tick()
    await a.release()
    await b.tick()
    await a.tick()
    await until(lambda: parted(a, b), (a, b), 5)


async def test_the_next_process_of_a_name_goes_on_at_once(make: Make, pool: asyncpg.Pool) -> None:
    dead = make("a", ttl_s=60)
    assert await dead.tick() == ALL
    before = dict(await pool.fetch("SELECT shard, fence FROM leases"))
    successor = make("a", ttl_s=60)
    assert await successor.tick() == ALL
    after = dict(await pool.fetch("SELECT shard, fence FROM leases"))
    assert all(after[shard] > before[shard] for shard in ALL)


async def test_two_processes_of_one_name_do_not_share(make: Make) -> None:
    a, twin = make("a", ttl_s=60), make("a", ttl_s=60)
    await a.tick()
    assert await twin.tick() == ALL
    assert await a.tick() == frozenset()
    assert await twin.tick() == ALL
    await a.release()
    assert await twin.tick() == ALL
    assert twin.live_nodes == 1


async def test_another_number_of_shards_is_another_group(make: Make) -> None:
    old, new = make("a", ttl_s=60), make("b", shards=3, ttl_s=60)
    assert await old.tick() == ALL
    assert await new.tick() == frozenset(range(3)), "while it is being changed all are held"
    assert await old.tick() == ALL
    changed = make("a", shards=3, ttl_s=60)
    await until(lambda: len(changed.held() | new.held()) == 3, (changed, new), 5)
    await until(lambda: len(new.held()) == 2, (changed, new), 5)
    assert not changed.held() & new.held()


@pytest.mark.parametrize("jump_s", [-86_400, -1, 3600])
async def test_jumps_of_the_host_clock_do_not_matter(
    make: Make, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    a, b = make("a", ttl_s=60), make("b", ttl_s=60)
    await until(lambda: parted(a, b), (a, b), 5)
    before = a.held(), b.held()
    real = clock.wall_ns
    monkeypatch.setattr(clock, "wall_ns", lambda: real() + jump_s * 10**9)
    assert (await a.tick(), await b.tick()) == before


async def test_the_database_is_away(migrated_database: str, monkeypatch: Any) -> None:
    steady = Clock()
    monkeypatch.setattr(clock, "mono_ns", steady)
    pool = await open_pool(migrated_database, 2)
    away = False

    def get() -> asyncpg.Pool:
        if away:
            raise TransientStoreError("down", "the database is away")
        return pool

    node = Leases(get, "a", SHARDS, ttl_s=30)
    assert await node.tick() == ALL
    away = True
    with pytest.raises(TransientStoreError):
        await node.tick()
    assert node.held() == ALL
    steady.ahead_ns += int(30e9)
    with pytest.raises(TransientStoreError):
        await node.tick()
    assert node.held() == frozenset()
    with pytest.raises(TransientStoreError):
        await node.release()
    away = False
    assert await node.tick() == ALL
    await asyncio.wait_for(pool.close(), 10)


async def test_a_slow_database_cannot_hold_a_tick_up(make: Make, pool: asyncpg.Pool) -> None:
    node = make("a")
    await node.tick()
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("LOCK TABLE leases")
        begun = REAL_NS()
        with pytest.raises(TransientStoreError):
            await node.tick()
        assert (REAL_NS() - begun) / 1e9 < TTL_S + 2
        assert node.held() == frozenset()
    assert await node.tick() == ALL


async def test_wrong_arguments(make: Make) -> None:
    for arguments in (("", 1, 1.0), ("a", 0, 1.0), ("a", 1, 0.0)):
        with pytest.raises(ValueError, match="no lease for node"):
            make(*arguments)


async def test_claims_at_once_never_give_one_shard_to_two(make: Make, pool: asyncpg.Pool) -> None:
    """Nodes come, stop, freeze and leave at random while a witness reads the table."""
    rng = random.Random(11)
    stop = asyncio.Event()
    fences: dict[int, tuple[int, str | None]] = {}

    async def live(name: str) -> None:
        node = make(name)
        while not stop.is_set():
            await act(node, rng.random())
            if rng.random() < 0.03:
                node = make(name)  # killed and started again
            await asyncio.sleep(rng.uniform(0, TICK_S))

    async def act(node: Leases, chance: float) -> None:
        if chance < 0.03:
            await node.release()
        elif chance < 0.06:
            await asyncio.sleep(TTL_S * 1.5)
        else:
            await node.tick()

    async def watch() -> None:
        rows = await pool.fetch("SELECT shard, owner, fence FROM leases")
        assert len(rows) == len({row["shard"] for row in rows})
        for shard, owner, fence in rows:
            fence_before, owner_before = fences.get(shard, (0, None))
            assert fence >= fence_before
            assert fence > fence_before or owner == owner_before, "a new owner, a new fence"
            fences[shard] = fence, owner

    # Who holds what by its own belief, of nodes that tick as they should: never two at a time.
    steady = [make(f"steady-{n}") for n in range(3)]

    async def tick_on(node: Leases) -> None:
        while not stop.is_set():
            await node.tick()
            held = [other.held() for other in steady]
            assert sum(map(len, held)) == len(frozenset().union(*held))
            await asyncio.sleep(TICK_S / 2)

    async def reign() -> None:
        while sum(fence for fence, _ in fences.values()) < 5 * SHARDS:
            await watch()
            await asyncio.sleep(0.02)
        stop.set()

    work: list[Awaitable[None]] = [live(f"n{n}") for n in range(4)]
    work += [tick_on(node) for node in steady]
    await asyncio.wait_for(asyncio.gather(reign(), *work), 60)
    assert set(fences) == ALL
    await until(lambda: parted(*steady), steady, 10)


class Node:
    """A daemon's share: real leases, and a venue that is within reach or not."""

    def __init__(self, leases: Leases) -> None:
        self.leases = leases
        self.reaches = True
        self.sharing = Sharing(leases, SHARDS, self._apply, lambda: self.reaches)

    async def _apply(self, held: frozenset[int]) -> None:
        pass

    @property
    def held(self) -> frozenset[int]:
        return self.leases.held()


@pytest.fixture
async def nodes(make: Make, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Node]]:
    """Three of them at work."""
    for name, seconds in {"TICK_S": TICK_S / 2, "CUT_OFF_S": 0.5, "LINGER_S": 0.1}.items():
        monkeypatch.setattr(sharing, name, seconds)
    nodes = [Node(make(name)) for name in "abc"]
    tasks = [asyncio.create_task(node.sharing.run()) for node in nodes]
    await eventually(lambda: parted(*(node.leases for node in nodes)))
    yield nodes
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> float:
    begun = REAL_NS()
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)
    return (REAL_NS() - begun) / 1e9


async def test_whoever_cannot_reach_the_venue_stands_aside_until_it_can(nodes: list[Node]) -> None:
    a, b, c = nodes
    await eventually(lambda: a.sharing.held == a.held)
    before = a.held
    a.reaches = False
    await eventually(lambda: parted(b.leases, c.leases) and not a.held)
    assert a.sharing.held == before, "it goes on trying with what it had"
    away = TransientStoreError("connection", "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a.leases, "others", AsyncMock(side_effect=away))
        await asyncio.sleep(TTL_S)
    for _ in range(40):
        await asyncio.sleep(TTL_S / 20)
        assert not a.held, "a hiccup of the database is no reason to come back"
    a.reaches = True
    await eventually(lambda: parted(*(node.leases for node in nodes)))
    await eventually(lambda: a.sharing.held == a.held)


async def test_nothing_is_left_to_nobody_when_all_are_cut_off(nodes: list[Node]) -> None:
    for node in nodes:
        node.reaches = False
    await eventually(lambda: sorted(len(node.held) for node in nodes) == [0, 0, SHARDS])
    await asyncio.sleep(3 * TTL_S)
    assert sorted(len(node.held) for node in nodes) == [0, 0, SHARDS]
    back = next(node for node in nodes if not node.held)
    back.reaches = True
    await eventually(lambda: back.held == ALL)
    for node in nodes:
        node.reaches = True
    await eventually(lambda: parted(*(node.leases for node in nodes)))


async def test_a_node_that_stands_aside_comes_back_when_no_other_is_left(
    nodes: list[Node], pool: asyncpg.Pool
) -> None:
    a, b, c = nodes
    a.reaches = False
    await eventually(lambda: parted(b.leases, c.leases))
    await b.leases.release()
    await c.leases.release()
    b.leases.tick = c.leases.tick = pause  # type: ignore[method-assign]
    await eventually(lambda: a.held == ALL, TTL_S * 4)


async def pause() -> frozenset[int]:
    return frozenset()
