"""Plain frames of every kind, and two ways to write a frame down.

A frame starts as a Python value (`Members` for an object, so that keys may repeat) and becomes
bytes by `compact` (the venue's form) or `loose` (the same meaning in any other legal spelling).
"""

import json
import random
from collections.abc import Callable
from typing import TypeAlias, Union

Value: TypeAlias = Union[bool, int, str, "Raw", list["Value"], "Members", None]

SYMBOLS = (
    "BTCUSDT",
    "1000SATSFDUSD",
    "币安人生USDT",
    "这是测试币456",
    "\U0001d11e\u00e9\u2028USDT",
    "L" * 40,
    "Z",
)
"""ASCII; characters of three, of four and of two bytes; the longest and the shortest."""

SYMBOL_IDS = {symbol: number for number, symbol in enumerate(SYMBOLS)}


class Raw(str):
    """JSON text that is written as it stands."""


class Members(tuple[tuple[str, "Value"], ...]):
    """An object: its pairs in order; keys may repeat."""

    @classmethod
    def of(cls, **pairs: Value) -> "Members":
        return cls(pairs.items())

    def replaced(self, **changes: Value) -> "Members":
        """Return a copy with other values in the same places."""
        assert changes.keys() <= {key for key, _ in self}, changes
        return Members((key, changes.get(key, value)) for key, value in self)

    def without(self, key: str) -> "Members":
        assert any(name == key for name, _ in self), key
        return Members(pair for pair in self if pair[0] != key)

    def doubled(self, key: str) -> "Members":
        return Members([*self, (key, self.value(key))])

    def value(self, key: str) -> Value:
        return next(value for name, value in self if name == key)


# --- one plain event of each kind, keys in the venue's documented order ---

TRADE = Members.of(
    e="trade",
    E=1723161255343,
    s="BTCUSDT",
    t=3735683259,
    p="61837.63000000",
    q="0.02000000",
    T=1723161255342,
    m=True,
    M=True,
)
TICKER = Members(
    [
        *Members.of(e="24hrTicker", E=1723161255343, s="BTCUSDT"),
        ("p", "-1437.89000000"),
        ("P", "-2.071"),
        *((key, f"{60 + n}.{n:08}") for n, key in enumerate("wxcQbBaAohlvq")),
        *Members.of(O=1723074855340, C=1723161255340, F=3735683000, L=3735683259, n=260),
    ]
)
CANDLE = Members.of(
    t=1723161240000,
    T=1723161299999,
    s="BTCUSDT",
    i="1m",
    f=3735683000,
    L=3735683259,
    o="61837.63000000",
    c="61840.00000000",
    h="61841.50000000",
    l="61830.00000000",
    v="12.34500000",
    n=260,
    x=False,
    q="763412.12345678",
    V="6.10000000",
    Q="377000.00000001",
    B="0",
)
KLINE = Members.of(e="kline", E=1723161255343, s="BTCUSDT", k=CANDLE)
SHUTDOWN = Members.of(e="serverShutdown", E=1770123456789)
EVENTS = {"trade": TRADE, "ticker": TICKER, "kline": KLINE, "server_shutdown": SHUTDOWN}

STREAM_NAMES = {
    "trade": "btcusdt@trade",
    "ticker": "btcusdt@ticker",
    "kline": "btcusdt@kline_1m",
    "server_shutdown": "!serverShutdown",
}

CONTROLS = (
    b'{"result":null,"id":1}',
    b'{"result":["btcusdt@trade"],"id":3}',
    b'{"result":true,"id":"a1b2"}',
    b'{"code":0,"msg":"Unknown property","id":4}',
    b'{"code":3,"msg":"Invalid JSON: expected value at line 1 column 1"}',
    b'{"error":{"code":2,"msg":"Invalid request: invalid stream"},"id":1}',
    b'{"error":{"code":2,"msg":"Invalid request"},"id":null}',
    b' {"id" : 9,\n"error":{"msg":"x","code":-1}} ',
)


