"""The codec's two paths on frames in the venue's form, whole, cut and with one byte changed."""

import random

import pytest
from codec_check import Check, make_table
from plain_frames import (
    CANDLE,
    CONTROLS,
    EVENTS,
    STREAM_NAMES,
    SYMBOLS,
    TRADE,
    compact,
    in_microseconds,
    plain_frames,
    wrapped,
)
from test_oracle import TRADE_FIELDS

from tradecore._fastparse import FrameError, parse_event
from tradecore._symbols import SymbolTable

check = Check()

FAST_KINDS = ("trade", "ticker", "kline")


def test_plain_trade_is_read_as_spelled_by_hand() -> None:
    assert parse_event(compact(TRADE), check.table) == ("trade", TRADE_FIELDS)


@pytest.mark.parametrize("symbol", ["BTCUSDT", "币安人生USDT", "L" * 40])
@pytest.mark.parametrize("kind", FAST_KINDS)
def test_documented_form_takes_the_fast_path(kind: str, symbol: str) -> None:
    event = EVENTS[kind].replaced(s=symbol)
    if kind == "kline":
        event = event.replaced(k=CANDLE.replaced(s=symbol))
    lower = "".join(char.lower() if char.isascii() else char for char in symbol)
    stream = STREAM_NAMES[kind].replace("btcusdt", lower)
    for timed in (event, in_microseconds(event)):
        for frame in (compact(timed), compact(wrapped(timed, stream))):
            found = parse_event(frame, check.table, "fast")
            assert found == check(frame)
            assert found[0] == kind


@pytest.mark.parametrize("payload", plain_frames())
def test_plain_frames_equal_the_oracle(payload: bytes) -> None:
    assert check(payload) is not None


@pytest.mark.parametrize("payload", CONTROLS)
def test_control_replies_of_both_shapes_are_told_apart(payload: bytes) -> None:
    assert check(payload) == ("control", {})


@pytest.mark.parametrize("payload", [*plain_frames(), *CONTROLS])
def test_a_frame_cut_at_any_byte_is_refused(payload: bytes) -> None:
    payload = payload.rstrip()
    for size in range(len(payload)):
        assert check(payload[:size]) is None


def test_trailing_bytes_other_than_white_space_are_refused() -> None:
    for payload in [*plain_frames(), *CONTROLS]:
        for byte in range(256):
            found = check(payload + bytes([byte]))
            assert (found is not None) == (byte in b" \t\r\n")


@pytest.mark.parametrize("payload", [compact(TRADE), compact(wrapped(TRADE))])
def test_every_change_of_one_byte_of_a_trade_gives_what_the_oracle_gives(payload: bytes) -> None:
    for at in range(len(payload)):
        for byte in range(256):
            check(payload[:at] + bytes([byte]) + payload[at + 1 :])


@pytest.mark.parametrize("payload", plain_frames())
def test_bytes_left_out_doubled_or_put_in_give_what_the_oracle_gives(payload: bytes) -> None:
    dice = random.Random(len(payload))
    for at in range(len(payload)):
        check(payload[:at] + payload[at + 1 :])
        check(payload[:at] + payload[at : at + 1] + payload[at:])
        for byte in dice.sample(b'09-+.eE,:"\\{}[]tn \x00\x7f\x80\xc3\xff', 6):
            check(payload[:at] + bytes([byte]) + payload[at:])
            check(payload[:at] + bytes([byte]) + payload[at + 1 :])


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_the_stream_of_another_symbol_does_not_rename_the_event(kind: str) -> None:
    for stream in ("ethusdt@trade", "zzzzzzzzz@kline_1m", "z@ticker", "", "btcusdt", "@trade"):
        found = check(compact(wrapped(EVENTS[kind], stream)))
        assert found is not None
        assert found[1]["symbol_id"] == 0


def test_frame_error_carries_cause_and_head() -> None:
    payload = compact(TRADE.replaced(s="STRANGER")) + b" " * 200
    with pytest.raises(FrameError) as caught:
        parse_event(payload, check.table)
    assert isinstance(caught.value, ValueError)
    assert caught.value.cause == "unknown_symbol"
    assert caught.value.head == payload[:80]
    assert parse_event(compact(TRADE), check.table)[0] == "trade"


def test_an_unknown_path_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="path"):
        parse_event(compact(TRADE), check.table, "quick")  # type: ignore[arg-type]


# --- symbol table ---


def test_symbol_ids_are_dense_and_stay() -> None:
    table = make_table()
    assert [table.add(symbol) for symbol in SYMBOLS] == list(range(len(SYMBOLS)))
    assert len(table) == len(SYMBOLS)
    for number, symbol in enumerate(SYMBOLS):
        assert table.get(symbol) == number
        assert table.name(number) == symbol
        assert table.utf8(number) == symbol.encode()
    assert table.get("STRANGER") is None
    assert table.get("") is None


def test_symbols_that_no_frame_can_carry_are_not_added() -> None:
    table = SymbolTable()
    for symbol in ("", "L" * 41, "币" * 14, "\ud800", "A\\B", 'A"B', "A\tB", "\0"):
        with pytest.raises(ValueError):
            table.add(symbol)
    assert len(table) == 0
    assert table.add("币" * 13) == 0


@pytest.mark.parametrize("symbol_id", [1, 2, 10**6, -1, -(10**6)])
def test_an_id_that_was_never_given_is_an_index_error(symbol_id: int) -> None:
    table = make_table(("BTCUSDT",))
    with pytest.raises(IndexError):
        table.name(symbol_id)
    with pytest.raises(IndexError):
        table.utf8(symbol_id)


def test_two_thousand_symbols_are_all_found() -> None:
    symbols = tuple(f"S{number}币USDT" for number in range(2000))
    many = Check(symbols)
    for number, symbol in enumerate(symbols):
        stream = f"s{number}币usdt@trade"
        found = many(compact(wrapped(TRADE.replaced(s=symbol), stream)))
        assert found is not None
        assert found[1]["symbol_id"] == number
    assert many(compact(TRADE)) is None
