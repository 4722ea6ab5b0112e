"""The oracle itself: held against values spelled by hand and against the strategies' own."""

import oracle
import pytest
from frame_strategies import Fields, frames
from hypothesis import given, settings
from plain_frames import CONTROLS, SYMBOL_IDS, TRADE, Members, Raw, compact, plain_frames

TRADE_FIELDS = {
    "symbol_id": 0,
    "trade_id": 3735683259,
    "price_e8": 6183763000000,
    "quantity_e8": 2000000,
    "trade_us": 1723161255342000,
    "event_us": 1723161255343000,
    "buyer_is_maker": True,
}


def test_plain_trade_is_read_as_spelled_by_hand() -> None:
    assert oracle.read_event(compact(TRADE), SYMBOL_IDS) == ("trade", TRADE_FIELDS)


@pytest.mark.parametrize("payload", [*plain_frames(), *CONTROLS])
def test_plain_frames_are_accepted(payload: bytes) -> None:
    oracle.read_event(payload, SYMBOL_IDS)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(made=frames())
def test_made_frames_hold_the_fields_they_were_made_from(made: tuple[bytes, str, Fields]) -> None:
    payload, kind, fields = made
    assert oracle.read_event(payload, SYMBOL_IDS) == (kind, fields)


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        (compact(Members([*TRADE, ("x", Raw("NaN"))])), "malformed"),
        (compact(Members([*TRADE, ("x", Raw("01"))])), "malformed"),
        (compact(TRADE) + b"\x00", "malformed"),
        (b"\xef\xbb\xbf" + compact(TRADE), "malformed"),
        (b"[" * 5000 + b"]" * 5000, "malformed"),
        (b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}", "malformed"),
        (b'{"s":"\xed\xa0\x80"}', "invalid_utf8"),
        (compact(TRADE.replaced(p="92233720368.54775808")), "out_of_range"),
        (compact(TRADE.replaced(p="0.000000001")), "out_of_range"),
        (compact(TRADE.replaced(p="1e5")), "bad_number"),
        (compact(TRADE.doubled("p")), "duplicate_key"),
    ],
)
def test_what_json_or_decimal_would_forgive_is_refused(payload: bytes, cause: str) -> None:
    with pytest.raises(oracle.Refused) as caught:
        oracle.read_event(payload, SYMBOL_IDS)
    assert caught.value.cause == cause
