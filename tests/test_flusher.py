"""When the flusher writes, how its batches grow, and what it does when a write fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tradecore.flusher as flusher_module
from tests.test_capture import trade
from tests.test_conflator import OPEN_MS, kline, ticker
from tradecore import clock
from tradecore.capture import Capture
from tradecore.conflator import CLOSED_KLINES_MAX, Conflator
from tradecore.errors import TransientStoreError
from tradecore.flusher import MAX_BATCH_ROWS, Flusher, FlushPolicy
from tradecore.ring import Ring


@dataclass
class Result:
    stored: int
    duplicate: int = 0
    parked: int = 0
    expired: int = 0
    opened: tuple[tuple[str, int, int], ...] = ()


class GatedSink:
    """Takes batches when the gate is open; fails as often as told."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[TransientStoreError] = []
        self.batches: list[list[int]] = []
        self.opens: list[tuple[str, int, int]] = []
        self.result: Result | None = None
        self.tickers: list[int] = []
        self.klines: list[int] = []
        self.waiting = 0
        self.pings = 0
        self.away = False

    async def write_trades(self, rows: NDArray[np.void]) -> Result:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        if self.failures:
            raise self.failures.pop()
        self.batches.append(rows["trade_id"].tolist())
        opened, self.opens = self.opens, []
        return self.result or Result(len(rows), opened=tuple(opened))

    async def write_tickers(self, rows: NDArray[np.void]) -> Result:
        if self.failures:
            raise self.failures.pop()
        self.tickers += (rows["event_us"] // 1000 - OPEN_MS).tolist()
        return Result(len(rows))

    async def write_klines(self, rows: NDArray[np.void]) -> Result:
        self.klines += (rows["event_us"] // 1000 - OPEN_MS).tolist()
        return Result(len(rows))

    async def ping(self) -> None:
        self.pings += 1
        if self.away:
            raise TransientStoreError("down", "it is away")


class Desk:
    def __init__(self, path: Path, policy: FlushPolicy, capacity: int) -> None:
        self.ring = Ring(path, capacity)
        for symbol in ("BTCUSDT", "ETHUSDT"):
            self.ring.intern(symbol)
        self.conflator = Conflator(2)
        self.capture = Capture(self.ring, self.ring.symbols, self.conflator)
        self.sink = GatedSink()
        self.released = 0
        self.told: list[tuple[int, tuple[str, int, int]]] = []
        self.flusher = Flusher(
            *(self.ring, self.capture, self.conflator, self.sink, policy),
            after_release=self._count,
            on_opened=lambda holes: self.told.extend((self.ring.pending, hole) for hole in holes),
        )

    def _count(self) -> None:
        self.released += 1

    def feed(self, first_id: int, count: int, epoch: int = 1) -> None:
        now_ns = clock.wall_ns()
        for trade_id in range(first_id, first_id + count):
            self.capture.feed(trade(trade_id), recv_ns=now_ns, epoch=epoch)


@asynccontextmanager
async def desk(
    tmp_path: Path, rows: int, age_s: float, capacity: int = 1024
) -> AsyncIterator[Desk]:
    one = Desk(tmp_path / "ring", FlushPolicy(rows, age_s), capacity)
    task = asyncio.create_task(one.flusher.run())
    try:
        yield one
    finally:
        one.sink.gate.set()
        one.flusher.drain()
        await asyncio.wait_for(task, 10)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("pending", "age_s", "since_s", "wait"),
    [
        (0, 9.0, 9.0, (0.5, 100)),
        (0, 0.0, 0.0, (0.5, 100)),
        (100, 0.0, 9.0, (0.0, 2048)),
        (500, -3.0, 9.0, (0.0, 2048)),
        (1, -3.0, 9.0, (0.0, 100)),  # the clock was set back: nobody knows how long it has waited
        (1, 0.25, 9.0, (0.75, 100)),
        (99, 1.5, 9.0, (0.0, 100)),
        # The last batch has begun only just now.
        (100, 0.5, 0.0, (0.05, 2048)),
        (1, 9.0, 0.0, (0.05, 100)),
        (1, 0.25, 0.0, (0.75, 100)),
        (2047, 0.0, 0.0, (0.05, 2048)),
        (2048, 0.0, 0.0, (0.0, 2048)),
    ],
)
def test_the_policy(pending: int, age_s: float, since_s: float, wait: tuple[float, int]) -> None:
    assert FlushPolicy(100, 1.0).wait(pending, age_s, since_s) == wait


def test_the_pace_is_no_slower_than_the_policy() -> None:
    quick, large = FlushPolicy(100, 0.005), FlushPolicy(10_000, 1.0)
    assert quick.wait(0, 0.0, 0.0) == (0.5, 1)  # the first row counts
    assert quick.wait(100, 0.0, 0.001).limit_s == pytest.approx(0.004)
    assert quick.wait(100, 0.0, 0.006).limit_s == 0.0
    assert large.wait(9_999, 0.75, 9.0) == (0.25, 10_000)
    assert large.wait(10_000, 0.0, 0.0) == (0.0, 10_000)


def test_the_policy_fits_the_ring() -> None:
    assert FlushPolicy.fitting(100, 1.0, 1 << 20) == FlushPolicy(100, 1.0)
    assert FlushPolicy.fitting(1_000_000, 60.0, 1 << 20).batch_rows == MAX_BATCH_ROWS
    small = FlushPolicy.fitting(1_000_000, 60.0, 1024)
    assert small.wait(256, 0.0, 0.0).limit_s == 0.0  # well before the sockets would be paused
    assert FlushPolicy.fitting(100, 1.0, 1024).wait(256, 0.0, 0.0).limit_s == 0.0


async def test_a_batch_that_takes_too_long_is_tried_in_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "RETRY_BASE_S", 0.001)
    monkeypatch.setattr(flusher_module, "RETRY_CAP_S", 0.001)
    monkeypatch.setattr(flusher_module, "LEAST_ROWS", 16)
    async with desk(tmp_path, rows=10, age_s=0.01) as one:
        write = one.sink.write_trades

        async def at_most_40(rows: NDArray[np.void]) -> Result:
            if len(rows) > 40:
                raise TransientStoreError("57014", "canceling statement due to statement timeout")
            return await write(rows)

        one.sink.write_trades = at_most_40  # type: ignore[method-assign]
        one.feed(0, 300)
        await until(lambda: one.ring.pending == 0)
        assert [i for batch in one.sink.batches for i in batch] == list(range(300))
        assert all(18 <= len(batch) <= 40 for batch in one.sink.batches[:-1])


