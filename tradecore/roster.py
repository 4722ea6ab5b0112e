"""Which symbols this daemon captures, and how that changes while it runs.

Two things change it: SIGHUP, after which SETTINGS_FILE is read again, and, where several daemons
share the symbols, a change of the shards that are ours.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace

from tradecore import shards
from tradecore.capture import Capture
from tradecore.errors import DataDirError, SettingsError
from tradecore.feed.feed import Feed
from tradecore.ring import Ring
from tradecore.settings import VARIABLES, Settings, load

log = logging.getLogger(__name__)

CHANGEABLE = ("symbols", "streams")
"""Settings that a running daemon follows, by SIGHUP."""


def first_symbols(settings: Settings) -> tuple[str, ...]:
    """Return the symbols to begin with: all, or none before the first shards are ours."""
    return () if settings.shards else settings.symbols


class Roster:
    """The symbols of today; `symbols` is replaced as a whole when they change."""

    def __init__(
        self,
        settings: Settings,
        ring: Ring,
        capture: Capture,
        feed: Feed,
        on_added: Callable[[Sequence[str]], Awaitable[None]],
        on_changed: Callable[[Sequence[str]], None],
    ) -> None:
        """`on_added(symbols)` is called before symbols are subscribed that were not so before,
        `on_changed` with the same when the subscriptions are as they should be.
        """
        self.symbols = first_symbols(settings)
        self._settings = settings
        self._ring = ring
        self._capture = capture
        self._feed = feed
        self._on_added = on_added
        self._on_changed = on_changed
        self._held: frozenset[int] = frozenset()
        self._changing = asyncio.Lock()

    @property
    def streams(self) -> tuple[str, ...]:
        """The kinds of streams that are captured."""
        return self._settings.streams

    async def share(self, held: frozenset[int]) -> None:
        """Capture the symbols of these shards."""
        self._held = held
        await self._apply()

    async def reload(self, environ: Mapping[str, str]) -> None:
        """Read the settings again and follow them as far as a running daemon can."""
        try:
            new = load(environ)
        except SettingsError as error:
            log.error(
                "SIGHUP: the settings are wrong; going on with the present ones",
                extra={"problems": error.problems},
            )
            return
        others = [
            VARIABLES[one.name].name
            for one in fields(Settings)
            if one.name not in CHANGEABLE
            and getattr(new, one.name) != getattr(self._settings, one.name)
        ]
        if others:
            log.warning(
                "SIGHUP: these settings change with a restart only", extra={"settings": others}
            )
        changed = replace(self._settings, symbols=new.symbols, streams=new.streams)
        if changed == self._settings:
            if not others:
                log.info("SIGHUP: nothing has changed")
            return
        await self._apply(changed)

    async def _apply(self, changed: Settings | None = None) -> None:
        """Follow new settings, or a new share of the symbols; all or nothing of it."""
        async with self._changing:
            settings = changed or self._settings
            wanted = settings.symbols
            if settings.shards:
                wanted = tuple(shards.symbols_of(wanted, settings.shards, self._held))
            added = [symbol for symbol in wanted if symbol not in self.symbols]
            gone = [symbol for symbol in self.symbols if symbol not in wanted]
            try:
                for symbol in added:
                    self._ring.intern(symbol)
            except DataDirError as error:
                log.error(
                    "symbols cannot be added; going on with the present ones",
                    extra={"error": str(error), "symbols": added},
                )
                return
            self._settings = settings
            self._capture.grow()
            self.symbols = wanted
            await self._on_added(added)
            await self._feed.apply(wanted, settings.streams)
            self._on_changed(added)
            log.info(
                "subscriptions changed",
                extra={"symbols": len(wanted), "added": added, "gone": gone},
            )
