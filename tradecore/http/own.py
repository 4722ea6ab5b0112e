"""tradecore's own questions: /api/coverage (what is stored and what is missing), /api/stats."""

from collections.abc import Callable
from typing import Any

import orjson

from tradecore import clock
from tradecore.http import venue_errors
from tradecore.http.market import Body, Endpoint
from tradecore.http.parameters import Names, Query
from tradecore.snapshot import Snapshot
from tradecore.store import statistics
from tradecore.store.reader import Reader

_KEEP_STATISTICS_S = 10.0
"""Sizes are read from the file system: not for every request."""


class Own:
    """Answers about the record itself; `endpoints` has them by path below /api/.

    Times are microseconds since 1970 where the name ends in _us.
    """

    def __init__(self, reader: Reader, snapshot: Callable[[], Snapshot]) -> None:
        self._reader = reader
        self._snapshot = snapshot
        self._statistics: tuple[int, dict[str, Any]] | None = None
        self.endpoints = {
            "coverage": Endpoint(
                Names((), ("symbol", "fromId", "limit")), self._coverage, lambda _one, _more: 5
            ),
            "stats": Endpoint(Names(), self._stats, lambda _one, _more: 5),
        }

    async def _coverage(self, query: Query) -> Body:
        """All symbols in short, or one with its ranges and open holes, page by page."""
        symbol = query.symbol() if "symbol" in query else None
        if symbol is None and ("fromId" in query or "limit" in query):
            raise venue_errors.bad_combination()
        from_id, limit = query.trade_id("fromId") or 0, query.limit()
        async with self._reader.session() as conn:
            body: dict[str, Any] = dict(await statistics.horizon(conn))
            if symbol is None:
                body["symbols"] = orjson.Fragment(await statistics.coverage_of_all(conn))
            elif (found := await statistics.coverage_of(conn, symbol)) is None:
                raise venue_errors.bad_symbol()
            else:
                body |= found
                body["range_count"] = body.pop("ranges")
                body["hole_count"] = body.pop("holes")
                body |= await statistics.coverage_page(conn, symbol, from_id, limit)
        return Body(orjson.dumps(body))

    async def _stats(self, _query: Query) -> Body:
        now_ns = clock.mono_ns()
        kept = self._statistics
        if kept is None or now_ns - kept[0] > _KEEP_STATISTICS_S * 1e9:
            async with self._reader.session() as conn:
                body = await statistics.table_statistics(conn)
                body |= await statistics.horizon(conn)
                body |= await statistics.totals(conn)
            self._statistics = kept = now_ns, body
        snapshot = self._snapshot()
        live = {
            "level": snapshot.database.level,
            "server_version": snapshot.database.server_version,
            "lag_s": round(snapshot.ring.oldest_age_s, 3),
            "trades_received_per_s": round(snapshot.received_per_s, 1),
            "trades_stored_per_s": round(snapshot.stored_per_s, 1),
        }
        return Body(orjson.dumps({**live, **kept[1]}))
