"""Faults in the trade streams, each a pure function of the trade's position.

Position `i` counts from 0 at the symbol's first trade; `--drop-every n` hits i = n-1, 2n-1, ... So
both lines of a client get the same faults, a restart changes nothing, and a checker can compute
what must have happened. Junk frames carry ids far in the future (`POISON`): once stored, they show.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

from tradecore.simulate.frames import (
    BINARY,
    CONTINUATION,
    PING,
    TEXT,
    Pairs,
    frame,
    json_object,
    lower,
    trade_pairs,
    wrap,
)
from tradecore.simulate.words import Row

POISON = 10**15
"""Added to the id in junk frames that would otherwise look like a good trade."""
STRANGER = "STRANGERUSDT"
OVERSIZE = 1_200_000

_ROTATIONS = 9


def _every(text: str) -> int:
    return field(default=0, metadata={"help": text})


@dataclass(frozen=True)
class Faults:
    """How often each fault of the trade streams happens; 0 = never."""

    drop_every: int = _every("leave out every n-th trade of a symbol: a gap")
    duplicate_every: int = _every("send every n-th trade twice")
    reorder_every: int = _every("send every n-th trade after the one that follows it")
    garbage_every: int = _every("send a junk frame after every n-th trade, kinds in turn")
    oversize_every: int = _every("send a junk frame > 1 MiB after every n-th trade")
    protocol_violation_every: int = _every("break the WebSocket protocol after every n-th trade")
    fragment_every: int = _every("send every n-th trade in three fragments, a ping between")
    shuffle_keys_every: int = _every("send every n-th trade with its keys in another order")
    whitespace_every: int = _every("send every n-th trade with white space between the tokens")
    escape_every: int = _every(r"send every n-th trade with its symbol in \u escapes")

    @property
    def active(self) -> bool:
        """Tell whether any of them ever happens."""
        return any(getattr(self, f.name) for f in fields(self))

    def dropped(self, position: int) -> bool:
        """Tell whether this trade never reaches the streams."""
        return _hit(self.drop_every, position)

    def delayed(self, position: int) -> bool:
        """Tell whether this trade comes after its successor."""
        return _hit(self.reorder_every, position) and not self.dropped(position)

    def silent(self, position: int) -> bool:
        """Tell whether this trade, as the last one so far, has not been sent."""
        return self.dropped(position) or self.delayed(position)


def _hit(every: int, position: int) -> bool:
    return bool(every) and position % every == every - 1


def render_trade(
    faults: Faults,
    symbol: str,
    position: int,
    row: Row,
    event_us: int,
    combined: bool,
    micro: bool,
    counts: Counter[str],
) -> Iterator[bytes]:
    """Yield the frames that take the place of one trade's frame, and count the faults."""
    if faults.dropped(position):
        counts["drop"] += 1
        return
    pairs = trade_pairs(symbol, row, event_us, micro)
    text = _variant(faults, symbol, position, pairs, combined, counts)
    body = text.encode("utf-8")
    if _hit(faults.fragment_every, position):
        counts["fragment"] += 1
        yield from _fragments(body)
    else:
        yield frame(body)
    if _hit(faults.duplicate_every, position):
        counts["duplicate"] += 1
        yield frame(body)
    if _hit(faults.garbage_every, position):
        turn = position // faults.garbage_every
        counts["garbage"] += 1
        counts[f"garbage {GARBAGE_KINDS[turn % len(GARBAGE_KINDS)]}"] += 1
        yield junk_frame(turn, symbol, row, event_us, combined, micro)
    if not (
        _hit(faults.oversize_every, position) or _hit(faults.protocol_violation_every, position)
    ):
        return
    poisoned = _poisoned(symbol, row, event_us, micro)
    if _hit(faults.oversize_every, position):
        counts["oversize"] += 1
        yield _whole(symbol, [*poisoned, ("z", '"' + "x" * OVERSIZE + '"')], combined)
    if _hit(faults.protocol_violation_every, position):
        turn = position // faults.protocol_violation_every
        kind = VIOLATION_KINDS[turn % len(VIOLATION_KINDS)]
        counts["protocol violation"] += 1
        counts[f"protocol violation {kind}"] += 1
        yield _VIOLATIONS[kind](_text(symbol, poisoned, combined).encode("utf-8"))


def junk_frame(
    turn: int, symbol: str, row: Row, event_us: int, combined: bool, micro: bool
) -> bytes:
    """Return a junk frame that resembles this trade; the kinds follow each other by `turn`."""
    kind = GARBAGE_KINDS[turn % len(GARBAGE_KINDS)]
    return _GARBAGE[kind](symbol, _poisoned(symbol, row, event_us, micro), combined, turn)


def _poisoned(symbol: str, row: Row, event_us: int, micro: bool) -> Pairs:
    return trade_pairs(symbol, (row[0], row[1] + POISON, *row[2:]), event_us, micro)


