"""The fan-out, fed by a capture: bytes, who gets what, two lines, slow readers."""

import asyncio
import gzip
import json
import random
import time
from pathlib import Path

import pytest
from codec_check import make_table
from fuzz import mutated

from tests.plain_frames import (
    CANDLE,
    KLINE,
    TICKER,
    TRADE,
    Members,
    compact,
    corpus,
    in_microseconds,
    loose,
    wrapped,
)
from tests.test_capture import Bench, trade
from tests.ws_frames import payloads
from tradecore._broadcast import Broadcast, Key
from tradecore._fastparse import FrameError, parse_event
from tradecore._reframe import COMBINED, KINDS, MICRO, reframe

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "frames"
MODES = (0, COMBINED, MICRO, COMBINED | MICRO)
EVENTS = {"trade": TRADE, "ticker": TICKER, "kline_1m": KLINE}

BTC_TRADES = Key("btcusdt@trade", 0, 0)
BTC_TICKER = Key("btcusdt@ticker", 1, 0)
BTC_KLINES = Key("btcusdt@kline_1m", 2, 0)
ETH_TRADES = Key("ethusdt@trade", 0, 1)
HOLES = Key("!hole", 3, 0)


class Wire:
    """What a client's transport is to the fan-out."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.backlog = 0
        self.closing = False
        self.broken = False

    def write(self, data: bytes) -> None:
        if self.broken:
            raise RuntimeError("broken")
        self.writes.append(data)

    def get_write_buffer_size(self) -> int:
        return self.backlog

    def is_closing(self) -> bool:
        return self.closing

    def take(self) -> list[bytes]:
        """Return the payloads that came since the last call."""
        got = payloads(b"".join(self.writes))
        self.writes.clear()
        return got


class Desk(Bench):
    """A capture with a fan-out and clients."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fan = Broadcast(self.capture, conflate_bytes=1000, backlog_max_bytes=5000)
        self.given_up: list[Wire] = []

    def join(self, *keys: Key, mode: int = 0):
        wire = Wire()
        client = self.fan.join(wire, lambda: self.given_up.append(wire))
        client.choose(keys, mode)
        return client, wire

    def ids_sent(self, wire: Wire) -> list[int]:
        self.fan.flush()
        return [json.loads(payload)["t"] for payload in wire.take()]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "ring")


def ticker(event_us: int, last: str = "1.00000000") -> bytes:
    return compact(wrapped(TICKER.replaced(E=event_us, c=last), "btcusdt@ticker"))


def kline(event_us: int, open_us: int, closed: bool = False) -> bytes:
    candle = CANDLE.replaced(t=open_us, T=open_us + 59_999_999, x=closed)
    return compact(wrapped(KLINE.replaced(E=event_us, k=candle), "btcusdt@kline_1m"))


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_frames_are_those_of_the_venue_in_the_wanted_unit(kind: int, mode: int) -> None:
    name = f"btcusdt@{KINDS[kind]}"
    event = EVENTS[KINDS[kind]]
    micro = in_microseconds(event)
    if kind == 2:
        # The last instant of the minute, in either unit.
        micro = micro.replaced(
            k=in_microseconds(CANDLE).replaced(T=CANDLE.value("T") * 1000 + 999)  # type: ignore[operator]
        )
    wanted = micro if mode & MICRO else event
    expected = compact(wrapped(wanted, name) if mode & COMBINED else wanted)
    for frame in (compact(wrapped(micro, name)), compact(micro)):
        assert payloads(reframe(kind, frame, name.encode(), mode, "fast")) == [expected]
        assert payloads(reframe(kind, frame, name.encode(), mode, "slow")) == [expected]


