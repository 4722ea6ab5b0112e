"""The simulated market: trade `k` of a symbol as a pure function, so that any table can be checked.

A symbol's trades come in blocks of 1,024. Block `b` lasts a fixed time that follows from the
symbol's rate and is computed as a whole from hashes of (seed, symbol, position): no block depends
on another one, so any trade of any age costs the same, and an exchange that was killed goes on
where the clock says. Inside a block trades come in groups, the fills of one taker order: same
time, same side, prices that run away from the taker; some groups have several hundred trades.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tradecore.simulate.absences import Absences
from tradecore.simulate.pauses import Pauses, described
from tradecore.simulate.profiles import DEFAULT_SYMBOLS, Profile, hash64, is_quiet, profile_of
from tradecore.simulate.words import E8, MINUTE_US, Candle, Row, Trade, merge

QUIET_RATE = 1 / 150

_BITS = 10
_BLOCK = 1 << _BITS
_QUIET_BLOCK_NS = round(_BLOCK / QUIET_RATE * 1e9)
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
_Words = npt.NDArray[np.uint64]
_POSITIONS: _Words = np.arange(_BLOCK, dtype=np.uint64)
_INSIDE: _Ints = np.arange(_BLOCK)
_OCTAVES = ((20, 8), (16, 6), (12, 4), (8, 2), (4, 0))  # (period, weight) as powers of two
_GROUP_SIZES: _Ints = np.repeat(
    np.array([1, 2, 3, 5, 12, 40, 0]), np.array([700, 180, 80, 41, 16, 6, 1])
)
"""Size of a trade group by ten random bits; 0 stands for a burst of 100 to 735."""


@dataclass(frozen=True, slots=True)
class _Block:
    times: _Ints
    ticks: _Ints
    steps: _Ints
    maker: _Bools
    present: _Bools | None
    """None: the venue has them all."""


@dataclass(frozen=True, slots=True)
class Part:
    """Trades of one block that the venue has: ids, times in us, price in ticks, size in steps."""

    ids: _Ints
    times: _Ints
    ticks: _Ints
    steps: _Ints
    maker: _Bools


@dataclass(frozen=True, slots=True)
class _Line:
    """What is needed again and again about one symbol."""

    profile: Profile
    first_id: int
    block_ns: int
    tick_e8: int
    step_e8: int


def _hashes(key: int, positions: _Words) -> _Words:
    """Return 64 random bits for each position (splitmix64)."""
    x = positions * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _walk(key: int, positions: _Words) -> _Ints:
    """Return a smooth random walk through the positions, within +-341 * 2**15."""
    total: _Ints = np.zeros(len(positions), dtype=np.int64)
    for period, weight in _OCTAVES:
        corner = positions >> np.uint64(period)
        part = (positions & np.uint64((1 << period) - 1)).astype(np.int64)
        octave = key ^ period
        left = (_hashes(octave, corner) >> np.uint64(48)).astype(np.int64)
        right = (_hashes(octave, corner + np.uint64(1)) >> np.uint64(48)).astype(np.int64)
        total += (((left * ((1 << period) - part) + right * part) >> period) - 32768) << weight
    return total


def _dot(a: _Ints, b: _Ints) -> tuple[int, int]:
    """Return (sum of b, sum of a * b) without overflow."""
    if not len(a):
        return 0, 0
    if int(a.max()) * int(b.max()) * len(a) < 2**63:
        return int(b.sum()), int(a @ b)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    return sum(q for _, q in pairs), sum(p * q for p, q in pairs)


class Market:
    """All trades of all symbols for a seed, an epoch and a rate.

    `rate` is in trades per second over all `symbols` together, the first being the busiest; a
    symbol outside the list trades like the last of it. `first_id` maps symbols to the id of their
    first trade, the key `*` stands for all others; without it every symbol gets its own.
    """

    def __init__(
        self,
        seed: int = 1,
        symbols: Sequence[str] = DEFAULT_SYMBOLS,
        rate: float = 100.0,
        epoch_us: int = 1_767_225_600_000_000,
        first_id: Mapping[str, int] | None = None,
        absent: Mapping[str, Sequence[Sequence[int]]] | None = None,
        absent_every: int = 0,
        pauses: Mapping[str, Sequence[Sequence[int | None]]] | None = None,
    ) -> None:
        self.seed = seed
        self.symbols = tuple(symbols)
        self.rate = rate
        self.epoch_us = epoch_us
        self.first_ids = dict(first_id or {})
        self.absences = Absences(absent, absent_every)
        self.pauses = Pauses(pauses)
        busy = [s for s in self.symbols if not is_quiet(s)]
        self._shares = {s: 1 / (1 + rank) for rank, s in enumerate(busy)}
        self._share_sum = sum(self._shares.values()) or 1.0
        self._line = lru_cache(None)(self._make_line)
        self._block = lru_cache(2048)(self._make_block)
        self._node = lru_cache(100_000)(self._make_node)

    def arguments(self) -> dict[str, object]:
        """Return what rebuilds this market with `Market(**arguments)`, fit for JSON."""
        return {
            "seed": self.seed,
            "symbols": list(self.symbols),
            "rate": self.rate,
            "epoch_us": self.epoch_us,
            "first_id": self.first_ids,
            "absent": self.absences.ranges,
            "absent_every": self.absences.every,
            **described(self.pauses),
        }

    def profile(self, symbol: str) -> Profile:
        """Return the fixed properties of the symbol."""
        return self._line(symbol).profile

    def first_id(self, symbol: str) -> int:
        """Return the id of the symbol's first trade."""
        return self._line(symbol).first_id

    def next_id(self, symbol: str, at_us: int) -> int:
        """Return the id after the last trade whose time is <= `at_us`."""
        line = self._line(symbol)
        at_us = self.pauses.inner_us(symbol, at_us)
        index = (at_us - self.epoch_us) * 1000 // line.block_ns
        if index < 0:
            return line.first_id
        # Block starts are cut to whole microseconds: the next block may begin at `at_us` itself.
        if self._start_us(line, index + 1) <= at_us:
            index += 1
        inside = int(self._block(symbol, index).times.searchsorted(at_us, "right"))
        return line.first_id + (index << _BITS) + inside

    def trade_us(self, symbol: str, trade_id: int) -> int:
        """Return the time of a trade in microseconds since 1970."""
        position = self._position(symbol, trade_id)
        at = position & (_BLOCK - 1)
        times = self._block(symbol, position >> _BITS).times[at : at + 1]
        return int(self.pauses.outer_us(symbol, times)[0])

    def trade(self, symbol: str, trade_id: int) -> Trade:
        """Return one trade; ValueError if the id lies before the symbol's first one.

        IndexError if the venue does not have it.
        """
        return self.trades(symbol, trade_id, trade_id + 1)[0]

    def has(self, symbol: str, trade_id: int) -> bool:
        """Tell whether the venue has this id at all."""
        position = self._position(symbol, trade_id)
        present = self._block(symbol, position >> _BITS).present
        return present is None or bool(present[position & (_BLOCK - 1)])

    def count(self, symbol: str, first_id: int, end_id: int) -> int:
        """Return how many of the ids `first_id` .. `end_id - 1` exist."""
        if not self.absences.every and symbol not in self.absences.ranges:
            return max(0, end_id - first_id)
        return sum(len(part.ids) for part in self.parts(symbol, first_id, end_id))

    def trades(self, symbol: str, first_id: int, end_id: int) -> list[Trade]:
        """Return the trades `first_id` .. `end_id - 1` that the venue has."""
        line = self._line(symbol)
        return [
            Trade(symbol, trade_id, ticks * line.tick_e8, steps * line.step_e8, trade_us, maker)
            for part in self.parts(symbol, first_id, end_id)
            for trade_id, trade_us, ticks, steps, maker in zip(
                part.ids.tolist(),
                part.times.tolist(),
                part.ticks.tolist(),
                part.steps.tolist(),
                part.maker.tolist(),
                strict=True,
            )
        ]

    def rows(self, symbol: str, first_id: int, end_id: int) -> list[Row]:
        """Return the trades `first_id` .. `end_id - 1` that the venue has, for printing."""
        profile = self._line(symbol).profile
        rows: list[Row] = []
        for part in self.parts(symbol, first_id, end_id):
            rows += zip(
                part.times.tolist(),
                part.ids.tolist(),
                _texts(part.ticks, profile.tick_decimals, profile.quote_precision),
                _texts(part.steps, profile.step_decimals, profile.base_precision),
                ["true" if m else "false" for m in part.maker.tolist()],
                strict=True,
            )
        return rows

    def candle(self, symbol: str, first_id: int, end_id: int) -> Candle | None:
        """Return the sums over the trades `first_id` .. `end_id - 1`, None if there are none."""
        if end_id <= first_id:
            return None
        lo, hi = self._position(symbol, first_id), self._position(symbol, end_id)
        head, tail = -(-lo >> _BITS), hi >> _BITS
        if head > tail:  # inside one block
            return self._fold(symbol, tail, lo & (_BLOCK - 1), hi & (_BLOCK - 1))
        parts = []
        if lo & (_BLOCK - 1):
            parts.append(self._fold(symbol, head - 1, lo & (_BLOCK - 1), _BLOCK))
        while head < tail:
            level = (tail - head).bit_length() - 1
            if head:
                level = min(level, (head & -head).bit_length() - 1)
            parts.append(self._node(symbol, level, head >> level))
            head += 1 << level
        if hi & (_BLOCK - 1):
            parts.append(self._fold(symbol, tail, 0, hi & (_BLOCK - 1)))
        return merge(found) if (found := [part for part in parts if part]) else None

    def minute(self, symbol: str, open_us: int) -> Candle | None:
        """Return the candle of the whole minute that begins at `open_us`."""
        first = self.next_id(symbol, open_us - 1)
        return self.candle(symbol, first, self.next_id(symbol, open_us + MINUTE_US - 1))

    def _position(self, symbol: str, trade_id: int) -> int:
        position = trade_id - self._line(symbol).first_id
        if position < 0:
            raise ValueError(f"trade {trade_id} lies before the first trade of {symbol}")
        return position

    def parts(self, symbol: str, first_id: int, end_id: int) -> Iterator[Part]:
        """Yield what exists of the ids `first_id` .. `end_id - 1` as arrays, block by block.

        Ticks and steps are as small as the symbol's profile says.
        """
        base = self._line(symbol).first_id
        at, end = self._position(symbol, first_id), end_id - base
        while at < end:
            index, lo = at >> _BITS, at & (_BLOCK - 1)
            hi = min(_BLOCK, lo + end - at)
            yield self._part(symbol, index, lo, hi)
            at += hi - lo

    def _part(self, symbol: str, index: int, lo: int, hi: int) -> Part:
        block = self._block(symbol, index)
        cut: slice | _Ints = slice(lo, hi)
        if block.present is not None:
            cut = _INSIDE[lo:hi][block.present[lo:hi]]
        return Part(
            _INSIDE[cut] + (self._line(symbol).first_id + (index << _BITS)),
            self.pauses.outer_us(symbol, block.times[cut]),
            block.ticks[cut],
            block.steps[cut],
            block.maker[cut],
        )

    def _start_us(self, line: _Line, index: int) -> int:
        return self.epoch_us + index * line.block_ns // 1000

    def _make_line(self, symbol: str) -> _Line:
        profile = profile_of(symbol)
        first = self.first_ids.get(symbol, self.first_ids.get("*"))
        if first is None:
            first = 1 + hash64(self.seed, symbol, "first id") % 9_000_000_000
        block_ns = _QUIET_BLOCK_NS
        if not is_quiet(symbol):
            share = self._shares.get(symbol, 1 / (1 + len(self._shares)))
            block_ns = max(1_000_000, round(_BLOCK * 1e9 / (self.rate * share / self._share_sum)))
        tick_e8, step_e8 = 10 ** (8 - profile.tick_decimals), 10 ** (8 - profile.step_decimals)
        return _Line(profile, first, block_ns, tick_e8, step_e8)

    def _make_block(self, symbol: str, index: int) -> _Block:
        line = self._line(symbol)
        profile = line.profile
        positions = _POSITIONS + np.uint64(index << _BITS)

        grouping = _hashes(hash64(self.seed, symbol, "group"), positions)
        sizes = _GROUP_SIZES[(grouping & np.uint64(1023)).astype(np.int64)]
        burst = 100 + ((grouping >> np.uint64(10)) % np.uint64(636)).astype(np.int64)
        sizes = np.where(sizes == 0, burst, sizes)
        starts = np.cumsum(sizes) - sizes
        groups = int(starts.searchsorted(_BLOCK))  # those that begin inside the block
        of_group = np.repeat(np.arange(groups), sizes[:groups])[:_BLOCK]
        inside = _INSIDE - starts[of_group]

        jitter = ((grouping >> np.uint64(20)) & np.uint64(1023)).astype(np.int64)[:groups]
        moments = (np.arange(groups) << 10) + jitter
        times = moments * (line.block_ns // 1000) // (groups << 10) + self._start_us(line, index)

        sells = (grouping >> np.uint64(31)) & np.uint64(1) == 1
        maker = sells[of_group]
        middle = profile.middle_ticks
        walk = _walk(hash64(self.seed, symbol, "price"), positions[starts[:groups]])
        swing = middle * inside >> 16
        ticks = middle + (middle * walk[of_group] >> 26) + np.where(maker, -swing, swing)

        random = _hashes(hash64(self.seed, symbol, "quantity"), positions)
        largest = np.uint64(profile.largest_steps)
        sizes_64 = (random & np.uint64(0xFFFFFFFF)) * largest >> np.uint64(32)
        steps = (sizes_64 >> (random >> np.uint64(32) & np.uint64(7))).astype(np.int64) + 1
        if profile.extreme_steps:
            steps[random >> np.uint64(55) == 0] = profile.extreme_steps
        base = line.first_id
        present = self.absences.present(symbol, base, base + (index << _BITS), _BLOCK)
        return _Block(times[of_group], np.maximum(ticks, 1), steps, maker, present)

    def _make_node(self, symbol: str, level: int, index: int) -> Candle | None:
        """Return the candle of 2**level whole blocks: a node of the tree of sums."""
        if level == 0:
            return self._fold(symbol, index, 0, _BLOCK)
        halves = (self._node(symbol, level - 1, 2 * index + side) for side in (0, 1))
        return merge(found) if (found := [half for half in halves if half]) else None

    def _fold(self, symbol: str, index: int, lo: int, hi: int) -> Candle | None:
        line, part = self._line(symbol), self._part(symbol, index, lo, hi)
        ids, ticks, steps, taker_buys = part.ids, part.ticks, part.steps, ~part.maker
        if not len(ids):
            return None
        volume, quote = _dot(ticks, steps)
        bought, bought_quote = _dot(ticks[taker_buys], steps[taker_buys])
        tick, step = line.tick_e8, line.step_e8
        unit = tick * step // E8
        first, last = int(ids[0]), int(ids[-1])
        return Candle(
            first,
            last,
            int(ticks[0]) * tick,
            int(ticks.max()) * tick,
            int(ticks.min()) * tick,
            int(ticks[-1]) * tick,
            volume * step,
            quote * unit,
            bought * step,
            bought_quote * unit,
            last - first + 1 - len(ids),
        )


def _texts(values: _Ints, decimals: int, printed: int) -> list[str]:
    """Print integers with `decimals` decimals, padded with zeros to `printed` ones."""
    if not decimals:
        tail = "." + "0" * printed
        return [f"{v}{tail}" for v in values.tolist()]
    form = f"%d.%0{decimals}d" + "0" * (printed - decimals)
    scale = 10**decimals
    return [form % divmod(v, scale) for v in values.tolist()]
