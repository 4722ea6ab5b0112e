"""The codec's slow path: any legal spelling of a frame means the same."""

import random
import re

import pytest
from codec_check import Check
from frame_strategies import Fields, extra_values, frames
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_frames import (
    CONTROLS,
    EVENTS,
    KLINE,
    SYMBOLS,
    TRADE,
    Members,
    Raw,
    Value,
    compact,
    loose,
    wrapped,
)

from tradecore._fastparse import FrameError, parse_event

check = Check()

HYPOTHESIS = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@HYPOTHESIS
@given(made=frames())
def test_made_frames_are_read_exactly(made: tuple[bytes, str, Fields]) -> None:
    payload, kind, fields = made
    assert check(payload) == (kind, fields)


@HYPOTHESIS
@given(made=frames(), data=st.data())
def test_made_frames_with_bytes_changed_give_what_the_oracle_gives(
    made: tuple[bytes, str, Fields], data: st.DataObject
) -> None:
    payload = bytearray(made[0])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    check(bytes(payload))


@HYPOTHESIS
@given(value=extra_values(), seed=st.integers(0, 2**32))
def test_any_json_value_may_stand_under_a_key_nobody_needs(value: Value, seed: int) -> None:
    event = Members([*TRADE, ("extra", value)])
    assert check(loose(wrapped(event), random.Random(seed))) is not None


@HYPOTHESIS
@given(value=extra_values(), key=st.sampled_from([key for key, _ in TRADE]))
def test_any_json_value_may_turn_up_under_a_needed_key(value: Value, key: str) -> None:
    check(compact(TRADE.replaced(**{key: value})))
    check(compact(wrapped(value)))


@pytest.mark.parametrize("kind", list(EVENTS))
def test_the_slow_path_alone_takes_other_forms(kind: str) -> None:
    payload = compact(Members(reversed(EVENTS[kind])))
    assert check(payload) is not None
    with pytest.raises(FrameError) as caught:
        parse_event(payload, check.table, "fast")
    assert caught.value.cause == "not_fast"


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_spelling_of_a_symbol_names_it(symbol: str) -> None:
    units = symbol.encode("utf-16-be").hex()
    escaped = "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
    for spelling in (symbol, escaped, escaped.upper().replace("U", "u")):
        for kind in ("trade", "ticker"):
            found = check(compact(EVENTS[kind].replaced(s=Raw(f'"{spelling}"'))))
            assert found is not None
            assert found[1]["symbol_id"] == SYMBOLS.index(symbol)


@pytest.mark.parametrize("pair", ["\\ud833\\ue11e", "\\ud835\\ud91e", "\\udd1e\\ud834"])
def test_halves_that_are_no_pair_do_not_add_up_to_a_symbol(pair: str) -> None:
    """Blind arithmetic on each of these gives U+1D11E, as \\ud834\\udd1e does."""
    symbol = SYMBOLS[4]
    assert symbol[0] == "\U0001d11e"
    for spelling, accepted in (("\\ud834\\udd1e", True), (pair, False)):
        payload = compact(TRADE.replaced(s=Raw(f'"{spelling}{symbol[1:]}"')))
        assert (check(payload) is not None) == accepted


def test_escapes_may_stand_in_every_key_and_string() -> None:
    plain = compact(KLINE)
    spelled = re.sub(rb'(?<=")[0-9A-Za-z]', lambda found: b"\\u%04x" % found[0][0], plain)
    assert spelled.count(b"\\u") == 21 + 13  # keys and strings of a kline
    assert check(spelled) == check(plain) is not None


@pytest.mark.parametrize("key", [key for key, _ in TRADE if key != "M"])
def test_a_key_doubled_by_an_escape_is_doubled(key: str) -> None:
    again = Raw(compact(TRADE.value(key)).decode())
    text = compact(TRADE).decode()[:-1] + f',"\\u{ord(key):04x}":{again}}}'
    assert check(text.encode()) is None


@pytest.mark.parametrize("key", ["M", "x", "Z"])
def test_a_doubled_letter_is_refused_though_nobody_needs_it(key: str) -> None:
    event = Members([*TRADE.without("M"), (key, True), (key, True)])
    assert check(compact(event)) is None


@pytest.mark.parametrize("key", ["", "ee", "stream_", "\u0000", "\ud7ff"])
def test_a_doubled_key_that_nobody_needs_is_no_harm(key: str) -> None:
    event = Members([*TRADE, (key, 1), (key, [2])])
    assert check(compact(event)) == check(compact(TRADE))


