"""The newest values that wait for Redis, fed by a capture: what is news, and in which order."""

import asyncio
import json
import random
from pathlib import Path

from tests.plain_frames import TICKER, TRADE, compact, loose, wrapped
from tests.test_capture import Bench
from tradecore import clock
from tradecore._broadcast import Broadcast, Key
from tradecore._latest import Latest


def now_us() -> int:
    return clock.wall_ns() // 1000


def ticker(event_us: int, symbol: str = "BTCUSDT", last: str = "64000.01000000") -> bytes:
    event = TICKER.replaced(E=event_us, s=symbol, c=last)
    return compact(wrapped(event, f"{symbol.lower()}@ticker"))


def values(latest: Latest, limit: int = 100) -> list[bytes]:
    count, resp = latest.take(limit)
    found = resp.split(b"\r\n")[1::2]
    assert len(found) == 2 * count
    return found


def test_newer_values_take_the_place_of_older_ones(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "ring")
    latest = Latest(bench.capture)
    bench.feed(1, 2, 3, 2)
    event_us = now_us()
    bench.capture.feed(ticker(event_us))
    bench.capture.feed(ticker(event_us - 1))
    assert latest.waiting == 2 and latest.conflated == 2
    name, event = values(latest, 1)
    assert name == b"btcusdt@trade" and json.loads(event)["t"] == 3
    name, event = values(latest)
    assert name == b"btcusdt@ticker" and json.loads(event)["E"] == event_us
    assert values(latest) == []
    latest.mark([0, 1, 9])
    assert len(values(latest)) == 4


def test_a_ticker_of_the_far_future_does_not_silence_its_stream(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "ring")
    latest = Latest(bench.capture)
    bench.capture.feed(ticker(now_us() + 3_600_000_000))
    bench.capture.feed(ticker(now_us(), last="3.00000000"))
    assert json.loads(values(latest)[1])["c"] == "3.00000000"


def test_events_of_any_spelling_are_taken(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "ring")
    latest = Latest(bench.capture)
    spelt = loose(TRADE.replaced(t=5), random.Random(1))
    assert bench.capture.feed(spelt) > 0
    assert json.loads(values(latest)[1])["t"] == 5


def test_the_fan_out_and_redis_tap_the_capture_beside_each_other(tmp_path: Path) -> None:
    class Closed:
        def is_closing(self) -> bool:
            return True

    async def scene() -> None:
        bench = Bench(tmp_path / "ring")
        fan = Broadcast(bench.capture)
        client = fan.join(Closed(), lambda: None)
        client.choose([Key("btcusdt@trade", 0, 0)], 0)
        latest = Latest(bench.capture)
        bench.feed(1)
        client.leave()
        bench.feed(2)
        assert fan.events[0] == 1
        assert json.loads(values(latest)[1])["t"] == 2
        latest.close()
        latest.close()
        bench.feed(3)
        assert values(latest) == []

    asyncio.run(scene())


def test_trades_beyond_the_buffer_are_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "ring", 1 << 12)
    latest = Latest(bench.capture, 2000)
    bench.feed(*range(1, 101))
    count, events = latest.take_trades()
    assert [event["t"] for event in json.loads(events)] == list(range(1, count + 1))
    assert 5 < count < 20 and latest.trades_dropped == 100 - count
    assert latest.take_trades() == (0, b"[]")
    bench.feed(101)
    assert latest.take_trades()[0] == 1
