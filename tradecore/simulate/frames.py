"""Rendering: events as the venue prints them, and the WebSocket frames around them.

Payloads are `str`. `trade_frames` is the fast path: it returns whole frames as latin-1 text (a
byte a character), so that thousands of them are joined and encoded in one go.
"""

from collections.abc import Iterable
from functools import lru_cache

from tradecore.simulate.profiles import Profile
from tradecore.simulate.words import E8, Candle, Row

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONTINUATION = 0

Pairs = list[tuple[str, str]]
"""The members of a JSON object in order: key, value as JSON text."""


def frame(payload: bytes, opcode: int = TEXT, fin: bool = True) -> bytes:
    """Return an unmasked WebSocket frame."""
    first = opcode | (0x80 if fin else 0)
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


_TEXT_HEADERS = [
    frame(bytes(size))[: 2 if size < 126 else 4].decode("latin-1") for size in range(2048)
]


def lower(symbol: str) -> str:
    """Lower-case the ASCII letters only, as stream names do."""
    return "".join(c.lower() if c.isascii() else c for c in symbol)


def upper(name: str) -> str:
    """Upper-case the ASCII letters only."""
    return "".join(c.upper() if c.isascii() else c for c in name)


def stamp(us: int, micro: bool) -> int:
    """Return a time in the unit that the client asked for."""
    return us if micro else us // 1000


def decimal(value_e8: int, places: int = 8) -> str:
    """Print an integer at scale 1e-8 with a fixed number of decimals (digits beyond are cut)."""
    sign, value_e8 = ("-", -value_e8) if value_e8 < 0 else ("", value_e8)
    whole, part = divmod(value_e8, E8)
    return f"{sign}{whole}.{f'{part:08d}'[:places]}"


def json_object(pairs: Iterable[tuple[str, str]]) -> str:
    """Print an object compactly, keys in the given order."""
    return "{" + ",".join(f'"{key}":{value}' for key, value in pairs) + "}"


def wrap(stream: str, payload: str, combined: bool) -> str:
    """Put a payload into the wrapper of combined mode, if that is on."""
    return f'{{"stream":"{stream}","data":{payload}}}' if combined else payload


@lru_cache(8192)
def _trade_texts(symbol: str, combined: bool) -> tuple[str, str, str]:
    """Return the parts of a trade frame before `E`, between `E` and `t`, and after `M`."""
    name = symbol.encode("utf-8").decode("latin-1")
    stream = f"{lower(symbol)}@trade".encode().decode("latin-1")
    head = f'{{"stream":"{stream}","data":' if combined else ""
    return f'{head}{{"e":"trade","E":', f',"s":"{name}","t":', "}" if combined else ""


def trade_frames(
    symbol: str, rows: list[Row], event_us: int, combined: bool, micro: bool
) -> list[tuple[int, str]]:
    """Return (trade time, whole frame as latin-1 text) for each row."""
    before, after, end = _trade_texts(symbol, combined)
    lead = f"{before}{stamp(event_us, micro)}{after}"
    divisor = 1 if micro else 1000
    headers = _TEXT_HEADERS
    return [
        (
            us,
            headers[
                len(
                    text := f'{lead}{trade_id},"p":"{price}","q":"{quantity}",'
                    f'"T":{us // divisor},"m":{maker},"M":true}}{end}'
                )
            ]
            + text,
        )
        for us, trade_id, price, quantity, maker in rows
    ]


def trade_pairs(symbol: str, row: Row, event_us: int, micro: bool) -> Pairs:
    """Return the members of a trade event, for the variants that are not the usual text."""
    us, trade_id, price, quantity, maker = row
    return [
        ("e", '"trade"'),
        ("E", str(stamp(event_us, micro))),
        ("s", f'"{symbol}"'),
        ("t", str(trade_id)),
        ("p", f'"{price}"'),
        ("q", f'"{quantity}"'),
        ("T", str(stamp(us, micro))),
        ("m", maker),
        ("M", "true"),
    ]


