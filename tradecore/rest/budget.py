"""What the venue's REST may be asked: request weight per minute, and silence when it says so.

Rules (binance.md §4): 6,000 weight a minute and address, told in X-MBX-USED-WEIGHT-1M, which
counts other programs of the address too; 429 = too much, wait for Retry-After; 418 = banned, two
minutes to three days; 403 = the venue's firewall.

One request is under way at a time, so that after a 429 or 418 none follows. One that hangs does
not hold up the others: after a second the next one may go, three at most.
"""

import asyncio
import logging
import re
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tradecore import clock
from tradecore.block import (
    LONGEST_S,
    MARGIN_S,
    Block,
    BlockFile,
    Kind,
    Memory,
    mono_s,
    retry_after_s,
    sentence,
    told_s,
)
from tradecore.errors import VenueError

STATE_NAME = "rest_budget.json"
LIMIT_WEIGHT = 6000
SHARE = 0.9
"""Of the limit; the rest is left to other programs on the address."""

_WINDOW_S = 60.0
_LIMITED_S = 60.0
_LOWEST_CEILING = 0.1
_RECOVERY = 1.05
_POLL_S = 0.5
_HANGS_AFTER_S = 1.0
_MAX_IN_FLIGHT = 3
_MAX_WAITING = 64
_SAVE_EVERY_S = 5.0

_log = logging.getLogger(__name__)


