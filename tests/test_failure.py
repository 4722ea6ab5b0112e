"""What each kind of failure calls for, told by SQLSTATE and type, never by text."""

import asyncpg
import pytest

from tradecore.errors import StoreError, TransientStoreError
from tradecore.store.failure import Kind, as_transient, classify


def server_error(state: str, **fields: str) -> asyncpg.PostgresError:
    error = asyncpg.PostgresError("a text that says nothing")
    error.sqlstate = state
    for name, value in fields.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        *((state, Kind.TRANSIENT) for state in ("08006", "40001", "40P01", "53300", "55P03")),
        *((state, Kind.TRANSIENT) for state in ("57014", "57P01", "57P03", "58030")),
        *((state, Kind.PERSISTENT) for state in ("53100", "25006", "42501", "42P01", "3D000")),
        *((state, Kind.PERSISTENT) for state in ("28P01", "22P03", "22P04", "XX000", "0A000")),
        *((state, Kind.REFUSED) for state in ("22003", "22008", "22021", "23502")),
        ("23505", Kind.REPEATED),
        ("23514", Kind.NO_PARTITION),
    ],
)
def test_kinds_by_sqlstate(state: str, kind: Kind) -> None:
    error = server_error(state)
    assert classify(error).kind is kind
    outcome = as_transient(error)
    assert outcome.reason == ("connection" if state.startswith("08") else state)
    assert outcome.fatal_looking == (kind not in (Kind.TRANSIENT, Kind.NO_PARTITION))


def test_a_check_constraint_is_no_missing_partition() -> None:
    assert classify(server_error("23514", constraint_name="odd")).kind is Kind.REFUSED


@pytest.mark.parametrize(
    ("error", "reason", "fatal_looking"),
    [
        (TimeoutError(), "timeout", False),
        (ConnectionResetError("reset"), "connection", False),
        (asyncpg.InterfaceError("closed"), "connection", False),
        (asyncpg.InternalClientError("state"), "connection", False),
        (asyncpg.ConnectionDoesNotExistError("gone"), "connection", False),
        (StoreError("no table: run `tradecore migrate`"), "store", True),
        (ZeroDivisionError("a bug"), "client", True),
        (TransientStoreError("symbols", "again"), "symbols", False),
    ],
)
def test_other_failures(error: Exception, reason: str, fatal_looking: bool) -> None:
    outcome = as_transient(error)
    assert (outcome.reason, outcome.fatal_looking) == (reason, fatal_looking)
