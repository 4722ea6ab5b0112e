"""Shares the shards out among the nodes that write into one database.

A node renews its leases several times within their lifetime. One that dies, hangs or loses the
database renews nothing: its leases expire by the database's clock and others take them, and by
then it has stopped believing in them by its own steady clock. Host clocks are never compared.

A lease carries a fence that grows whenever somebody takes it. A node renews by shard and fence:
another process of the same name cannot share its leases unnoticed, only take them over.

Who captures a shard is all that a lease decides. That each trade is stored once is the ledger's
business, so two nodes that overlap for a moment do no harm.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

import asyncpg

from tradecore import clock
from tradecore.store.failure import TROUBLE, as_transient
from tradecore.store.transaction import transaction

TTL_S = 3.0
"""How long a lease lasts; renew it every TTL_S / 6 or so."""

_FORGOTTEN = "1 day"  # after which a node's row is removed

log = logging.getLogger(__name__)

_JOIN = """
INSERT INTO leases (shards, shard)
SELECT $1::int, shard FROM generate_series(0, $1::int - 1) AS shard
ON CONFLICT DO NOTHING
"""

_ADOPT = """
UPDATE leases SET fence = fence + 1, expires_at = clock_timestamp() + $3::float8 * interval '1 s'
WHERE shards = $1::int AND owner = $2::text AND expires_at > clock_timestamp()
RETURNING shard, fence
"""

_SEEN = """
INSERT INTO nodes (name, shards, seen_at) VALUES ($2::text, $1::int, clock_timestamp())
ON CONFLICT (name) DO UPDATE SET shards = excluded.shards, seen_at = excluded.seen_at
"""

_FORGET = f"DELETE FROM nodes WHERE seen_at < clock_timestamp() - interval '{_FORGOTTEN}'"

_LIVE = """
SELECT count(*) FROM nodes
WHERE shards = $1::int AND seen_at > clock_timestamp() - $2::float8 * interval '1 s'
"""

_OTHERS = f"{_LIVE} AND name <> $3::text"

_MINE = """
FROM unnest($3::int[], $4::int8[]) AS mine (shard, fence)
WHERE leases.shards = $1::int AND leases.owner = $2::text AND leases.shard = mine.shard
  AND leases.fence = mine.fence AND leases.expires_at > clock_timestamp()
"""

_RENEW = f"""
UPDATE leases SET expires_at = clock_timestamp() + $5::float8 * interval '1 s' {_MINE}
RETURNING leases.shard, leases.fence
"""

_GIVE_BACK = f"UPDATE leases SET expires_at = clock_timestamp() {_MINE}"

# Another process of our name that has taken over is still there: its row stays.
_LEAVE = """
DELETE FROM nodes WHERE name = $2::text AND NOT EXISTS (
    SELECT FROM leases
    WHERE shards = $1::int AND owner = $2::text AND expires_at > clock_timestamp())
"""

# What another claims at the same time is locked, or found to be renewed when its row is locked:
# READ COMMITTED checks the row again then.
_CLAIM = """
UPDATE leases
SET owner = $2::text, fence = fence + 1,
    expires_at = clock_timestamp() + $4::float8 * interval '1 s'
WHERE shards = $1::int AND shard = ANY(ARRAY(
    SELECT shard FROM leases WHERE shards = $1::int AND expires_at <= clock_timestamp()
    ORDER BY shard LIMIT $3::int FOR UPDATE SKIP LOCKED))
