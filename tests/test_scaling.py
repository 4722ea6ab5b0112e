"""What the bench of growth rests on: the even market, the made history, the tables of its page."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

from _generator import FIRST_ID, GROUP, EvenMarket, Frames  # noqa: E402
from _history import History  # noqa: E402
from _scaling import Scaling  # noqa: E402

SYMBOLS = ("BTCUSDT", "DOGEUSDT", "ETHUSDT")


def payloads(data: bytes) -> list[bytes]:
    """Take frames apart, by their two bytes of length."""
    found = []
    while data:
        assert data[:2] == b"\x81\x7e"
        end = 4 + int.from_bytes(data[2:4], "big")
        found.append(data[4:end])
        data = data[end:]
    return found


def test_frames_are_the_trades_of_the_market() -> None:
    market = EvenMarket(SYMBOLS, 100_000, {})
    begin, end, event_us = 5, 5_000, market.epoch_us + 1
    pieces = list(Frames(market).render(begin, end, event_us))
    events = payloads(b"".join(part for _, part in pieces))
    assert len(events) == end - begin
    makers = set()
    for index, event in enumerate(events, begin):
        wrapper: dict[str, Any] = json.loads(event)
        data = wrapper["data"]
        turn, symbol = divmod(index // GROUP, len(SYMBOLS))
        trade = market.trade(SYMBOLS[symbol], FIRST_ID + turn * GROUP + index % GROUP)
        makers.add(trade.buyer_is_maker)
        assert wrapper["stream"] == f"{trade.symbol.lower()}@trade"
        assert data == {
            "e": "trade",
            "E": event_us,
            "s": trade.symbol,
            "t": trade.trade_id,
            "p": f"{trade.price_e8 // 10**8}.{trade.price_e8 % 10**8:08}",
            "q": f"{trade.quantity_e8 // 10**8}.{trade.quantity_e8 % 10**8:08}",
            "T": trade.trade_us,
            "m": trade.buyer_is_maker,
            "M": True,
        }
        assert trade.trade_us == market.epoch_us + index * 10
    assert makers == {True, False}


def test_an_even_market_counts_what_it_has_sent() -> None:
    market = EvenMarket(SYMBOLS, 100_000, {})
    for end in (0, 1, 7, 8, 9, 23, 24, 25, 4_999):
        sent = [SYMBOLS[index // GROUP % len(SYMBOLS)] for index in range(end)]
        assert [market.traded(end, symbol) for symbol in SYMBOLS] == [
            sent.count(symbol) for symbol in SYMBOLS
        ]
    at_us = market.epoch_us + 1_234
    assert market.end_at(at_us) == 124
    for symbol in SYMBOLS:
        assert market.next_id(symbol, at_us) == FIRST_ID + market.traded(124, symbol)


def test_a_made_history_ends_where_the_market_begins() -> None:
    history = History(SYMBOLS, 30_000)
    rows = history.rows(0, history.each)
    assert len(rows) == 30_000
    for symbol_id in range(len(SYMBOLS)):
        own = rows[rows["symbol_id"] == symbol_id]
        assert np.array_equal(own["trade_id"], np.arange(FIRST_ID - history.each, FIRST_ID))
        assert (np.diff(own["trade_us"]) > 0).all()
    assert rows["trade_us"][0] == history.begin_us
    assert rows["trade_us"][-1] < history.end_us


def test_the_page_has_the_tables_of_the_last_report() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert Scaling.load().markdown() in page, "run bench/report.py --saved"
