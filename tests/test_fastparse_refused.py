"""Each kind of bad input, one fault at a time, with the cause that the operator will read."""

import random

import pytest
from codec_check import PATHS, Check, Path
from plain_frames import (
    CANDLE,
    EVENTS,
    KLINE,
    TICKER,
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

CANDLE_KEYS = [key for key, _ in CANDLE if key != "B"]
DECIMAL_KEYS = [
    *(("trade", key) for key in "pq"),
    *(("ticker", key) for key in "pPwxcQbBaAohlvq"),
    *(("kline", key) for key in "ohlcvqVQ"),
]
TIME_KEYS = [
    *(("trade", key) for key in "ET"),
    *(("ticker", key) for key in "EOC"),
    *(("kline", key) for key in "tT"),
    ("server_shutdown", "E"),
]
ID_KEYS = [("trade", "t"), *(("ticker", key) for key in "FLn"), *(("kline", key) for key in "fLn")]
NEEDED_KEYS = [
    *(("trade", key) for key, _ in TRADE if key != "M"),
    *(("ticker", key) for key, _ in TICKER),
    *(("kline", key) for key in CANDLE_KEYS),
    *(("server_shutdown", key) for key in "eE"),
]


def changed(kind: str, key: str, value: Value) -> Members:
    """Return the plain event with one value changed; for a kline, the candle's."""
    if kind == "kline":
        return KLINE.replaced(k=CANDLE.replaced(**{key: value}))
    return EVENTS[kind].replaced(**{key: value})


def cause_of(payload: bytes, path: Path) -> str:
    with pytest.raises(FrameError) as caught:
        parse_event(payload, check.table, path)
    assert caught.value.head == payload[:80]
    return caught.value.cause


def assert_refused(event: Value, cause: str) -> None:
    """Every spelling of `event` is refused for `cause`, by the oracle as well."""
    dice = random.Random(7)
    for whole in (event, wrapped(event)):
        for payload in (compact(whole), loose(whole, dice), loose(whole, dice)):
            assert check(payload) is None
            for path in PATHS:
                assert cause_of(payload, path) in {cause, "not_fast" if path == "fast" else cause}


@pytest.mark.parametrize(("kind", "key"), NEEDED_KEYS)
def test_missing_key(kind: str, key: str) -> None:
    if kind == "kline":
        assert_refused(KLINE.replaced(k=CANDLE.without(key)), "missing_key")
    else:
        assert_refused(EVENTS[kind].without(key), "missing_key")


@pytest.mark.parametrize(("kind", "key"), NEEDED_KEYS)
def test_doubled_key(kind: str, key: str) -> None:
    if kind == "kline":
        assert_refused(KLINE.replaced(k=CANDLE.doubled(key)), "duplicate_key")
    else:
        assert_refused(EVENTS[kind].doubled(key), "duplicate_key")


@pytest.mark.parametrize("key", ["e", "E", "s", "k"])
def test_missing_and_doubled_key_around_the_candle(key: str) -> None:
    assert_refused(KLINE.without(key), "missing_key")
    assert_refused(KLINE.doubled(key), "duplicate_key")


@pytest.mark.parametrize("key", ["stream", "data"])
def test_missing_and_doubled_key_of_the_wrapper(key: str) -> None:
    for frame, cause in (
        (wrapped(TRADE).without(key), "missing_key"),
        (wrapped(TRADE).doubled(key), "duplicate_key"),
    ):
        assert check(compact(frame)) is None
        assert cause_of(compact(frame), "auto") == cause


@pytest.mark.parametrize("stream", [None, 1, True, ["btcusdt@trade"], Members()])
def test_wrapper_of_wrong_types(stream: Value) -> None:
    for frame in (Members.of(stream=stream, data=TRADE), Members.of(stream="x", data=stream)):
        payload = compact(frame)
        if stream != Members() or frame.value("stream") != "x":
            assert cause_of(payload, "auto") == "wrong_type"
        assert check(payload) is None


@pytest.mark.parametrize(("kind", "key"), DECIMAL_KEYS)
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        *((text, "bad_number") for text in ("", " ", "-", ".", "+1.0", ".5", "5.", "-.5", "1..2")),
        *((text, "bad_number") for text in ("1e5", "1E5", "1.0e-5", "0x10", "1,5", "1_0", "NaN")),
        *((text, "bad_number") for text in (" 1.0", "1.0 ", "1.0\n", "--1", "1-", "Infinity")),
        *((text, "bad_number") for text in ("\uff11.5", "\u0661", "1.5\u0000", "1.2.3", "1/2")),
        *((text, "out_of_range") for text in ("0.000000001", "1.123456789", "9" * 31, "1" * 60)),
        *((text, "out_of_range") for text in ("1" + "0" * 30, "5.00000000000000000001")),
    ],
)
def test_bad_decimal(kind: str, key: str, text: str, cause: str) -> None:
    assert_refused(changed(kind, key, text), cause)


