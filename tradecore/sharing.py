"""Keeps this daemon's share of the symbols: shards held by lease in the database.

Which daemon captures what is a question of cost, not of truth: the ledger takes each trade once,
whoever brings it. So while the database cannot be asked, a daemon goes on with the shards that it
had. Others can have taken them over only if the database is away from us alone, and then both
capture the same for a while.

A daemon that cannot reach the venue while others might gives its leases back, and goes on trying
with the shards that it had: when it gets through, it takes part again. The last one keeps all.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from socket import gethostname
from zlib import crc32

from tradecore import clock
from tradecore.errors import TransientStoreError
from tradecore.log import once_per
from tradecore.settings import Settings
from tradecore.store.leases import Leases

log = logging.getLogger(__name__)

TICK_S = 0.5

HAND_OVER_S = 2.0
"""How long a daemon that stops captures on when another is there to take over: that one finds the
free shards within a tick and has to connect."""

LINGER_S = 5.0
"""How long symbols that another daemon has taken over are captured on."""

CUT_OFF_S = 15.0
"""How long the venue may be out of reach before others shall try; drawn from 80 to 120 % of it, so
that daemons which are cut off together do not all leave in the same moment."""


class Sharing:
    """`run` it until it is cancelled; `held` is what this daemon captures."""

    def __init__(
        self,
        leases: Leases,
        shards: int,
        apply: Callable[[frozenset[int]], Awaitable[None]],
        reaches_venue: Callable[[], bool],
    ) -> None:
        """`apply(held)` makes the feed follow; it is called whenever the share has changed.

        `reaches_venue` tells whether a connection is open, or none is wanted.
        """
        self._leases = leases
        self._apply = apply
        self._reaches_venue = reaches_venue
        self._reached_s = clock.mono_ns() / 1e9
        self._cut_off_s = _draw_s()
        self._aside = False
        self._lost_s: dict[int, float] = {}
        self._changed = asyncio.Event()
        self._agreed = False
        self._applied: frozenset[int] = frozenset()
        self.total = shards
        self.held: frozenset[int] = frozenset()

    @property
    def settled(self) -> bool:
        """Whether a round of leases has succeeded and the feed follows what came of it."""
        return self._agreed and self._applied == self.held

    async def run(self) -> None:
        """Renew, take and give back leases twice a second, and make the feed follow."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew(), name="leases")
            group.create_task(self._follow(), name="share of the symbols")

    async def close(self) -> None:
        """Give everything back at once; return when others have had the time to take it."""
        others = self._leases.live_nodes > 1 and self.held
        try:
            await self._leases.release()
        except TransientStoreError as error:
            log.warning(
                "leases could not be given back; they expire by themselves",
                extra={"error": str(error)},
            )
        else:
            if others:
                log.info("stopping: others take the symbols over", extra={"wait_s": HAND_OVER_S})
                await asyncio.sleep(HAND_OVER_S)

    async def _renew(self) -> None:
        while True:
            try:
                held = await self._due()
            except TransientStoreError as error:
                once_per(log, "leases").warning(
                    "leases cannot be renewed; capturing the same symbols on",
                    extra={"held": len(self.held), "error": str(error)},
                )
                if not self._aside:  # a full ring may be why no connection is open
                    self._reached_s = clock.mono_ns() / 1e9
            else:
                if held is not None:
                    self._take(held, clock.mono_ns() / 1e9)
                    self._agreed = True
            await asyncio.sleep(TICK_S)

    async def _due(self) -> frozenset[int] | None:
        """Return the shards that are ours by lease; None = others have them, as we are cut off."""
        now_s = clock.mono_ns() / 1e9
        if not self.held or self._reaches_venue():
            self._reached_s = now_s
        if now_s - self._reached_s > self._cut_off_s:
            if self._aside and await self._leases.others():
                return None
            if not self._aside and self._leases.live_nodes > 1:
                log.warning(
                    "the venue cannot be reached; others take our symbols, and we go on trying",
                    extra={"shards": sorted(self.held), "nodes": self._leases.live_nodes},
                )
                self._aside = True
                await self._leases.release()
                return None
        if self._aside:
            log.info("taking part in the symbols again")
            self._aside, self._cut_off_s = False, _draw_s()
        return await self._leases.tick()

    def _take(self, held: frozenset[int], now_s: float) -> None:
        """Capture what is ours, and for a while what was: the new owner has to connect first."""
        for shard in self.held - held:
            self._lost_s.setdefault(shard, now_s)
        self._lost_s = {
            shard: since_s
            for shard, since_s in self._lost_s.items()
            if shard not in held and now_s - since_s < LINGER_S
        }
        captured = held | self._lost_s.keys()
        if captured != self.held:
            log.info(
                "share of the symbols changed",
                extra={"shards": sorted(captured), "before": sorted(self.held)},
            )
            self.held = captured
            self._changed.set()

    async def _follow(self) -> None:
        """Apply changes one after the other; that may take a minute, and leases do not wait."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            share = self.held
            await self._apply(share)
            self._applied = share


def _draw_s() -> float:
    return CUT_OFF_S * random.uniform(0.8, 1.2)


def node_of(settings: Settings) -> str:
    """Return NODE_NAME, or a name that another start on this host with this DATA_DIR has too."""
    if settings.node_name:
        return settings.node_name
    folder = crc32(str(settings.data_dir.absolute()).encode())
    return f"{gethostname()[:48]}-{folder:08x}"
