"""Tells systemd that the daemon is ready, alive, and what it does; silent once it is stuck.

Ready is when trades are captured for the first time, as /ready judges it. Stuck is what only
another start would mend: the loop does not turn (then nothing is sent anyway), or a part of the
capture has not gone through its own loop for longer than all of its time limits together. A venue
or a database that is away is not: attempts go on and fail, and a start would change nothing.
"""

import asyncio
import logging
from collections.abc import Callable

from tradecore import clock
from tradecore.feed.feed import Feed
from tradecore.flusher import FlushStats
from tradecore.http.health import assess
from tradecore.notify import Notifier
from tradecore.snapshot import Snapshot
from tradecore.terminal import status_line

log = logging.getLogger(__name__)

WRITER_LIMIT_S = 600.0
"""How long one round of a writer may take: a batch with refused rows is done in eight pieces, each
of which has 45 s."""

FEED_LIMIT_S = 120.0
"""How long one step of a connection may take, MAX_RECONNECT_DELAY not counted."""

STARTING_INTERVAL_S = 0.5
INTERVAL_S = 5.0
"""How often the state is told at least, before and after the daemon is ready."""

_EXTENSION_S = 30
"""How long a start may go on without a further word."""

_STATUS_CHARACTERS = 300


class Progress:
    """Whether each part of the capture still goes through its loop."""

    def __init__(
        self,
        flush: FlushStats,
        feed: Feed,
        is_opening: Callable[[], bool],
        max_delay_s: float,
    ) -> None:
        """`is_opening`: the database is being opened; writers wait for that, hours perhaps when its
        schema is brought up to date. `max_delay_s`: the longest pause between two attempts.
        """
        self._flush = flush
        self._feed = feed
        self._is_opening = is_opening
        self._opening_ns = 0
        self._feed_limit_s = FEED_LIMIT_S + max_delay_s

    def stuck(self) -> str:
        """Return what has stopped, as a sentence; "" while all goes on."""
        now_ns = clock.mono_ns()
        if self._is_opening():
            self._opening_ns = now_ns
        for what, turned_ns in self._flush.turned_ns.items():
            age_s = (now_ns - max(turned_ns, self._opening_ns)) / 1e9
            if age_s > WRITER_LIMIT_S:
                return f"for {age_s:.0f} s a write of {what} has neither succeeded nor failed"
        for connection in self._feed.connections:
            age_s = (now_ns - connection.moved_ns) / 1e9
            if age_s > self._feed_limit_s:
                name = connection.name
                return f"for {age_s:.0f} s connection {name} was not kept, tried or waited for"
        return ""


class Watchdog:
    """Speaks from the event loop; `read` gives the state, `stuck` what has stopped, or ""."""

    def __init__(
        self, notifier: Notifier, read: Callable[[], Snapshot], stuck: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._read = read
        self._stuck = stuck
        self._ready = False
        self._withheld = False

    async def run(self) -> None:
        """Speak until cancelled."""
        interval_s = min(INTERVAL_S, (self._notifier.watchdog_s or INTERVAL_S * 3) / 3)
        while True:
            self._tell()
            await asyncio.sleep(interval_s if self._ready else STARTING_INTERVAL_S)

    def _tell(self) -> None:
        snapshot = self._read()
        health = assess(snapshot)
        stuck = self._stuck()
        words = [stuck] if stuck else [reason.text for reason in health.reasons]
        words.append(status_line(snapshot, _STATUS_CHARACTERS))
        lines = [f"STATUS={' '.join(words)[:_STATUS_CHARACTERS]}"]
        ready = self._ready or (health.ready and not stuck)
        if ready and not self._ready:
            lines.append("READY=1")
        if stuck and not self._withheld:
            log.error(
                "the capture is stuck: systemd is left without a sign of life, so that it starts"
                " the daemon anew; rows in the ring are kept",
                extra={"stuck": stuck},
            )
        elif self._withheld and not stuck:
            log.warning("the capture goes on; systemd gets signs of life again")
        self._withheld = bool(stuck)
        if not stuck:
            lines.append("WATCHDOG=1" if ready else f"EXTEND_TIMEOUT_USEC={_EXTENSION_S}000000")
        if self._notifier.send(*lines):
            self._ready = ready  # told again until it was taken