@pytest.mark.parametrize(("kind", "key"), DECIMAL_KEYS)
def test_sign_of_a_decimal(kind: str, key: str) -> None:
    signed = kind == "ticker" and key in "pP"
    for text in ("-0.00000001", "-1", "-92233720368.54775807"):
        if signed:
            assert check(compact(changed(kind, key, text))) is not None
        else:
            assert_refused(changed(kind, key, text), "negative")
    assert check(compact(changed(kind, key, "-0.00"))) is not None


@pytest.mark.parametrize("key", ["p", "q"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("92233720368.54775807", 2**63 - 1),
        ("00092233720368.547758070000", 2**63 - 1),
        ("92233720368.54775806", 2**63 - 2),
        ("92233720368", 92233720368 * 10**8),
        ("92233720367.99999999", 9223372036799999999),
        ("0", 0),
        ("0.00000001", 1),
        ("0.000000010000000000", 1),
        ("12345678.12345678", 1234567812345678),
        ("123456789.1", 12345678910000000),
        ("99999999999999", None),
        ("92233720368.54775808", None),
        ("92233720368.6", None),
        ("92233720369", None),
        ("92233720369.0", None),
        ("99999999999.9", None),
        ("184467440737.09551616", None),
        ("184467440737.09551617", None),
        ("3402823669209384634633746074317.68211457", None),
    ],
)
def test_trade_decimals_end_where_int64_ends(key: str, text: str, value: int | None) -> None:
    name = {"p": "price_e8", "q": "quantity_e8"}[key]
    if value is None:
        assert_refused(TRADE.replaced(**{key: text}), "out_of_range")
        return
    for event in (TRADE, wrapped(TRADE)):
        payload = compact(event).replace(compact(TRADE.value(key)), f'"{text}"'.encode())
        found = check(payload)
        assert found is not None
        assert found[1][name] == value


@pytest.mark.parametrize(("kind", "key"), [pair for pair in DECIMAL_KEYS if pair[0] != "trade"])
def test_wide_decimals_reach_to_the_end_of_numeric_38_8(kind: str, key: str) -> None:
    text = f"{'9' * 30}.{'9' * 8}"
    found = check(compact(changed(kind, key, text)))
    assert found is not None
    assert 10**38 - 1 in found[1].values()
    assert_refused(changed(kind, key, f"1{'0' * 30}.00000000"), "out_of_range")


@pytest.mark.parametrize(("kind", "key"), ID_KEYS)
def test_ids(kind: str, key: str) -> None:
    lowest = 0 if key in "tn" else -1
    for number in (lowest, 0, 1, 2**31, 2**32 + 1, 10**18 - 1, 10**18, 2**63 - 1):
        found = check(compact(changed(kind, key, number)))
        assert found is not None
        assert number in found[1].values()
    assert_refused(changed(kind, key, lowest - 1), "negative")
    assert_refused(changed(kind, key, -5_000_000_000), "negative")
    for number in (2**63, 2**64 + 5, 10**19, 10**400):
        assert_refused(changed(kind, key, number), "out_of_range")
    for text in ("1.0", "1e3", "1E+2", "-1.5", "0.0"):
        assert_refused(changed(kind, key, Raw(text)), "bad_number")


@pytest.mark.parametrize(("kind", "key"), TIME_KEYS)
def test_times(kind: str, key: str) -> None:
    first_ms, end_ms = 946_684_800_000, 4_102_444_800_000
    for time, time_us in (
        (first_ms, first_ms * 1000),
        (end_ms - 1, (end_ms - 1) * 1000),
        (first_ms * 1000, first_ms * 1000),
        (end_ms * 1000 - 1, end_ms * 1000 - 1),
        (1723161255343, 1723161255343000),
        (1723161255343999, 1723161255343999),
    ):
        found = check(compact(changed(kind, key, time)))
        assert found is not None
        assert time_us in found[1].values()
    for time in (0, 1, 1723161255, first_ms - 1, end_ms, end_ms + 1, 10**14, 10**14 + 1):
        assert_refused(changed(kind, key, time), "bad_time")
    for time in (first_ms * 1000 - 1, end_ms * 1000, 1723161255343999999, 2**63 - 1):
        assert_refused(changed(kind, key, time), "bad_time")
    assert_refused(changed(kind, key, Raw("1.7e12")), "bad_number")
    assert_refused(changed(kind, key, 2**63), "out_of_range")
    assert check(compact(changed(kind, key, -1723161255343))) is None


