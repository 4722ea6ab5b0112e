"""An exchange for heavy load: the simulated one with a market so even that numpy renders it.

`python bench/_generator.py --symbols BTCUSDT,ETHUSDT --rate 100000` takes the options of
`tradecore simulate` and serves the same streams, REST and /sim/state, but costs 0.3 us a trade, so
that millions of trades need not be rendered and held before. With `--rate 0` it sends as fast as
the clients read. Trades begin when all symbols are subscribed, `--lines` times each.

Trade i of all: groups of GROUP trades go round the symbols; its time is epoch + i x step; price,
quantity and side follow from i alone. `EQUAL` computes all of it once more, in SQL: so any number
of stored rows is compared in the server.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import asyncpg
import numpy as np
import uvloop
from aiohttp import web
from numpy.typing import NDArray

from tradecore import clock
from tradecore.simulate.command import Exchange, run
from tradecore.simulate.frames import frame, lower
from tradecore.simulate.hub import Hub
from tradecore.simulate.market import Market, _Block, _Line
from tradecore.simulate.options import Options, add_arguments
from tradecore.simulate.player import Player
from tradecore.simulate.profiles import Profile
from tradecore.simulate.tape import Tape

GROUP = 8
FIRST_ID = 5_000_000_000
"""Ids have ten digits, so that frames of a symbol have one length."""

STEP_US = 2_000
"""How often a paced market sends."""
SATURATED_STEP_TRADES = 8192

_BLOCK = 1024
_INSIDE = np.arange(_BLOCK)
_MARK = "\x00"

Ints = NDArray[np.int64]

EQUAL = f"""
SELECT count(*) AS rows, count(*) FILTER (WHERE
    timestamp = timestamptz 'epoch' + ($4::int8 + i * $5::int8 / 1000) * interval '1 microsecond'
    AND price * 10000 = 10000000 + i * 48271 % 90000000
    AND quantity * 10000 = 1 + i * 69621 % 9999
    AND (side = 'SELL') = ((i / {GROUP} * 40503 / 32) % 2 = 1)) AS equal
FROM raw_trades JOIN unnest($1::text[], $2::int8[], $3::int8[]) WITH ORDINALITY
    AS s (name, first_id, last_id, number) ON symbol = name AND trade_id >= first_id
    AND trade_id <= last_id
CROSS JOIN LATERAL (SELECT ((trade_id - first_id) / {GROUP} * cardinality($1::text[])
    + number - 1) * {GROUP} + (trade_id - first_id) % {GROUP} AS i) AS place
"""


async def count_equal(conn: asyncpg.Connection, state: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows are stored of the trades of /sim/state, and how many are equal.

    `state` is of a market that stands still. Doubled rows are impossible by the unique key.
    """
    symbols, sent = state["market"]["symbols"], state["symbols"]
    spans = [sent.get(name, {"first_id": 1, "last_id": 0}) for name in symbols]
    ids = ([span[key] for span in spans] for key in ("first_id", "last_id"))
    step_ns = _step_ns(state["market"]["rate"])
    row = await conn.fetchrow(EQUAL, symbols, *ids, state["epoch_us"], step_ns, timeout=900)
    assert row is not None
    return row["rows"], row["equal"]


def _step_ns(rate: float) -> int:
    return max(1, round(1e9 / rate))


def _ticks(index: Ints) -> Ints:
    return 10_000_000 + index * 48_271 % 90_000_000


def _steps(index: Ints) -> Ints:
    return 1 + index * 69_621 % 9_999


