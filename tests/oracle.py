"""Slow, independent reading of the venue's frames: json + Decimal, no code shared with the codec.

Tests hold `tradecore._fastparse` against it. Speed does not matter here, being obviously right
does. Where a frame has several faults, which cause is named first is of no importance.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import NoReturn

MAX_DEPTH = 64
"""Deepest value of a frame, the frame's own object being at depth 0."""

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
NUMERIC_38_8_END = 10**30
"""First whole number that a numeric(38,8) does not hold."""

FIRST_TIME_US = 946_684_800 * 1_000_000  # 2000-01-01
END_TIME_US = 4_102_444_800 * 1_000_000  # 2100-01-01

CONTROL_KEYS = frozenset({"result", "error", "code", "id"})

TICKER_KEYS = {
    "p": "price_change",
    "P": "price_change_percent",
    "w": "weighted_average_price",
    "x": "previous_close_price",
    "c": "last_price",
    "Q": "last_quantity",
    "b": "best_bid_price",
    "B": "best_bid_quantity",
    "a": "best_ask_price",
    "A": "best_ask_quantity",
    "o": "open_price",
    "h": "high_price",
    "l": "low_price",
    "v": "volume",
    "q": "quote_volume",
}
SIGNED_TICKER_KEYS = frozenset({"p", "P"})

KLINE_KEYS = {
    "o": "open",
    "h": "high",
    "l": "low",
    "c": "close",
    "v": "volume",
    "q": "quote_volume",
    "V": "taker_buy_base_volume",
    "Q": "taker_buy_quote_volume",
}

_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_INTEGER = re.compile(r"-?[0-9]+")
_EXACT = Context(prec=3_000_000, Emax=MAX_EMAX, Emin=MIN_EMIN)

Fields = dict[str, int | bool]
Event = tuple[str, Fields]


