"""Moves the market's clock and sends what falls due: trades, tickers, candles.

Time runs on a grid of steps that starts at the epoch. With a rate the wall clock drives it;
without one (`--rate 0`) the clock is virtual: it stands while nobody listens and runs as fast as
the slowest client reads.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tradecore import clock
from tradecore.simulate.chunks import Chunk, Variant, render_chunk, render_pieces
from tradecore.simulate.frames import kline_payload, lower, ticker_payload, upper
from tradecore.simulate.hub import Hub, Subscriber
from tradecore.simulate.summaries import INTERVALS_US, candle_at, day_at
from tradecore.simulate.tape import Due, Tape

STEP_S = 0.005
"""How often a paced market sends; a trade is at most this late."""
_SATURATED_STEP_TRADES = 2048
_TICKER_US = 1_000_000
_KLINE_US = 2_000_000
_CATCH_UP_STEPS = 200

_T = TypeVar("_T")


class _Ready(NamedTuple):
    due: Due
    variant: Variant
    chunk: Chunk


def parse_stream(name: str) -> tuple[str, str] | None:
    """Split a stream name into (symbol, kind); None if the exchange has nothing to send on it."""
    symbol, _, kind = name.partition("@")
    known = kind in ("trade", "ticker") or kind.removeprefix("kline_") in INTERVALS_US
    return (upper(symbol), kind) if known and symbol and lower(symbol) == symbol else None


class Player:
    """Sends the simulated market to the hub's connections."""

    def __init__(
        self,
        hub: Hub,
        tape: Tape,
        paced: bool,
        on_done: Callable[[], None],
        step_s: float = STEP_S,
    ) -> None:
        self.hub = hub
        self.tape = tape
        self.paced = paced
        self.late_ms: Counter[int] = Counter()
        """Milliseconds by which steps of a paced market came late -> how many steps."""
        self._on_done = on_done
        epoch_us, rate = tape.market.epoch_us, tape.market.rate
        self._step_us = round(step_s * 1e6)
        if not paced:
            self._step_us = max(1, min(1_000_000, round(_SATURATED_STEP_TRADES * 1e6 / rate)))
        steps = max(0, clock.wall_ns() // 1000 - epoch_us) // self._step_us if paced else 0
        # One step back: the first step then takes in trades at the very moment of the epoch.
        self._at_us = epoch_us + (steps - 1) * self._step_us
        self._seen = -1
        self._groups: dict[Variant, list[Subscriber]] = {}
        self._tickers: list[tuple[str, str]] = []
        self._klines: list[tuple[str, str, str]] = []
        self._kline_sent: dict[str, tuple[int, int]] = {}
        self._ready: dict[int, _Ready] = {}
        self._listed = frozenset(tape.market.symbols)
        self._jumped = False

    @property
    def now_us(self) -> int:
        """The market's time: the wall clock's, or the virtual one."""
        return clock.wall_ns() // 1000 if self.paced else self._at_us

    def prerender(self, trades: int, micro: bool = False) -> None:
        """Render the next trades of all listed symbols (combined mode) before they are due."""
        market = self.tape.market
        scratch = Tape(market, self.tape.faults)
        scratch.follow(set(self._listed), self._at_us)
        at_us = self._at_us
        variant: Variant = (self._listed, True, micro)
        while scratch.total < trades:
            at_us += self._step_us
            if due := scratch.advance(at_us):
                chunk = render_chunk(market, self.tape.faults, due, variant, at_us)
                self._ready[at_us] = _Ready(due, variant, chunk)
        gc.freeze()  # a look at millions of frames would make the exchange late

    def market_changed(self) -> None:
        """Take in a change of the market's pauses; what was rendered before is thrown away."""
        self._ready.clear()
        self.tape.resume()

    async def run(self) -> None:
        """Send until cancelled."""
        await (self._run_paced() if self.paced else self._run_saturated())

    async def _run_paced(self) -> None:
        while True:
            behind = (clock.wall_ns() // 1000 - self._at_us) // self._step_us
            for _ in range(min(behind, _CATCH_UP_STEPS)):
                self._step()
                self.late_ms[(clock.wall_ns() // 1000 - self._at_us) // 1000] += 1
            next_us = self._at_us + self._step_us
            await asyncio.sleep(max(0, next_us * 1000 - clock.wall_ns()) / 1e9)

    async def _run_saturated(self) -> None:
        while True:
            await self.hub.wait_for(lambda: self._running())
            self._step()
            await self.hub.drain()
            await asyncio.sleep(0)

    def _running(self) -> bool:
        self._regroup()
        return bool(self._groups) and self.tape.stopped_us is None

    def _regroup(self) -> None:
        """Bring the lists of what is wanted up to date with the subscriptions."""
        if self._seen == self.hub.version:
            return
        self._seen = self.hub.version
        parsed = {n: p for n in self.hub.names() if (p := parse_stream(n))}
        self._groups.clear()
        for member in self.hub.connections:
            names = (parsed[n] for n in member.streams if n in parsed)
            symbols = frozenset(symbol for symbol, kind in names if kind == "trade")
            if symbols:
                variant = (symbols, member.combined, member.micro)
                self._groups.setdefault(variant, []).append(member)
        traded = {symbol for symbol, kind in parsed.values() if kind == "trade"}
        self.tape.follow(traded, self._at_us)
        self._tickers = [(n, s) for n, (s, kind) in parsed.items() if kind == "ticker"]
        self._klines = [
            (n, s, kind.removeprefix("kline_"))
            for n, (s, kind) in parsed.items()
            if kind.startswith("kline_")
        ]

    def _step(self) -> None:
        self._regroup()
        start_us = self._at_us
        self._at_us += self._step_us
        self._send_trades(self._at_us)
        self._send_tickers(start_us, self._at_us)
        self._send_klines(start_us, self._at_us)

    def _send_trades(self, end_us: int) -> None:
        stopped = self.tape.stopped_us is not None
        ready = self._ready.pop(end_us, None)
        if ready and self.tape.followed == self._listed and self.tape.jump(ready.due):
            self._jumped = True
            due = ready.due
        else:
            if self._jumped:
                self.tape.resume()
                self._jumped = False
            ready = None
            due = self.tape.advance(end_us)
        for variant, members in self._groups.items() if due else ():
            if edited := [member for member in members if member.edits.active]:
                self._send_edited(edited, due, variant, end_us)
                members = [member for member in members if member not in edited]
            if not members:
                continue
            if ready and variant == ready.variant:
                chunk = ready.chunk
            else:
                chunk = render_chunk(self.tape.market, self.tape.faults, due, variant, end_us)
            for member in members:
                member.write(chunk.data)
                self.hub.counts.update(chunk.counts)
        if self.tape.stopped_us is not None and not stopped:
            self._on_done()

    def _send_edited(
        self, members: list[Subscriber], due: Due, variant: Variant, end_us: int
    ) -> None:
        """Send to connections whose trades are skipped, doubled or changed by hand."""
        tape, counts = self.tape, self.hub.counts
        pieces = render_pieces(tape.market, tape.faults, due, variant, end_us, counts)
        for member in members:
            member.write(member.edits.apply(pieces, variant, end_us, counts))

    def _send_tickers(self, start_us: int, end_us: int) -> None:
        for name, symbol in _slots(self._tickers, start_us, end_us, _TICKER_US):
            self.hub.publish(name, self._ticker(symbol, end_us))

    def _ticker(self, symbol: str, at_us: int) -> Callable[[bool], str]:
        day = day_at(self.tape, symbol, at_us)
        return lambda micro: ticker_payload(
            symbol, day.statistics, day.window_us, day.ids, at_us, micro
        )

    def _send_klines(self, start_us: int, end_us: int) -> None:
        """Send closing frames at the boundary, and updates where something was traded."""
        for name, symbol, interval in self._klines if self._crosses(start_us, end_us) else ():
            length_us = INTERVALS_US[interval]
            boundary_us = end_us // length_us * length_us
            if start_us < boundary_us:
                self.hub.publish(name, self._kline(symbol, interval, boundary_us - 1, end_us))
        for name, symbol, interval in _slots(self._klines, start_us, end_us, _KLINE_US):
            traded = self.tape.next_id(symbol, end_us)
            last, sent_us = self._kline_sent.get(name, (traded, 0))
            if sent_us and (traded == last or end_us - sent_us < _KLINE_US):
                continue
            self._kline_sent[name] = (traded, end_us)
            self.hub.publish(name, self._kline(symbol, interval, end_us, end_us))

    def _crosses(self, start_us: int, end_us: int) -> bool:
        return end_us // 1_000_000 != start_us // 1_000_000

    def _kline(
        self, symbol: str, interval: str, inside_us: int, event_us: int
    ) -> Callable[[bool], str]:
        length_us = INTERVALS_US[interval]
        open_us = inside_us // length_us * length_us
        span_us = (open_us, open_us + length_us)
        candle, price_e8 = candle_at(self.tape, symbol, open_us, length_us, event_us)
        closed = event_us >= span_us[1]
        return lambda micro: kline_payload(
            self.tape.profile(symbol), interval, span_us, candle, price_e8, closed, event_us, micro
        )


def _slots(items: list[_T], start_us: int, end_us: int, period_us: int) -> list[_T]:
    """Return the items whose turn comes in (start, end]; each has one turn in every period."""
    count = len(items)
    turns = range(start_us * count // period_us + 1, end_us * count // period_us + 1)
    return [items[turn % count] for turn in turns]
