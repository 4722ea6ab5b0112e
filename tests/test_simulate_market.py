"""The simulated market: pure, exact, realistic."""

from collections import Counter
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradecore.simulate.market import Market
from tradecore.simulate.profiles import DEFAULT_SYMBOLS
from tradecore.simulate.words import E8, MINUTE_US, candle_of

EPOCH_US = 1_767_225_600_000_000
MARKET = Market(seed=7, rate=5_000, epoch_us=EPOCH_US)


def test_a_trade_depends_on_nothing_but_its_id() -> None:
    one, two = (Market(seed=7, rate=5_000, epoch_us=EPOCH_US) for _ in range(2))
    for symbol in DEFAULT_SYMBOLS:
        first = one.first_id(symbol)
        forward = one.trades(symbol, first, first + 3_000)
        backward = [two.trade(symbol, first + k) for k in reversed(range(2_500, 3_000))]
        assert backward[::-1] == forward[2_500:]
    assert Market(seed=8).first_id("BTCUSDT") != Market(seed=7).first_id("BTCUSDT")


def test_known_values_do_not_change_between_versions() -> None:
    market = Market(seed=1, symbols=("BTCUSDT",), rate=10, first_id={"*": 5_000_000_000})
    trade = market.trade("BTCUSDT", 5_000_000_100)
    assert trade == ("BTCUSDT", 5_000_000_100, *trade[2:])
    assert (trade.price_e8, trade.quantity_e8, trade.trade_us, trade.buyer_is_maker) == KNOWN


KNOWN = (5981931000000, 2570000, 1767225605692798, True)


@pytest.mark.parametrize("symbol", DEFAULT_SYMBOLS)
def test_ids_times_and_counts_agree(symbol: str) -> None:
    first = MARKET.first_id(symbol)
    trades = MARKET.trades(symbol, first, first + 6_000)
    assert [t.trade_id for t in trades] == list(range(first, first + 6_000))
    assert all(a.trade_us <= b.trade_us for a, b in pairwise(trades))
    assert trades[0].trade_us >= EPOCH_US
    for trade in trades[:4_000:97] + trades[1_020:1_030]:
        upto = sum(t.trade_us <= trade.trade_us for t in trades)
        assert MARKET.next_id(symbol, trade.trade_us) == first + upto
        before = sum(t.trade_us < trade.trade_us for t in trades)
        assert MARKET.next_id(symbol, trade.trade_us - 1) == first + before
    assert MARKET.next_id(symbol, EPOCH_US - 1) == first


@settings(max_examples=60, deadline=None)
@given(
    symbol=st.sampled_from(DEFAULT_SYMBOLS),
    start=st.integers(0, 9_000),
    size=st.integers(1, 9_000),
)
def test_candles_are_the_sums_of_their_trades(symbol: str, start: int, size: int) -> None:
    first = MARKET.first_id(symbol) + start
    expected = candle_of(MARKET.trades(symbol, first, first + size))
    assert MARKET.candle(symbol, first, first + size) == expected
    assert expected.trade_count == size


def test_candle_of_nothing_is_none() -> None:
    first = MARKET.first_id("BTCUSDT")
    assert MARKET.candle("BTCUSDT", first, first) is None
    assert MARKET.minute("BTCUSDT", EPOCH_US - MINUTE_US) is None
    minute = MARKET.minute("BTCUSDT", EPOCH_US)
    assert minute is not None
    assert minute.first_id == first
    with pytest.raises(ValueError, match="before the first trade"):
        MARKET.trade("BTCUSDT", first - 1)


def test_quote_amounts_need_no_rounding() -> None:
    for symbol in (*DEFAULT_SYMBOLS, "XECUSDT", "WINUSDT", "ABCDTRY", "QWERTYBTC", "A"):
        first = MARKET.first_id(symbol)
        for trade in MARKET.trades(symbol, first, first + 2_000):
            assert trade.price_e8 * trade.quantity_e8 % E8 == 0
            assert 0 < trade.price_e8 < 2**63
            assert 0 < trade.quantity_e8 < 2**63


def test_the_venues_extremes_occur() -> None:
    first = MARKET.first_id("LUNCUSDT")
    largest = max(t.quantity_e8 for t in MARKET.trades("LUNCUSDT", first, first + 4_000))
    assert largest == 2**63 - 1
    rows = MARKET.rows("LUNCUSDT", first, first + 4_000)
    assert "92233720368.54775807" in {row[3] for row in rows}
    pepe = MARKET.first_id("PEPEUSDT")
    assert "92233720368.00" in {row[3] for row in MARKET.rows("PEPEUSDT", pepe, pepe + 4_000)}


@pytest.mark.parametrize(
    ("symbol", "price_decimals", "quantity_decimals"),
    [("BTCUSDT", 8, 8), ("PEPEUSDT", 8, 2), ("BTTCUSDT", 8, 1), ("BTCIDRT", 2, 8)],
)
def test_rows_print_the_same_numbers(
    symbol: str, price_decimals: int, quantity_decimals: int
) -> None:
    first = MARKET.first_id(symbol)
    rows = MARKET.rows(symbol, first + 1_000, first + 1_100)
    trades = MARKET.trades(symbol, first + 1_000, first + 1_100)
    for (us, trade_id, price, quantity, maker), trade in zip(rows, trades, strict=True):
        assert (us, trade_id) == (trade.trade_us, trade.trade_id)
        assert Decimal(price) * E8 == trade.price_e8
        assert Decimal(quantity) * E8 == trade.quantity_e8
        assert maker == str(trade.buyer_is_maker).lower()
        assert len(price.partition(".")[2]) == price_decimals
        assert len(quantity.partition(".")[2]) == quantity_decimals


def test_bursts_share_time_and_side_and_run_away() -> None:
    first = MARKET.first_id("BTCUSDT")
    trades = MARKET.trades("BTCUSDT", first, first + 20_000)
    moment, size = Counter(t.trade_us for t in trades).most_common(1)[0]
    assert 300 < size <= 1_024
    burst = [t for t in trades if t.trade_us == moment]
    assert len({t.side for t in burst}) == 1
    prices = [t.price_e8 for t in burst]
    assert prices == sorted(prices, reverse=burst[0].buyer_is_maker)
    assert {t.side for t in trades} == {"BUY", "SELL"}


def test_the_rate_is_kept_and_shared_unevenly() -> None:
    end_us = EPOCH_US + 20_000_000
    counts = {s: MARKET.next_id(s, end_us) - MARKET.first_id(s) for s in DEFAULT_SYMBOLS}
    assert sum(counts.values()) == pytest.approx(5_000 * 20, rel=0.05)
    assert counts["BTCUSDT"] > 3 * counts["BTCIDRT"] > 0
    assert counts["QUIETUSDT"] <= 2


def test_first_ids_by_option() -> None:
    market = Market(first_id={"BTCUSDT": 2**40, "*": 1})
    assert market.first_id("BTCUSDT") == 2**40
    assert market.first_id("ETHUSDT") == 1
    assert market.trade("BTCUSDT", 2**40).trade_id == 2**40
    ids = {symbol: Market(seed=3).first_id(symbol) for symbol in DEFAULT_SYMBOLS}
    assert len(set(ids.values())) == len(ids)
