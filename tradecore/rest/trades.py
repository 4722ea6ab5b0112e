"""The venue's REST answers as rows: pages of trades, newest ids, one-minute klines."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tradecore import _history
from tradecore.rest.budget import RestError
from tradecore.rest.client import TRIES, WAIT_S, Params, RestClient, json_list

PAGE = 1000
"""Most rows that the venue gives at once."""
TRADES_WEIGHT = 25
KLINES_WEIGHT = 2
HANGS_S = 4.0
"""A page that has not come by then is asked for a second time."""
RESERVE = 300
"""Weight of the minute that long work leaves to short questions."""

_MINUTE_US = 60_000_000
_UNKNOWN_SYMBOL = (-1100, -1121)


@dataclass(frozen=True, slots=True)
class Page:
    """Trades of one symbol by ascending id: TRADE_DTYPE with symbol_id, recv_ns, sequence 0."""

    symbol: str
    rows: NDArray[Any]

    @property
    def first_id(self) -> int | None:
        """Id of the first trade, None when there is none."""
        return int(self.rows["trade_id"][0]) if len(self.rows) else None

    @property
    def last_id(self) -> int | None:
        """Id of the last trade, None when there is none."""
        return int(self.rows["trade_id"][-1]) if len(self.rows) else None

    @property
    def jumps(self) -> list[tuple[int, int]]:
        """Ranges (first, last) of ids that are missing between the first and the last."""
        ids = self.rows["trade_id"]
        before = np.flatnonzero(np.diff(ids) > 1)
        return [(int(ids[i]) + 1, int(ids[i + 1]) - 1) for i in before]


async def historical(client: RestClient, symbol: str, from_id: int, limit: int = PAGE) -> Page:
    """Return up to `limit` trades from `from_id` on, as far as the venue still has them.

    The page begins later than `from_id` when older ones are gone, is empty when none is newer, and
    lags behind the stream. Raises RestError.
    """
    params: Params = {"symbol": symbol, "fromId": from_id, "limit": limit}
    body = await client.get(
        "/api/v3/historicalTrades",
        params,
        TRADES_WEIGHT,
        reserve=RESERVE,
        wait_s=180.0,
        hangs_s=HANGS_S,
    )
    page = _page(symbol, body)
    if page.first_id is not None and page.first_id < from_id:
        raise _broken(symbol, f"asked for ids from {from_id}, the page begins at {page.first_id}")
    return page


async def newest(client: RestClient, symbol: str, limit: int = PAGE) -> Page:
    """Return the newest `limit` trades, from the venue's memory. Raises RestError."""
    params: Params = {"symbol": symbol, "limit": limit}
    return _page(symbol, await client.get("/api/v3/trades", params, TRADES_WEIGHT))


async def last_ids(client: RestClient, symbols: Sequence[str]) -> dict[str, int]:
    """Return the newest trade id of each symbol that the venue lists; -1: no trade in 24 hours.

    One request: weight 2 for up to 20 symbols, 40 for up to 100, 80 for more. One symbol that the
    venue does not list spoils the list; then all symbols are asked for. Raises RestError.
    """
    asked = list(dict.fromkeys(symbols))
    params: Params = {"type": "MINI"}
    path = "/api/v3/ticker/24hr"
    if not asked:
        return {}
    if len(asked) > 100:
        body = await client.get(path, params, 80)
    else:
        try:
            listed: Params = {**params, "symbols": json_list(asked)}
            body = await client.get(path, listed, 2 if len(asked) <= 20 else 40)
        except RestError as error:
            if error.code not in _UNKNOWN_SYMBOL or len(asked) == 1:
                if error.code in _UNKNOWN_SYMBOL:
                    return {}
                raise
            body = await client.get(path, params, 80)
    found: dict[str, int] = {}
    wanted = set(asked)
    for one in _list("ticker/24hr", body):
        name = one.get("symbol") if isinstance(one, dict) else None
        if name in wanted:
            last_id = one.get("lastId")
            if type(last_id) is not int or not -1 <= last_id < 2**63:
                raise _broken(name, f"ticker/24hr tells the last id {last_id!r}")
            found[name] = last_id
    return found


async def klines(client: RestClient, symbol: str, start_us: int, end_us: int) -> NDArray[Any]:
    """Return the one-minute klines that open in `start_us` <= open < `end_us`, as KLINE_DTYPE.

    first_id and last_id are -1, for REST does not tell them; recv_ns is 0, event_us the venue's
    time when it was asked. Those that were over by then have FLAG_CLOSED. Raises RestError.
    """
    pages = [rows async for rows in _kline_pages(client, symbol, start_us, end_us)]
    return np.concatenate([_history.kline_rows([], 0), *pages])


async def first_traded_us(
    client: RestClient, symbol: str, start_us: int, end_us: int
) -> int | None:
    """Return when the first minute with a trade opens in `start_us` <= open < `end_us`, if any.

    Tells what the venue once had, also where it gives the trades no longer. Raises RestError.
    """
    async for rows in _kline_pages(client, symbol, start_us, end_us):
        for i in np.flatnonzero(rows["trade_count"])[:1]:
            return int(rows["open_us"][i])
    return None


async def _kline_pages(
    client: RestClient, symbol: str, start_us: int, end_us: int
) -> AsyncIterator[NDArray[Any]]:
    now_us = await venue_time_us(client)
    end_us = min(end_us, now_us)
    while start_us < end_us:
        params: Params = {
            "symbol": symbol,
            "interval": "1m",
            "startTime": -(-start_us // 1000),
            "endTime": (end_us - 1) // 1000,
            "limit": PAGE,
        }
        body = await client.get("/api/v3/klines", params, KLINES_WEIGHT)
        try:
            rows = _history.kline_rows(_list("klines", body), now_us)
        except ValueError as error:
            raise _broken(symbol, f"klines: {error}") from error
        opens = rows["open_us"]
        if len(rows) and (opens[0] < start_us or opens[-1] >= end_us):
            raise _broken(symbol, "klines of other minutes than were asked for")
        yield rows
        if len(rows) < PAGE:
            break
        start_us = int(opens[-1]) + _MINUTE_US


async def venue_time_us(client: RestClient, *, wait_s: float = WAIT_S, tries: int = TRIES) -> int:
    """Return the venue's clock in microseconds since 1970 (weight 1). Raises RestError."""
    body = await client.get("/api/v3/time", wait_s=wait_s, tries=tries)
    try:
        return _history.time_us(orjson.loads(body)["serverTime"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"{client.base_url} does not answer as the venue does: time is {body[:80]!r}"
        raise RestError("broken", f"{text}; check BINANCE_REST_URL") from error


def _page(symbol: str, body: bytes) -> Page:
    try:
        return Page(symbol, _history.trade_rows(_list(symbol, body)))
    except ValueError as error:
        raise _broken(symbol, str(error)) from error


def _list(what: str, body: bytes) -> list[Any]:
    """Read a JSON list. Money in it is text; a number is refused where money should be."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _broken(what, f"the answer is no JSON ({error})") from error
    if not isinstance(found, list):
        raise _broken(what, f"the answer is no list: {body[:80]!r}")
    return found


def _broken(what: str, text: str) -> RestError:
    return RestError(
        "broken", f"{what}: {text}. Nothing of it is stored; it is not what the venue documents"
    )
