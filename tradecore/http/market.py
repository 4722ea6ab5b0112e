"""Market data under the venue's own paths, parameters and shapes, so that its clients work here.

GET /api/v3/… as the venue's page "Public Rest API" says, from what is stored; prices and quantities
are the table's own digits. What tradecore does not record (order book, aggregate trades, accounts)
is refused in the venue's words and never made up.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import orjson

from tradecore import clock
from tradecore.http import venue_errors
from tradecore.http.instruments import instrument_json, rate_limits
from tradecore.http.parameters import Names, Query, trading
from tradecore.store import grids, queries, ticker_queries, trade_queries
from tradecore.store.reader import Reader

_MINUTE_US = 60_000_000
_DAY_US = 1440 * _MINUTE_US
_WINDOW_SYMBOLS_MAX = 100
_INSTRUMENTS_AT_ONCE = 100

_ONE_OR_MORE = ("symbol", "symbols")
_KLINES = Names(("symbol", "interval"), ("startTime", "endTime", "timeZone", "limit"))

_NOT_KEPT = {
    "1s": "Candles of a second are not kept; see /api/v3/historicalTrades.",
    "3d": "Where the venue's candles of three days begin is not documented; see 1d.",
}
NOT_RECORDED = {
    "depth": "The order book is not recorded.",
    "avgPrice": "The venue's average price is not recorded; see /api/v3/ticker?windowSize=5m.",
    "aggTrades": (
        "The venue's aggregate trades and their ids cannot be told from single trades;"
        " see /api/v3/historicalTrades."
    ),
    "historicalBlockTrades": "Block trades are not recorded.",
    "ticker/bookTicker": "The order book is not recorded; see /api/v3/ticker/24hr.",
    "referencePrice": "Reference prices are not recorded.",
    "referencePrice/calculation": "Reference prices are not recorded.",
    "executionRules": "The venue's rules for orders are not recorded.",
}
"""Public endpoints of the venue that are refused, and why."""


class Body(NamedTuple):
    """An answer as JSON."""

    text: bytes
    settled: bool = False
    """Only late trades can change it: it may be kept by the client, and is asked for again."""
    behind: bool = False
    """Stored trades are not in its candles yet: they came late, or many at once."""


class Endpoint(NamedTuple):
    """What is behind a path."""

    names: Names
    answer: Callable[[Query], Awaitable[Body]]
    weight: Callable[[str, str], int]
    """Of the parameters `symbol` and `symbols`, as the venue's pages say."""