async def test_a_busy_market_is_written_in_batches_apart(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=30, capacity=8192) as one:
        begun_ns: list[int] = []
        write = one.sink.write_trades

        async def noted(rows: NDArray[np.void]) -> Result:
            begun_ns.append(one.flusher._began_ns)
            return await write(rows)

        one.sink.write_trades = noted  # type: ignore[method-assign]
        count = 0
        while len(begun_ns) < 4:
            one.feed(count, 20)
            count += 20
            await asyncio.sleep(0.001)
        assert np.diff(begun_ns).min() >= flusher_module.PACE_S * 1e9 - 1
        one.feed(count, flusher_module.PACE_ROWS)
        await until(lambda: sum(map(len, one.sink.batches)) == count + flusher_module.PACE_ROWS)


async def test_what_became_of_a_batch_is_counted(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=30) as one:
        one.sink.result = Result(4, duplicate=3, parked=2, expired=1)
        one.feed(0, 10)
        stats = one.flusher.stats
        await until(lambda: stats.trades_stored == 4)
        assert (stats.trades_duplicate, stats.trades_parked, stats.trades_expired) == (3, 2, 1)


async def test_a_full_batch_goes_at_once_and_a_part_of_one_waits(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=30) as one:
        one.feed(0, 10)
        await until(lambda: one.ring.pending == 0)
        one.feed(10, 9)
        await asyncio.sleep(0.05)
        assert one.ring.pending == 9, "neither the size nor the age is reached"
        one.feed(19, 1)
        await until(lambda: one.ring.pending == 0)
        assert one.sink.batches == [list(range(10)), list(range(10, 20))]
        assert one.released == 2


async def test_the_oldest_row_waits_no_longer_than_the_age(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=1000, age_s=0.15) as one:
        began_ns = clock.mono_ns()
        one.feed(0, 3)
        await until(lambda: one.ring.pending == 0)
        assert clock.mono_ns() - began_ns >= 140_000_000
        assert one.sink.batches == [[0, 1, 2]]


async def test_rows_that_woke_nobody_are_found(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=1000, age_s=0.05) as one:
        await asyncio.sleep(0)
        one.feed(0, 1)
        await until(lambda: one.ring.pending == 0)
        row = one.ring.rows[:1].copy()
        row["trade_id"] = 77
        one.ring.append(row)  # past the capture, as if its read had broken off
        await until(lambda: one.sink.batches == [[0], [77]])


async def test_the_next_batch_grows_while_one_is_under_way(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=0.01) as one:
        one.sink.gate.clear()
        one.feed(0, 10)
        await until(lambda: one.sink.waiting == 1)
        one.feed(10, 500)
        one.sink.gate.set()
        await until(lambda: one.ring.pending == 0)
        assert [len(batch) for batch in one.sink.batches] == [10, 500]


async def test_a_batch_has_a_cap(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=0.01, capacity=1 << 16) as one:
        one.sink.gate.clear()
        one.feed(0, MAX_BATCH_ROWS + 100)
        one.sink.gate.set()
        await until(lambda: one.ring.pending == 0)
        assert [len(batch) for batch in one.sink.batches] == [MAX_BATCH_ROWS, 100]


