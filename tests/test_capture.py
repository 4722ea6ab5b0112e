"""Frames in, rows and counters out: tracking of ids, a full ring, waking, the high-water mark."""

import json
import logging
from bisect import bisect_left
from pathlib import Path

import numpy as np
import pytest

from tests.plain_frames import KLINE, TICKER, Members, compact
from tradecore._fastparse import parse_event
from tradecore.capture import LATENCY_BOUNDS_US, Capture, LineUse, Told, Track
from tradecore.conflator import Conflator
from tradecore.ring import Ring
from tradecore.schema import (
    FLAG_AFTER_REFUSED,
    FLAG_BUYER_IS_MAKER,
    FLAG_FAR_BELOW,
    FLAG_FIRST_OF_EPOCH,
    FLAG_FIRST_OF_RUN,
)

BASE_MS = 1723161255343


def trade(trade_id: int, symbol: str = "BTCUSDT", event_ms: int = BASE_MS) -> bytes:
    data = {
        "e": "trade",
        "E": event_ms,
        "s": symbol,
        "t": trade_id,
        "p": f"{trade_id % 1000}.25000000",
        "q": "1.00000000",
        "T": event_ms - 1,
        "m": trade_id % 2 == 0,
        "M": True,
    }
    frame = {"stream": f"{symbol.lower()}@trade", "data": data}
    return json.dumps(frame, separators=(",", ":")).encode()


class Bench:
    """A capture with a small ring."""

    def __init__(self, path: Path, capacity: int = 64) -> None:
        self.ring = Ring(path, capacity)
        for symbol in ("BTCUSDT", "ETHUSDT"):
            self.ring.intern(symbol)
        self.capture = Capture(self.ring, self.ring.symbols, Conflator(len(self.ring.symbols)))

    def feed(self, *ids: int, symbol: str = "BTCUSDT") -> None:
        for trade_id in ids:
            self.capture.feed(trade(trade_id, symbol))

    def ids(self) -> list[int]:
        return [int(i) for i in self.ring.peek(1000)["trade_id"]]

    def count(self, name: str) -> int:
        return self.capture.counters()[name]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "ring")


def test_a_row_holds_what_the_frame_said(bench: Bench) -> None:
    bench.capture.feed(trade(12345678901), recv_ns=77, line=1, epoch=9)
    (row,) = bench.ring.peek(10)
    assert row.tolist()[:10] == (1, 12345678901, 901_25000000, 100000000, (BASE_MS - 1) * 1000, 77,
                                 0, FLAG_FIRST_OF_RUN, 1, 9)  # fmt: skip


def test_ids_seen_in_the_present_run_are_dropped_as_duplicates(bench: Bench) -> None:
    bench.feed(10, 11, 12, 11, 12, 10, 13)
    assert bench.ids() == [10, 11, 12, 13]
    assert bench.count("duplicate") == 3
    assert bench.count("gaps") == bench.count("out_of_order") == 0


def test_a_gap_is_counted_and_the_trade_behind_it_kept(bench: Bench) -> None:
    bench.feed(10, 15, 16, 20)
    assert bench.ids() == [10, 15, 16, 20]
    assert (bench.count("gaps"), bench.count("missing")) == (2, 7)


def test_late_trades_are_kept_for_the_ledger_to_judge(bench: Bench) -> None:
    bench.feed(10, 15, 12, 14, 15, 14, 10, 9, 7, 7)
    # 14 and 15 are in the present run, 9 and 10 in the one before; of 12 and 7 the ledger knows.
    assert bench.ids() == [10, 15, 12, 14, 9, 7, 7]
    assert (bench.count("duplicate"), bench.count("out_of_order")) == (3, 5)


def test_ids_of_a_gap_that_come_after_all_are_counted(bench: Bench) -> None:
    bench.feed(10, 15)
    assert bench.capture.track("BTCUSDT").hole == (11, 14)
    bench.feed(11, 12, 14)
    track = bench.capture.track("BTCUSDT")
    assert (track.first_id, track.last_id, track.hole) == (14, 15, (13, 13))
    assert (bench.count("missing"), bench.count("missing_arrived")) == (4, 3)
    bench.feed(13, *range(10, 16))
    assert bench.capture.track("BTCUSDT")[:3] == (6, 10, 15)
    assert bench.count("missing_arrived") == 4
    assert bench.count("duplicate") == 6