class Market:
    """Answers from what is stored; `endpoints` has them by path below /api/v3/."""

    def __init__(
        self, reader: Reader, captured: Callable[[], Sequence[str]], weight_limit: int
    ) -> None:
        """`captured` are the symbols of this moment; `weight_limit` is told, not enforced here."""
        self._reader = reader
        self._captured = captured
        self._weight_limit = weight_limit
        several = (*_ONE_OR_MORE, "type", "symbolStatus")
        info = (*_ONE_OR_MORE, "permissions", "showPermissionSets", "symbolStatus")
        self.endpoints = {
            "ping": Endpoint(Names(), self._ping, _fixed(1)),
            "time": Endpoint(Names(), self._time, _fixed(1)),
            "exchangeInfo": Endpoint(Names((), info), self._exchange_info, _fixed(20)),
            "klines": Endpoint(_KLINES, self._klines, _fixed(2)),
            "uiKlines": Endpoint(_KLINES, self._klines, _fixed(2)),
            "trades": Endpoint(Names(("symbol",), ("limit",)), self._trades, _fixed(25)),
            "historicalTrades": Endpoint(
                Names(("symbol",), ("fromId", "limit")), self._trades, _fixed(25)
            ),
            "ticker/price": Endpoint(
                Names((), (*_ONE_OR_MORE, "symbolStatus")), self._prices, _price_weight
            ),
            "ticker/24hr": Endpoint(Names((), several), self._tickers, _ticker_weight),
            "ticker": Endpoint(Names((), (*several, "windowSize")), self._window, _window_weight),
            "ticker/tradingDay": Endpoint(
                Names((), (*several, "timeZone")), self._trading_day, _window_weight
            ),
        }

    async def _ping(self, _query: Query) -> Body:
        return Body(b"{}")

    async def _time(self, query: Query) -> Body:
        return Body(b'{"serverTime":%d}' % _stamp(_now_us(), query.micro))

    async def _exchange_info(self, query: Query) -> Body:
        asked, status = query.symbols(), query.status()
        if asked is not None and ("permissions" in query or status is not None):
            raise venue_errors.bad_combination()
        captured = self._captured()
        if asked is not None and not set(asked) <= set(captured):
            raise venue_errors.bad_symbol()
        shown = trading(status, captured if asked is None else asked, single=False)
        if "SPOT" not in query.permissions():
            shown = ()
        sets = query.text("showPermissionSets", "true").lower()
        if sets not in ("true", "false"):
            raise venue_errors.bad_data("showPermissionSets")
        head = {
            "timezone": "UTC",
            "serverTime": _stamp(_now_us(), query.micro),
            "rateLimits": rate_limits(self._weight_limit),
            "exchangeFilters": [],
        }
        entries = []
        for number, symbol in enumerate(shown, 1):
            entries.append(instrument_json(symbol, sets == "true"))
            if number % _INSTRUMENTS_AT_ONCE == 0:
                await asyncio.sleep(0)  # the loop has other things to do
        return Body(orjson.dumps(head)[:-1] + b',"symbols":[' + b",".join(entries) + b"]}")

    async def _klines(self, query: Query) -> Body:
        symbol = query.symbol()
        if query.text("interval") in _NOT_KEPT:
            raise venue_errors.unsupported(_NOT_KEPT[query.text("interval")])
        if query.text("interval") not in grids.INTERVALS:
            raise venue_errors.bad_interval()
        grid = grids.grid(query.text("interval"), query.zone_us())
        (start_us, end_us), limit = query.range_us(), query.limit()
        async with self._reader.session() as conn:
            page = await queries.candles(
                *(conn, self._reader.tables, symbol, grid),
                start_us=start_us,
                end_us=end_us,
                limit=limit,
                micro=query.micro,
            )
            low_us = grid.step(grid.floor(_now_us()), -limit) if start_us is None else start_us
            behind = await queries.are_behind(conn, low_us, end_us)
        if page is None:
            return self._nothing(symbol)
        last_us = page.last_us
        is_over = last_us is not None and grid.step(last_us, 1) <= _now_us()
        return Body(page.body, is_over, behind)

    async def _trades(self, query: Query) -> Body:
        symbol, limit, from_id = query.symbol(), query.limit(), query.trade_id("fromId")
        async with self._reader.session() as conn:
            tables, micro = self._reader.tables, query.micro
            span = await queries.trade_span(conn, symbol)
            if span is None:
                return self._nothing(symbol)
            if from_id is None:
                page = await trade_queries.newest_trades(
                    conn, tables, symbol, span.last_us, limit, micro=micro
                )
            else:
                page = await trade_queries.trades_from(
                    conn, tables, symbol, from_id, limit, micro=micro
                )
        return Body(page.body, from_id is not None and page.rows == limit)

    async def _prices(self, query: Query) -> Body:
        asked, symbols = self._asked(query)
        async with self._reader.session() as conn:
            found = await ticker_queries.last_prices(conn, symbols)
        if asked and (lacking := [one for one in symbols if one not in found]):
            if not set(lacking) <= set(self._captured()):
                raise venue_errors.bad_symbol()
            raise venue_errors.unsupported(f"No trade of {lacking[0]} is stored yet.")
        return _listed(query, symbols, found)

    async def _tickers(self, query: Query) -> Body:
        asked, symbols = self._asked(query)
        async with self._reader.session() as conn:
            found = await ticker_queries.newest_tickers(
                conn, symbols, _now_us(), mini=query.is_mini(), micro=query.micro
            )
            lacking = [symbol for symbol in symbols if symbol not in found]
            for symbol in lacking if asked else ():
                if symbol not in self._captured() and not await queries.trade_span(conn, symbol):
                    raise venue_errors.bad_symbol()
        if asked and lacking:
            raise venue_errors.unsupported(
                f"No ticker of {lacking[0]} was captured within a day; see /api/v3/ticker."
            )
        return _listed(query, symbols, found)

    async def _window(self, query: Query) -> Body:
        """The venue's page "Rolling window": it opens at a minute and closes now."""
        now_us = _now_us()
        begin_us = (now_us - _window_us(query)) // _MINUTE_US * _MINUTE_US
        return await self._statistics(query, begin_us, now_us, now_us)

    async def _trading_day(self, query: Query) -> Body:
        zone_us = query.zone_us()
        begin_us = (_now_us() + zone_us) // _DAY_US * _DAY_US - zone_us
        unit_us = 1 if query.micro else 1000
        return await self._statistics(
            query, begin_us, begin_us + _DAY_US, begin_us + _DAY_US - unit_us
        )

    async def _statistics(self, query: Query, begin_us: int, end_us: int, shown_us: int) -> Body:
        asked, symbols = self._asked(query)
        if not asked:
            raise venue_errors.missing_both("symbol", "symbols")
        if len(symbols) > _WINDOW_SYMBOLS_MAX:
            raise venue_errors.bad_data("symbols")
        shown = _stamp(begin_us, query.micro), _stamp(shown_us, query.micro)
        async with self._reader.session() as conn:
            found = await ticker_queries.window_statistics(
                *(conn, self._reader.tables, symbols, begin_us, end_us, shown),
                mini=query.is_mini(),
            )
            for symbol in symbols:
                if symbol in found:
                    continue
                if symbol not in self._captured() and not await queries.trade_span(conn, symbol):
                    raise venue_errors.bad_symbol()
                if "symbol" in query:
                    raise venue_errors.no_window()
        return _listed(query, symbols, found)

    def _asked(self, query: Query) -> tuple[bool, Sequence[str]]:
        """Return whether symbols were named, and those or all."""
        asked, status = query.symbols(), query.status()
        symbols = self._captured() if asked is None else asked
        return asked is not None, trading(status, symbols, single="symbol" in query)

    def _nothing(self, symbol: str) -> Body:
        """Return no rows for a symbol that is captured and of which nothing is stored yet."""
        if symbol not in self._captured():
            raise venue_errors.bad_symbol()
        return Body(b"[]")