async def test_rows_stay_in_the_ring_until_a_write_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "RETRY_CAP_S", 0.1)
    async with desk(tmp_path, rows=5, age_s=0.01) as one:
        one.sink.failures = [TransientStoreError("08006", "gone"), TransientStoreError("57P01", "")]
        one.feed(0, 5)
        await until(lambda: one.flusher.stats.retries.total() == 1)
        assert one.ring.pending == 5
        assert one.flusher.stats.away_since_ns > 0
        await until(lambda: one.ring.pending == 0)
        assert one.sink.batches == [[0, 1, 2, 3, 4]]
        assert +one.flusher.stats.retries == {"57P01": 1, "08006": 1}
        assert one.flusher.stats.away_since_ns == 0
        assert one.flusher.stats.last_error is None


async def test_drain_writes_what_waits_and_ends(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=1000, age_s=60) as one:
        one.feed(0, 7)
        for frame in (ticker(OPEN_MS + 1), kline(0, OPEN_MS + 2, closed=True)):
            one.capture.feed(frame)
    assert one.sink.batches == [list(range(7))]
    assert (one.sink.tickers, one.sink.klines) == ([1], [2])
    assert one.ring.pending == 0


async def test_a_ticker_whose_write_failed_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "STATE_INTERVAL_S", 0.02)
    async with desk(tmp_path, rows=1000, age_s=60) as one:
        one.sink.failures = [TransientStoreError("40P01", "deadlock")]
        one.capture.feed(ticker(OPEN_MS + 1))
        await until(lambda: one.sink.tickers == [1])
        assert one.flusher.stats.retries["40P01"] == 1
        assert one.flusher.stats.tickers_stored == 1


async def test_klines_that_find_no_room_are_counted_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flusher_module, "STATE_INTERVAL_S", 0.02)
    async with desk(tmp_path, rows=1000, age_s=60) as one:
        count = CLOSED_KLINES_MAX + 3
        for turn in range(2):
            for minute in range(turn * count, (turn + 1) * count):
                one.capture.feed(kline(minute, OPEN_MS + minute, closed=True))
            await until(lambda n=turn + 1: one.flusher.stats.klines_dropped == n * 3)
    assert [r.message for r in caplog.records if "klines" in r.message] == [
        "closed klines find no room; the cross-check asks the venue for them later"
    ]


async def test_latency_and_size_histograms_count_rows_and_batches(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=30) as one:
        one.feed(0, 10)
        await until(lambda: one.ring.pending == 0)
        stats = one.flusher.stats
        assert int(stats.latency_counts.sum()) == 10
        assert stats.latency_sum_ns > 0
        assert (sum(stats.rows_counts), stats.rows_sum) == (1, 10)
        assert sum(stats.duration_counts) == 1
        assert stats.trades_stored == 10


async def test_holes_are_told_after_their_rows_have_left_the_ring(tmp_path: Path) -> None:
    async with desk(tmp_path, rows=10, age_s=30) as one:
        hole = ("BTCUSDT", 3, 4)
        one.sink.opens = [hole]
        one.feed(0, 10)
        await until(lambda: bool(one.told))
        one.feed(10, 10)
        await until(lambda: one.ring.pending == 0)
        assert one.told == [(0, hole)]
        assert one.flusher.stats.holes_opened == 1


async def test_a_database_that_goes_while_nothing_is_written_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "QUIET_S", 0.05)
    async with desk(tmp_path, rows=1, age_s=30) as one:
        stats = one.flusher.stats
        await until(lambda: one.sink.pings > 1)
        assert not stats.away_since_ns
        one.sink.away = True
        await until(lambda: stats.away_since_ns > 0)
        assert stats.last_error == "it is away"
        one.sink.away = False
        await until(lambda: not stats.away_since_ns)


async def test_a_database_that_hangs_is_away_since_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "SILENT_S", 0.05)
    async with desk(tmp_path, rows=1, age_s=30) as one:
        stats = one.flusher.stats
        await until(lambda: one.sink.pings > 0 and not stats.asked_ns)
        one.sink.gate.clear()
        asked_ns = clock.mono_ns()
        one.feed(0, 1)
        await until(lambda: stats.away_since(clock.mono_ns()) > 0)
        assert stats.away_since(clock.mono_ns()) >= asked_ns
        one.sink.gate.set()
        await until(lambda: one.sink.batches)
        await until(lambda: not stats.away_since(clock.mono_ns()))


async def test_a_database_that_answers_and_takes_no_rows_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "QUIET_S", 0.05)
    monkeypatch.setattr(flusher_module, "RETRY_BASE_S", 0.5)
    async with desk(tmp_path, rows=1, age_s=30) as one:
        stats = one.flusher.stats
        await until(lambda: one.sink.pings > 0)
        one.sink.failures = [TransientStoreError("53100", "disk full")]
        one.feed(0, 1)
        await until(lambda: stats.away_since_ns > 0)
        pings = one.sink.pings
        while not one.sink.batches:
            assert (one.sink.pings, bool(stats.away_since_ns)) == (pings, True)
            await asyncio.sleep(0.01)
        await until(lambda: one.sink.pings > pings)
