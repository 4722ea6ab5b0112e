"""Hypothesis strategies for frames that have to be accepted, with the fields to find in them.

What a strategy expects is computed before the text is made, so it judges the oracle as well.
"""

import random
from typing import TypeAlias

from hypothesis import strategies as st
from plain_frames import (
    CANDLE,
    KLINE,
    STREAM_NAMES,
    SYMBOL_IDS,
    SYMBOLS,
    TICKER,
    TRADE,
    Members,
    Raw,
    Value,
    compact,
    loose,
    wrapped,
)

Fields: TypeAlias = dict[str, int | bool]

INT64_MAX = 2**63 - 1
FIRST_TIME_MS, LAST_TIME_MS = 946_684_800_000, 4_102_444_800_000
TRADE_END_E8 = 2**63
WIDE_END_E8 = 10**38

TICKER_DECIMALS = {
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
KLINE_DECIMALS = {
    "o": "open",
    "c": "close",
    "h": "high",
    "l": "low",
    "v": "volume",
    "q": "quote_volume",
    "V": "taker_buy_base_volume",
    "Q": "taker_buy_quote_volume",
}


@st.composite
def decimals(draw: st.DrawFn, end_e8: int, signed: bool = False) -> tuple[str, int]:
    """A decimal's text and its value at scale 1e-8, with the extremes often."""
    edges = [0, 1, 99_999_999, 100_000_000, 10**18, 2**63 - 1, end_e8 - 1]
    value = draw(st.sampled_from(edges) | st.integers(0, end_e8 - 1))
    value = min(value, end_e8 - 1)
    whole, fraction = divmod(value, 10**8)
    digits = f"{fraction:08}"
    style = draw(st.integers(0, 7))
    if style == 1:
        digits = digits.rstrip("0")
    elif style == 2:
        digits += "0" * 25
    text = f"{'0' * 41 if style == 3 else ''}{whole}{'.' + digits if digits else ''}"
    if signed and value and draw(st.booleans()):
        return f"-{text}", -value
    return text, value


def ids(lowest: int) -> st.SearchStrategy[int]:
    return st.sampled_from((lowest, 0, 2**32, INT64_MAX)) | st.integers(lowest, INT64_MAX)


@st.composite
def times(draw: st.DrawFn) -> tuple[int, int]:
    """A time as the frame has it (ms or us) and in microseconds."""
    if draw(st.booleans()):
        time_ms = draw(st.integers(FIRST_TIME_MS, LAST_TIME_MS - 1))
        return time_ms, time_ms * 1000
    time_us = draw(st.integers(FIRST_TIME_MS * 1000, LAST_TIME_MS * 1000 - 1))
    return time_us, time_us


@st.composite
def trades(draw: st.DrawFn) -> tuple[Members, Fields]:
    symbol = draw(st.sampled_from(SYMBOLS))
    (event_time, event_us), (trade_time, trade_us) = draw(times()), draw(times())
    price, price_e8 = draw(decimals(TRADE_END_E8))
    quantity, quantity_e8 = draw(decimals(TRADE_END_E8))
    trade_id, maker = draw(ids(0)), draw(st.booleans())
    event = TRADE.replaced(
        E=event_time, s=symbol, t=trade_id, p=price, q=quantity, T=trade_time, m=maker
    )
    best_match = draw(st.sampled_from((True, False, None, 7, "x", Raw(""))))
    event = event.without("M") if best_match == "" else event.replaced(M=best_match)
    return event, {
        "symbol_id": SYMBOL_IDS[symbol],
        "trade_id": trade_id,
        "price_e8": price_e8,
        "quantity_e8": quantity_e8,
        "trade_us": trade_us,
        "event_us": event_us,
        "buyer_is_maker": maker,
    }


@st.composite
def tickers(draw: st.DrawFn) -> tuple[Members, Fields]:
    symbol = draw(st.sampled_from(SYMBOLS))
    stamps = {key: draw(times()) for key in "EOC"}
    numbers = {"F": draw(ids(-1)), "L": draw(ids(-1)), "n": draw(ids(0))}
    amounts = {key: draw(decimals(WIDE_END_E8, signed=key in "pP")) for key in TICKER_DECIMALS}
    values: dict[str, Value] = {"e": "24hrTicker", "s": symbol, **numbers}
    values |= {key: stamp for key, (stamp, _) in stamps.items()}
    values |= {key: text for key, (text, _) in amounts.items()}
    fields: Fields = {
        "symbol_id": SYMBOL_IDS[symbol],
        "event_us": stamps["E"][1],
        "open_us": stamps["O"][1],
        "close_us": stamps["C"][1],
        "first_id": numbers["F"],
        "last_id": numbers["L"],
        "trade_count": numbers["n"],
    }
    fields |= {name: amounts[key][1] for key, name in TICKER_DECIMALS.items()}
    return TICKER.replaced(**values), fields


@st.composite
def klines(draw: st.DrawFn) -> tuple[Members, Fields]:
    symbol = draw(st.sampled_from(SYMBOLS))
    stamps = {key: draw(times()) for key in "EtT"}
    numbers = {"f": draw(ids(-1)), "L": draw(ids(-1)), "n": draw(ids(0))}
    amounts = {key: draw(decimals(WIDE_END_E8)) for key in KLINE_DECIMALS}
    closed = draw(st.booleans())
    values: dict[str, Value] = {"s": symbol, "x": closed, **numbers}
    values |= {key: stamps[key][0] for key in "tT"}
    values |= {key: text for key, (text, _) in amounts.items()}
    fields: Fields = {
        "symbol_id": SYMBOL_IDS[symbol],
        "event_us": stamps["E"][1],
        "open_us": stamps["t"][1],
        "close_us": stamps["T"][1],
        "first_id": numbers["f"],
        "last_id": numbers["L"],
        "trade_count": numbers["n"],
        "is_closed": closed,
    }
    fields |= {name: amounts[key][1] for key, name in KLINE_DECIMALS.items()}
    return KLINE.replaced(E=stamps["E"][0], s=symbol, k=CANDLE.replaced(**values)), fields


@st.composite
def shutdowns(draw: st.DrawFn) -> tuple[Members, Fields]:
    event_time, event_us = draw(times())
    return Members.of(e="serverShutdown", E=event_time), {"event_us": event_us}


EVENT_STRATEGIES = {
    "trade": trades(),
    "ticker": tickers(),
    "kline": klines(),
    "server_shutdown": shutdowns(),
}
KINDS = st.sampled_from(tuple(EVENT_STRATEGIES))

RAW_NUMBERS = st.sampled_from(
    ("0", "-0", "-1", "1.5", "-0.0", "1e5", "-2.5E+10", "1E-7", "9" * 400, "1e99999")
).map(Raw)


def extra_values() -> st.SearchStrategy[Value]:
    """Any JSON value, for keys that nobody asked for."""
    leaves: st.SearchStrategy[Value] = (
        st.none() | st.booleans() | st.integers() | RAW_NUMBERS | st.text(max_size=8)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(st.tuples(st.text(max_size=3), inner), max_size=3).map(Members)
        ),
        max_leaves=6,
    )


