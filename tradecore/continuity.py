"""Holds what we have against what the venue says it has printed, so that no hole stays unseen.

A jump in the ids shows a hole when the next trade comes. Where no next trade has come yet, other
things tell, in this order of cost:

* at the start, one `ticker/24hr` call: which symbols moved while the daemon was away;
* tickers and klines, which carry the id of the last trade;
* the same REST call, for a symbol that is silent for longer than its own pace explains.

What is found is handed to the back-fill, and a connection that misses trades is replaced.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from tradecore import clock
from tradecore.backoff import Backoff, Repeats
from tradecore.capture import Capture
from tradecore.errors import TransientStoreError, VenueError
from tradecore.log import once_per
from tradecore.pace import Pace

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
TOLD_GRACE_S = 2.0
"""A ticker or kline may be ahead of its trade, since streams are not ordered; not for so long."""

TOLD_FRESH_S = 5.0
"""A ticker as old as this still proves that a silent symbol is quiet."""

ASK_INTERVAL_S = 10.0
ASK_ALL_INTERVAL_S = 60.0
"""Between two REST checks of silent symbols: weight 2 for up to 20 symbols, 80 for all."""

BREAK_GRACE_S = 5.0
"""How long tickers and trades have, after a break, to show what was missed; then REST is asked."""

REPEAT_S = 5.0
"""Between two fetches for one symbol that stays behind."""

_CHEAP_SYMBOLS = 20
_BREATH_SYMBOLS = 200
"""The event loop has other things to do: it gets to them after so many symbols, 0.5 ms."""

_REPLACE_CAP_S = 3600.0
_NOT_YET = 2**63
_SHOWN = 10
_RETRY_BASE_S = 1.0
_RETRY_CAP_S = 60.0


class Bounds(Protocol):
    """What the ledger holds of a symbol, as a whole."""

    @property
    def last_id(self) -> int: ...
    @property
    def last_us(self) -> int: ...


AskLastIds = Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]
"""Returns the venue's newest trade id of each symbol it knows, -1 for none; raises VenueError."""


@dataclass(slots=True)
class _Behind:
    """A symbol of which tickers or klines tell newer trades than have come."""

    last_id: int
    """What was told when it was noticed."""
    since_s: float
    due_s: float
    """When to fetch what is missing."""


