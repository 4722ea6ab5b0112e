"""The whole feed: all streams of all symbols, spread over connections that run side by side."""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tradecore import clock
from tradecore.backoff import Backoff
from tradecore.feed import subscriptions
from tradecore.feed.addresses import AddressBook
from tradecore.feed.connection import Connection, ConnectionStatus
from tradecore.feed.gate import Gate
from tradecore.feed.lines import LINE_NAMES, line_endpoints
from tradecore.feed.plan import Cause, Confirm, ListenerFactory, Plan, Timing
from tradecore.feed.states import State
from tradecore.feed.subscriptions import Share
from tradecore.settings import Settings

log = logging.getLogger(__name__)

APPLY_LIMIT_S = 60.0
"""How long each step of a change of subscriptions waits for the venue."""


class Feed:
    """Run every connection that the settings ask for.

    `symbol_id` gives a symbol's number as the listeners know it. `confirm` asks the venue's REST
    interface which of some symbols have nothing newer than what was received; it is asked only
    when the streams themselves do not tell. `gate` knows when the venue may be asked for
    connections; one of its own forgets. Raises SettingsError for an address that cannot be
    used.
    """

    def __init__(
        self,
        settings: Settings,
        listener_factory: ListenerFactory,
        *,
        symbol_id: Callable[[str], int],
        confirm: Confirm,
        gate: Gate | None = None,
        timing: Timing | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._settings = settings
        self._listener_factory = listener_factory
        self._symbol_id = symbol_id
        self._confirm = confirm
        self._timing = timing or Timing()
        self._uniform = uniform
        self._endpoints = [
            line_endpoints(settings.websocket_urls, line) for line in range(settings.feed_lines)
        ]
        self._addresses = AddressBook()
        self._gate = gate or Gate()
        self._epochs = itertools.count(1)
        self._group: asyncio.TaskGroup | None = None
        self._closing = asyncio.Event()
        self._paused = False
        self._applying = asyncio.Lock()
        self._left_reconnects: Counter[str] = Counter()  # by line, of connections that are gone
        shares = subscriptions.spread(settings.symbols, settings.streams)
        self.connections = tuple(
            self._make(line, index, share)
            for line in range(settings.feed_lines)
            for index, share in enumerate(shares)
        )

    async def run(self) -> None:
        """Keep all connections up; returns after close(). Only a bug raises, and ends them all."""
        if self._closing.is_set():
            return
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for connection in self.connections:
                    self._start(connection)
                await self._closing.wait()
        finally:
            self._group = None

    async def close(self) -> None:
        """Close all connections side by side, each within its time limit."""
        self._closing.set()
        await asyncio.gather(*(connection.close() for connection in self.connections))

    async def apply(self, symbols: Sequence[str], streams: Sequence[str]) -> None:
        """Carry these streams of these symbols from now on; those that stay are not touched.

        New symbols have to be known to `symbol_id` and to the capture already. Returns when the
        venue has acknowledged the change or, told in the log, `APPLY_LIMIT_S` has passed; what is
        opened later takes the new set in any case.
        """
        async with self._applying:
            if not self._closing.is_set():
                lines = range(len(self._endpoints))
                await asyncio.gather(*(self._apply(line, symbols, streams) for line in lines))

    def replace(self, symbols: Iterable[str], why: str) -> None:
        """Replace, without a break, the connections that carry these symbols' trades."""
        wanted = set(symbols)
        for connection in self.connections:
            if not wanted.isdisjoint(connection.share.traded):
                connection.replace(why)

    def rolling(self, symbol: str) -> bool:
        """Tell whether a connection that carries this symbol's trades is being replaced."""
        return any(
            connection.rolling and symbol in connection.share.traded
            for connection in self.connections
        )

    def pause_reading(self) -> None:
        """Stop taking data on every connection, present and future: back-pressure."""
        self._paused = True
        for connection in self.connections:
            connection.pause_reading()

    def resume_reading(self) -> None:
        """Take data again."""
        self._paused = False
        for connection in self.connections:
            connection.resume_reading()

    def heard_s(self) -> dict[str, float]:
        """Return how many seconds ago each symbol's trades could have come at last.

        That is, when anything came on a connection that carries them; symbols of connections that
        have brought nothing yet are left out.
        """
        heard: dict[str, float] = {}
        for connection in self.connections:
            age_s = connection.describe().last_data_age_s
            if age_s is not None:
                for symbol in connection.share.traded:
                    heard[symbol] = min(age_s, heard.get(symbol, age_s))
        return heard

    @property
    def live(self) -> int:
        """Number of connections in state LIVE."""
        return sum(connection.state is State.LIVE for connection in self.connections)

    def reconnects(self) -> dict[str, int]:
        """Return how often connections were opened again, by line; it never falls."""
        count = Counter({LINE_NAMES[line]: 0 for line in range(len(self._endpoints))})
        count.update(self._left_reconnects)
        for one in self.describe():
            count[LINE_NAMES[one.line]] += sum(one.reconnects.values())
        return dict(count)

    def breaks(self) -> tuple[int, bool]:
        """Return how often data may have been missed, and whether a line is whole now.

        A rollover for age or by the venue's notice misses none. A line is whole when all of its
        connections are open.
        """
        deaf = (Cause.SILENT.value, Cause.STALE.value)
        count = 0
        for status in self.describe():
            count += sum(status.reconnects.values())
            count += sum(status.rollovers[cause] for cause in deaf)
        opened = (State.SUBSCRIBING, State.LIVE, State.STALE)
        broken = {one.plan.line for one in self.connections if one.state not in opened}
        return count, len(broken) < len(self._endpoints)

    def describe(self) -> list[ConnectionStatus]:
        """Return a snapshot of every connection, in order of line and number."""
        return [connection.describe() for connection in self.connections]

    def _make(self, line: int, index: int, share: Share) -> Connection:
        plan = Plan(
            name=f"{LINE_NAMES[line]}{index}",
            line=line,
            endpoints=self._endpoints[line],
            listener_factory=self._listener_factory,
            symbol_id=self._symbol_id,
            confirm=self._confirm,
            max_age_s=self._settings.connection_max_age_s,
            addresses=self._addresses,
            timing=self._timing,
        )
        backoff = Backoff(
            self._settings.reconnect_delay_ms / 1e3,
            self._settings.max_reconnect_delay_ms / 1e3,
            uniform=self._uniform,
        )
        return Connection(
            plan, share, backoff, self._gate, lambda: next(self._epochs), self._uniform
        )

    def _start(self, connection: Connection) -> None:
        if self._paused:
            connection.pause_reading()
        if self._group is not None:
            self._group.create_task(connection.run(), name=f"feed {connection.name}")

    async def _apply(self, line: int, symbols: Sequence[str], streams: Sequence[str]) -> None:
        present = [one for one in self.connections if one.plan.line == line]
        shares, new = subscriptions.rearrange([one.share for one in present], symbols, streams)
        steps = list(zip(present, shares, strict=True))
        # A symbol that has to move (more streams than fit beside each other) is taken up at its
        # new place before the old one gives it up.
        wanted = set(symbols)
        moved = {
            symbol
            for one, share in steps
            for symbol in set(one.share.symbols) - set(share.symbols)
            if symbol in wanted
        }
        gives = [one for one in present if not moved.isdisjoint(one.share.symbols)]
        log.info(
            "subscriptions change",
            extra={
                "line": LINE_NAMES[line],
                "symbols": len(wanted),
                "streams": list(streams),
                "moved": len(moved),
                "new_connections": len(new),
            },
        )
        takers = self._open(line, new) + [one for one in present if one not in gives]
        await self._change([step for step in steps if step[0] not in gives])
        await self._await_moved(takers, moved)
        await self._change([step for step in steps if step[0] in gives])
        idle = [one for one in present if not one.share.symbols]
        self.connections = tuple(one for one in self.connections if one not in idle)
        await asyncio.gather(*(one.close() for one in idle))
        for one in idle:
            ended = sum(one.describe().reconnects.values())
            self._left_reconnects[LINE_NAMES[line]] += ended

    def _open(self, line: int, shares: Sequence[Share]) -> list[Connection]:
        taken = {one.name for one in self.connections}
        free = (index for index in itertools.count() if f"{LINE_NAMES[line]}{index}" not in taken)
        opened = [self._make(line, next(free), share) for share in shares]
        self.connections = tuple(
            sorted(
                (*self.connections, *opened),
                key=lambda one: (one.plan.line, int(one.name[1:])),
            )
        )
        for connection in opened:
            self._start(connection)
        return opened

    async def _change(self, steps: Sequence[tuple[Connection, Share]]) -> None:
        done = await asyncio.gather(
            *(connection.apply(share, APPLY_LIMIT_S) for connection, share in steps)
        )
        late = [step[0].name for step, in_time in zip(steps, done, strict=True) if not in_time]
        if late:
            log.warning(
                "the venue has not acknowledged new subscriptions in time; they are asked for on",
                extra={"connections": late},
            )

    async def _await_moved(self, takers: Sequence[Connection], moved: set[str]) -> None:
        """Wait until what other connections are to give up was seen at its new place."""
        takers = [one for one in takers if not moved.isdisjoint(one.share.symbols)]
        deadline_ns = clock.mono_ns() + int(APPLY_LIMIT_S * 1e9)
        while self._group is not None and not all(one.carries(moved) for one in takers):
            if clock.mono_ns() > deadline_ns:
                log.warning(
                    "moved symbols were not seen at their new connection in time",
                    extra={"connections": [one.name for one in takers]},
                )
                return
            await asyncio.sleep(self._timing.tick_s)
