"""What `tradecore check` says of one thing."""

from typing import Literal, NamedTuple

from tradecore.errors import EXIT_OK
from tradecore.venue_clock import Offset

CLOCK_TOLERANCE_MS = 250.0
CLOCK_SAMPLES = 4


class Finding(NamedTuple):
    """One line of the report."""

    grade: Literal["ok", "warn", "fail"]
    what: str
    text: str
    mend: str = ""
    exit_code: int = EXIT_OK


def judge_clock(whose: str, measured: Offset) -> Finding:
    """Judge our clock by what was measured."""
    offset_ms, bound_ms = measured.offset_s * 1e3, measured.bound_s * 1e3
    text = f"this clock is {offset_ms:+.1f} ms against the {whose}'s, give or take {bound_ms:.1f}"
    if abs(offset_ms) - bound_ms > CLOCK_TOLERANCE_MS:
        mend = "run an NTP client, since received_at and latencies come from this clock"
        return Finding("warn", "clock", text, mend)
    return Finding("ok", "clock", text)