def test_symbols_are_tracked_apart(bench: Bench) -> None:
    bench.feed(10, 11)
    bench.feed(10, 12, symbol="ETHUSDT")
    assert (bench.count("gaps"), bench.count("missing"), bench.count("duplicate")) == (1, 1, 0)
    received = bench.capture.received()
    assert received["BTCUSDT"] == (2, 11, (BASE_MS - 1) * 1000)
    assert received["ETHUSDT"][:2] == (2, 12)


def test_id_0_is_an_id(bench: Bench) -> None:
    bench.feed(0, 1, 0)
    assert bench.ids() == [0, 1]
    assert (bench.count("duplicate"), bench.count("gaps")) == (1, 0)


def test_a_full_ring_refuses_and_the_hole_shows(bench: Bench) -> None:
    bench.feed(*range(70))
    assert bench.ids() == list(range(64))
    assert bench.count("ring_full") == 6
    bench.ring.release(64)
    bench.feed(69, 70)
    assert bench.ids() == [69, 70], "a refused id is no duplicate when it comes again"
    assert (bench.count("gaps"), bench.count("missing")) == (1, 5)


def test_rows_tell_what_came_before_them(bench: Bench) -> None:
    def notes() -> dict[int, int]:
        rows = bench.ring.peek(64)
        flags = rows["flags"] & ~np.uint16(FLAG_BUYER_IS_MAKER)
        return dict(zip(rows["trade_id"].tolist(), flags.tolist(), strict=True))

    for trade_id, epoch in ((2, 1), (4, 1), (6, 2), (8, 2)):
        bench.capture.feed(trade(trade_id), epoch=epoch)
    for trade_id in range(100, 200):
        bench.capture.feed(trade(trade_id, "ETHUSDT"), epoch=2)
    noted = notes()
    assert [noted[i] for i in (2, 4, 6, 8)] == [FLAG_FIRST_OF_RUN, 0, FLAG_FIRST_OF_EPOCH, 0]
    assert (noted[100], noted[101]) == (FLAG_FIRST_OF_RUN, 0)
    bench.ring.release(64)
    bench.capture.feed(trade(10), epoch=2)
    for trade_id in (240, 242):
        bench.capture.feed(trade(trade_id, "ETHUSDT"), epoch=2)
    assert notes() == {10: 0, 240: FLAG_AFTER_REFUSED, 242: 0}, "of ETHUSDT some were refused"


def test_a_refused_frame_is_counted_and_logged_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for junk in (b"{", b"[]", b"", b'{"e":"depthUpdate"}'):
        assert bench.capture.feed(junk) < 0
    refused = bench.capture.refused()
    assert (refused["malformed"], refused["unknown_event"], sum(refused.values())) == (3, 1, 4)
    assert [r.__dict__["cause"] for r in caplog.records] == ["malformed", "unknown_event"]
    assert caplog.records[0].__dict__["head"] == "{"
    assert caplog.records[0].levelno == logging.WARNING
    assert bench.ids() == []


def test_the_flusher_is_woken_once_when_enough_rows_wait(bench: Bench) -> None:
    calls: list[int] = []
    bench.capture.wake_when(3, lambda: calls.append(bench.ring.pending))
    bench.feed(1, 2)
    assert calls == []
    bench.feed(3, 4, 5)
    assert calls == [3]
    bench.capture.wake_when(1, lambda: calls.append(-1))
    bench.feed(6)
    assert calls == [3, -1]


def test_the_high_water_mark_is_reported_once_until_the_ring_has_drained(bench: Bench) -> None:
    calls: list[int] = []
    bench.capture.watch_high_water(10, lambda: calls.append(bench.ring.pending))
    bench.feed(*range(20))
    assert calls == [10]
    assert bench.capture.above_high_water
    bench.ring.release(15)
    bench.capture.below_high_water()
    bench.feed(*range(20, 40))
    assert calls == [10, 10]