@pytest.mark.parametrize("kind", range(3))
def test_what_came_in_milliseconds_is_made_longer(kind: int) -> None:
    name = f"btcusdt@{KINDS[kind]}".encode()
    frame = compact(EVENTS[KINDS[kind]])
    for path in ("fast", "slow"):
        (longer,) = payloads(reframe(kind, frame, name, MICRO, path))
        assert payloads(reframe(kind, longer, name, 0, path)) == [frame]
        assert json.loads(longer)["E"] == 1723161255343000
        if kind == 2:
            assert json.loads(longer)["k"]["T"] == 1723161299999999
            assert json.loads(longer)["k"]["t"] == 1723161240000000


@pytest.mark.parametrize("kind", range(3))
def test_any_other_spelling_goes_the_slow_way_and_keeps_its_decimals(kind: int) -> None:
    name = f"btcusdt@{KINDS[kind]}"
    event = in_microseconds(EVENTS[KINDS[kind]])
    dice = random.Random(7)
    for _ in range(300):
        text = loose(wrapped(event, name), dice)
        (payload,) = payloads(reframe(kind, text, name.encode(), MICRO))
        sent = json.loads(payload)
        assert sent == json.loads(compact(event))
        assert compact_again(sent) == payload


def compact_again(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda frame: frame[:-1],
        lambda frame: frame.replace(b'"T":', b'"T" :'),
        lambda frame: frame.replace(b'"M":true}', b'"M":true,"X":1}'),
        lambda frame: frame.replace(b'"E":1', b'"E":12345'),
        lambda frame: b" " + frame,
        lambda frame: frame[:-1] + b" }",
        lambda frame: frame.replace(b'"m":true', b'"m":null'),
    ],
)
def test_the_fast_way_takes_the_documented_form_only(damage) -> None:
    frame = compact(wrapped(in_microseconds(TRADE)))
    assert damage(frame) != frame
    with pytest.raises(ValueError):
        reframe(0, damage(frame), b"btcusdt@trade", 0, "fast")


@pytest.mark.parametrize("cut", range(1, 170, 3))
def test_a_cut_frame_is_never_read_past_its_end(cut: int) -> None:
    for kind, event in enumerate((TRADE, TICKER)):
        frame = compact(wrapped(in_microseconds(event)))[:-cut]
        with pytest.raises(ValueError):
            reframe(kind, frame, b"btcusdt@trade", 0, "fast")


@pytest.mark.parametrize("path", ["fast", "slow"])
@pytest.mark.parametrize(
    "frame",
    [
        # Numbers of keys that nobody needs, beyond what a double and an int of Python hold.
        b'{"X":1e400,' + compact(TRADE)[1:],
        b'{"X":["\\ud800",-1E+999],' + compact(TRADE)[1:],
        b'{"X":' + b"9" * 5000 + b"," + compact(TRADE)[1:],
        # An event of its own, with the keys of a wrapper.
        compact(Members([*TRADE, ("stream", "x"), ("data", Members([("e", "trade")]))])),
        b'{"stream":"x","data":{"e":"trade","E":1},' + compact(TRADE)[1:],
        # A wrapper with one key more, an object that ends as the event does.
        compact(Members([*wrapped(TRADE), ("y", TRADE.replaced(T=1723161255999))])),
        compact(Members([*wrapped(TICKER), ("y", TICKER.replaced(C=1723161255999))])),
        compact(Members([*wrapped(KLINE), ("y", KLINE)])),
    ],
)
def test_keys_that_nobody_needs_do_no_harm(frame: bytes, path: str) -> None:
    kind = ("trade", "ticker", "kline").index(parse_event(frame, make_table())[0])
    try:
        (payload,) = payloads(reframe(kind, frame, b"x@y", MICRO, path))
    except ValueError:
        assert path == "fast"
        return
    sent = json.loads(payload, parse_constant=pytest.fail)
    event = (TRADE, TICKER, KLINE)[kind]
    assert (sent["e"], sent["s"]) == (event.value("e"), event.value("s"))
    assert sent["E"] == 1723161255343000
    for key in set("pqOC") & sent.keys():
        value = event.value(key)
        assert sent[key] == (value * 1000 if isinstance(value, int) else value)
    if kind == 0:
        assert sent["T"] == 1723161255342000


