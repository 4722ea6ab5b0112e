"""How long a connection may be silent, learnt from its own rate of data. Pure state."""

from math import exp, expm1

UNLIKELY = 20.0
"""A silence counts as suspicious when its probability is below e^-20 at the learnt rate."""

MEMORY_S = 60.0
"""Time constant of the learnt rate."""

_MAX_RATE = 16.0
"""Data events a second that count. One order of a taker comes as hundreds of events at once, and
a burst tells nothing about the pause after it."""

_MOST_PATIENT = 20.0


class Pulse:
    """The silence of one session, in seconds during which data could have been read.

    For k events in T seconds, an unknown but steady rate makes a silence of t seconds as likely as
    (T / (T + t))^k. Long ago counts less: k and T fade with `memory_s`.
    """

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._events = 0.0
        self._span_s = 0.0
        self._gap_s = 0.0
        self._patience = 1.0
        self.silence_s = 0.0

    def beat(self, passed_s: float, events: int) -> None:
        """Take the data events of the last `passed_s` seconds."""
        self._gap_s += passed_s
        self.silence_s += passed_s
        if not events:
            return
        # A silence enters what was learnt once it is over: it must not excuse itself.
        fade = exp(-self._gap_s / self._memory_s)
        self._events = self._events * fade + min(events, max(1.0, _MAX_RATE * passed_s))
        self._span_s = self._span_s * fade + self._gap_s
        self._patience = 1 + (self._patience - 1) * exp(-self._gap_s / (10 * self._memory_s))
        self._gap_s = self.silence_s = 0.0

    def handed_on(self) -> "Pulse":
        """Return the pulse of a session that follows: it knows the pace, and no silence yet."""
        other = Pulse(self._memory_s)
        other._events, other._span_s = self._events, self._span_s
        return other

    def forgive(self) -> None:
        """Count silence from now: nobody was reading, or the silence was found to be honest."""
        self.silence_s = 0.0

    def be_patient(self) -> None:
        """Double the limit: the market is quiet. That wears off within some minutes of data."""
        self._patience = min(2 * self._patience, _MOST_PATIENT)
        self.forgive()

    def limit_s(self, floor_s: float, cap_s: float) -> float:
        """Return the silence from which on the connection is suspicious.

        It lies between floor and cap, and is the cap while little is known; patience comes on top.
        """
        learnt_s = cap_s
        if self._events > 0.5:
            learnt_s = self._span_s * expm1(min(UNLIKELY / self._events, 50.0))
        return min(max(floor_s, learnt_s), max(floor_s, cap_s)) * self._patience
