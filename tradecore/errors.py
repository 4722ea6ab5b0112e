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


class DataDirError(TradecoreError):
    """DATA_DIR cannot be used: taken by another daemon, full, or damaged."""

    exit_code = EXIT_DATA_DIR


class DifferenceError(TradecoreError):
    """`verify` found that the table and the ledger disagree."""

    exit_code = EXIT_DIFFERENCE


class VenueError(TradecoreError):
    """The venue cannot be reached or refuses us."""

    exit_code = EXIT_VENUE