def wrapped(event: Value, stream: str = "btcusdt@trade") -> Members:
    """Return `event` as the combined mode carries it."""
    return Members.of(stream=stream, data=event)


def in_microseconds(event: Members) -> Members:
    """Return `event` as `timeUnit=MICROSECOND` delivers it."""

    def in_us(value: Value) -> Value:
        return value * 1000 + 321 if isinstance(value, int) and value > 10**12 else value

    return Members(
        (key, in_microseconds(value) if isinstance(value, Members) else in_us(value))
        for key, value in event
    )


# --- writing ---


def compact(value: Value) -> bytes:
    """Write the venue's form: no white space, no escape that JSON does not demand."""
    return _write(value, _plain_string, lambda: "", None).encode()


def loose(value: Value, dice: random.Random) -> bytes:
    """Write the same meaning with shuffled keys, white space and escapes."""

    def space() -> str:
        return "" if dice.random() < 0.7 else dice.choice((" ", "\n", "\r\n", "\t", "   "))

    def string(text: str) -> str:
        rate = dice.choice((0.0, 0.0, 0.0, 0.2, 1.0))
        return f'"{"".join(_loose_character(character, dice, rate) for character in text)}"'

    return f"{space()}{_write(value, string, space, dice)}{space()}".encode()


def _write(
    value: Value,
    string: Callable[[str], str],
    space: Callable[[], str],
    dice: random.Random | None,
) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, str):
        return string(value)
    if isinstance(value, Members):
        pairs = list(value)
        if dice and dice.random() < 0.8:
            dice.shuffle(pairs)
        body = ",".join(
            f"{space()}{string(key)}{space()}:{space()}{_write(item, string, space, dice)}{space()}"
            for key, item in pairs
        )
        return f"{{{body or space()}}}"
    if isinstance(value, list):
        items = (f"{space()}{_write(item, string, space, dice)}{space()}" for item in value)
        return f"[{','.join(items) or space()}]"
    return json.dumps(value)


def _plain_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _loose_character(character: str, dice: random.Random, rate: float) -> str:
    short = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f"}
    short |= {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    must = character in '"\\' or character < " "
    if not must and dice.random() >= rate:
        return character
    if character in short and dice.random() < 0.5:
        return short[character]
    units = character.encode("utf-16-be")
    codes = (int.from_bytes(units[at : at + 2]) for at in range(0, len(units), 2))
    return "".join(f"\\u{code:{dice.choice(('04x', '04X'))}}" for code in codes)


def plain_frames() -> list[bytes]:
    """Return each event raw and combined, in ms and in us, in the venue's form."""
    found = []
    for kind, plain in EVENTS.items():
        for event in (plain, in_microseconds(plain)):
            found += [compact(event), compact(wrapped(event, STREAM_NAMES[kind]))]
    return found


def corpus() -> list[bytes]:
    """Return seeds for mutation: the plain frames, loose spellings of them, control replies."""
    dice = random.Random(20240809)
    # Long fields leave the fast path the least room behind them when such a frame is cut.
    widest = in_microseconds(TRADE).replaced(
        t=10**18 - 1, p="92233720368.54775807", q="92233720368.54775807", m=False, M=False
    )
    long = [widest.replaced(s=SYMBOLS[number]) for number in (2, 5)]
    longest = [compact(event) for event in long]
    longest += [compact(wrapped(long[1], f"{SYMBOLS[5].lower()}@trade"))]
    events = [*EVENTS.values(), *(wrapped(event) for event in EVENTS.values()), long[0]]
    spelled = [loose(event, dice) for event in events for _ in range(3)]
    extra = Raw('{"a":[1,-2.5e-7,"\\u0000\\ud834\\udd1e"],"":[{}]}')
    nested = compact(Members([*TRADE, ("x", extra)]))
    return [*plain_frames(), *spelled, *CONTROLS, nested, *longest]
