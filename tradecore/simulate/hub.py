"""The meeting point of connections and players: who wants which stream, and what was counted."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from tradecore.simulate.edits import Edits
from tradecore.simulate.frames import frame, wrap

_MOST_TIMES = 100_000


class Subscriber(Protocol):
    """A client's connection, as a player sees it."""

    streams: dict[str, None]
    combined: bool
    micro: bool
    edits: Edits

    def write(self, data: bytes) -> None:
        """Send whole frames."""

    async def drain(self) -> None:
        """Wait until the client has read enough; gives up on a client that stopped reading."""


class Hub:
    """All open connections, indexed by stream name."""

    def __init__(self) -> None:
        self.connections: set[Subscriber] = set()
        self.counts: Counter[str] = Counter()
        """Faults and other events by name."""
        self.version = 0
        """Moves with every change of a subscription."""
        self.reconnect_s: list[float] = []
        """Seconds from each connection that we ended to the next one that came."""
        self._lost: deque[float] = deque()
        self._index: dict[str, list[Subscriber]] = {}
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Note that a connection came, went, or changed its streams or properties."""
        self.version += 1
        self._index.clear()
        for connection in self.connections:
            for name in connection.streams:
                self._index.setdefault(name, []).append(connection)
        self._changed.set()

    def note_lost(self) -> None:
        """Note that we ended a connection."""
        self._lost.append(asyncio.get_running_loop().time())

    def note_accepted(self) -> None:
        """Note that a client has connected."""
        if self._lost and len(self.reconnect_s) < _MOST_TIMES:
            self.reconnect_s.append(asyncio.get_running_loop().time() - self._lost.popleft())

    def subscribers(self, name: str) -> list[Subscriber]:
        """Return the connections that want this stream."""
        return self._index.get(name, [])

    def names(self) -> list[str]:
        """Return the names of all wanted streams."""
        return list(self._index)

    async def wait_for(self, wanted: Callable[[], bool]) -> None:
        """Wait until a change of the subscriptions makes the condition true."""
        while not wanted():
            self._changed.clear()
            await self._changed.wait()

    async def drain(self) -> None:
        """Wait for the slowest of all connections."""
        for connection in list(self.connections):
            await connection.drain()

    def publish(self, name: str, render: Callable[[bool], str]) -> None:
        """Send an event to the stream's subscribers; `render(micro)` returns its payload."""
        made: dict[tuple[bool, bool], bytes] = {}
        for member in self.subscribers(name):
            key = (member.combined, member.micro)
            if key not in made:
                payload = render(member.micro)
                made[key] = frame(wrap(name, payload, member.combined).encode("utf-8"))
            member.write(made[key])
