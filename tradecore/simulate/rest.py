"""The REST side: the venue's public market data endpoints, weights and error bodies."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import web

from tradecore import clock
from tradecore.simulate.frames import decimal, stamp
from tradecore.simulate.gate import Gate, reply
from tradecore.simulate.options import Options
from tradecore.simulate.summaries import (
    INTERVALS_US,
    Source,
    candle_at,
    day_at,
    downward,
    upward,
)
from tradecore.simulate.words import Candle, Trade

_SYMBOL = re.compile(r"[\w\-.]{1,50}")
_NUMBER = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_MAX_ROWS = 1000
_US_FROM = 10**14  # larger times are microseconds
_STATISTICS = {
    "priceChange": "p",
    "priceChangePercent": "P",
    "weightedAvgPrice": "w",
    "prevClosePrice": "x",
    "lastPrice": "c",
    "lastQty": "Q",
    "bidPrice": "b",
    "bidQty": "B",
    "askPrice": "a",
    "askQty": "A",
    "openPrice": "o",
    "highPrice": "h",
    "lowPrice": "l",
    "volume": "v",
    "quoteVolume": "q",
}
_MINI = ("lastPrice", "openPrice", "highPrice", "lowPrice", "volume", "quoteVolume")


class ApiError(Exception):
    """A reply with status 400 and the venue's error body."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Query(NamedTuple):
    """The checked parameters of a request."""

    values: dict[str, str]
    micro: bool

    def number(self, name: str) -> int | None:
        """Return an integer parameter, None if absent; ApiError if it is none."""
        text = self.values.get(name)
        if text is None:
            return None
        if not _NUMBER.fullmatch(text):
            message = (
                f"Illegal characters found in parameter '{name}'; legal range is '^[0-9]{{1,20}}$'."
            )
            raise ApiError(-1100, message)
        return int(text)

    def limit(self) -> int:
        """Return `limit`, 500 by default, 1,000 at most."""
        number = self.number("limit")
        if number is not None and number <= 0:
            raise ApiError(-1130, "Data sent for parameter 'limit' is not valid.")
        return min(number or 500, _MAX_ROWS)

    def time_us(self, name: str) -> int | None:
        """Return a time parameter, given in ms or us, in us."""
        number = self.number(name)
        return number if number is None or number >= _US_FROM else number * 1000


