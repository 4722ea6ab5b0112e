"""Recorded messages, sent as they are, and REST history from the trades among them."""

import asyncio
import gzip
import json
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from operator import attrgetter
from pathlib import Path
from typing import Any

from tradecore import clock
from tradecore.errors import UsageError
from tradecore.simulate.frames import frame, lower
from tradecore.simulate.hub import Hub
from tradecore.simulate.profiles import Profile, profile_of
from tradecore.simulate.words import E8, Candle, Trade, candle_of

_BATCH = 256
_STEP_S = 0.005


@dataclass(frozen=True)
class _Message:
    stream: str | None
    """None: the line tells no stream; everybody gets it."""
    combined: bytes
    raw: bytes
    event_us: int
    trade: Trade | None


class Recording:
    """The messages of a file, one a line; REST serves the trades that were sent so far."""

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
            lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
            self.messages = _read(lines)
        except (OSError, EOFError, zlib.error) as exc:
            raise UsageError(f"cannot read the recording {path}: {exc}") from exc
        if not self.messages:
            raise UsageError(f"the recording {path} is empty")
        self.sent: dict[str, tuple[int, int]] = {}
        """Symbol -> first and last id that went to at least one subscriber."""
        self.total = 0
        self.now_us = 0
        """Event time of the last message that was sent."""
        self._trades: dict[str, list[Trade]] = {}

    @property
    def streams(self) -> set[str]:
        """The streams that occur in the file."""
        return {m.stream for m in self.messages if m.stream}

    @property
    def symbols(self) -> Iterable[str]:
        """Symbols that have traded so far."""
        return self._trades

    def note(self, message: _Message, received: bool) -> None:
        """Take a message whose time has come into the history; `received`: it has subscribers."""
        self.now_us = max(self.now_us, message.event_us)
        trade = message.trade
        if trade is None:
            return
        history = self._trades.setdefault(trade.symbol, [])
        if not history or trade.trade_id > history[-1].trade_id:
            history.append(trade)
        if received:
            first, last = self.sent.get(trade.symbol, (trade.trade_id, -1))
            self.sent[trade.symbol] = (min(first, trade.trade_id), max(last, trade.trade_id))
            self.total += 1

    def knows(self, symbol: str) -> bool:
        """Tell whether the symbol has traded so far."""
        return symbol in self._trades

    def profile(self, symbol: str) -> Profile:
        """Return the properties of the symbol."""
        return profile_of(symbol)

    def first_id(self, symbol: str) -> int:
        """Return the oldest id, 0 for a symbol that has no trade."""
        return self._trades[symbol][0].trade_id if symbol in self._trades else 0

    def next_id(self, symbol: str, at_us: int) -> int:
        """Return the id after the last trade up to `at_us`."""
        trades = self._trades.get(symbol, [])
        at = bisect_right(trades, at_us, key=attrgetter("trade_us"))
        return trades[at - 1].trade_id + 1 if at else self.first_id(symbol)

    def trades(self, symbol: str, first_id: int, end_id: int) -> list[Trade]:
        """Return the trades with ids in `first_id` .. `end_id - 1`."""
        trades = self._trades.get(symbol, [])
        by_id = attrgetter("trade_id")
        return trades[
            bisect_left(trades, first_id, key=by_id) : bisect_left(trades, end_id, key=by_id)
        ]

    def candle(self, symbol: str, first_id: int, end_id: int) -> Candle | None:
        """Return the sums over the trades `first_id` .. `end_id - 1`."""
        trades = self.trades(symbol, first_id, end_id)
        return candle_of(trades) if trades else None


class ReplayPlayer:
    """Sends a recording once, from the moment on that somebody wants one of its streams."""

    def __init__(
        self, hub: Hub, recording: Recording, speed: float, on_done: Callable[[], None]
    ) -> None:
        self.hub = hub
        self.late_ms: Counter[int] = Counter()
        """Not counted here."""
        self.recording = recording
        self._speed = speed
        self._on_done = on_done

    @property
    def now_us(self) -> int:
        """The recording's time."""
        return self.recording.now_us

    async def run(self) -> None:
        """Send everything, then return."""
        streams = self.recording.streams
        await self.hub.wait_for(
            lambda: any(c.streams.keys() & streams for c in self.hub.connections)
        )
        messages = self.recording.messages
        begin_us, begin_ns = messages[0].event_us, clock.mono_ns()
        at = 0
        while at < len(messages):
            end = at + _BATCH
            if self._speed:
                played_us = int((clock.mono_ns() - begin_ns) / 1000 * self._speed)
                while at < end and at < len(messages):
                    if messages[at].event_us - begin_us > played_us:
                        break
                    self._send(messages[at])
                    at += 1
                await asyncio.sleep(_STEP_S)
                continue
            for message in messages[at:end]:
                self._send(message)
            at = end
            await self.hub.drain()
            await asyncio.sleep(0)
        self._on_done()

    def _send(self, message: _Message) -> None:
        targets = (
            self.hub.connections if message.stream is None else self.hub.subscribers(message.stream)
        )
        self.recording.note(message, bool(targets))
        for member in targets:
            member.write(message.combined if member.combined else message.raw)


def _read(lines: Iterable[bytes]) -> list[_Message]:
    messages: list[_Message] = []
    event_us = 0
    for line in lines:
        if line:
            messages.append(_message(line, event_us))
            event_us = messages[-1].event_us
    first_us = next((m.event_us for m in messages if m.event_us), 0)
    return [m if m.event_us else _Message(**{**vars(m), "event_us": first_us}) for m in messages]


def _message(body: bytes, last_us: int) -> _Message:
    """Read one recorded line; a line that is no JSON is kept and goes to everybody."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        value = None
    wrapped = isinstance(value, dict) and isinstance(value.get("stream"), str) and "data" in value
    data = value["data"] if wrapped else value
    stream = value["stream"] if wrapped else _stream_of(data)
    combined = raw = body
    if wrapped and body.startswith(b'{"stream":') and b',"data":' in body:
        raw = body[body.index(b',"data":') + 8 : -1]
    elif stream:
        combined = b'{"stream":"' + stream.encode() + b'","data":' + body + b"}"
    event_us = last_us
    if isinstance(data, dict) and isinstance(data.get("E"), int):
        event_us = max(last_us, _micros(data["E"]))
    return _Message(stream, frame(combined), frame(raw), event_us, _trade(data))


def _stream_of(data: Any) -> str | None:
    """Name the stream of an event that has no wrapper."""
    kinds = {"trade": "trade", "aggTrade": "aggTrade", "24hrTicker": "ticker", "kline": "kline_1m"}
    if not isinstance(data, dict) or not isinstance(data.get("s"), str):
        return None
    kind = kinds.get(str(data.get("e")))
    return f"{lower(data['s'])}@{kind}" if kind else None


def _trade(data: Any) -> Trade | None:
    """Read a recorded trade; None for everything else, malformed trades too."""
    if not isinstance(data, dict) or data.get("e") != "trade":
        return None
    try:
        price_e8, quantity_e8 = (int(Decimal(data[key]) * E8) for key in "pq")
        trade_us = _micros(data["T"])
        return Trade(data["s"], data["t"], price_e8, quantity_e8, trade_us, data["m"])
    except (KeyError, TypeError, ArithmeticError):
        return None


def _micros(value: int) -> int:
    """Read a time in ms or us."""
    return value if value > 10**14 else value * 1000