def kline_payload(
    profile: Profile,
    interval: str,
    span_us: tuple[int, int],
    candle: Candle | None,
    last_price_e8: int,
    closed: bool,
    event_us: int,
    micro: bool,
) -> str:
    """Render a kline event; `span_us` is (open, end), `candle` None = nothing traded so far."""
    c = candle or Candle(-1, -1, *(4 * (last_price_e8,)), 0, 0, 0, 0)
    price, size = profile.quote_precision, profile.base_precision
    body = json_object(
        (
            ("t", str(stamp(span_us[0], micro))),
            ("T", str(stamp(span_us[1], micro) - 1)),
            ("s", f'"{profile.symbol}"'),
            ("i", f'"{interval}"'),
            ("f", str(c.first_id)),
            ("L", str(c.last_id)),
            ("o", f'"{decimal(c.open_e8, price)}"'),
            ("c", f'"{decimal(c.close_e8, price)}"'),
            ("h", f'"{decimal(c.high_e8, price)}"'),
            ("l", f'"{decimal(c.low_e8, price)}"'),
            ("v", f'"{decimal(c.volume_e8, size)}"'),
            ("n", str(c.trade_count)),
            ("x", "true" if closed else "false"),
            ("q", f'"{decimal(c.quote_volume_e8, price)}"'),
            ("V", f'"{decimal(c.taker_base_e8, size)}"'),
            ("Q", f'"{decimal(c.taker_quote_e8, price)}"'),
            ("B", '"0"'),
        )
    )
    event = str(stamp(event_us, micro))
    return json_object((("e", '"kline"'), ("E", event), ("s", f'"{profile.symbol}"'), ("k", body)))


def day_statistics(
    profile: Profile, candle: Candle | None, previous_price_e8: int, last_quantity_e8: int
) -> dict[str, str]:
    """Return the texts of the 24 h statistics by stream key: p P w x c Q b B a A o h l v q.

    A symbol without a trade in the window has zeros everywhere.
    """
    c = candle or Candle(-1, -1, 0, 0, 0, 0, 0, 0, 0, 0)
    price, size = profile.quote_precision, profile.base_precision
    tick_e8 = 10 ** (8 - profile.tick_decimals)
    step_e8 = 10 ** (8 - profile.step_decimals)
    change = c.close_e8 - c.open_e8
    percent_e3 = round(change * 100_000 / c.open_e8) if c.open_e8 else 0
    average = c.quote_volume_e8 * E8 // c.volume_e8 if c.volume_e8 else 0
    return {
        "p": decimal(change, price),
        "P": decimal(percent_e3 * 10**5, 3),
        "w": decimal(average, price),
        "x": decimal(previous_price_e8, price),
        "c": decimal(c.close_e8, price),
        "Q": decimal(last_quantity_e8, size),
        "b": decimal(max(c.close_e8 - tick_e8, tick_e8) if candle else 0, price),
        "B": decimal(37 * step_e8, size),
        "a": decimal(c.close_e8 + tick_e8 if candle else 0, price),
        "A": decimal(41 * step_e8, size),
        "o": decimal(c.open_e8, price),
        "h": decimal(c.high_e8, price),
        "l": decimal(c.low_e8, price),
        "v": decimal(c.volume_e8, size),
        "q": decimal(c.quote_volume_e8, price),
    }


def ticker_payload(
    symbol: str,
    statistics: dict[str, str],
    window_us: tuple[int, int],
    ids: tuple[int, int, int],
    event_us: int,
    micro: bool,
) -> str:
    """Render a 24hrTicker event; `ids` is (first id, last id, count), -1 -1 0 for none."""
    return json_object(
        [("e", '"24hrTicker"'), ("E", str(stamp(event_us, micro))), ("s", f'"{symbol}"')]
        + [(key, f'"{text}"') for key, text in statistics.items()]
        + [("O", str(stamp(window_us[0], micro))), ("C", str(stamp(window_us[1], micro)))]
        + list(zip("FLn", map(str, ids), strict=True))
    )