def test_latency_lands_in_its_bucket_and_early_frames_are_counted_apart(bench: Bench) -> None:
    event_ns = BASE_MS * 1_000_000
    for trade_id, late_us in enumerate((50, 100, 101, 700_000_000, -5)):
        bench.capture.feed(trade(trade_id), recv_ns=event_ns + late_us * 1000)
    counts, sum_us = bench.capture.latency()
    assert len(counts) == len(LATENCY_BOUNDS_US) + 1
    assert {i: n for i, n in enumerate(counts) if n} == {0: 2, 1: 1, len(counts) - 1: 1}
    assert sum_us == 50 + 100 + 101 + 700_000_000
    assert bench.count("early") == 1


@pytest.mark.parametrize("bound", [*LATENCY_BOUNDS_US, *(1 << bits for bits in range(40))])
def test_every_latency_lands_where_a_search_puts_it(bench: Bench, bound: int) -> None:
    for latency_us in {bound - 1, bound, bound + 1}:
        before, _ = bench.capture.latency()
        bench.capture.feed(trade(latency_us), recv_ns=(BASE_MS * 1000 + latency_us) * 1000)
        after, _ = bench.capture.latency()
        grown = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if new > old]
        assert grown == [bisect_left(LATENCY_BOUNDS_US, latency_us)]


def test_two_lines_in_turn_are_no_disconnect(bench: Bench) -> None:
    arrivals = [(0, 1, 10), (1, 2, 10), (1, 2, 11), (0, 1, 12), (1, 2, 15), (0, 1, 17), (0, 3, 19)]
    for line, epoch, trade_id in arrivals:
        bench.capture.feed(trade(trade_id), line=line, epoch=epoch)
    rows = bench.ring.peek(9)
    assert rows["trade_id"].tolist() == [10, 11, 12, 15, 17, 19]
    assert (rows["flags"] & ~np.uint16(FLAG_BUYER_IS_MAKER)).tolist() == [
        FLAG_FIRST_OF_RUN, 0, 0, 0, 0, FLAG_FIRST_OF_EPOCH,
    ]  # fmt: skip


def test_the_cause_of_a_hole_is_on_every_row_in_it(bench: Bench) -> None:
    """Whatever of a hole stays missing, the row right behind it tells why."""
    for trade_id, epoch in ((10, 1), (15, 2), (13, 1), (14, 1), (9, 1), (17, 2), (16, 1)):
        bench.capture.feed(trade(trade_id), epoch=epoch)
    rows = bench.ring.peek(9)
    flags = rows["flags"] & ~np.uint16(FLAG_BUYER_IS_MAKER)
    noted = dict(zip(rows["trade_id"].tolist(), flags.tolist(), strict=True))
    new = FLAG_FIRST_OF_EPOCH
    assert noted == {10: FLAG_FIRST_OF_RUN, 15: new, 13: new, 14: new, 9: 0, 17: 0, 16: 0}


def test_an_id_far_below_is_parked_reported_and_moves_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.feed(5_000_000, 5_000_001)
    bench.ring.release(2)
    before = bench.capture.track("BTCUSDT")
    bench.feed(3, 4, 3)
    rows = bench.ring.peek(9)
    assert rows["trade_id"].tolist() == [3, 4, 3]
    assert (rows["flags"] & ~np.uint16(FLAG_BUYER_IS_MAKER)).tolist() == [FLAG_FAR_BELOW] * 3
    assert bench.capture.track("BTCUSDT") == before
    assert bench.count("far_below") == 3
    assert bench.count("duplicate") == bench.count("out_of_order") == 0
    (record,) = caplog.records
    told = {name: record.__dict__[name] for name in ("symbol", "trade_id", "greatest_id")}
    assert told == {"symbol": "BTCUSDT", "trade_id": 3, "greatest_id": 5_000_001}
    bench.feed(2, symbol="ETHUSDT")
    bench.feed(5_000_002)
    assert bench.ids()[-2:] == [2, 5_000_002]
    assert bench.count("gaps") == 0


def test_a_symbol_that_is_listed_anew_is_parked_past_its_former_end(bench: Bench) -> None:
    bench.feed(1, 2, 5, 6)
    bench.ring.release(4)
    for trade_id in range(1, 10):
        bench.capture.feed(trade(trade_id, event_ms=BASE_MS + 86_400_000))
    rows = bench.ring.peek(99)
    assert rows["trade_id"].tolist() == list(range(1, 10))
    assert (rows["flags"] & FLAG_FAR_BELOW).all(), "neither the hole nor what follows is its own"
    assert bench.capture.track("BTCUSDT").hole == (3, 4)


