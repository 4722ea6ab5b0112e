"""Tells by SQLSTATE what a failed write calls for: another try, a person, or a look at its rows."""

import asyncio
from dataclasses import dataclass
from enum import Enum

import asyncpg

from tradecore.errors import StoreError, TransientStoreError

TROUBLE = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    StoreError,
    OSError,
    TimeoutError,
)
"""What statements raise, and taking a connection for them, when the database does not do."""


AWAY = frozenset(("connection", "57P01", "57P02", "57P03"))
"""Reasons of failures that mean: nobody answers now, whatever was asked."""


class Kind(Enum):
    """What a failure of one statement means."""

    TRANSIENT = "transient"
    """A bad moment: away, restarting, overloaded, deadlock, lock or time limit."""
    PERSISTENT = "persistent"
    """Somebody has to mend it: a table, a right, the disk. Trying again is harmless."""
    NO_PARTITION = "no partition"
    """A row found no partition of its day."""
    REPEATED = "repeated"
    """A row is in the table already (23505)."""
    REFUSED = "refused"
    """A value or a constraint: another try of the same rows meets the same end."""


@dataclass(frozen=True, slots=True)
class Failure:
    kind: Kind
    reason: str
    remedy: str = ""


_TRANSIENT_CLASSES = {"40", "53", "55", "57", "58"}

# Exact states before classes. 22P03 and 22P04 speak of our encoding, not of a row's values.
_REMEDIES = {
    "22P03": "the column types are not those of tradecore's schema: run `tradecore check`",
    "22P04": "the columns are not those of tradecore's schema: run `tradecore check`",
    "25006": "the server takes no writes: point DATABASE_URL at the primary",
    "42501": "give the role of DATABASE_URL its rights back: it has to own tradecore's tables",
    "42P01": "a table is missing: run `tradecore migrate`",
    "42703": "a column is missing: run `tradecore migrate`",
    "53100": "free disk space on the database server",
    "3D": "the database is gone: create it, or correct DATABASE_URL",
    "3F": "the schema is gone: create it and run `tradecore migrate`",
    "28": "the role may not log in any more: correct DATABASE_URL or the role",
}
_LOOK = "see the log of the database server, and run `tradecore check`"


def classify(exc: BaseException) -> Failure:
    """Return what `exc` of a statement calls for. Bugs of ours come back as PERSISTENT."""
    match exc:
        case asyncpg.PostgresError():
            return _classify_state(exc)
        case TransientStoreError():
            kind = Kind.PERSISTENT if exc.fatal_looking else Kind.TRANSIENT
            return Failure(kind, exc.reason)
        case StoreError():
            return Failure(Kind.PERSISTENT, "store")
        case TimeoutError() | asyncio.CancelledError():
            return Failure(Kind.TRANSIENT, "timeout")
        case OSError():
            return Failure(Kind.TRANSIENT, "connection")
        case asyncpg.InterfaceError() | asyncpg.InternalClientError() if not isinstance(
            exc, ValueError
        ):
            # What asyncpg raises when the connection ended between or under its statements.
            return Failure(Kind.TRANSIENT, "connection")
    return Failure(Kind.PERSISTENT, "client", _LOOK)


def _classify_state(exc: asyncpg.PostgresError) -> Failure:
    state = exc.sqlstate or "08000"
    remedy = _REMEDIES.get(state) or _REMEDIES.get(state[:2]) or ""
    if state == "23505":
        return Failure(Kind.REPEATED, state)
    if state == "23514" and exc.constraint_name is None:
        return Failure(Kind.NO_PARTITION, state)
    if remedy:
        return Failure(Kind.PERSISTENT, state, remedy)
    if state[:2] in ("22", "23"):
        return Failure(Kind.REFUSED, state)
    if state[:2] == "08":
        return Failure(Kind.TRANSIENT, "connection")
    if state[:2] in _TRANSIENT_CLASSES:
        return Failure(Kind.TRANSIENT, state)
    return Failure(Kind.PERSISTENT, state, _LOOK)


def as_transient(exc: BaseException, failed: str = "take a batch") -> TransientStoreError:
    """Return what the flusher gets for `exc`; `failed` is what the database did not do."""
    if isinstance(exc, TransientStoreError):
        return exc
    if isinstance(exc, StoreError):
        return TransientStoreError("store", str(exc), fatal_looking=True)
    failure = classify(exc)
    text = str(exc) or ("no answer in time" if failure.reason == "timeout" else type(exc).__name__)
    if failure.kind in (Kind.TRANSIENT, Kind.NO_PARTITION):
        return TransientStoreError(failure.reason, f"the database did not {failed}: {text}")
    remedy = f": {failure.remedy}" if failure.remedy else ""
    return TransientStoreError(
        failure.reason, f"the database cannot {failed}, {text}{remedy}", fatal_looking=True
    )