class Rest:
    """Answers REST requests from a source of trades."""

    def __init__(
        self, gate: Gate, options: Options, source: Source, now_us: Callable[[], int]
    ) -> None:
        self._gate = gate
        self._options = options
        self._source = source
        self._now_us = now_us

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Put the REST paths on a router."""
        for path, weight, handler, allowed in (
            ("ping", _fixed(1), self._ping, ""),
            ("time", _fixed(1), self._time, ""),
            (
                "exchangeInfo",
                _fixed(20),
                self._exchange_info,
                "symbol symbols permissions symbolStatus showPermissionSets",
            ),
            ("trades", _fixed(25), self._newest_trades, "symbol limit"),
            ("historicalTrades", _fixed(25), self._historical_trades, "symbol fromId limit"),
            ("klines", _fixed(2), self._klines, "symbol interval startTime endTime timeZone limit"),
            ("ticker/24hr", _ticker_weight, self._ticker, "symbol symbols type symbolStatus"),
        ):
            answer = self._guarded(weight, handler, set(allowed.split()))
            router.add_get(f"/api/v3/{path}", answer)

    def _guarded(
        self,
        weight: Callable[[dict[str, str]], int],
        handler: Callable[[Query], Any],
        allowed: set[str],
    ) -> Callable[[web.Request], Any]:
        """Wrap a handler with the gate and the error bodies."""

        async def answer(request: web.Request) -> web.Response:
            values = dict(request.query)
            endpoint = request.path.rpartition("/api/v3/")[2]
            headers = await self._gate.enter(endpoint, weight(values))
            if isinstance(headers, web.Response):
                return headers
            unit = request.headers.get("X-MBX-TIME-UNIT", "MILLISECOND").upper()
            try:
                if unknown := values.keys() - allowed:
                    read = len(values) - len(unknown)
                    message = f"read '{read}' parameter(s) but was sent '{len(values)}'."
                    raise ApiError(-1104, f"Not all sent parameters were read; {message}")
                body = handler(Query(values, unit == "MICROSECOND"))
            except ApiError as exc:
                return reply(400, {"code": exc.code, "msg": str(exc)}, headers)
            return self._gate.answer(endpoint, body, headers)

        return answer

    def _symbol(self, text: str | None) -> str:
        if not text:
            message = "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed."
            raise ApiError(-1102, message)
        if not _SYMBOL.fullmatch(text) or any(c.isascii() and c.islower() for c in text):
            legal = "legal range is '^[\\w\\-._&&[^a-z]]{1,50}$'."
            raise ApiError(-1100, f"Illegal characters found in parameter 'symbol'; {legal}")
        listed = not self._options.strict_symbols or text in self._options.symbol_list
        if not listed or not self._source.knows(text):
            raise ApiError(-1121, "Invalid symbol.")
        return text

    def _symbols(self, query: Query) -> list[str]:
        """Return the asked symbols: one, several, or all listed ones."""
        if "symbol" in query.values and "symbols" in query.values:
            message = "Combination of optional parameters invalid. Recommendation: 'symbol'"
            raise ApiError(-1128, message)
        if "symbol" in query.values:
            return [self._symbol(query.values["symbol"])]
        if "symbols" not in query.values:
            return list(self._source.symbols)
        try:
            names = json.loads(query.values["symbols"])
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ApiError(-1100, "Illegal characters found in parameter 'symbols'.")
        return [self._symbol(name) for name in names]

    def _ping(self, query: Query) -> Any:
        return {}

    def _time(self, query: Query) -> Any:
        return {"serverTime": stamp(clock.wall_ns() // 1000, query.micro)}

    def _exchange_info(self, query: Query) -> Any:
        limit = {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1}
        return {
            "timezone": "UTC",
            "serverTime": stamp(clock.wall_ns() // 1000, query.micro),
            "rateLimits": [{**limit, "limit": self._options.weight_limit}],
            "exchangeFilters": [],
            "symbols": [self._instrument(symbol) for symbol in self._symbols(query)],
        }

    def _instrument(self, symbol: str) -> dict[str, Any]:
        profile = self._source.profile(symbol)
        tick = decimal(10 ** (8 - profile.tick_decimals))
        step = decimal(10 ** (8 - profile.step_decimals))
        largest = "9223372036854775807"
        return {
            "symbol": symbol,
            "status": "TRADING",
            "baseAsset": profile.base_asset,
            "baseAssetPrecision": profile.base_precision,
            "quoteAsset": profile.quote_asset,
            "quotePrecision": profile.quote_precision,
            "quoteAssetPrecision": profile.quote_precision,
            "orderTypes": ["LIMIT", "MARKET"],
            "isSpotTradingAllowed": True,
            "isMarginTradingAllowed": False,
            "filters": [
                {
                    "filterType": "PRICE_FILTER",
                    "minPrice": tick,
                    "maxPrice": decimal(int(largest)),
                    "tickSize": tick,
                },
                {
                    "filterType": "LOT_SIZE",
                    "minQty": step,
                    "maxQty": decimal(int(largest)),
                    "stepSize": step,
                },
            ],
            "permissions": [],
            "permissionSets": [["SPOT"]],
        }

    def _newest_trades(self, query: Query) -> Any:
        symbol = self._symbol(query.values.get("symbol"))
        end = self._source.next_id(symbol, self._now_us())
        oldest = self._source.first_id(symbol)
        return self._rows(query, downward(self._source, symbol, oldest, end, query.limit()))

    def _historical_trades(self, query: Query) -> Any:
        """Serve `limit` trades from `fromId` on; ids that are gone are skipped silently."""
        symbol = self._symbol(query.values.get("symbol"))
        limit, asked = query.limit(), query.number("fromId")
        end = self._source.next_id(symbol, self._now_us() - round(self._gate.lag_s * 1e6))
        oldest = self._source.first_id(symbol)
        if self._options.rest_keep:
            oldest = max(oldest, end - self._options.rest_keep)
        if asked is None:
            trades = downward(self._source, symbol, oldest, end, limit)
        else:
            trades = upward(self._source, symbol, max(oldest, asked), end, limit)
        return self._rows(query, trades)

    def _rows(self, query: Query, trades: list[Trade]) -> list[dict[str, Any]]:
        if not trades:
            return []
        price, size = self._precisions(trades[0].symbol)
        return [
            {
                "id": trade.trade_id,
                "price": decimal(trade.price_e8, price),
                "qty": decimal(trade.quantity_e8, size),
                "quoteQty": decimal(trade.quote_e8, price),
                "time": stamp(trade.trade_us, query.micro),
                "isBuyerMaker": trade.buyer_is_maker,
                "isBestMatch": True,
            }
            for trade in trades
        ]

    def _precisions(self, symbol: str) -> tuple[int, int]:
        profile = self._source.profile(symbol)
        return profile.quote_precision, profile.base_precision

    def _klines(self, query: Query) -> Any:
        symbol = self._symbol(query.values.get("symbol"))
        interval = query.values.get("interval")
        if interval is None:
            message = "Mandatory parameter 'interval' was not sent, was empty/null, or malformed."
            raise ApiError(-1102, message)
        if interval not in INTERVALS_US:
            raise ApiError(-1120, "Invalid interval.")
        length_us, limit, now_us = INTERVALS_US[interval], query.limit(), self._now_us()
        start_us, end_us = query.time_us("startTime"), query.time_us("endTime")
        oldest = self._source.first_id(symbol)
        begun = upward(self._source, symbol, oldest, self._source.next_id(symbol, now_us), 1)
        if not begun:
            return []
        first = begun[0].trade_us // length_us
        last = min(now_us, now_us if end_us is None else end_us) // length_us
        if start_us is not None:
            first = max(first, -(-start_us // length_us))
            last = min(last, first + limit - 1)
        first = max(first, last - limit + 1)
        return [
            self._kline(query, symbol, index * length_us, length_us)
            for index in range(first, last + 1)
        ]

    def _kline(self, query: Query, symbol: str, open_us: int, length_us: int) -> list[Any]:
        candle, before_e8 = candle_at(self._source, symbol, open_us, length_us, self._now_us())
        c = candle or Candle(-1, -1, before_e8, before_e8, before_e8, before_e8, 0, 0, 0, 0)
        price, size = self._precisions(symbol)
        return [
            stamp(open_us, query.micro),
            decimal(c.open_e8, price),
            decimal(c.high_e8, price),
            decimal(c.low_e8, price),
            decimal(c.close_e8, price),
            decimal(c.volume_e8, size),
            stamp(open_us + length_us, query.micro) - 1,
            decimal(c.quote_volume_e8, price),
            c.trade_count,
            decimal(c.taker_base_e8, size),
            decimal(c.taker_quote_e8, price),
            "0",
        ]

    def _ticker(self, query: Query) -> Any:
        form = query.values.get("type", "FULL")
        if form not in ("FULL", "MINI"):
            raise ApiError(-1130, "Data sent for parameter 'type' is not valid.")
        days = [self._day(query, symbol, form) for symbol in self._symbols(query)]
        return days[0] if "symbol" in query.values else days

    def _day(self, query: Query, symbol: str, form: str) -> dict[str, Any]:
        day = day_at(self._source, symbol, self._now_us())
        first, last, count = day.ids
        return {
            "symbol": symbol,
            **{
                name: day.statistics[key]
                for name, key in _STATISTICS.items()
                if form == "FULL" or name in _MINI
            },
            "openTime": stamp(day.window_us[0], query.micro),
            "closeTime": stamp(day.window_us[1], query.micro),
            "firstId": first,
            "lastId": last,
            "count": count,
        }


def _fixed(weight: int) -> Callable[[dict[str, str]], int]:
    return lambda _: weight


def _ticker_weight(values: dict[str, str]) -> int:
    """Return 2 for up to 20 symbols, 40 for up to 100, else 80."""
    if "symbol" in values:
        return 2
    asked = values.get("symbols", "").count('"') // 2
    if not asked or asked > 100:
        return 80
    return 2 if asked <= 20 else 40