def test_a_parked_trade_takes_no_note_of_the_trades_around_it(bench: Bench) -> None:
    for trade_id in range(5_000_000, 5_000_070):
        bench.capture.feed(trade(trade_id), epoch=1)
    bench.ring.release(64)
    bench.capture.feed(trade(7), epoch=2)
    bench.capture.feed(trade(5_000_070), epoch=2)
    flags = bench.ring.peek(2)["flags"].tolist()
    assert [flag & ~FLAG_BUYER_IS_MAKER for flag in flags] == [
        FLAG_FAR_BELOW,
        FLAG_AFTER_REFUSED | FLAG_FIRST_OF_EPOCH,
    ]


def test_a_seed_serves_the_far_below_question_only(bench: Bench) -> None:
    bench.capture.seed("BTCUSDT", 5_000_000, (BASE_MS - 1) * 1000)
    bench.capture.seed("ETHUSDT", 50, (BASE_MS - 70_000) * 1000)
    bench.feed(4_999_999, 5_000_000, 5_000_005, 7)
    bench.feed(50, 60, symbol="ETHUSDT")
    rows = bench.ring.peek(9)
    far = (rows["flags"] & FLAG_FAR_BELOW).astype(bool)
    assert rows["trade_id"][far].tolist() == [7, 50], "too far; too new for an id of the past"
    assert rows["trade_id"][~far].tolist() == [4_999_999, 5_000_000, 5_000_005, 60]
    assert (bench.count("duplicate"), bench.count("gaps"), bench.count("missing")) == (0, 1, 4)
    with pytest.raises(KeyError, match="XRPUSDT has no track"):
        bench.capture.seed("XRPUSDT", 1, 1)


def test_a_track_tells_the_present_run(bench: Bench) -> None:
    assert bench.capture.track("BTCUSDT") == (0, None, None, 0, 0, None)
    bench.capture.feed(trade(10), recv_ns=5)
    bench.capture.feed(trade(11, event_ms=BASE_MS + 1), recv_ns=6)
    bench.capture.feed(trade(10), recv_ns=7)
    bench.capture.feed(trade(9, event_ms=BASE_MS), recv_ns=8)
    assert bench.capture.track("BTCUSDT") == Track(
        received=3, first_id=9, last_id=11, last_trade_us=BASE_MS * 1000, last_recv_ns=6, hole=None
    )
    with pytest.raises(KeyError, match="XRPUSDT has no track"):
        bench.capture.track("XRPUSDT")


def ticker(last_id: int, count: int, event_ms: int) -> bytes:
    return compact(TICKER.replaced(s="BTCUSDT", L=last_id, n=count, E=event_ms))


def kline(last_id: int, count: int, event_ms: int) -> bytes:
    candle = KLINE.value("k")
    assert isinstance(candle, Members)
    candle = candle.replaced(s="BTCUSDT", L=last_id, n=count)
    return compact(KLINE.replaced(s="BTCUSDT", E=event_ms, k=candle))


def test_the_greatest_last_id_told_is_kept_with_its_times(bench: Bench) -> None:
    def told() -> tuple[int, int, int, int]:
        last_id, event_us, recv_ns, since_ns, _ = bench.capture.told("BTCUSDT")
        return last_id, event_us // 1000 - BASE_MS if event_us else 0, recv_ns, since_ns

    assert told() == (-1, 0, 0, 0)
    steps = (
        (kline(-1, 0, BASE_MS + 1), (-1, 1, 1, 1)),
        (ticker(-1, 0, BASE_MS + 2), (-1, 2, 2, 2)),
        (ticker(0, 1, BASE_MS + 3), (0, 3, 3, 3)),
        (kline(70, 9, BASE_MS + 4), (70, 4, 4, 4)),
        (kline(-1, 0, BASE_MS + 5), (70, 4, 4, 4)),
        (ticker(70, 9, BASE_MS + 6), (70, 6, 6, 4)),
        (ticker(70, 9, BASE_MS + 5), (70, 6, 6, 4)),
        (ticker(69, 9, BASE_MS + 8), (70, 6, 6, 4)),
        (ticker(71, 9, BASE_MS + 9), (71, 9, 9, 9)),
    )
    for recv_ns, (frame, expected) in enumerate(steps, start=1):
        assert bench.capture.feed(frame, recv_ns=recv_ns) > 0
        assert told() == (expected[0], expected[1], expected[2], told()[3])
        if expected[0] >= 0:
            assert told()[3] == expected[3]
        assert bench.capture.told("BTCUSDT").heard_ns == recv_ns, "whatever it told"
    assert bench.capture.told("ETHUSDT") == Told(-1, 0, 0, 0, 0)