def _variant(
    faults: Faults,
    symbol: str,
    position: int,
    pairs: Pairs,
    combined: bool,
    counts: Counter[str],
) -> str:
    """Return the event as text: as the venue prints it, or in another valid spelling."""
    if _hit(faults.shuffle_keys_every, position):
        counts["shuffle keys"] += 1
        turn = 1 + position // faults.shuffle_keys_every % (_ROTATIONS - 1)
        payload = json_object(pairs[turn:] + pairs[:turn])
        if combined and turn % 2:
            return f'{{"data":{payload},"stream":"{lower(symbol)}@trade"}}'
        return wrap(f"{lower(symbol)}@trade", payload, combined)
    if _hit(faults.whitespace_every, position):
        counts["whitespace"] += 1
        value = json.loads(_text(symbol, pairs, combined))
        return "\r\n " + json.dumps(value, ensure_ascii=False, indent="\t") + " \n"
    if _hit(faults.escape_every, position):
        counts["escape"] += 1
        escaped = [(k, _escaped(symbol)) if k == "s" else (k, v) for k, v in pairs]
        payload = json_object(escaped)
        if combined:
            return f'{{"stream":{_escaped(lower(symbol) + "@trade")},"data":{payload}}}'
        return payload
    return _text(symbol, pairs, combined)


def _escaped(text: str) -> str:
    units = text.encode("utf-16-be")
    return (
        '"' + "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)) + '"'
    )


def _text(symbol: str, pairs: Pairs, combined: bool) -> str:
    return wrap(f"{lower(symbol)}@trade", json_object(pairs), combined)


def _whole(symbol: str, pairs: Pairs, combined: bool) -> bytes:
    return frame(_text(symbol, pairs, combined).encode("utf-8"))


def _fragments(body: bytes) -> Iterator[bytes]:
    """Cut a message in three at odd places, inside a UTF-8 character too, pings between."""
    first, second = len(body) // 7, len(body) // 2 + 1
    yield frame(body[:first], TEXT, fin=False)
    yield frame(b"between", PING)
    yield frame(body[first:second], CONTINUATION, fin=False)
    yield frame(body[second:], CONTINUATION)


def _replaced(pairs: Pairs, key: str, value: str) -> Pairs:
    return [(k, value) if k == key else (k, v) for k, v in pairs]


_Junk = Callable[[str, Pairs, bool, int], bytes]


def _changed(*choices: tuple[str, str]) -> _Junk:
    """Make a kind of junk: one of the (key, new JSON value) in turn, the rest a good trade."""

    def render(symbol: str, pairs: Pairs, combined: bool, turn: int) -> bytes:
        key, value = choices[turn // len(GARBAGE_KINDS) % len(choices)]
        return _whole(symbol, _replaced(pairs, key, value), combined)

    return render


def _truncated(symbol: str, pairs: Pairs, combined: bool, turn: int) -> bytes:
    body = _text(symbol, pairs, combined).encode("utf-8")
    return frame(body[: 1 + turn * 7 % (len(body) - 1)])


def _invalid_utf8(symbol: str, pairs: Pairs, combined: bool, turn: int) -> bytes:
    body = _text(symbol, pairs, combined).encode("utf-8")
    return frame(body.replace(b'"s":"', b'"s":"\xc3\x28\xff'))


def _missing_key(symbol: str, pairs: Pairs, combined: bool, turn: int) -> bytes:
    gone = "stpqTm"[turn // len(GARBAGE_KINDS) % 6]
    return _whole(symbol, [(k, v) for k, v in pairs if k != gone], combined)


def _doubled_key(symbol: str, pairs: Pairs, combined: bool, turn: int) -> bytes:
    at = turn // len(GARBAGE_KINDS) % 9
    return _whole(symbol, pairs[: at + 1] + pairs[at:], combined)


_GARBAGE: dict[str, _Junk] = {
    "truncated": _truncated,
    "invalid utf-8": _invalid_utf8,
    "binary": lambda s, pairs, combined, _: frame(
        _text(s, pairs, combined).encode("utf-8"), BINARY
    ),
    "unknown event": _changed(("e", '"mystery"'), ("e", '"tradeX"'), ("e", '""')),
    "missing key": _missing_key,
    "doubled key": _doubled_key,
    "exponent": _changed(("p", '"6.1e4"'), ("q", '"1E-3"'), ("t", "1e15"), ("T", "1.7e12")),
    "too large": _changed(
        ("p", '"92233720368.54775808"'),
        ("t", "9223372036854775808"),
        ("q", '"100000000000000000000000000000.0"'),
        ("T", "99999999999999999999"),
    ),
    "too many decimals": _changed(("p", '"1.123456789"'), ("q", '"0.000000001"')),
    "negative": _changed(("t", "-5"), ("p", '"-1.00000000"'), ("q", '"-0.5"'), ("T", "-1")),
    "wrong type": _changed(("p", "null"), ("t", '"x"'), ("m", "1"), ("s", "{}")),
    "stranger": lambda _, pairs, combined, __: _whole(
        STRANGER, _replaced(pairs, "s", f'"{STRANGER}"'), combined
    ),
    "not an object": lambda *_: frame(b"[1,2,3]"),
    "empty": lambda *_: frame(b""),
}
GARBAGE_KINDS = tuple(_GARBAGE)

_VIOLATIONS: dict[str, Callable[[bytes], bytes]] = {
    "reserved bit": lambda body: b"\xc1" + frame(body)[1:],
    "reserved opcode": lambda body: frame(body, 3),
    "lone continuation": lambda body: frame(body, CONTINUATION),
    "long ping": lambda body: frame(body[:130].ljust(130), PING),
    "fragmented ping": lambda body: frame(b"x", PING, fin=False),
    "text inside a fragmented message": lambda body: frame(body, TEXT, fin=False) + frame(body),
}
VIOLATION_KINDS = tuple(_VIOLATIONS)
