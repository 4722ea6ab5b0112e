"""What commands that write trades share: the database beside a daemon, progress, points in time."""

import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tradecore import clock
from tradecore.commands import print_json, start_embedded
from tradecore.errors import UsageError
from tradecore.settings import Settings
from tradecore.values import Secret, duration

if TYPE_CHECKING:
    from tradecore.store.store import Store

PROGRESS_S = 5.0
_POOL_SIZE = 6
_LONGEST_S = 100 * 365 * 86_400
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@asynccontextmanager
async def open_store(settings: Settings, *, make: bool) -> AsyncIterator["Store"]:
    """Open the database as the daemon does, also while one runs; its embedded server is shared.

    With `make` an embedded database that is not there is made. Raises StoreError or DataDirError.
    """
    from tradecore._symbols import SymbolTable
    from tradecore.store.store import Store

    async with AsyncExitStack() as stack:
        dsn = settings.database_url
        if dsn is None:
            dsn = Secret(await start_embedded(settings, stack, make=make))
        pool_size = min(settings.db_pool_size, _POOL_SIZE)
        store = Store(replace(settings, database_url=dsn, db_pool_size=pool_size), SymbolTable())
        stack.push_async_callback(store.close)
        await store.open()
        yield store


def moment(option: str, text: str) -> int:
    """Return the time that an option names, in microseconds since 1970.

    An ISO date or date and time, UTC unless it says otherwise, or how long ago, such as 3d.
    Raises UsageError.
    """
    now = datetime.fromtimestamp(clock.wall_ns() / 1e9, UTC)
    try:
        if re.fullmatch(r"[0-9]+\s*[A-Za-z]+", text):
            at = now - timedelta(seconds=duration(1, _LONGEST_S, "3d")(text))
        else:
            at = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is no time: give a date (2026-01-31), a date and time in UTC"
            " (2026-01-31T08:00) or how long ago (3d, 12h)"
        ) from None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    if at < _EPOCH or at > now + timedelta(days=1):
        raise UsageError(f"{option} {text} is out of range: give a time between 1970 and now")
    return (at - _EPOCH) // timedelta(microseconds=1)


def shown(time_us: int) -> str:
    """Return a time as an operator reads it: UTC, to the second."""
    return f"{_EPOCH + timedelta(microseconds=time_us):%Y-%m-%d %H:%M:%S}Z"


class Progress:
    """A bar on a terminal, a JSON line every few seconds elsewhere; lines go above the bar."""

    def __init__(self, what: str, unit: str = " trades") -> None:
        """Begin; `what` stands before the bar."""
        self.on_terminal = sys.stdout.isatty()
        self._next_ns = clock.mono_ns() + int(PROGRESS_S * 1e9)
        self._bar: Any = None
        if self.on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(desc=what, unit=unit, unit_scale=True, leave=False, file=sys.stdout)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int | None, **fields: Any) -> None:
        """Show how far it is; `fields` come beside it, in JSON."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.n = done
            self._bar.refresh()
        elif clock.mono_ns() >= self._next_ns:
            self._next_ns = clock.mono_ns() + int(PROGRESS_S * 1e9)
            print_json("progress", {"done": done, "total": total, **fields})

    def tell(self, event: str, line: str, **fields: Any) -> None:
        """Print a line on a terminal, the fields as JSON elsewhere."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print_json(event, fields)