def test_lines_are_held_against_each_other(bench: Bench) -> None:
    def arrive(line: int, trade_id: int, recv_ms: int) -> None:
        bench.capture.feed(trade(trade_id), recv_ns=recv_ms * 1_000_000, line=line, epoch=line + 1)

    for at_ms, (line, trade_id) in enumerate(
        [(0, 1), (1, 1), (0, 2), (0, 3), (1, 3), (1, 4), (1, 5), (0, 5), (0, 4)], start=100
    ):
        arrive(line, trade_id, at_ms)
    a, b = bench.capture.lines()
    # A: 1, 2, 3 first, 5 one ms behind; jumped over 4, which came after it and is no news.
    assert a == LineUse(first=3, late=1, missing=1, lag_s_sum=pytest.approx(0.001), lag_count=1)
    # B: 1 and 3 one ms behind, 4 and 5 first; it never brought 2.
    assert b == LineUse(first=2, late=2, missing=1, lag_s_sum=pytest.approx(0.002), lag_count=2)
    assert bench.ids() == [1, 2, 3, 4, 5]


def test_a_new_connection_of_the_same_line_is_no_second_line(bench: Bench) -> None:
    for epoch, trade_id in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (1, 3)):
        bench.capture.feed(trade(trade_id), line=0, epoch=epoch)
    assert bench.capture.lines() == ((3, 0, 0, 0.0, 0), (0, 0, 0, 0.0, 0))


def test_symbols_interned_later_are_taken_after_growing(bench: Bench) -> None:
    bench.feed(1, 2, symbol="ETHUSDT")
    before = bench.capture.track("ETHUSDT")
    late = [f"LATE{i}" for i in range(100)]
    for symbol in late:
        bench.ring.intern(symbol)
    with pytest.raises(KeyError, match="LATE0 has no track"):
        bench.capture.track("LATE0")
    bench.capture.grow()
    bench.capture.grow()
    assert bench.capture.track("ETHUSDT") == before
    assert bench.capture.told("LATE99") == (-1, 0, 0, 0, 0)
    bench.feed(3, 2, symbol="ETHUSDT")
    bench.feed(7, 8, symbol="LATE99")
    assert bench.ids() == [1, 2, 3, 7, 8]
    assert bench.capture.track("LATE99")[:3] == (2, 7, 8)
    assert bench.count("duplicate") == 1
    assert list(bench.capture.received()) == ["BTCUSDT", "ETHUSDT", *late]


def test_a_symbol_added_later_is_refused_as_unknown(bench: Bench) -> None:
    """There is no track and no slot of the conflator for it: taking it would write wild memory."""
    late = bench.ring.intern("LATEUSDT")
    candle = KLINE.value("k")
    assert isinstance(candle, Members)
    frames = (
        trade(1, "LATEUSDT"),
        compact(TICKER.replaced(s="LATEUSDT")),
        compact(KLINE.replaced(s="LATEUSDT", k=candle.replaced(s="LATEUSDT"))),
    )
    assert [parse_event(f, bench.ring.symbols)[1]["symbol_id"] for f in frames] == [late] * 3
    assert all(bench.capture.feed(frame) < 0 for frame in frames)
    assert bench.capture.refused()["unknown_symbol"] == 3
    assert [bench.count(name) for name in ("trades", "tickers", "klines")] == [0, 0, 0]
    assert len(bench.capture.conflator.take_tickers()) == 0
    assert len(bench.capture.conflator.take_klines()) == 0
    bench.feed(1, 2, symbol="ETHUSDT")
    assert bench.ids() == [1, 2]


def test_more_symbols_than_slots_is_refused(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 64)
    for i in range(3):
        ring.intern(f"S{i}")
    with pytest.raises(ValueError, match="fewer slots"):
        Capture(ring, ring.symbols, Conflator(2))