def _maker(index: Ints) -> NDArray[np.bool_]:
    return ((index // GROUP * 40_503) >> 5) & 1 == 1


class EvenMarket(Market):
    """A market whose symbols trade alike; what is not overridden works on its blocks."""

    def __init__(self, symbols: tuple[str, ...], rate: float, first_ids: Mapping[str, int]) -> None:
        first_ids = {"*": FIRST_ID, **first_ids}
        super().__init__(1, symbols, rate, clock.wall_ns() // 1000, first_ids)
        self.step_ns = _step_ns(rate)
        self._number = {symbol: number for number, symbol in enumerate(symbols)}

    def time_us(self, index: Ints) -> Ints:
        """Return the times of trades."""
        return self.epoch_us + index * self.step_ns // 1000

    def end_at(self, end_us: int) -> int:
        """Return the index after the last trade up to `end_us`."""
        return max(0, ((end_us - self.epoch_us + 1) * 1000 - 1) // self.step_ns + 1)

    def traded(self, index: int, symbol: str) -> int:
        """Return how many trades of a symbol stand before `index`."""
        rounds, rest = divmod(index, GROUP * len(self.symbols))
        return rounds * GROUP + min(GROUP, max(0, rest - GROUP * self._number[symbol]))

    def _make_line(self, symbol: str) -> _Line:
        block_ns = _BLOCK * len(self.symbols) * self.step_ns
        first_id = self.first_ids.get(symbol, self.first_ids["*"])
        assert 10**9 <= first_id < 9 * 10**9, f"ids of {symbol} need ten digits"
        profile = Profile(symbol, symbol.removesuffix("USDT"), "USDT", 8, 8, 4, 4, 10**7, 9999, 0)
        return _Line(profile, first_id, block_ns, 10**4, 10**4)

    def _make_block(self, symbol: str, index: int) -> _Block:
        place = _INSIDE + index * _BLOCK
        groups = place // GROUP * len(self.symbols) + self._number[symbol]
        trades = groups * GROUP + place % GROUP
        return _Block(self.time_us(trades), _ticks(trades), _steps(trades), _maker(trades), None)


class Frames:
    """Renders runs of trades as frames of combined streams with microseconds."""

    def __init__(self, market: EvenMarket) -> None:
        self._market = market
        self._first_ids = np.array([market.first_id(symbol) for symbol in market.symbols])
        kinds: dict[int, list[int]] = {}
        for number, symbol in enumerate(market.symbols):
            kinds.setdefault(len(symbol.encode()), []).append(number)
        self._kind = np.zeros(len(market.symbols), np.int64)
        self._place = np.zeros(len(market.symbols), np.int64)
        self._templates = []
        for kind, numbers in enumerate(kinds.values()):
            self._kind[numbers] = kind
            self._place[numbers] = np.arange(len(numbers))
            for maker in ("false", "true"):
                self._templates.append(_template([market.symbols[n] for n in numbers], maker))

    def render(self, begin: int, end: int, event_us: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (number of the symbol, its frames) of the trades in order."""
        index = np.arange(begin, end)
        group = index // GROUP
        symbol = group % len(self._market.symbols)
        kind = self._kind[symbol] * 2 + _maker(index)
        made = [
            memoryview(self._rows(template, index[kind == n], symbol[kind == n], event_us))
            for n, template in enumerate(self._templates)
        ]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(starts, append=len(index))
        used = [0] * len(made)
        for number, which, size in zip(
            symbol[starts].tolist(), kind[starts].tolist(), sizes.tolist(), strict=True
        ):
            at = used[which]
            used[which] = at + size * self._templates[which].itemsize
            yield number, made[which][at : used[which]]

    def _rows(self, template: NDArray[Any], index: Ints, symbol: Ints, event_us: int) -> Any:
        """Return the frames of trades of one template as bytes."""
        market = self._market
        rows = template[self._place[symbol]].view(_fields(template.itemsize, template.tobytes()))
        rounds = index // (GROUP * len(market.symbols))
        _put(rows, "E", np.array([event_us]))
        _put(rows, "t", self._first_ids[symbol] + rounds * GROUP + index % GROUP)
        _put(rows, "T", market.time_us(index))
        price, quantity = _ticks(index), _steps(index)
        rows["p0"], rows["p1"] = _FOUR[price // 10_000], _FOUR[price % 10_000]
        rows["q0"] = _FOUR[quantity]
        return rows.tobytes()


_FOUR = np.array([b"%04d" % number for number in range(10_000)]).view("<u4")
_TWO = np.array([b"%02d" % number for number in range(100)]).view("<u2")


def _put(rows: NDArray[Any], name: str, value: Ints) -> None:
    """Write numbers of 16 digits, or of ten, into the fields of `rows`."""
    for field in [f"{name}3", f"{name}2", f"{name}1", f"{name}0"]:
        if field in rows.dtype.names:
            two = rows.dtype[field].itemsize == 2
            base = 100 if two else 10_000
            rows[field] = (_TWO if two else _FOUR)[value % base]
            value = value // base


def _template(symbols: list[str], maker: str) -> NDArray[Any]:
    """Return a frame for each symbol with marks in place of its digits."""
    made = []
    for symbol in symbols:
        text = (
            f'{{"stream":"{lower(symbol)}@trade","data":{{"e":"trade","E":{_MARK * 16},'
            f'"s":"{symbol}","t":{_MARK * 10},"p":"{_MARK * 4}.{_MARK * 4}0000",'
            f'"q":"0.{_MARK * 4}0000","T":{_MARK * 16},"m":{maker},"M":true}}}}'
        )
        made.append(frame(text.encode()))
    return np.array(made, f"V{len(made[0])}")


@lru_cache(64)
def _fields(size: int, templates: bytes) -> np.dtype[Any]:
    """Return the dtype that gives access to the digits of a frame."""
    head, names, formats, offsets = templates[:size], [], [], []
    at = 4  # after the frame's own header, which may have a zero byte
    for name, parts in (
        ("E", (4, 4, 4, 4)), ("t", (2, 4, 4)), ("p", (4, 4)), ("q", (4,)), ("T", (4, 4, 4, 4))
    ):  # fmt: skip
        for number, digits in enumerate(parts):
            at = head.index(_MARK.encode(), at)
            names.append(f"{name}{number}")
            formats.append(f"<u{digits}")
            offsets.append(at)
            at += digits
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


class EvenTape(Tape):
    """How far the market was sent."""

    market: EvenMarket

    def follow(self, symbols: set[str], at_us: int) -> None:
        """All symbols are sent, whoever follows."""

    def take(self, end_us: int) -> tuple[int, int]:
        """Return the trades up to `end_us` that are still to be sent."""
        begin, end = self.total, self.market.end_at(end_us)
        if self._count is not None and end >= self._count:
            end = self._count
            self.stopped_us = int(self.market.time_us(np.array([end - 1]))[0])
        self.total = max(begin, end)
        return begin, self.total

    def note_sent(self) -> None:
        """Bring `sent` up to date."""
        market = self.market
        for symbol in market.symbols:
            first = market.first_id(symbol)
            if traded := market.traded(self.total, symbol):
                self.sent[symbol] = (first, first + traded - 1)


@dataclass(frozen=True)
class Pace:
    """How trades are sent."""

    paced: bool
    step_s: float
    lines: int


class EvenPlayer(Player):
    """Sends it, from the moment on that everybody has subscribed."""

    tape: EvenTape

    def __init__(self, hub: Hub, tape: EvenTape, on_done: Callable[[], None], pace: Pace) -> None:
        super().__init__(hub, tape, pace.paced, on_done, pace.step_s)
        self._frames = Frames(tape.market)
        self._lines = pace.lines
        if not pace.paced:
            self._step_us = max(1, SATURATED_STEP_TRADES * tape.market.step_ns // 1000)

    async def run(self) -> None:
        """Send until cancelled."""
        market = self.tape.market
        names = [f"{lower(symbol)}@trade" for symbol in market.symbols]
        await self.hub.wait_for(
            lambda: all(len(self.hub.subscribers(name)) >= self._lines for name in names)
        )
        market.epoch_us = self._at_us = clock.wall_ns() // 1000
        await super().run()

    def _send_trades(self, end_us: int) -> None:
        if self.tape.stopped_us is not None:
            return
        begin, end = self.tape.take(end_us)
        if begin < end:
            pieces = list(self._frames.render(begin, end, end_us))
            for (symbols, *_), members in self._groups.items():
                own = [symbol in symbols for symbol in self.tape.market.symbols]
                data = b"".join([part for number, part in pieces if own[number]])
                for member in members:
                    member.write(data)
        if self.tape.stopped_us is not None:
            self._on_done()


class EvenExchange(Exchange):
    """The simulated exchange with that market."""

    def __init__(self, options: Options, lines: int) -> None:
        self._pace = Pace(options.rate > 0, options.step, lines)
        super().__init__(options)

    def _make_market(self) -> tuple[EvenTape, EvenPlayer]:
        options = self.options
        rate = options.rate or options.virtual_rate
        market = EvenMarket(options.symbol_list, rate, options.first_ids)
        tape = EvenTape(market, options.faults, options.count)
        return tape, EvenPlayer(self.hub, tape, self._report_done, self._pace)

    async def _state(self, request: web.Request) -> web.Response:
        assert isinstance(self.source, EvenTape)
        self.source.note_sent()
        return await super()._state(request)


def main() -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--lines", type=int, default=1, help="wait for so many of each stream")
    args = parser.parse_args()
    make = partial(EvenExchange, lines=args.lines)
    return uvloop.run(run(args, make))


if __name__ == "__main__":
    sys.exit(main())
