"""A connection that a test runs against the fake venue, with short times."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import picows
import pytest
from fake_venue import StubListener, Venue

from tradecore.backoff import AttemptBudget, Backoff
from tradecore.feed.addresses import AddressBook
from tradecore.feed.connection import Connection
from tradecore.feed.endpoint import Endpoint
from tradecore.feed.gate import Gate
from tradecore.feed.plan import Confirm, Plan, Timing
from tradecore.feed.states import State
from tradecore.feed.subscriptions import Share

FAST = Timing(
    connect_s=2.0,
    reply_s=0.3,
    frame_gap_s=0.01,
    silent_s=0.3,
    quiet_silent_s=0.3,
    suspicious_s=0.2,
    ping_s=0.1,
    confirm_s=0.3,
    grace_s=0.1,
    quiet_grace_s=0.3,
    rollover_s=1.0,
    settle_s=0.1,
    steady_s=0.1,
    tick_s=0.02,
    close_s=0.3,
)
SHARE = Share(("BTCUSDT",), ("trade", "ticker"))


async def nobody_to_ask(symbols: Sequence[str]) -> set[str]:
    raise AssertionError(f"REST was asked for {symbols}")


def connect(
    *urls: str,
    base_s: float = 0.01,
    cap_s: float = 0.05,
    budget: AttemptBudget | None = None,
    gate: Gate | None = None,
    listener_factory: Callable[..., picows.WSListener] = StubListener,
    share: Share = SHARE,
    confirm: Confirm = nobody_to_ask,
    max_age_s: float = 3600.0,
    **timing: float,
) -> Connection:
    """A connection whose jitter always takes the longest delay."""
    endpoints = tuple(Endpoint.parse(url) for url in urls)
    return Connection(
        Plan(
            "A0",
            0,
            endpoints,
            listener_factory,
            share.symbols.index,
            confirm,
            max_age_s,
            AddressBook(),
            replace(FAST, **timing),
        ),
        share,
        Backoff(base_s, cap_s, uniform=lambda low, high: high),
        gate or Gate(budget=budget or AttemptBudget(10_000)),
        itertools.count(1).__next__,
        lambda low, high: low,
    )


class Running:
    """Run a connection for the length of a `with`, and close it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def __aenter__(self) -> Connection:
        self.task = asyncio.create_task(self.connection.run())
        return self.connection

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()
        async with asyncio.timeout(5):
            await self.task
        assert self.connection.state is State.CLOSED


@pytest.fixture
async def venue() -> AsyncIterator[Venue]:
    venue = Venue()
    await venue.start()
    yield venue
    await venue.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
