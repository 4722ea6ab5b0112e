"""The words that the parts of a connection share: its plan, its pace, and why things end."""

import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from picows import WSListener

from tradecore.feed.addresses import AddressBook
from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
from tradecore.feed.subscriptions import Share


class Reason(enum.StrEnum):
    """Why a session ended by itself."""

    CONNECT_FAILED = "connect_failed"
    SUBSCRIBE_FAILED = "subscribe_failed"
    CLOSED_BY_VENUE = "closed_by_venue"
    LOST = "lost"
    SILENT = "silent"
    PROTOCOL_VIOLATION = "protocol_violation"
    UNEXPECTED = "unexpected"


class SessionOver(Exception):
    """The session is over; `refusal` is the venue's word when it refused the upgrade."""

    def __init__(
        self, reason: Reason, detail: str = "", refusal: UpgradeRefusedError | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.refusal = refusal


class Cause(enum.StrEnum):
    """Why an open session is replaced by a successor: a rollover."""

    AGE = "age"
    """The venue cuts at 24 hours; we are earlier."""

    SERVER_SHUTDOWN = "server_shutdown"
    """The venue announced that it is about to close the connection."""

    SILENT = "silent"
    """Half-open: neither data nor a PONG comes."""

    STALE = "stale"
    """The socket lives, but data are missing, or subscriptions could not be changed."""


class Trouble(NamedTuple):
    """What makes a session wish for a successor."""

    cause: Cause
    detail: str


class DataListener(Protocol):
    """What the session reads from its listener."""

    last_data_ns: int
    """Monotonic time of the last socket read that carried a data event; 0 before the first."""
    data_frames: int

    def unconfirmed(self, symbol_ids: Sequence[int]) -> list[int]:
        """Return those symbols whose trades this connection was not yet seen to continue."""
        ...

    def mark(self) -> None:
        """From now on this connection owes what moves."""
        ...

    def left_out(self, symbol_ids: Sequence[int]) -> list[int]:
        """Return those that have moved since the mark without a trade over this connection."""
        ...

    def behind(self, symbol_ids: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return (symbol id, last id from here, newest known) where others brought newer trades,
        or newer ones were told here, since the mark."""
        ...


ListenerFactory = Callable[[Any, int, int], WSListener]
"""(owner, line, epoch) -> a listener that is a DataListener too; the owner is a Session."""

Confirm = Callable[[Sequence[str]], Awaitable[set[str]]]
"""Asks the venue for the symbols of which nothing newer exists than what was received.

May raise VenueError, which counts as none.
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """Limits and paces in seconds; tests shorten them."""

    connect_s: float = 10.0
    """Name, TCP, TLS and upgrade together."""
    reply_s: float = 10.0
    frame_gap_s: float = 0.5
    """Between our frames: the venue allows 5 a second, strictly, and our pongs count too."""
    silent_s: float = 30.0
    """Longest time without a data event when a ticker, which comes every second, is among them."""
    quiet_silent_s: float = 120.0
    """The same without any ticker: a thin symbol may honestly have no trade for a while."""
    first_data_s: float = 5.0
    """The same for the first data event of a socket with tickers."""
    suspicious_s: float = 2.0
    """No silence below this is looked into, however busy the connection is."""
    ping_s: float = 2.0
    """How long data or a PONG may take to come after our PING."""
    confirm_s: float = 15.0
    """How long the venue's REST interface may take to answer for quiet symbols."""
    grace_s: float = 5.0
    """How long a successor waits for its tickers to tell of quiet symbols, before REST is asked."""
    quiet_grace_s: float = 20.0
    """The same for trades where no ticker comes."""
    rollover_s: float = 60.0
    """How long two sessions stay open for symbols that could not be confirmed at all."""
    settle_s: float = 1.0
    """Data for this long forgives all failures before the end of a session."""
    steady_s: float = 60.0
    """A session that wants a successor within this time is followed with back-off."""
    behind_s: float = 5.0
    """How long a connection may bring nothing of a symbol of which more and more is printed."""
    lag_s: float = 1.0
    """What was printed before a connection was subscribed reaches the others within so long."""
    tick_s: float = 0.25
    close_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a connection gets its streams, and whom it asks."""

    name: str
    line: int
    endpoints: tuple[Endpoint, ...]
    """The preferred one first."""
    listener_factory: ListenerFactory
    symbol_id: Callable[[str], int]
    confirm: Confirm
    max_age_s: float
    addresses: AddressBook
    timing: Timing = Timing()

    def silent_s(self, share: Share) -> float:
        """Return the longest silence of these streams that is not looked into."""
        return self.timing.silent_s if share.ticks else self.timing.quiet_silent_s