@pytest.mark.parametrize(("kind", "key"), NEEDED_KEYS)
def test_wrong_type(kind: str, key: str) -> None:
    plain = CANDLE.value(key) if kind == "kline" else EVENTS[kind].value(key)
    values: list[Value] = [None, [], Members(), [plain], Members.of(x=plain)]
    values += [1, "1"] if isinstance(plain, bool) else [True, False]
    if not isinstance(plain, bool):
        values.append(1 if isinstance(plain, str) else str(plain))
    for value in values:
        assert_refused(changed(kind, key, value), "wrong_type")


@pytest.mark.parametrize("value", [None, [], "x", 5, True])
def test_candle_of_wrong_type(value: Value) -> None:
    assert_refused(KLINE.replaced(k=value), "wrong_type")


@pytest.mark.parametrize(
    "name",
    ["", "Trade", "trade ", "trad", "trades", "aggTrade", "24hrMiniTicker", "depthUpdate", "1m"],
)
def test_unknown_event(name: str) -> None:
    assert_refused(TRADE.replaced(e=name), "unknown_event")


@pytest.mark.parametrize("interval", ["", "1s", "1M", "3m", "1m ", "01m", "1"])
def test_candle_of_another_interval(interval: str) -> None:
    assert_refused(changed("kline", "i", interval), "unknown_event")


@pytest.mark.parametrize("kind", ["trade", "ticker", "kline"])
@pytest.mark.parametrize("symbol", ["", "btcusdt", "BTCUSD", "BTCUSDTT", "\u5e01", "L" * 39])
def test_unknown_symbol(kind: str, symbol: str) -> None:
    event = EVENTS[kind].replaced(s=symbol)
    if kind == "kline":
        event = event.replaced(k=CANDLE.replaced(s=symbol))
    assert_refused(event, "unknown_symbol")


def test_candle_of_another_symbol() -> None:
    for symbol in ("Z", "STRANGER", ""):
        assert_refused(changed("kline", "s", symbol), "unknown_symbol")
        assert_refused(KLINE.replaced(s=symbol), "unknown_symbol")


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        *((text, "malformed") for text in (b"", b" ", b"[]", b"1", b'"x"', b"null", b"{", b"}")),
        *((text, "malformed") for text in (b"{}{}", b"{},", b"\x00", b"PING", b"\xef\xbb\xbf{}")),
        *((text, "missing_key") for text in (b"{}", b' { "x" : 1 } ')),
        *((text, "invalid_utf8") for text in (b"\xff", b"\x80\x81\x82", b"\xff\xfe{\x00}\x00")),
        (compact(TRADE) * 2, "malformed"),
        (compact(TRADE)[:-1], "malformed"),
        (compact(TRADE).decode().encode("utf-16"), "invalid_utf8"),
        (compact([TRADE]), "malformed"),
        (compact(TRADE).replace(b"BTCUSDT", b"BTC\xffUSDT"), "invalid_utf8"),
        (compact(TRADE).replace(b"true,", b"True,"), "malformed"),
        (compact(TRADE).replace(b'"', b"'"), "malformed"),
        (b'{"u":1,"s":"BTCUSDT","b":"1","B":"1","a":"1","A":"1"}', "missing_key"),
        (b'{"lastUpdateId":160,"bids":[],"asks":[]}', "missing_key"),
    ],
)
def test_what_is_no_event_at_all(payload: bytes, cause: str) -> None:
    assert check(payload) is None
    assert cause_of(payload, "auto") == cause
    assert cause_of(payload, "slow") == cause


@pytest.mark.parametrize("fill", [b" ", b"[", b'"', b"9", b"a", b"\\", b"\xe5\xb8\x81", b"{"])
def test_a_megabyte_of_anything_is_answered(fill: bytes) -> None:
    for before in (b"", b'{"x":', b'{"e":"trade","E":', b'{"stream":"', b'{"p":"'):
        check(before + fill * (1_048_576 // len(fill)))


def test_the_codec_goes_on_after_every_refusal() -> None:
    assert check(compact(TRADE)) is not None
