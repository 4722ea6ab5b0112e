"""The whole feed: all streams of all symbols, spread over connections that run side by side."""

import asyncio
import itertools
import random
from collections.abc import Callable

from tradecore.backoff import AttemptBudget, Backoff
from tradecore.errors import SettingsError
from tradecore.feed import subscriptions
from tradecore.feed.connection import Connection, ConnectionStatus
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.session import ListenerFactory, Plan, Timing
from tradecore.feed.states import State
from tradecore.settings import Settings

LINE_NAMES = "AB"


class Feed:
    """Run every connection that the settings ask for.

    Raises SettingsError for an address that cannot be used or a number of lines not yet built.
    """

    def __init__(
        self,
        settings: Settings,
        listener_factory: ListenerFactory,
        *,
        timing: Timing | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if settings.feed_lines != 1:
            raise SettingsError([f"FEED_LINES: {settings.feed_lines} is not supported yet; use 1"])
        endpoint = Endpoint.parse(settings.websocket_urls[0])
        budget = AttemptBudget()
        epochs = itertools.count(1)
        self.connections = tuple(
            Connection(
                Plan(
                    f"{LINE_NAMES[line]}{index}",
                    line,
                    streams,
                    endpoint,
                    listener_factory,
                    timing or Timing(),
                ),
                Backoff(
                    settings.reconnect_delay_ms / 1e3,
                    settings.max_reconnect_delay_ms / 1e3,
                    uniform=uniform,
                ),
                budget,
                lambda: next(epochs),
            )
            for line in range(settings.feed_lines)
            for index, streams in enumerate(
                subscriptions.spread(settings.symbols, settings.streams)
            )
        )

    async def run(self) -> None:
        """Keep all connections up; returns after close(). Only a bug raises, and ends them all."""
        async with asyncio.TaskGroup() as group:
            for connection in self.connections:
                group.create_task(connection.run(), name=f"feed {connection.name}")

    async def close(self) -> None:
        """Close all connections side by side, each within its time limit."""
        await asyncio.gather(*(connection.close() for connection in self.connections))

    def pause_reading(self) -> None:
        """Stop taking data on every connection, present and future: back-pressure."""
        for connection in self.connections:
            connection.pause_reading()

    def resume_reading(self) -> None:
        """Take data again."""
        for connection in self.connections:
            connection.resume_reading()

    @property
    def live(self) -> int:
        """Number of connections in state LIVE."""
        return sum(connection.state is State.LIVE for connection in self.connections)

    def describe(self) -> list[ConnectionStatus]:
        """Return a snapshot of every connection, in order of line and number."""
        return [connection.describe() for connection in self.connections]