class RestError(VenueError):
    """A REST request that brought nothing.

    kind: banned (418), limited (429, or the budget has no room in time), refused (the request is
    wrong or unwelcome: do not repeat it as it is), unreachable (no answer or 5xx: try later),
    broken (an answer that is not what the venue documents). `retry_after_s`: not before so many
    seconds, 0 = not said. `status`: HTTP, 0 = no answer. `code`: the venue's own, as in -1121.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        retry_after_s: float = 0.0,
        status: int = 0,
        code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.status = status
        self.code = code


class Ticket(NamedTuple):
    """The right to send one request; give it back with `Budget.done`."""

    number: int
    sent_s: float
    weight: int


class Budget:
    """The weight and the silences of one host of the venue.

    Everything that calls the host in a process shares one; processes share the file
    `state_path` (None = nothing is remembered). `waits` counts requests that had to wait,
    `refusals` the venue's 429, 418, 403 and 451.
    """

    def __init__(
        self, state_path: Path | None, host: str, *, limit_weight: int = LIMIT_WEIGHT
    ) -> None:
        self.host = host
        self.waits = 0
        self.refusals: Counter[int] = Counter()
        self._limit = limit_weight
        self._ceiling = float(limit_weight)
        self._ceiling_s = mono_s()
        self._last_429 = (0, -1e9)  # weight used, and when
        self._file = BlockFile(state_path, host)
        self._saved_s = mono_s()
        self._block: Block | None = None
        self._strikes = 0
        self._sent: deque[Ticket] = deque()  # of the last minute; each weighs 1 at least
        self._in_flight: dict[int, Ticket] = {}
        self._number = 0
        self._waiting = 0
        self._changed = asyncio.Event()
        self._venue_used = 0
        self._minute_ends_s = 0.0
        self._recall()

    @classmethod
    def of(cls, data_dir: Path | None, base_url: str) -> "Budget":
        """Return the budget of the host of `base_url`, remembered in DATA_DIR."""
        return cls(data_dir and data_dir / STATE_NAME, urlsplit(base_url).netloc.lower())

    @property
    def limit_weight(self) -> int:
        """Weight a minute that the venue is thought to allow: lower after a 429."""
        return int(self._ceiling)

    @property
    def used_weight(self) -> int:
        """Weight of this minute: the venue's count or our own, whichever is greater."""
        return max(self._own_weight(), self._venue_weight())

    @property
    def banned_until_s(self) -> float:
        """When the venue may be asked again, in seconds since 1970; 0 = now."""
        left_s = self.silent_s
        return clock.wall_ns() / 1e9 + left_s if left_s else 0.0

    @property
    def silent_s(self) -> float:
        """For how many seconds nobody may ask; 0 = now."""
        return max(self._block.until_s - mono_s(), 0.0) if self._block else 0.0

    @property
    def write_failures(self) -> int:
        """How often the file could not be written."""
        return self._file.failures

    async def take(self, weight: int, limit_s: float, *, reserve: int = 0) -> Ticket:
        """Wait until a request of `weight` may be sent, `limit_s` at most.

        `reserve`: so much weight of the minute, a tenth at most, stays free for others.
        Raises RestError banned, refused or limited when it may not be sent in time, at once when
        that is known beforehand.
        """
        if self._waiting >= _MAX_WAITING:
            text = f"{_MAX_WAITING} requests to {self.host} wait already; ask again later"
            raise RestError("limited", text, retry_after_s=_LIMITED_S)
        ends_s = mono_s() + limit_s
        waited = False
        self._waiting += 1
        try:
            while (wait_s := self._wait_s(weight, reserve)) > 0:
                left_s = ends_s - mono_s()
                if left_s <= 0 or self.silent_s > left_s or (wait_s > left_s and not self._busy()):
                    raise self._refusal(wait_s)
                if not waited:
                    waited = True
                    self.waits += 1
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(wait_s, left_s, _POLL_S)):
                        await self._changed.wait()
        finally:
            self._waiting -= 1
        self._number += 1
        ticket = Ticket(self._number, mono_s(), max(weight, 1))
        self._sent.append(ticket)
        self._in_flight[ticket.number] = ticket
        return ticket

    def done(self, ticket: Ticket) -> None:
        """Give back the ticket of a request that has ended, however it has."""
        self._in_flight.pop(ticket.number, None)
        self._changed.set()

    def observe(self, status: int, headers: Mapping[str, str]) -> None:
        """Learn from an answer; what forbids further requests is on the disk on return."""
        used = _number(headers.get("X-MBX-USED-WEIGHT-1M"))
        if used is not None:
            self._venue_used = used
            self._minute_ends_s = mono_s() + _minute_left_s(headers.get("Date"))
        if status in (418, 429, 403, 451):
            self._refused(status, retry_after_s(headers))
            return
        if status < 400:
            self._recover()
        if mono_s() - self._saved_s >= _SAVE_EVERY_S:
            self.save()

    def hear(self, headers: Mapping[str, str], body: bytes) -> None:
        """Learn from the body of a 418 or 429 that was observed: the later end is the right one."""
        if (left_s := told_s(headers, body)) > self.silent_s:
            self._silence(left_s, self._block.kind if self._block else "banned")

    def save(self) -> None:
        """Leave the used weight to the next process; done by itself every five seconds of use."""
        self._keep(durable=False)

    # -- what may be sent -------------------------------------------------------------------------

    def _busy(self) -> bool:
        return bool(self._in_flight)

    def _wait_s(self, weight: int, reserve: int) -> float:
        """Return 0 when a request may go now, else seconds after which to look again."""
        if self._file.changed():
            self._recall()
        if silent_s := self.silent_s:
            return silent_s
        now_s = mono_s()
        if self._in_flight:
            if len(self._in_flight) >= _MAX_IN_FLIGHT:
                return _POLL_S
            youngest_s = max(ticket.sent_s for ticket in self._in_flight.values())
            if (wait_s := youngest_s + _HANGS_AFTER_S - now_s) > 0:
                return wait_s
        allowed = max(int(self._ceiling * SHARE), 1)
        allowed -= min(reserve, allowed // 10)
        need = min(max(weight, 1), allowed)
        under_way = sum(ticket.weight for ticket in self._in_flight.values())
        if self._venue_weight() + under_way + need > allowed:
            return self._minute_ends_s - now_s
        excess = self._own_weight() + need - allowed
        if excess <= 0:
            return 0.0
        for ticket in self._sent:
            excess -= ticket.weight
            if excess <= 0:
                return max(ticket.sent_s + _WINDOW_S - now_s, 0.001)
        return _POLL_S

    def _own_weight(self) -> int:
        oldest_s = mono_s() - _WINDOW_S
        while self._sent and self._sent[0].sent_s <= oldest_s:
            self._sent.popleft()
        return sum(ticket.weight for ticket in self._sent)

    def _venue_weight(self) -> int:
        return self._venue_used if mono_s() < self._minute_ends_s else 0

    def _refusal(self, wait_s: float) -> RestError:
        if self._block and self.silent_s:
            what = {
                "banned": "has banned this address",
                "limited": "had too many requests from this address",
                "refused": "refuses this address",
            }[self._block.kind]
            text = f"{self.host} {what}: it is not asked for another {ceil(self.silent_s)} s"
            return RestError(self._block.kind, text, retry_after_s=self.silent_s)
        text = (
            f"the request budget of {self.host} has no room for another {ceil(wait_s)} s "
            f"({self.used_weight} of {self.limit_weight} weight a minute are used)"
        )
        return RestError("limited", text, retry_after_s=wait_s)

    # -- what the venue says ----------------------------------------------------------------------

    def _refused(self, status: int, told_s: float) -> None:
        kind, length_s = sentence(status, told_s, self._strikes)
        if status == 418:
            self._strikes = min(self._strikes + 1, 20)
        elif status == 429:
            self._learn(self._venue_weight() or self._own_weight())
        self.refusals[status] += 1
        self._silence(length_s, kind)
        _log.warning(
            "%s answered HTTP %d: it is not asked for %d s (%d of %d weight a minute were used)",
            *(self.host, status, ceil(self.silent_s), self.used_weight, self._limit),
        )

    def _silence(self, length_s: float, kind: Kind) -> None:
        """Ask nobody for so long, or longer where that is known already; put it on the disk."""
        length_s = min(length_s + MARGIN_S, LONGEST_S)
        block = Block(mono_s() + length_s, length_s, kind)
        self._block = max(self._block or block, block)
        self._keep(durable=True)

    def _learn(self, used: int) -> None:
        """Take what was used when a 429 came for the venue's limit, if that is likely.

        A 429 far below the known limit had another cause, unless it comes again at the same use in
        another minute.
        """
        now_s = mono_s()
        before, before_s = self._last_429
        again = 55 < now_s - before_s < 600 and abs(used - before) <= before / 5
        self._last_429 = used, now_s
        if used >= self._ceiling / 2 or again:
            self._ceiling = max(min(used, self._ceiling), self._limit * _LOWEST_CEILING)
        self._ceiling_s = now_s

    def _recover(self) -> None:
        """Raise a learnt ceiling by a twentieth for each minute without a 429."""
        minutes = int((mono_s() - self._ceiling_s) // 60)
        if minutes and self._ceiling < self._limit:
            self._ceiling = min(self._ceiling * _RECOVERY ** min(minutes, 999), self._limit)
            self._ceiling_s += 60 * minutes
        if minutes >= 1440:  # a day of peace: the next ban is a first one
            self._strikes = 0
            self._ceiling_s = mono_s()

    def _recall(self) -> None:
        """Take over what the file knows better: a longer silence, a greater use."""
        memory = self._file.read()
        if memory.block:
            self._block = max(self._block or memory.block, memory.block)
        self._strikes = max(self._strikes, memory.strikes)
        if memory.used_weight > self._venue_weight():
            self._venue_used, self._minute_ends_s = memory.used_weight, memory.minute_ends_s
        if self._limit * _LOWEST_CEILING <= memory.ceiling < self._ceiling:
            self._ceiling, self._ceiling_s = float(memory.ceiling), mono_s()

    def _keep(self, *, durable: bool) -> None:
        self._saved_s = mono_s()
        block = self._block if self.silent_s else None
        ours = Memory(
            block, self._strikes, self._venue_weight(), self._minute_ends_s, int(self._ceiling)
        )
        self._block = self._file.write(ours, durable=durable).block


def _number(text: str | None) -> int | None:
    """Read a header of up to nine digits; None when it is anything else."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,9}", text.strip()) else None


def _minute_left_s(date: str | None) -> float:
    """Return the seconds until the venue's clock minute turns, a second too many at most.

    By the answer's Date, "Tue, 24 Nov 2026 03:41:26 GMT", else by the host clock.
    """
    if date and re.fullmatch(r".*:[0-5][0-9] GMT", date):
        return 60.0 - int(date[-6:-4])
    return 60.0 - clock.wall_ns() / 1e9 % 60 + MARGIN_S
