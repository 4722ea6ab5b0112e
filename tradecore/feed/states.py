"""The states of a feed connection and the only moves between them."""

import enum

from tradecore import clock


class State(enum.StrEnum):
    """What is true in each state; exactly one holds at any time."""

    CONNECTING = "connecting"
    """No socket carries frames. An attempt is under way, or run() has not begun."""

    SUBSCRIBING = "subscribing"
    """The WebSocket is open. Requests are still unanswered, or no data event has come yet."""

    LIVE = "live"
    """Every SUBSCRIBE was answered and data events have come, the last one not too long ago."""

    STALE = "stale"
    """The socket looks open but has been silent for too long; it is about to be replaced."""

    BACKING_OFF = "backing_off"
    """No socket is open. The next attempt waits for its time, or for reading to be resumed."""

    DRAINING = "draining"
    """close() was called. What the venue sent before our CLOSE is still taken; no new attempt."""

    CLOSED = "closed"
    """No socket is open and none will ever be again."""


_NEXT = {
    State.CONNECTING: {State.SUBSCRIBING, State.BACKING_OFF, State.DRAINING},
    State.SUBSCRIBING: {State.LIVE, State.STALE, State.BACKING_OFF, State.DRAINING},
    State.LIVE: {State.STALE, State.BACKING_OFF, State.DRAINING},
    State.STALE: {State.LIVE, State.BACKING_OFF, State.DRAINING},
    State.BACKING_OFF: {State.CONNECTING, State.DRAINING},
    State.DRAINING: {State.CLOSED},
    State.CLOSED: set(),
}


class Machine:
    """Hold the state of one connection; `since_ns` is the monotonic time of the last move."""

    def __init__(self) -> None:
        self.state = State.CONNECTING
        self.since_ns = clock.mono_ns()

    @property
    def ending(self) -> bool:
        """True from close() on: there is no way back."""
        return self.state in (State.DRAINING, State.CLOSED)

    def connect(self) -> None:
        """Begin an attempt; the first one starts in CONNECTING already."""
        if self.state is not State.CONNECTING:
            self._move(State.CONNECTING)

    def subscribe(self) -> None:
        """The upgrade is done."""
        self._move(State.SUBSCRIBING)

    def go_live(self) -> None:
        """All streams are subscribed and the first data event is here, or one after a silence."""
        self._move(State.LIVE)

    def go_stale(self) -> None:
        """The silence was looked into and is not an honest one."""
        self._move(State.STALE)

    def back_off(self) -> None:
        """The connection is gone, or the attempt has failed."""
        self._move(State.BACKING_OFF)

    def drain(self) -> bool:
        """Begin to close; False when that has begun before."""
        if self.ending:
            return False
        self._move(State.DRAINING)
        return True

    def close(self) -> None:
        """Nothing is open any more; from every other state this goes through DRAINING."""
        self.drain()
        if self.state is State.DRAINING:
            self._move(State.CLOSED)

    def _move(self, to: State) -> None:
        if to not in _NEXT[self.state]:
            raise RuntimeError(f"a feed connection cannot go from {self.state} to {to}")
        self.state = to
        self.since_ns = clock.mono_ns()
