"""Ids that the venue does not have: seen to be passed over, seen again, then closed as absent."""

import logging
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tradecore import clock
from tradecore.backfill.plan import Asked, Jump
from tradecore.backfill.work import FillStats
from tradecore.log import once_per
from tradecore.store.ledger import Span
from tradecore.store.store import Store

log = logging.getLogger(__name__)

_MAX_SUSPECTS = 10_000


class Suspect(NamedTuple):
    """Ids that one reply or dump of the venue passed over."""

    sighting: dict[str, Any]
    due_s: float
    """Monotonic clock from which on a second one confirms it."""

    @property
    def wait_s(self) -> float:
        return self.due_s - clock.mono_ns() / 1e9


class Absences:
    """Ids under suspicion, of all symbols; the oldest are forgotten when they are too many."""

    def __init__(self, store: Store, stats: FillStats, confirm_s: float) -> None:
        """`confirm_s`: between the two replies, or looks at a dump, that close ids."""
        self._store = store
        self._stats = stats
        self._confirm_s = confirm_s
        self._suspects: dict[tuple[str, int, int], Suspect] = {}

    def suspect(self, symbol: str, span: Span) -> Suspect | None:
        """Return what is known against the ids of a hole."""
        return self._suspects.get((symbol, *span))

    def forget(self, symbol: str, span: Span) -> None:
        """Drop the suspicion."""
        self._suspects.pop((symbol, *span), None)

    def sighted(self, symbol: str, jump: Jump, sighting: dict[str, Any]) -> None:
        """Note what passed over ids of a hole."""
        key = symbol, jump.first_id, jump.last_id
        if key not in self._suspects:
            while len(self._suspects) >= _MAX_SUSPECTS:
                self._suspects.pop(next(iter(self._suspects)))
            due_s = clock.mono_ns() / 1e9 + self._confirm_s
            self._suspects[key] = Suspect(sighting, due_s)

    async def close(self, symbol: str, jump: Jump, evidence: dict[str, Any]) -> bool:
        """Close ids as absent and forget them; False when a stored kline counts some of them.

        Raises TransientStoreError.
        """
        ids = jump.first_id, jump.last_id
        about = {"symbol": symbol, "first_id": ids[0], "last_id": ids[1]}
        if await self._store.is_counted(symbol, *ids):
            self.forget(symbol, Span(*ids))
            once_per(log, ("counted", symbol)).warning(
                "the venue passes over trades that its own kline counts; the hole stays open",
                extra={**about, "source": evidence["source"]},
            )
            return False
        closed = await self._store.close_absent(symbol, *ids, evidence)
        self.forget(symbol, Span(*ids))
        if closed:
            self._stats.holes_absent += 1
            self._stats.ids_absent += closed
            log.info(
                "the venue has no such trades; the hole is closed as absent",
                extra={**about, "source": evidence["source"]},
            )
        return True


COUNTED = "a kline of the venue counts these trades, though it gives them no longer"
"""Why a hole stays open that nothing else would fill."""


def sighting(asked: Asked | None, jump: Jump) -> dict[str, Any]:
    """Return what a reply has shown, as it is kept in the ledger."""
    return {
        **({"from_id": asked.from_id, "limit": asked.limit} if asked else {}),
        "id_below": jump.id_below,
        "id_above": jump.id_above,
        "asked_at": _iso(clock.wall_ns()),
    }


def _iso(wall_ns: int) -> str:
    return datetime.fromtimestamp(wall_ns / 1e9, UTC).isoformat(timespec="milliseconds")
