"""Last tickers and klines: what a newer one replaces, and what is never lost."""

import numpy as np
import pytest
from numpy.typing import NDArray

import tradecore.conflator as conflator_module
from tests.plain_frames import KLINE, TICKER, Members, compact
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.ring import Ring

MINUTE_MS = 60_000
OPEN_MS = 1723161240000


@pytest.fixture
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    ring = Ring(tmp_path_factory.mktemp("ring") / "ring", 64)
    for symbol in ("BTCUSDT", "ETHUSDT"):
        ring.intern(symbol)
    return Capture(ring, ring.symbols, Conflator(2))


def ticker(event_ms: int, symbol: str = "BTCUSDT") -> bytes:
    return compact(TICKER.replaced(E=event_ms, s=symbol))


def kline(minute: int, event_ms: int, *, closed: bool = False, symbol: str = "BTCUSDT") -> bytes:
    candle = KLINE.value("k")
    assert isinstance(candle, Members)
    open_ms = OPEN_MS + minute * MINUTE_MS
    candle = candle.replaced(t=open_ms, T=open_ms + MINUTE_MS - 1, x=closed, s=symbol)
    return compact(KLINE.replaced(E=event_ms, s=symbol, k=candle))


def states(rows: NDArray[np.void]) -> list[tuple[int, int, int]]:
    """(minute, event time in ms past the base, closed) of klines."""
    return [
        (
            (int(r["open_us"]) // 1000 - OPEN_MS) // MINUTE_MS,
            int(r["event_us"]) // 1000 - OPEN_MS,
            int(r["flags"]),
        )
        for r in rows
    ]


def feed(capture: Capture, *frames: bytes) -> None:
    for frame in frames:
        assert capture.feed(frame) > 0, frame


def test_only_the_newest_ticker_of_a_symbol_waits(capture: Capture) -> None:
    feed(capture, ticker(OPEN_MS + 5), ticker(OPEN_MS + 9), ticker(OPEN_MS + 7))
    feed(capture, ticker(OPEN_MS + 1, "ETHUSDT"))
    rows = capture.conflator.take_tickers()
    assert [int(e) // 1000 - OPEN_MS for e in rows["event_us"]] == [9, 1]
    assert len(capture.conflator.take_tickers()) == 0


def test_a_ticker_put_back_yields_to_a_newer_one(capture: Capture) -> None:
    feed(capture, ticker(OPEN_MS + 5), ticker(OPEN_MS + 5, "ETHUSDT"))
    rows = capture.conflator.take_tickers()
    feed(capture, ticker(OPEN_MS + 6))
    capture.conflator.put_back_tickers(rows)
    again = capture.conflator.take_tickers()
    assert [int(e) // 1000 - OPEN_MS for e in again["event_us"]] == [6, 5]


def test_closed_klines_queue_and_open_ones_are_replaced(capture: Capture) -> None:
    feed(capture, kline(0, OPEN_MS + 1), kline(0, OPEN_MS + 2))
    feed(capture, kline(0, OPEN_MS + 3, closed=True))
    feed(capture, kline(1, OPEN_MS + 4), kline(1, OPEN_MS + 5, closed=True))
    feed(capture, kline(2, OPEN_MS + 6), kline(2, OPEN_MS + 7))
    assert states(capture.conflator.take_klines()) == [(0, 3, 1), (1, 5, 1), (2, 7, 0)]


def test_nothing_follows_a_closed_kline_of_its_minute(capture: Capture) -> None:
    feed(capture, kline(0, OPEN_MS + 3, closed=True), kline(0, OPEN_MS + 4))
    assert states(capture.conflator.take_klines()) == [(0, 3, 1)]


def test_the_last_state_of_a_kline_that_never_closed_is_kept(capture: Capture) -> None:
    feed(capture, kline(0, OPEN_MS + 1), kline(1, OPEN_MS + 2))
    assert states(capture.conflator.take_klines()) == [(0, 1, 0), (1, 2, 0)]


def test_a_late_closing_frame_is_taken_and_a_late_open_one_is_not(capture: Capture) -> None:
    feed(capture, kline(1, OPEN_MS + 5), kline(0, OPEN_MS + 2))
    feed(capture, kline(0, OPEN_MS + 3, closed=True))
    assert states(capture.conflator.take_klines()) == [(0, 3, 1), (1, 5, 0)]


def test_klines_put_back_lose_nothing(capture: Capture) -> None:
    feed(capture, kline(0, OPEN_MS + 1, closed=True), kline(1, OPEN_MS + 2))
    rows = capture.conflator.take_klines()
    feed(capture, kline(1, OPEN_MS + 4))
    capture.conflator.put_back_klines(rows)
    assert states(capture.conflator.take_klines()) == [(0, 1, 1), (1, 4, 0)]


def test_the_last_state_of_a_past_minute_is_put_back_too(capture: Capture) -> None:
    feed(capture, kline(0, OPEN_MS + 1))
    rows = capture.conflator.take_klines()
    feed(capture, kline(1, OPEN_MS + 2))
    capture.conflator.put_back_klines(rows)
    assert sorted(states(capture.conflator.take_klines())) == [(0, 1, 0), (1, 2, 0)]


def test_rows_that_cannot_be_put_back_are_refused(capture: Capture) -> None:
    feed(capture, ticker(OPEN_MS), kline(0, OPEN_MS))
    tickers, klines = capture.conflator.take_tickers(), capture.conflator.take_klines()
    for rows, put_back in (
        (klines, capture.conflator.put_back_tickers),
        (tickers, capture.conflator.put_back_klines),
    ):
        with pytest.raises(ValueError, match="rows of another kind"):
            put_back(rows)
    for rows, put_back in (
        (tickers, capture.conflator.put_back_tickers),
        (klines, capture.conflator.put_back_klines),
    ):
        rows["symbol_id"] = 2
        with pytest.raises(ValueError, match="no slot for the symbol id 2"):
            put_back(rows)
    assert len(capture.conflator.take_tickers()) == len(capture.conflator.take_klines()) == 0


def test_growing_keeps_what_waits_and_takes_more_symbols(capture: Capture) -> None:
    feed(capture, ticker(OPEN_MS + 5, "ETHUSDT"), kline(1, OPEN_MS + 2))
    feed(capture, kline(0, OPEN_MS + 3, closed=True))
    capture.ring.intern("LATEUSDT")  # type: ignore[attr-defined]
    capture.grow()
    assert capture.conflator.symbol_slots == 3
    feed(capture, ticker(OPEN_MS + 4, "ETHUSDT"), ticker(OPEN_MS + 6, "LATEUSDT"))
    feed(capture, kline(1, OPEN_MS + 1), kline(2, OPEN_MS + 7, symbol="LATEUSDT"))
    rows = capture.conflator.take_tickers()
    assert [int(e) // 1000 - OPEN_MS for e in rows["event_us"]] == [5, 6]
    assert rows["symbol_id"].tolist() == [1, 2]
    assert states(capture.conflator.take_klines()) == [(0, 3, 1), (1, 2, 0), (2, 7, 0)]


def test_the_queue_of_closed_klines_is_bounded_and_counts_what_it_drops(capture: Capture) -> None:
    room = conflator_module.CLOSED_KLINES_MAX
    for minute in range(room + 3):
        feed(capture, kline(minute, OPEN_MS + minute, closed=True))
    rows = capture.conflator.take_klines()
    assert (len(rows), capture.conflator.closed_dropped) == (room, 3)
    assert states(rows[:1])[0][0] == 3