class Continuity:
    """Watches all captured symbols; `run` it until it is cancelled."""

    def __init__(
        self,
        capture: Capture,
        symbols: Callable[[], Sequence[str]],
        ask_last_ids: AskLastIds,
        reach: Callable[[str, int, str], None],
        replace: Callable[[Sequence[str], str], None],
        *,
        is_live: Callable[[], bool],
        breaks: Callable[[], tuple[int, bool]] = lambda: (0, True),
    ) -> None:
        """`reach(symbol, last_id, cause)` fetches a newest trade that we lack.

        `replace(symbols, why)` replaces the connections that should have brought it. `is_live`
        tells whether the feed as a whole brings data: if not, silence says nothing. `breaks` gives
        how many sessions have ended without a successor that went on, and whether all connections
        are open now.
        """
        self._capture = capture
        self._symbols = symbols
        self._ask_last_ids = ask_last_ids
        self._reach = reach
        self._replace = replace
        self._is_live = is_live
        self._breaks = breaks
        self._breaks_seen = 0
        self._mended_s: float | None = None  # after a break: when to ask about silent symbols
        self._suspects: dict[str, int] = {}  # what the venue had of them at the last question
        # A symbol that has shown nothing since the latest break, or since we began to capture it,
        # may have holes above.
        self._since_ns = clock.wall_ns()
        self._joined_ns = dict.fromkeys(symbols(), self._since_ns)
        self._confirmed: set[str] = set()  # by REST, since then
        self._printed: dict[str, int] = {}  # what REST told and we lacked
        self._first_told: dict[str, int] = {}  # of symbols of which no trade came ever; see _known
        self._paces: dict[str, Pace] = {}
        self._behind: dict[str, _Behind] = {}
        self._replaced = Repeats(REPEAT_S, _REPLACE_CAP_S)
        self.stored: dict[str, int] = {}
        """The last id that the ledger holds of each symbol."""
        self.stored_us: dict[str, int] = {}
        """The time of the last trade that it holds, in microseconds since 1970."""
        self._looked_s = 0.0
        self._ask_due_s = 0.0
        self.stale: set[str] = set()
        """Symbols whose trades come no more although the venue prints them."""
        self.checks = 0
        """REST calls that asked for last ids."""

    def seed(self, bounds: Mapping[str, Bounds]) -> None:
        """Take the marks up to which the ledger holds each symbol.

        To be called at the start and again later: what was fetched does not pass the capture.
        """
        for symbol in self._symbols():
            one = bounds.get(symbol)
            if one is not None and one.last_id > self.stored.get(symbol, -1):
                self.stored[symbol] = one.last_id
                self.stored_us[symbol] = one.last_us
                self._capture.seed(symbol, one.last_id, one.last_us)

    def known(self) -> list[str]:
        """Return the captured symbols of which something is stored."""
        return [symbol for symbol in self._symbols() if symbol in self.stored]

    def last_id(self, symbol: str) -> int:
        """Return the newest id that was received or is stored; -1 for none."""
        received = self._capture.track(symbol).last_id
        return max(-1 if received is None else received, self.stored.get(symbol, -1))

    def is_whole(self, symbol: str) -> bool:
        """Tell whether what was printed until now is stored, in the ring, or an open hole.

        As far as is known; False also while nobody can know, as after a break until the symbol
        shows itself or REST confirms it.
        """
        behind = self._behind.get(symbol)
        overdue = behind is not None and self._looked_s - behind.since_s >= TOLD_GRACE_S
        if symbol in self.stale or overdue:
            return False
        printed = self._printed.get(symbol, -1)
        if printed >= 0 and printed > self.last_id(symbol):
            return False
        track = self._capture.track(symbol)
        if track.hole is not None and self.stored.get(symbol, -1) <= track.hole[1]:
            return False  # the row that opens the hole in the ledger is not stored yet
        return symbol in self._confirmed or self._was_heard(symbol)

    async def confirm(self, symbols: Sequence[str]) -> set[str]:
        """Return the symbols of which the venue has nothing newer than we; fetch the others.

        Raises VenueError.
        """
        # Trades that nobody has told of yet cannot be called old: they may be printed and not come.
        new = {s for s in symbols if self.last_id(s) < 0 and s not in self._first_told}
        # Whoever asks has waited for them already; a late one that still comes is stored once.
        missed = await self._ask_what_is_missed(symbols)
        for symbol, last_id in missed.items():
            self._reach(symbol, last_id, "disconnect")
        return set(symbols) - missed.keys() - {s for s in new if self._first_told.get(s, -1) >= 0}

    async def look_back(self) -> None:
        """Find out, once, which symbols moved while the daemon was away, and have them fetched.

        A symbol that has traded since the start needs no help: its first trade shows the hole.
        Tries until the venue has answered.
        """
        backoff = Backoff(_RETRY_BASE_S, _RETRY_CAP_S)
        while True:
            asked = [s for s in self._symbols() if s in self.stored and not self._has_traded(s)]
            if not asked:
                return
            try:
                missed = await self._ask_what_is_missed(asked)
                break
            except VenueError as error:
                log.warning(
                    "cannot ask the venue what happened while tradecore was away; trying again",
                    extra={"error": str(error), "symbols": len(asked)},
                )
                await asyncio.sleep(backoff.next_delay_s() + _RETRY_BASE_S)
        for symbol, last_id in missed.items():
            self._reach(symbol, last_id, "restart")
        log.info(
            "held against the venue",
            extra={"symbols": len(asked), "moved_while_away": sorted(missed)},
        )

    async def run(self) -> None:
        """Look once a second."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            try:
                await self._look(clock.mono_ns() / 1e9)
            except (VenueError, TransientStoreError) as error:
                log.warning(
                    "silent symbols could not be checked; trying again",
                    extra={"error": str(error), "cause": "venue"},
                )

    async def _look(self, now_s: float) -> None:
        self._looked_s = now_s
        symbols = self._symbols()
        self._follow(symbols)
        await self._look_after_break(now_s)
        if not self._is_live():
            self._paces.clear()  # a pause must not be learnt as a lull
            self._behind.clear()
            return
        late: list[str] = []
        silent: list[str] = []
        missed: dict[str, int] = {}
        dead: list[str] = []
        for count, symbol in enumerate(symbols, 1):
            if count % _BREATH_SYMBOLS == 0:
                await asyncio.sleep(0)
            track = self._capture.track(symbol)
            pace = self._paces.get(symbol)
            if pace is None:
                self._paces[symbol] = Pace(now_s, track.received)
                continue
            told = self._capture.told(symbol)
            pace.look(now_s, track.received, told.heard_ns)
            if pace.last_s == now_s:
                self.stale.discard(symbol)
            if told.recv_ns and told.last_id > self._known(symbol, told.last_id):
                behind = self._behind.setdefault(
                    symbol, _Behind(told.last_id, now_s, now_s + TOLD_GRACE_S)
                )
                if now_s >= behind.due_s:
                    behind.due_s = now_s + REPEAT_S
                    # One trade may be lost; that several are and none comes is another matter.
                    if told.last_id > behind.last_id and pace.last_s <= behind.since_s:
                        dead.append(symbol)
                        missed[symbol] = told.last_id
                    elif self.last_id(symbol) >= 0:
                        missed[symbol] = told.last_id
                continue
            self._behind.pop(symbol, None)
            if not pace.is_late(now_s):
                if pace.has_fallen_silent(now_s):
                    silent.append(symbol)
                continue
            if (clock.wall_ns() - told.recv_ns) / 1e9 < TOLD_FRESH_S:
                pace.forgive(now_s)
            else:
                late.append(symbol)
        self._fetch(missed, dead, "ticker or kline")
        if 2 * len(silent) <= len(symbols):  # else it is the connection, which looks for itself
            late += silent
        if late and now_s >= self._ask_due_s:
            cheap = len(late) <= _CHEAP_SYMBOLS
            self._ask_due_s = now_s + (ASK_INTERVAL_S if cheap else ASK_ALL_INTERVAL_S)
            await self._ask(late, now_s)

    def _follow(self, symbols: Sequence[str]) -> None:
        """Begin with symbols that are new, and forget those that are gone."""
        for gone in self._joined_ns.keys() - set(symbols):
            self._joined_ns.pop(gone)
            self._paces.pop(gone, None)
            self._behind.pop(gone, None)
            self._first_told.pop(gone, None)
            self._printed.pop(gone, None)
            self.stale.discard(gone)
            self._confirmed.discard(gone)
        for symbol in symbols:
            self._joined_ns.setdefault(symbol, clock.wall_ns())

    async def _look_after_break(self, now_s: float) -> None:
        """Ask about symbols that have shown nothing since a broken connection is back.

        What a thin symbol printed meanwhile shows in no jump before its next trade, hours later
        perhaps; a ticker tells it, where one comes.
        """
        broken, whole = self._breaks()
        more, self._breaks_seen = broken > self._breaks_seen, broken
        if more or not whole:
            self._suspects = {}
            self._mended_s = now_s + BREAK_GRACE_S
            self._since_ns = clock.wall_ns()
            self._confirmed.clear()
        if self._mended_s is None or now_s < self._mended_s:
            return
        silent = [
            symbol
            for symbol in self._symbols()
            if (self.last_id(symbol) >= 0 or symbol in self._first_told)
            and not self._was_heard(symbol)
        ]
        if silent:
            self._mended_s = now_s + ASK_INTERVAL_S  # again when the venue fails
            missed = await self._ask_what_is_missed(silent)
            suspects, self._suspects = self._suspects, missed
            # What it printed while we were away is one thing; that it goes on is another.
            dead = [symbol for symbol in suspects if missed.get(symbol, -1) > suspects[symbol]]
            self._fetch(missed, dead, "REST")
            if missed and not suspects:
                self._mended_s = now_s + BREAK_GRACE_S
                return
        self._mended_s, self._suspects = None, {}

    def _was_heard(self, symbol: str) -> bool:
        """Tell whether a trade, or a ticker that tells of one, came since the latest break."""
        since_ns = max(self._since_ns, self._joined(symbol))
        capture = self._capture
        return (
            capture.track(symbol).last_recv_ns >= since_ns
            or capture.told(symbol).recv_ns >= since_ns
        )

    def _joined(self, symbol: str) -> int:
        """Since when we capture it; the next look notes one that is new."""
        return self._joined_ns.get(symbol, _NOT_YET)

    def _known(self, symbol: str, told: int) -> int:
        """Return the newest id that we have; where that is none, the first that was ever told.

        What is told above that was printed while we listened, and should have come.
        """
        last_id = self.last_id(symbol)
        return last_id if last_id >= 0 else self._first_told.setdefault(symbol, told)

    async def _ask(self, late: Sequence[str], now_s: float) -> None:
        missed = await self._ask_what_is_missed(late)
        for symbol in late:
            if symbol not in missed and symbol in self._paces:
                self._paces[symbol].forgive(now_s)
        self._fetch(missed, list(missed), "REST")

    async def _ask_what_is_missed(self, symbols: Sequence[str]) -> dict[str, int]:
        """Return the venue's newest id of those symbols of which it has newer trades than we."""
        self.checks += 1
        since_ns = self._since_ns
        venue = await self._ask_last_ids(symbols)
        told = {symbol: venue.get(symbol, -1) for symbol in symbols}
        missed = {s: last_id for s, last_id in told.items() if last_id > self._known(s, last_id)}
        for symbol in symbols:
            self._printed.pop(symbol, None)  # what was told before may have been too high
        self._printed.update(missed)
        if since_ns == self._since_ns:  # else a connection broke after the answer, perhaps
            self._confirmed.update(s for s in symbols if s not in missed)
        return missed

    def _fetch(self, missed: Mapping[str, int], dead: Sequence[str], witness: str) -> None:
        """Fetch what the venue has printed and we lack; replace connections of `dead` symbols."""
        if not missed:
            return
        once_per(log, ("missed", witness)).warning(
            "trades were printed and have not come; they are fetched as soon as REST allows",
            extra={
                "symbols": len(missed),
                "behind": {
                    symbol: {"received": self.last_id(symbol), "printed": last_id}
                    for symbol, last_id in islice(missed.items(), _SHOWN)
                },
                "witness": witness,
                "stale": list(dead[:_SHOWN]),
            },
        )
        for symbol, last_id in missed.items():
            self._reach(symbol, last_id, "disconnect")
        self.stale.update(dead)
        if due := self._replaced.due(self._looked_s, dead):
            self._replace(due, "stale")

    def _has_traded(self, symbol: str) -> bool:
        return self._capture.track(symbol).last_recv_ns >= self._joined(symbol)