def test_keys_of_a_reply_inside_an_event_do_not_make_it_a_reply() -> None:
    for key in ("id", "result", "error", "code"):
        assert check(compact(Members([(key, 1), *TRADE]))) == check(compact(TRADE))


@pytest.mark.parametrize("payload", CONTROLS)
def test_a_reply_that_is_wrapped_is_no_reply(payload: bytes) -> None:
    assert check(compact(wrapped(Raw(payload.decode())))) is None


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"e":', "}]")])
def test_nesting_is_bounded(opening: str, closing: str) -> None:
    """A value may stand at depth 64, no deeper; no depth hurts the stack."""
    levels = opening.count("[") + opening.count("{")
    for count in (1, 10, 31, 60, 62, 63, 64, 65, 66, 100, 1000, 300_000):
        nested = Raw(opening * (count // levels) + "1" + closing * (count // levels))
        depth = 1 + count // levels * levels
        for frame, own in (
            (compact(Members([*TRADE, ("x", nested)])), 0),
            (compact(wrapped(Members([*TRADE, ("x", nested)]))), 1),
            (compact(Members([*wrapped(TRADE), ("x", nested)])), 0),
        ):
            assert (check(frame) is not None) == (own + depth <= 64), count


def test_unclosed_nesting_is_refused() -> None:
    for opening in (b"[", b'{"a":', b'{"data":'):
        assert check(opening * 200_000) is None


@pytest.mark.parametrize(
    "text",
    [
        *('"\\ud800"', '"\\udc00"', '"\\ud800\\ud800"', '"\\udfff\\ud83d"', '"\\ud83dx"'),
        *('"\\ud83d\\"', '"\\u12"', '"\\u12g4"', '"\\U0041"', '"\\x41"', '"\\', '"\t"', '"\x7f"'),
        *("-", "+1", ".5", "5.", "1e", "1e+", "0x1", "00", "-01", "1.e1", "Infinity", "-Infinity"),
        *("NaN", "nul", "nulll", "tru", "True", "undefined", "'x'", "[1,]", "[,1]", "[1 2]", "[1}"),
        *('{"a"}', '{"a":}', '{"a":1,}', "{a:1}", '{"a" 1}', "{,}", "{1:1}", "", "/**/1", "1//"),
    ],
)
def test_what_is_almost_json_gives_what_the_oracle_gives(text: str) -> None:
    check(compact(Members([("x", Raw(text)), *TRADE])))
    check(compact(Members([*TRADE, ("x", Raw(text))])))
    check(compact(wrapped(Members([*TRADE, ("x", Raw(text))]))))
    check(compact(TRADE.replaced(p=Raw(text), s=Raw(text))))
    check(text.encode())


@pytest.mark.parametrize(
    ("sequence", "valid"),
    [
        *((b"\xc2\x80", True), (b"\xdf\xbf", True), (b"\xe0\xa0\x80", True)),
        *((b"\xed\x9f\xbf", True), (b"\xee\x80\x80", True), (b"\xef\xbf\xbf", True)),
        *((b"\xf0\x90\x80\x80", True), (b"\xf4\x8f\xbf\xbf", True)),
        *((b"\x80", False), (b"\xbf", False), (b"\xc0\x80", False), (b"\xc1\xbf", False)),
        *((b"\xe0\x9f\xbf", False), (b"\xed\xa0\x80", False), (b"\xed\xbf\xbf", False)),
        *((b"\xf0\x8f\xbf\xbf", False), (b"\xf4\x90\x80\x80", False), (b"\xf5\x80\x80\x80", False)),
        *((b"\xc2", False), (b"\xe2\x82", False), (b"\xf0\x9f\x98", False), (b"\xff", False)),
    ],
)
def test_utf8_is_checked_everywhere(sequence: bytes, valid: bool) -> None:
    plain = compact(Members([("x", "#"), *TRADE]))
    frames = [
        plain.replace(b"#", sequence),
        plain.replace(b'"x"', b'"%s"' % sequence),
        compact(wrapped(Members([*TRADE, ("x", ["#"])]))).replace(b"#", sequence),
        compact(wrapped(TRADE, "#@trade")).replace(b"#", sequence),
        compact(wrapped(EVENTS["kline"], "#@kline_1m")).replace(b"#", sequence),
    ]
    for frame in frames:
        assert (check(frame) is not None) == valid, frame
    assert check(compact(TRADE) + sequence) is None
    assert check(sequence) is None