@pytest.mark.parametrize("size", [0, 1, 124, 125, 126, 127, 65534, 65535, 65536, 70000])
def test_headers_of_all_sizes(size: int) -> None:
    event = Members([*TRADE, ("X", "x" * max(0, size - len(compact(TRADE)) - 7))])
    (payload,) = payloads(reframe(0, compact(event), b"btcusdt@trade", 0))
    assert payload == compact(event)


def test_names_that_are_not_ascii(tmp_path: Path) -> None:
    event = in_microseconds(TRADE).replaced(s="币安人生USDT")
    name = "币安人生usdt@trade"
    (payload,) = payloads(
        reframe(0, compact(wrapped(event, name)), name.encode(), COMBINED | MICRO, "fast")
    )
    assert payload == compact(wrapped(event, name))


def test_mutated_frames_that_the_codec_takes_mean_the_same_on_both_ways() -> None:
    dice = random.Random(11)
    table = make_table()
    seeds = corpus()
    kinds = {"trade": 0, "ticker": 1, "kline": 2}
    fast = slow = 0
    while fast < 3000:
        frame = dice.choice(seeds)
        if dice.random() < 0.8:
            frame = mutated(frame, dice, seeds)
        try:
            kind = kinds[parse_event(frame, table)[0]]
        except (FrameError, KeyError):
            continue
        mode = dice.choice(MODES)
        (exact,) = payloads(reframe(kind, frame, b"x@y", mode, "slow"))
        slow += 1
        try:
            (quick,) = payloads(reframe(kind, frame, b"x@y", mode, "fast"))
        except ValueError:
            continue
        fast += 1
        assert json.loads(quick) == json.loads(exact), frame
    assert slow > fast


def recorded_trades() -> list[bytes]:
    path = RECORDED / "btcusdt_trade_20240809.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no recording {path.name} in ../shared/frames")
    with gzip.open(path) as lines:
        return [line.rstrip(b"\n") for line in lines]


async def test_recorded_trades_reach_clients_byte_for_byte(tmp_path: Path) -> None:
    frames = recorded_trades()
    desk = Desk(tmp_path / "ring")
    _, combined = desk.join(BTC_TRADES, mode=COMBINED)
    _, raw = desk.join(BTC_TRADES)
    sent = 0
    for frame in frames:
        sent += desk.capture.feed(frame) == 1
        desk.ring.release(desk.ring.pending)
    desk.fan.flush()
    assert combined.take() == frames
    assert raw.take() == [frame[len(b'{"stream":"btcusdt@trade","data":') : -1] for frame in frames]
    assert desk.fan.events == [sent, 0, 0, 0]


# --- who gets what ----------------------------------------------------------------------------


async def test_nothing_is_done_while_nobody_is_subscribed(desk: Desk) -> None:
    desk.feed(1, 2)
    client, wire = desk.join(BTC_TRADES)
    desk.feed(3)
    client.choose([], 0)
    desk.feed(4)
    client.choose([ETH_TRADES], 0)
    desk.feed(5)
    client.leave()
    desk.feed(6)
    assert desk.ids_sent(wire) == [3]
    assert desk.fan.events[0] == 1
    assert desk.fan.groups == 0


async def test_clients_with_the_same_streams_share_one_buffer_and_one_write(desk: Desk) -> None:
    wires = [desk.join(BTC_TRADES, ETH_TRADES)[1] for _ in range(5)]
    wires += [desk.join(ETH_TRADES, BTC_TRADES)[1] for _ in range(5)]
    other = desk.join(BTC_TRADES)[1]
    desk.feed(1, 2, 3)
    desk.feed(7, symbol="ETHUSDT")
    desk.fan.flush()
    assert [len(wire.writes) for wire in wires] == [1] * 10
    assert len({id(wire.writes[0]) for wire in wires}) == 1
    assert desk.fan.groups == 2
    assert desk.ids_sent(wires[0]) == [1, 2, 3, 7]
    assert desk.ids_sent(other) == [1, 2, 3]
    assert desk.fan.events[0] == 4


