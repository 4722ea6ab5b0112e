"""Rollovers at random: once a symbol is confirmed, closing the old connection costs no trade."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.plain_frames import TICKER, compact
from tests.test_capture import BASE_MS, Bench, trade
from tests.test_listener import wire

SYMBOLS = 60
FIRST_ID = 100


@dataclass
class Story:
    """One symbol: what the venue sends of it, and how far either connection has come."""

    symbol: str
    dice: random.Random
    events: list[tuple[str, int]] = field(default_factory=list)
    old_at: int = 0
    old_never: set[int] = field(default_factory=set)
    came: set[int] = field(default_factory=set)
    confirmed: bool = False

    def __post_init__(self) -> None:
        told = last = FIRST_ID - 1
        for _ in range(self.dice.randrange(4, 30)):
            if self.dice.random() < 0.3:
                # A ticker may tell a trade before its own frame comes.
                told = max(told, last + self.dice.choice((0, 0, 1)))
                self.events.append(("told", told))
            else:
                last += 1
                self.events.append(("trade", last))
        if told > last:
            self.events.append(("trade", told))
        self.new_at = self.first_new = self.dice.randrange(len(self.events))
        # The new connection is opened while the old one is this far, or behind.
        self.old_at = self.dice.randrange(self.first_new + 1)
        before = {i for what, i in self.events[: self.old_at] if what == "trade"}
        self.old_never = {i for i in self.trades() - before if self.dice.random() < 0.1}
        self.before = self.events[: self.old_at]

    def trades(self) -> set[int]:
        return {i for what, i in self.events if what == "trade"}

    def frames(self, events: list[tuple[str, int]], without: set[int]) -> Iterator[bytes]:
        for what, i in events:
            if what == "told":
                row = TICKER.replaced(s=self.symbol, L=i, n=9 if i >= FIRST_ID else 0, E=BASE_MS)
                yield compact(row)
            elif i not in without:
                self.came.add(i)
                yield trade(i, self.symbol)

    def old_goes_on(self) -> list[bytes]:
        if self.confirmed:
            return []
        upto = min(len(self.events), self.old_at + self.dice.randrange(4))
        events, self.old_at = self.events[self.old_at : upto], upto
        return list(self.frames(events, self.old_never))

    def new_goes_on(self) -> list[bytes]:
        upto = min(len(self.events), self.new_at + self.dice.randrange(4))
        events, self.new_at = self.events[self.new_at : upto], upto
        return list(self.frames(events, set()))

    def lost(self) -> set[int]:
        """What neither has brought and the new connection will not bring, though the old would."""
        coming = {i for what, i in self.events[self.new_at :] if what == "trade"}
        return self.trades() - self.came - coming - self.old_never


@pytest.mark.parametrize("seed", range(6))
async def test_closing_the_old_connection_costs_nothing(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    async with wire(tmp_path) as old:
        bench: Bench = old.bench
        stories = [Story(f"S{i}USDT", random.Random(dice.random())) for i in range(SYMBOLS)]
        ids = [bench.ring.intern(story.symbol) for story in stories]
        bench.capture.grow()
        await old.deliver(*(f for s in stories for f in s.frames(s.before, set())))
        async with wire(tmp_path, bench) as new:
            for _ in range(60):
                wires = [(old, Story.old_goes_on), (new, Story.new_goes_on)]
                dice.shuffle(wires)
                for one, go_on in wires:
                    some = dice.sample(stories, SYMBOLS // 2)
                    await one.deliver(*(frame for story in some for frame in go_on(story)))
                    bench.ring.release(bench.ring.pending)
                    open_ids = set(new.listener.unconfirmed(ids))
                    for symbol_id, story in zip(ids, stories, strict=True):
                        if symbol_id not in open_ids and not story.confirmed:
                            story.confirmed = True
                            assert story.lost() == set(), story
        # A symbol of which the new connection has shown nothing, or the old one lost the ids right
        # before, waits for the venue's word.
        assert sum(story.confirmed for story in stories) > 0.6 * SYMBOLS
        for story in stories:
            assert story.trades() - story.came <= story.old_never
