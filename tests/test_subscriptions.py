"""Stream names, their spread over connections, and the size of requests."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.feed import subscriptions
from tradecore.feed.subscriptions import Share
from tradecore.schema import STREAMS


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("BTCUSDT", "btcusdt@trade"),
        ("1000SATSFDUSD", "1000satsfdusd@trade"),
        ("币安人生USDT", "币安人生usdt@trade"),
        ("ÄİUSDT", "Äİusdt@trade"),
    ],
)
def test_only_ascii_letters_are_lowered(symbol: str, name: str) -> None:
    assert subscriptions.stream_name(symbol, "trade") == name


def test_the_stream_part_keeps_its_case() -> None:
    assert subscriptions.stream_name("BTCUSDT", "kline_1M") == "btcusdt@kline_1M"


def test_whole_market_spread() -> None:
    symbols = [f"SYM{number}USDT" for number in range(1400)]
    hands = [share.streams for share in subscriptions.spread(symbols, STREAMS)]
    assert len(hands) == 5
    assert max(map(len, hands)) - min(map(len, hands)) <= len(STREAMS)
    # neighbours in the list never share a connection
    owner = {stream: index for index, hand in enumerate(hands) for stream in hand}
    for left, right in itertools.pairwise(symbols):
        names = [subscriptions.stream_name(symbol, "trade") for symbol in (left, right)]
        assert owner[names[0]] != owner[names[1]]


@given(
    st.lists(st.text("ABC1", min_size=1, max_size=4), max_size=60),
    st.integers(1, 3),
    st.integers(3, 20),
)
def test_spread_is_complete_and_within_the_limit(
    symbols: list[str], kinds: int, max_streams: int
) -> None:
    streams = STREAMS[:kinds]
    hands = [share.streams for share in subscriptions.spread(symbols, streams, max_streams)]
    dealt = [stream for hand in hands for stream in hand]
    wanted = {f"{symbol.lower()}@{stream}" for symbol in symbols for stream in streams}
    assert len(dealt) == len(wanted) and set(dealt) == wanted
    assert all(0 < len(hand) <= max_streams for hand in hands)
    assert len(hands) == math.ceil(len(set(symbols)) / (max_streams // kinds))
    for hand in hands:  # all streams of a symbol together
        held = [stream.partition("@")[0] for stream in hand]
        assert all(held.count(symbol) == kinds for symbol in set(held))


SYMBOLS = st.lists(st.text("ABC1", min_size=1, max_size=3), max_size=60, unique=True)
KINDS = st.integers(1, 3).map(lambda kinds: STREAMS[:kinds])


@given(SYMBOLS, KINDS, SYMBOLS, KINDS, st.integers(3, 20))
def test_rearranged_is_complete_and_moves_only_what_does_not_fit(
    before: list[str], kinds: tuple[str, ...], after: list[str], wanted: tuple[str, ...], most: int
) -> None:
    present = subscriptions.spread(before, kinds, most)
    changed, new = subscriptions.rearrange(present, after, wanted, most)
    assert len(changed) == len(present)
    carried = [symbol for share in (*changed, *new) for symbol in share.symbols]
    assert sorted(carried) == sorted(after)
    for share in (*changed, *new):
        assert len(share.streams) <= most and share.kinds == wanted
    assert all(share.symbols for share in new)
    room = most // len(wanted)
    for old, now in zip(present, changed, strict=True):
        stays = [symbol for symbol in old.symbols if symbol in after]
        assert list(now.symbols[: len(stays)]) == stays[:room]
    if new:  # no connection is opened while there is room
        assert all(len(share.symbols) == room for share in changed)


def test_trades_are_asked_for_first_and_tickers_last() -> None:
    for kinds in itertools.permutations(STREAMS):
        names = [name.partition("@")[2] for name in Share(("A", "B", "C"), kinds).streams]
        assert names == ["trade"] * 3 + ["kline_1m"] * 3 + ["ticker"] * 3


def test_new_symbols_go_where_most_room_is() -> None:
    present = [Share(("A", "B", "C"), ("trade",)), Share(("D",), ("trade",))]
    changed, new = subscriptions.rearrange(present, "ABCDEF", ("trade",), 4)
    assert changed == [present[0], Share(("D", "E", "F"), ("trade",))]
    assert not new


def test_a_connection_without_symbols_is_not_filled_while_others_have_room() -> None:
    present = [Share(("A", "B"), ("trade",)), Share(("C",), ("trade",))]
    changed, new = subscriptions.rearrange(present, "CDE", ("trade",), 4)
    assert [share.symbols for share in changed] == [(), ("C", "D", "E")]
    assert not new


def test_what_a_share_tells() -> None:
    share = Share(("BTCUSDT", "ETHUSDT"), ("trade", "ticker"))
    assert share.ticks and share.traded == ("BTCUSDT", "ETHUSDT")
    assert share.streams == ("btcusdt@trade", "ethusdt@trade", "btcusdt@ticker", "ethusdt@ticker")
    assert not Share(("BTCUSDT",), ("kline_1m",)).traded
    assert not Share(("BTCUSDT",), ("trade",)).ticks


def test_requests_have_the_venues_shape_and_raw_utf8() -> None:
    payload = subscriptions.request("SUBSCRIBE", ("币安人生usdt@trade",), 7)
    assert "币安人生usdt@trade".encode() in payload
    body = {"method": "SUBSCRIBE", "params": ["币安人生usdt@trade"], "id": 7}
    assert json.loads(payload) == body
    listing = subscriptions.request("LIST_SUBSCRIPTIONS", None, 8)
    assert json.loads(listing) == {"method": "LIST_SUBSCRIPTIONS", "id": 8}


@given(
    st.lists(
        st.text('abç币"\\1', min_size=1, max_size=13).map(lambda s: s + "@trade"), max_size=400
    )
)
def test_batches_are_small_full_and_in_order(streams: list[str]) -> None:
    batches = list(subscriptions.batches(streams))
    assert [stream for batch in batches for stream in batch] == streams
    assert all(len(subscriptions.request("SUBSCRIBE", b, 2**63 - 1)) <= 3500 for b in batches)
    for batch, following in itertools.pairwise(batches):  # the next name would not have fitted
        more = subscriptions.request("SUBSCRIBE", (*batch, following[0]), 2**63 - 1)
        assert len(more) >= 3498  # UNSUBSCRIBE is two letters longer