async def test_each_trade_once_whichever_line_brings_it(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    for trade_id in (1, 2, 3):
        desk.capture.feed(trade(trade_id), line=0, epoch=1)
    for trade_id in (2, 3, 4, 5):
        desk.capture.feed(trade(trade_id), line=1, epoch=2)
    for trade_id in (4, 5, 6):
        desk.capture.feed(trade(trade_id), line=0, epoch=1)
    assert desk.ids_sent(wire) == [1, 2, 3, 4, 5, 6]


async def test_late_trades_of_a_hole_come_once(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    desk.feed(1, 2, 20)
    # In the middle of the hole, where the capture does not remember them; then from another line.
    desk.feed(8, 9, 10)
    desk.feed(8, 9, 10, 11, 3)
    desk.feed(3, 4, 11)
    assert desk.ids_sent(wire) == [1, 2, 20, 8, 9, 10, 11, 3, 4]


async def test_trades_that_were_perhaps_seen_long_ago_are_not_sent(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    desk.feed(10, 20, 30)
    desk.feed(10, 11)  # below both runs: the ledger knows, we do not
    assert desk.ids_sent(wire) == [10, 20, 30]


async def test_trades_far_below_and_refused_ones_are_not_sent(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    desk.feed(50_000_000, 1)
    assert desk.ids_sent(wire) == [50_000_000]
    desk.feed(*range(50_000_001, 50_000_100))  # more than the ring has slots
    sent = desk.ids_sent(wire)
    assert sent == desk.ids()[2:]
    desk.ring.release(desk.ring.pending)
    desk.feed(50_000_099)  # the other line brings it when there is room again
    assert desk.ids_sent(wire) == [50_000_099]


async def test_tickers_never_go_backwards(desk: Desk) -> None:
    _, wire = desk.join(BTC_TICKER, mode=MICRO)
    times = (1723161255343000, 1723161255343000, 1723161256343000, 1723161255343000)
    for event_us in times:
        desk.capture.feed(ticker(event_us))
    desk.fan.flush()
    assert [json.loads(payload)["E"] for payload in wire.take()] == [times[0], times[2]]


async def test_klines_never_go_backwards_and_close_once(desk: Desk) -> None:
    _, wire = desk.join(BTC_KLINES, mode=MICRO)
    first, second = 1723161240_000000, 1723161300_000000
    for frame in (
        kline(first + 10, first),
        kline(first + 10, first),
        kline(first + 60, first, closed=True),
        kline(first + 60, first, closed=True),
        kline(first + 70, first),
        kline(second + 5, second),
        kline(first + 60, first, closed=True),
        kline(second + 4, second),
        kline(second + 5, second, closed=True),
    ):
        desk.capture.feed(frame)
    desk.fan.flush()
    got = [json.loads(payload) for payload in wire.take()]
    assert [(one["E"], one["k"]["t"], one["k"]["x"]) for one in got] == [
        (first + 10, first, False),
        (first + 60, first, True),
        (second + 5, second, False),
        (second + 5, second, True),
    ]


async def test_a_state_of_the_far_future_silences_nothing(desk: Desk) -> None:
    _, wire = desk.join(BTC_TICKER, BTC_KLINES, mode=MICRO)
    now = time.time_ns() // 1000
    minute = now // 60_000_000 * 60_000_000
    absurd = now + 3600_000_000
    absurd_minute = minute + 3600_000_000
    for event_us in (now, absurd, now + 1, now, absurd, now + 2):
        desk.capture.feed(ticker(event_us))
    for frame in (
        kline(now, minute),
        kline(now + 1, absurd_minute, closed=True),
        kline(now + 2, minute),
        kline(now + 1, minute),
        kline(absurd, minute),
        kline(now + 3, minute),
        kline(now + 4, minute, closed=True),
        kline(now + 5, minute),
    ):
        desk.capture.feed(frame)
    desk.fan.flush()
    events = [json.loads(payload) for payload in wire.take()]
    tickers = [one["E"] for one in events if one["e"] == "24hrTicker"]
    klines = [one["E"] for one in events if one["e"] == "kline"]
    assert tickers == [now, absurd, now + 1, absurd, now + 2]
    assert klines == [now, now + 1, now + 2, absurd, now + 3, now + 4]


async def test_states_keep_their_order_while_our_clock_is_behind(desk: Desk) -> None:
    _, wire = desk.join(BTC_TICKER, BTC_KLINES, mode=MICRO)
    later = time.time_ns() // 1000 + 3600_000_000
    minute = later // 60_000_000 * 60_000_000
    for step in (5, 4, 6, 5):
        desk.capture.feed(ticker(later + step))
        desk.capture.feed(kline(later + step, minute))
    desk.fan.flush()
    events = [json.loads(payload) for payload in wire.take()]
    assert [one["E"] - later for one in events if one["e"] == "24hrTicker"] == [5, 6]
    assert [one["E"] - later for one in events if one["e"] == "kline"] == [5, 6]


async def test_a_change_of_mode_loses_and_doubles_nothing(desk: Desk) -> None:
    client, wire = desk.join(BTC_TRADES)
    desk.feed(1)
    client.choose([BTC_TRADES], COMBINED)
    desk.feed(2)
    client.choose([BTC_TRADES, ETH_TRADES], COMBINED)
    desk.feed(3)
    client.choose([ETH_TRADES], COMBINED)
    desk.feed(4)
    desk.fan.flush()
    one, two, three = map(json.loads, wire.take())
    assert (one["t"], two["data"]["t"], three["data"]["t"]) == (1, 2, 3)
    assert two["stream"] == "btcusdt@trade"


async def test_each_gets_its_own_mode_in_whatever_order_they_come_and_go(desk: Desk) -> None:
    dice = random.Random(3)
    modes = [dice.choice(MODES) for _ in range(40)]
    # No two want the same, so that each is a group.
    others = [Key(f"{number}@trade", 0, 100 + number) for number in range(len(modes))]
    clients = [
        desk.join(BTC_TRADES, other, mode=mode) for other, mode in zip(others, modes, strict=True)
    ]
    for number in dice.sample(range(len(modes)), 20):
        modes[number] = dice.choice(MODES)
        clients[number][0].choose([BTC_TRADES, others[number]], modes[number])
    assert desk.fan.groups == len(modes)
    desk.feed(1)
    desk.fan.flush()
    for mode, (_, wire) in zip(modes, clients, strict=True):
        assert wire.take() == payloads(reframe(0, trade(1), b"btcusdt@trade", mode))


async def test_events_of_our_own_come_in_both_units(desk: Desk) -> None:
    _, milli = desk.join(HOLES)
    _, micro = desk.join(HOLES, BTC_TRADES, mode=MICRO | COMBINED)
    desk.fan.announce(["btcusdt@hole", "!hole"], b'{"E":1}', b'{"E":1000}')
    desk.fan.flush()
    assert milli.take() == [b'{"E":1}']
    assert micro.take() == [b'{"stream":"!hole","data":{"E":1000}}']
    assert desk.fan.is_wanted(3)
    assert not desk.fan.is_wanted(1)


async def test_a_broken_client_harms_nobody(desk: Desk, caplog) -> None:
    _, broken = desk.join(BTC_TRADES)
    _, good = desk.join(BTC_TRADES)
    broken.broken = True
    desk.feed(1, 2)
    assert desk.ids_sent(good) == [1, 2]
    assert desk.ids() == [1, 2]
    assert "was not written to" in caplog.text


async def test_a_client_that_is_closing_gets_nothing(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    wire.closing = True
    desk.feed(1)
    assert desk.ids_sent(wire) == []


async def test_the_loop_writes_without_being_asked(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    for trade_id in range(1, 20):
        desk.feed(trade_id)
        async with asyncio.timeout(20):
            while not wire.writes:
                await asyncio.sleep(0)
        assert [json.loads(payload)["t"] for payload in wire.take()] == [trade_id]


# --- slow readers -----------------------------------------------------------------------------


async def test_states_of_a_slow_client_are_held_back_and_the_latest_is_sent(desk: Desk) -> None:
    client, wire = desk.join(BTC_TICKER, BTC_KLINES, BTC_TRADES, mode=MICRO)
    _, quick = desk.join(BTC_TICKER, BTC_KLINES, BTC_TRADES, mode=MICRO)
    wire.backlog = 2000
    first = 1723161240_000000
    for step in range(5):
        desk.capture.feed(ticker(1723161255343000 + step))
        desk.capture.feed(kline(first + step, first))
        desk.feed(step + 1)
        desk.fan.flush()
    desk.capture.feed(kline(first + 60, first, closed=True))
    desk.fan.flush()
    # Trades and the closed kline are not held back.
    assert [json.loads(payload)["e"] for payload in wire.take()] == ["trade"] * 5 + ["kline"]
    assert client.conflating
    assert desk.fan.conflated == [0, 4, 5, 0]
    assert len(quick.take()) == 16
    wire.backlog = 0
    async with asyncio.timeout(20):
        while client.conflating:
            await asyncio.sleep(0)
    held = [json.loads(payload) for payload in wire.take()]
    # The closed kline stands for the open one before it.
    assert [(one["e"], one["E"]) for one in held] == [("24hrTicker", 1723161255343004)]
    desk.capture.feed(ticker(1723161255343009))
    desk.fan.flush()
    assert len(wire.take()) == 1
    assert desk.given_up == []


async def test_a_client_that_leaves_trades_unread_is_given_up_once(desk: Desk) -> None:
    _, wire = desk.join(BTC_TRADES)
    _, quick = desk.join(BTC_TRADES)
    wire.backlog = 5000
    desk.feed(1)
    assert desk.ids_sent(wire) == [1]
    wire.backlog = 5001
    desk.feed(2)
    desk.feed(3)
    assert desk.ids_sent(wire) == []
    desk.feed(4)
    assert desk.ids_sent(wire) == []
    assert desk.given_up == [wire]
    assert desk.ids_sent(quick) == [1, 2, 3, 4]


async def test_states_alone_never_end_a_client(desk: Desk) -> None:
    _, wire = desk.join(BTC_TICKER)
    wire.backlog = 1 << 30
    for step in range(50):
        desk.capture.feed(ticker(1723161255343000 + step))
        desk.fan.flush()
    assert wire.take() == []
    assert desk.given_up == []
    assert desk.fan.conflated[1] == 49


async def test_what_is_held_back_is_sent_before_the_mode_changes(desk: Desk) -> None:
    client, wire = desk.join(BTC_TICKER, mode=MICRO)
    wire.backlog = 2000
    desk.capture.feed(ticker(1723161255343001))
    desk.fan.flush()
    assert wire.take() == []
    client.choose([BTC_TICKER], MICRO | COMBINED)
    assert [json.loads(payload)["E"] for payload in wire.take()] == [1723161255343001]


def klines_in(payloads_sent: list[bytes]) -> list[tuple[int, bool]]:
    return [(one["E"], one["k"]["x"]) for one in map(json.loads, payloads_sent)]


@pytest.mark.parametrize("rounds", ["one", "two", "drained"])
async def test_no_open_kline_comes_after_the_closed_one(desk: Desk, rounds: str) -> None:
    client, wire = desk.join(BTC_KLINES, mode=MICRO)
    first, second = 1723161240_000000, 1723161300_000000
    wire.backlog = 2000
    desk.capture.feed(kline(first + 40, first))
    desk.capture.feed(kline(first + 50, first))
    if rounds != "one":
        desk.fan.flush()
    if rounds == "drained":
        wire.backlog = 0
    desk.capture.feed(kline(first + 60, first, closed=True))
    desk.fan.flush()
    assert klines_in(wire.take()) == [(first + 60, True)]
    assert not client.conflating
    assert desk.fan.conflated == [0, 0, 2, 0]
    wire.backlog = 2000
    desk.capture.feed(kline(second + 2, second))
    desk.fan.flush()
    assert client.conflating
    wire.backlog = 0
    desk.fan._look()
    assert klines_in(wire.take()) == [(second + 2, False)]
    assert desk.fan.conflated == [0, 0, 2, 0]


async def test_a_slow_client_gets_the_newer_minute_after_the_closed_one(desk: Desk) -> None:
    _, wire = desk.join(BTC_KLINES, mode=MICRO)
    first, second = 1723161240_000000, 1723161300_000000
    wire.backlog = 2000
    desk.capture.feed(kline(first + 50, first))
    desk.capture.feed(kline(first + 60, first, closed=True))
    desk.capture.feed(kline(second + 2, second))
    desk.capture.feed(kline(second + 4, second))
    desk.fan.flush()
    wire.backlog = 0
    desk.fan._look()
    assert klines_in(wire.take()) == [(first + 60, True), (second + 4, False)]
    assert desk.fan.conflated == [0, 0, 2, 0]


async def test_states_never_go_backwards_for_anybody(desk: Desk) -> None:
    dice = random.Random(5)
    clients = []
    for _ in range(20):
        keys = dice.sample([BTC_TICKER, BTC_KLINES, BTC_TRADES], dice.randint(1, 3))
        clients.append((*desk.join(*keys, mode=MICRO), []))
    start = 1723161240_000000
    for step in range(3000):
        now = start + step * 1_000_000
        minute = now // 60_000_000 * 60_000_000
        desk.capture.feed(ticker(now))
        desk.capture.feed(kline(now, minute))
        if step % 60 == 59:
            desk.capture.feed(kline(now + 1, minute, closed=True))
        for client, wire, got in clients:
            wire.backlog = dice.choice((wire.backlog, wire.backlog, 0, 2000))
            if dice.random() < 0.02:
                keys = dice.sample([BTC_TICKER, BTC_KLINES, ETH_TRADES], dice.randint(0, 3))
                client.choose(keys, MICRO)
            got += wire.take()
        if dice.random() < 0.5:
            desk.fan.flush()
        if dice.random() < 0.2:
            desk.fan._look()
    for _, wire, got in clients:
        events = list(map(json.loads, got + wire.take()))
        times = [one["E"] for one in events if one["e"] == "24hrTicker"]
        klines = [(one["k"]["t"], one["k"]["x"], one["E"]) for one in events if one["e"] == "kline"]
        assert times == sorted(set(times)) != []
        assert klines == sorted(set(klines)) != []


async def test_what_waits_when_a_slow_client_chooses_comes_before_the_new_streams(
    desk: Desk,
) -> None:
    client, wire = desk.join(BTC_KLINES, mode=MICRO)
    first = 1723161240_000000
    wire.backlog = 2000
    desk.capture.feed(kline(first + 50, first))
    client.choose([ETH_TRADES], MICRO)
    assert klines_in(wire.take()) == [(first + 50, False)]
    assert not client.conflating


async def test_a_client_that_is_given_up_while_it_chooses_gets_nothing_more(desk: Desk) -> None:
    client, wire = desk.join(BTC_TRADES)
    wire.backlog = 5001
    desk.feed(1)
    client.choose([BTC_TRADES, ETH_TRADES], 0)
    assert desk.given_up == [wire]
    wire.backlog = 0
    desk.feed(2)
    assert desk.ids_sent(wire) == []
    assert desk.fan.groups == 0
