"""Lines for systemd's journal, which takes the priority of each from its front: sd-daemon(3)."""

import logging
import os
from typing import IO, Any

_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
_DEBUG = 7


def is_journal(stream: IO[Any]) -> bool:
    """Tell whether what is written to `stream` goes to the journal."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or none of the system's
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def with_priority(lines: bytes, levelno: int) -> bytes:
    """Return whole lines with the priority that a level of `logging` has in the journal."""
    number = next((number for least, number in _PRIORITIES if levelno >= least), _DEBUG)
    return b"".join(b"<%d>%b" % (number, line) for line in lines.splitlines(keepends=True))