@st.composite
def with_extras(draw: st.DrawFn, event: Members) -> Members:
    """Add keys that the object does not have, at its end (`loose` shuffles them in)."""
    taken = {key for key, _ in event} | {"M", "stream", "data"}
    name = st.sampled_from(("a", "b", "X", "nq", "st", "ps", "id", "", "e\u0000")) | st.text(
        max_size=4
    )
    extras = draw(
        st.lists(
            st.tuples(name.filter(lambda key: key not in taken), extra_values()),
            max_size=3,
            # A doubled letter is refused; any other key may stand twice.
            unique_by=lambda pair: pair[0] if len(pair[0]) == 1 else object(),
        )
    )
    own = ((key, draw(with_extras(v)) if isinstance(v, Members) else v) for key, v in event)
    return Members([*own, *extras])


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, str, Fields]:
    """Any frame that has to be accepted: its bytes, its kind, its fields."""
    kind = draw(KINDS)
    event, fields = draw(EVENT_STRATEGIES[kind])
    if draw(st.booleans()):
        event = draw(with_extras(event))
    if draw(st.booleans()):
        event = wrapped(event, STREAM_NAMES[kind])
    if draw(st.booleans()):
        return compact(event), kind, fields
    # Layout needs many small choices: a seeded generator makes them, far cheaper than draws.
    return loose(event, random.Random(draw(st.integers(0, 2**32)))), kind, fields
