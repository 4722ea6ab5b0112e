"""REST request weights: 6,000 a minute, then 429, then a ban with 418; bans of upgrades."""

from dataclasses import dataclass, field
from math import ceil

from tradecore import clock

_PATIENCE = 3
"""So many 429s inside one minute may be ignored before the ban."""

_SAME_MOMENT_S = 0.5
"""Upgrades that were asked for so soon after the first refusal may not have known of it."""


@dataclass
class UpgradeBan:
    """Refuses upgrades with `status` until a moment; says until when, or does not."""

    status: int = 0
    tells: bool = True
    early: int = 0
    """Attempts during a ban that had been answered before: a good client makes none."""
    _until_s: float = 0.0
    _refused_s: float | None = None

    def begin(self, status: int, seconds: float, *, tells: bool) -> None:
        """Refuse all upgrades for so long."""
        self.status, self.tells = status, tells
        self._until_s, self._refused_s = clock.mono_ns() / 1e9 + seconds, None

    def refuse(self) -> dict[str, str] | None:
        """Return the headers of a refusal, None when there is no ban."""
        now_s = clock.mono_ns() / 1e9
        if now_s >= self._until_s:
            return None
        if self._refused_s is None:
            self._refused_s = now_s
        self.early += now_s - self._refused_s > _SAME_MOMENT_S
        return {"Retry-After": str(ceil(self._until_s - now_s))} if self.tells else {}


@dataclass(frozen=True)
class Verdict:
    """Whether a request may go on, and the headers and body that say so."""

    status: int
    used: int
    message: str = ""
    retry_after_s: int = 0


@dataclass
class WeightLimit:
    """The used weight of the current UTC minute; all clients are one IP here."""

    limit: int
    ban_s: float
    _minute: int = 0
    _used: int = 0
    _refused: int = 0
    _banned_until_s: float = field(default=0.0)
    _told_s: dict[int, float] = field(default_factory=dict)
    early: dict[int, int] = field(default_factory=lambda: {429: 0, 418: 0})
    """Requests that came although a 429 or 418 had told to wait longer: a good client has none."""

    def charge(self, weight: int) -> Verdict:
        """Book a request; the verdict's status is 200, 429 or 418."""
        self._note_early()
        verdict = self._judged(weight)
        self.answered(verdict.status, verdict.retry_after_s)
        return verdict

    def answered(self, status: int, retry_after_s: float) -> None:
        """Note that a client has been told to wait."""
        if status in self.early:
            self._told_s[status] = clock.mono_ns() / 1e9 + retry_after_s

    def ban(self, seconds: float) -> None:
        """Answer 418 for so long, whatever the weight."""
        self._banned_until_s = clock.wall_ns() / 1e9 + seconds

    def _note_early(self) -> None:
        now_s = clock.mono_ns() / 1e9
        for status, until_s in self._told_s.items():
            self.early[status] += now_s < until_s

    def _judged(self, weight: int) -> Verdict:
        now_s = clock.wall_ns() / 1e9
        if int(now_s // 60) != self._minute:
            self._minute, self._used, self._refused = int(now_s // 60), 0, 0
        if now_s < self._banned_until_s:
            return self._ban(now_s)
        if self._used + weight <= self.limit:
            self._used += weight
            return Verdict(200, self._used)
        self._refused += 1
        if self._refused > _PATIENCE:
            self._banned_until_s = now_s + self.ban_s
            return self._ban(now_s)
        message = (
            f"Too much request weight used; current limit is {self.limit} request weight per "
            "1 MINUTE. Please use WebSocket Streams for live updates to avoid polling the API."
        )
        return Verdict(429, self._used, message, ceil(60 - now_s % 60))

    def _ban(self, now_s: float) -> Verdict:
        message = (
            f"Way too much request weight used; IP banned until {int(self._banned_until_s * 1000)}."
            " Please use WebSocket Streams for live updates to avoid bans."
        )
        return Verdict(418, self._used, message, ceil(self._banned_until_s - now_s))