RETURNING shard, fence
"""


class Leases:
    """The shards of one node. `tick` every half second; `held` at any time."""

    def __init__(
        self,
        pool_getter: Callable[[], asyncpg.Pool],
        node: str,
        shards: int,
        *,
        ttl_s: float = TTL_S,
    ) -> None:
        """Take part as `node`, one of those that share out `shards` shards.

        `pool_getter` returns the open pool or raises TransientStoreError; it is called by each
        tick. All nodes need the same `ttl_s`.
        """
        if not node or shards < 1 or ttl_s <= 0:
            raise ValueError(f"no lease for node {node!r} of {shards} shards and {ttl_s} s")
        self._pool = pool_getter
        self._node = node
        self._shards = shards
        self._ttl_s = ttl_s
        self._lock = asyncio.Lock()
        self._joined = False
        self._fences: dict[int, int] = {}
        self._until_ns = 0  # by our steady clock; all leases are renewed together
        self.live_nodes = 0
        """Nodes that share out this number of shards, ourselves included, as of the last tick."""

    def held(self) -> frozenset[int]:
        """Return the shards that are ours for sure: their last renewal is younger than the TTL."""
        if clock.mono_ns() >= self._until_ns:
            return frozenset()
        return frozenset(self._fences)

    async def tick(self) -> frozenset[int]:
        """Renew what is ours, give back what is above our fair share, take what is free below it.

        Returns `held()`. Raises TransientStoreError when the database is away or slower than the
        TTL: what is held then runs out by itself.
        """
        async with self._lock:
            # Before anything is sent: the server's clock_timestamp() + TTL is later than ours.
            begun_ns = clock.mono_ns()
            try:
                async with asyncio.timeout(self._ttl_s):
                    fences = await self._renew()
            except TROUBLE as exc:
                raise as_transient(exc, "renew the leases") from exc
            self._keep(fences, begun_ns + int(self._ttl_s * 1e9))
            return self.held()

    async def others(self) -> int:
        """Return how many nodes take part besides us, who may have left. Raises as `tick` does."""
        try:
            async with asyncio.timeout(self._ttl_s):
                key = self._shards, self._ttl_s, self._node
                return int(await self._pool().fetchval(_OTHERS, *key))
        except TROUBLE as exc:
            raise as_transient(exc, "count the nodes") from exc

    async def release(self) -> None:
        """Leave: every lease ends now, so that others can take the shards at once.

        Nothing is held from the call on. Raises TransientStoreError as `tick` does; the leases
        then expire by themselves.
        """
        async with self._lock:
            fences, self._fences = self._fences, {}
            self._until_ns = 0
            self._joined = False
            try:
                async with asyncio.timeout(self._ttl_s):
                    async with transaction(self._pool(), self._ttl_s) as conn:
                        await conn.execute(_GIVE_BACK, *self._key(fences))
                        await conn.execute(_LEAVE, self._shards, self._node)
            except TROUBLE as exc:
                raise as_transient(exc, "release the leases") from exc

    async def _renew(self) -> dict[int, int]:
        """Do the work of a tick in one transaction; return our leases with their fences."""
        async with transaction(self._pool(), self._ttl_s) as conn:
            await conn.execute(_SEEN, self._shards, self._node)
            if not self._joined:
                await conn.execute(_FORGET)
                await conn.execute(_JOIN, self._shards)
                # A former process of this name is dead, or shall be idle from now on.
                rows = await conn.fetch(_ADOPT, self._shards, self._node, self._ttl_s)
            else:
                rows = await conn.fetch(_RENEW, *self._key(self._fences), self._ttl_s)
            fences = {row["shard"]: row["fence"] for row in rows}
            live = int(await conn.fetchval(_LIVE, self._shards, self._ttl_s))
            share = -(-self._shards // max(live, 1))
            if len(fences) > share:
                surplus = {shard: fences.pop(shard) for shard in sorted(fences)[share:]}
                # Stop believing in them before anybody else can.
                self._fences = {s: f for s, f in self._fences.items() if s not in surplus}
                await conn.execute(_GIVE_BACK, *self._key(surplus))
            elif len(fences) < share:
                wanted = share - len(fences)
                rows = await conn.fetch(_CLAIM, self._shards, self._node, wanted, self._ttl_s)
                fences |= {row["shard"]: row["fence"] for row in rows}
        self._joined = True
        self.live_nodes = live
        return fences

    def _key(self, fences: Mapping[int, int]) -> tuple[int, str, list[int], list[int]]:
        return self._shards, self._node, list(fences), list(fences.values())

    def _keep(self, fences: dict[int, int], until_ns: int) -> None:
        before = set(self._fences)
        self._fences, self._until_ns = fences, until_ns
        if before != set(fences):
            log.info(
                "shards changed",
                extra={
                    "held": sorted(fences),
                    "taken": sorted(set(fences) - before),
                    "left": sorted(before - set(fences)),
                    "nodes": self.live_nodes,
                },
            )
