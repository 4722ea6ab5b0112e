"""Exceptions that end a command, each with the exit code that the shell sees.

Everything an operator can meet derives from `TradecoreError`; its text is one sentence that says
what happened, to what, and what to do. Anything else that escapes is a bug in tradecore (exit 1).
"""

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_DATABASE = 3
EXIT_DATA_DIR = 4
EXIT_DIFFERENCE = 5
EXIT_VENUE = 6


class TradecoreError(Exception):
    """Base of all errors with a clear cause outside the code."""

    exit_code = EXIT_BUG


class UsageError(TradecoreError):
    """A wrong command line or a wrong setting."""

    exit_code = EXIT_USAGE


class SettingsError(UsageError):
    """One or more wrong settings; `problems` lists every one of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class StoreError(TradecoreError):
    """The database cannot be used: wrong DSN, a missing right, a wrong schema version."""

    exit_code = EXIT_DATABASE


class TransientStoreError(StoreError):
    """A write that has to be offered again: nothing of it is known to be stored.

    When only the acknowledgement was lost, the next try finds the rows in the ledger. `reason` is
    a SQLSTATE or a short word, a label for metrics. `fatal_looking` marks what will hardly pass
    without an operator (a right revoked, a table gone): the text ends with the remedy and belongs
    in the log as an error.
    """

    def __init__(self, reason: str, message: str, *, fatal_looking: bool = False) -> None:
        self.reason = reason
        self.fatal_looking = fatal_looking
        super().__init__(message)


class DataDirError(TradecoreError):
    """DATA_DIR cannot be used: taken by another daemon, full, or damaged."""

    exit_code = EXIT_DATA_DIR


class DifferenceError(TradecoreError):
    """`verify` found that the table and the ledger disagree."""

    exit_code = EXIT_DIFFERENCE


class VenueError(TradecoreError):
    """The venue cannot be reached or refuses us."""

    exit_code = EXIT_VENUE