def _listed(query: Query, symbols: Sequence[str], found: dict[str, bytes]) -> Body:
    """Return one object where one symbol was asked for, else those that there are, as a list."""
    if "symbol" in query:
        return Body(found[symbols[0]])
    return Body(b"[" + b",".join(found[one] for one in symbols if one in found) + b"]")


def _window_us(query: Query) -> int:
    text = query.text("windowSize", "1d")
    most = {"m": 59, "h": 23, "d": 7}.get(text[-1], 0)
    number = int(text[:-1]) if text[:-1].isascii() and text[:-1].isdecimal() else 0
    if not 1 <= number <= most or text[0] == "0":
        raise venue_errors.bad_data("windowSize")
    return number * {"m": _MINUTE_US, "h": 60 * _MINUTE_US, "d": _DAY_US}[text[-1]]


def _now_us() -> int:
    return clock.wall_ns() // 1000


def _stamp(us: int, micro: bool) -> int:
    return us if micro else us // 1000


def _fixed(weight: int) -> Callable[[str, str], int]:
    return lambda _symbol, _symbols: weight


def _price_weight(symbol: str, _symbols: str) -> int:
    return 2 if symbol else 4


def _ticker_weight(symbol: str, symbols: str) -> int:
    count = 1 if symbol else symbols.count('"') // 2
    if not count or count > 100:
        return 80
    return 2 if count <= 20 else 40


def _window_weight(symbol: str, symbols: str) -> int:
    count = 1 if symbol else symbols.count('"') // 2
    return min(4 * max(count, 1), 200)