class Refused(Exception):
    """The frame is not one that may be stored; `cause` is the codec's word for it."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(cause)


class Members(list[tuple[str, object]]):
    """A JSON object as the pairs that stand in the text, doubled keys and all."""

    def keys(self) -> set[str]:
        return {key for key, _ in self}

    def refuse_doubled_letters(self) -> None:
        """Refuse an event in which a key of one letter stands twice, needed or not."""
        letters = [name for name, _ in self if re.fullmatch("[A-Za-z]", name)]
        if len(set(letters)) < len(letters):
            raise Refused("duplicate_key")

    def take(self, key: str) -> object:
        """Return the one value of `key`; refuse a missing and a doubled key."""
        values = [value for name, value in self if name == key]
        if not values:
            raise Refused("missing_key")
        if len(values) > 1:
            raise Refused("duplicate_key")
        return values[0]

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise Refused("wrong_type")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise Refused("wrong_type")
        return value

    def object(self, key: str) -> "Members":
        value = self.take(key)
        if not isinstance(value, Members):
            raise Refused("wrong_type")
        return value

    def integer(self, key: str, lowest: int = INT64_MIN) -> int:
        """Return a JSON integer of 64 bits that is at least `lowest`."""
        value = self.take(key)
        if not isinstance(value, Number):
            raise Refused("wrong_type")
        if not _INTEGER.fullmatch(value.text):
            raise Refused("bad_number")
        number = Decimal(value.text)
        if not INT64_MIN <= number <= INT64_MAX:
            raise Refused("out_of_range")
        if number < lowest:
            raise Refused("negative")
        return int(number)

    def time_us(self, key: str) -> int:
        """Return a time in microseconds; milliseconds are told apart by magnitude."""
        number = self.integer(key)
        time_us = number if number > 10**14 else number * 1000
        if not FIRST_TIME_US <= time_us < END_TIME_US:
            raise Refused("bad_time")
        return time_us

    def e8(self, key: str, end: Decimal, signed: bool = False) -> int:
        """Return a decimal below `end` (in magnitude) at scale 1e-8, exactly or not at all."""
        text = self.text(key)
        if not _DECIMAL.fullmatch(text):
            raise Refused("bad_number")
        value = Decimal(text)
        if value < 0 and not signed:
            raise Refused("negative")
        if value.copy_abs() >= end:
            raise Refused("out_of_range")
        scaled = _EXACT.scaleb(value, 8)
        if scaled != _EXACT.to_integral_value(scaled):
            raise Refused("out_of_range")
        return int(scaled)


@dataclass(frozen=True)
class Number:
    """A JSON number as its text."""

    text: str


def read_event(payload: bytes, symbols: Mapping[str, int]) -> Event:
    """Read one frame; `symbols` maps each known symbol to its id. Raise `Refused`."""
    top = _load(payload)
    keys = top.keys()
    if keys & {"stream", "data"} and "e" not in keys:
        top.text("stream")
        return _read_named(top.object("data"), symbols)
    if keys & CONTROL_KEYS and not keys & {"stream", "data", "e"}:
        return "control", {}
    return _read_named(top, symbols)


def _read_named(event: Members, symbols: Mapping[str, int]) -> Event:
    reader = _READERS.get(event.text("e"))
    event.refuse_doubled_letters()
    if reader is None:
        raise Refused("unknown_event")
    return reader(event, symbols)


def _read_trade(event: Members, symbols: Mapping[str, int]) -> Event:
    end = Decimal(2**63).scaleb(-8)
    return "trade", {
        "symbol_id": _symbol_id(event.text("s"), symbols),
        "trade_id": event.integer("t", lowest=0),
        "price_e8": event.e8("p", end),
        "quantity_e8": event.e8("q", end),
        "trade_us": event.time_us("T"),
        "event_us": event.time_us("E"),
        "buyer_is_maker": event.flag("m"),
    }


def _read_ticker(event: Members, symbols: Mapping[str, int]) -> Event:
    end = Decimal(NUMERIC_38_8_END)
    fields: Fields = {
        "symbol_id": _symbol_id(event.text("s"), symbols),
        "event_us": event.time_us("E"),
        "open_us": event.time_us("O"),
        "close_us": event.time_us("C"),
        "first_id": event.integer("F", lowest=-1),
        "last_id": event.integer("L", lowest=-1),
        "trade_count": event.integer("n", lowest=0),
    }
    for key, name in TICKER_KEYS.items():
        fields[name] = event.e8(key, end, signed=key in SIGNED_TICKER_KEYS)
    return "ticker", fields


def _read_kline(event: Members, symbols: Mapping[str, int]) -> Event:
    end = Decimal(NUMERIC_38_8_END)
    candle = event.object("k")
    candle.refuse_doubled_letters()
    if candle.text("i") != "1m":
        raise Refused("unknown_event")
    symbol = event.text("s")
    if candle.text("s") != symbol:
        raise Refused("unknown_symbol")
    fields: Fields = {
        "symbol_id": _symbol_id(symbol, symbols),
        "event_us": event.time_us("E"),
        "open_us": candle.time_us("t"),
        "close_us": candle.time_us("T"),
        "first_id": candle.integer("f", lowest=-1),
        "last_id": candle.integer("L", lowest=-1),
        "trade_count": candle.integer("n", lowest=0),
        "is_closed": candle.flag("x"),
    }
    for key, name in KLINE_KEYS.items():
        fields[name] = candle.e8(key, end)
    return "kline", fields


def _read_shutdown(event: Members, symbols: Mapping[str, int]) -> Event:
    return "server_shutdown", {"event_us": event.time_us("E")}


_READERS: dict[str, Callable[[Members, Mapping[str, int]], Event]] = {
    "trade": _read_trade,
    "24hrTicker": _read_ticker,
    "kline": _read_kline,
    "serverShutdown": _read_shutdown,
}


def _symbol_id(symbol: str, symbols: Mapping[str, int]) -> int:
    if symbol not in symbols:
        raise Refused("unknown_symbol")
    return symbols[symbol]


def _load(payload: bytes) -> Members:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("invalid_utf8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=Members,
            parse_int=Number,
            parse_float=Number,
            parse_constant=_refuse_constant,
        )
    except (json.JSONDecodeError, RecursionError):
        raise Refused("malformed") from None
    if not isinstance(value, Members) or _depth(value) > MAX_DEPTH:
        raise Refused("malformed")
    return value


def _refuse_constant(name: str) -> NoReturn:
    """Python's json takes NaN and Infinity; JSON does not."""
    raise Refused("malformed")


def _depth(value: object) -> int:
    """Return the depth of the deepest value, level by level: no recursion limit is met."""
    depth, level = 0, _children(value)
    while level:
        depth += 1
        level = [child for item in level for child in _children(item)]
    return depth


def _children(value: object) -> list[object]:
    if isinstance(value, Members):
        return [item for _, item in value]
    return value if isinstance(value, list) else []
