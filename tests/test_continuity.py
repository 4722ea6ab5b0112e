"""What a jump in the ids cannot show: trades without a successor, found by other witnesses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.plain_frames import TICKER, compact
from tests.test_capture import BASE_MS, trade
from tradecore import clock
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.continuity import REPEAT_S, TOLD_GRACE_S, Continuity
from tradecore.errors import VenueError
from tradecore.ring import Ring

SYMBOLS = ("BTCUSDT", "ETHUSDT")


class Bounds(NamedTuple):
    last_id: int
    last_us: int = BASE_MS * 1000


class Desk:
    """A continuity over a real capture, and what it asks for."""

    def __init__(self, path: Path) -> None:
        ring = Ring(path, 1024)
        for symbol in SYMBOLS:
            ring.intern(symbol)
        self.capture = Capture(ring, ring.symbols, Conflator(2))
        self.symbols: Sequence[str] = SYMBOLS
        self.venue: dict[str, int] = {}
        self.failures = 0
        self.asked: list[tuple[str, ...]] = []
        self.reached: list[tuple[str, int]] = []
        self.causes: set[str] = set()
        self.replaced: list[tuple[str, str]] = []
        self.live = True
        self.now_s = 1000.0
        self.breaks = (0, True)
        self.continuity = Continuity(
            self.capture,
            lambda: self.symbols,
            self._ask,
            self._reach,
            lambda symbols, why: self.replaced.extend((symbol, why) for symbol in symbols),
            is_live=lambda: self.live,
            breaks=lambda: self.breaks,
        )

    def _reach(self, symbol: str, last_id: int, cause: str) -> None:
        self.reached.append((symbol, last_id))
        self.causes.add(cause)

    async def _ask(self, symbols: Sequence[str]) -> dict[str, int]:
        self.asked.append(tuple(symbols))
        if self.failures:
            self.failures -= 1
            raise VenueError("no answer")
        return {symbol: self.venue[symbol] for symbol in symbols if symbol in self.venue}

    def trade(self, *ids: int, symbol: str = "BTCUSDT") -> None:
        for trade_id in ids:
            self.capture.feed(trade(trade_id, symbol))

    def tell(self, last_id: int, symbol: str = "BTCUSDT", age_s: float = 0.0) -> None:
        frame = compact(TICKER.replaced(s=symbol, L=last_id, F=1, n=last_id))
        self.capture.feed(frame, clock.wall_ns() - int(age_s * 1e9))

    async def look(self, seconds: float = 1.0) -> None:
        """Let time go by, looking once a second."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            await self.continuity._look(self.now_s)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "ring")


async def test_start_reaches_for_what_moved_while_away(desk: Desk) -> None:
    desk.continuity.seed({"BTCUSDT": Bounds(100), "ETHUSDT": Bounds(50)})
    desk.venue = {"BTCUSDT": 140, "ETHUSDT": 50}
    await desk.continuity.look_back()
    assert desk.asked == [SYMBOLS]
    assert desk.reached == [("BTCUSDT", 140)]
    assert desk.causes == {"restart"}


async def test_start_leaves_alone_what_has_traded_or_was_never_stored(desk: Desk) -> None:
    desk.continuity.seed({"BTCUSDT": Bounds(100)})
    desk.trade(120)
    desk.venue = {"BTCUSDT": 140, "ETHUSDT": 77}
    await desk.continuity.look_back()
    assert desk.asked == []
    assert desk.reached == []


async def test_start_asks_until_the_venue_answers(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tradecore.continuity._RETRY_BASE_S", 0.001)
    desk.continuity.seed({"ETHUSDT": Bounds(50)})
    desk.venue = {"ETHUSDT": 51}
    desk.failures = 3
    await desk.continuity.look_back()
    assert len(desk.asked) == 4
    assert desk.reached == [("ETHUSDT", 51)]


async def test_a_ticker_ahead_of_its_trade_is_no_news(desk: Desk) -> None:
    desk.trade(1, 2, 3)
    await desk.look()
    desk.tell(4)
    await desk.look()
    desk.trade(4)
    await desk.look(10)
    assert desk.reached == []


async def test_a_lost_last_trade_is_fetched_and_the_connection_kept(desk: Desk) -> None:
    desk.trade(1, 2, 3)
    await desk.look()
    desk.tell(4)
    await desk.look(TOLD_GRACE_S + 1)
    assert desk.reached == [("BTCUSDT", 4)]
    desk.continuity.seed({"BTCUSDT": Bounds(4)})  # it was fetched and stored
    await desk.look(20)
    assert desk.reached == [("BTCUSDT", 4)]
    assert desk.replaced == []
    assert desk.asked == []


async def test_a_stream_that_died_right_behind_a_trade_is_replaced_too(desk: Desk) -> None:
    """The look that finds us behind may be the one that saw the last trade."""
    desk.trade(1)
    await desk.look()
    desk.trade(2)
    desk.tell(5)
    await desk.look()
    for last_id in (9, 13, 17):
        desk.tell(last_id)
        await desk.look()
    assert desk.replaced[:1] == [("BTCUSDT", "stale")]


async def test_a_stream_that_died_alone_is_replaced_within_seconds(desk: Desk) -> None:
    desk.trade(1, 2, 3)
    await desk.look(5)
    for last_id in range(4, 12):
        desk.tell(last_id)
        await desk.look()
    assert desk.replaced[:1] == [("BTCUSDT", "stale")]
    assert desk.reached[0][0] == "BTCUSDT"
    assert desk.continuity.stale == {"BTCUSDT"}
    assert len(desk.reached) <= 1 + 8 / REPEAT_S
    desk.trade(12)
    await desk.look()
    assert desk.continuity.stale == set()


async def test_a_symbol_of_which_nothing_ever_came_is_found_dead(desk: Desk) -> None:
    """No trade shows a jump; tickers go on to tell newer ones."""
    desk.symbols = ("BTCUSDT",)
    for last_id in (500, 500, 500):
        desk.tell(last_id)
        await desk.look()
    assert desk.continuity.stale == set()
    for last_id in range(501, 515):
        desk.tell(last_id)
        await desk.look()
    assert desk.replaced[:1] == [("BTCUSDT", "stale")]
    assert desk.continuity.stale == {"BTCUSDT"}
    assert desk.asked == []


async def test_without_tickers_rest_finds_it(desk: Desk) -> None:
    desk.symbols = ("BTCUSDT",)
    desk.venue = {"BTCUSDT": 500}
    await desk.look(200)
    assert (len(desk.asked) > 0, desk.replaced) == (True, []), "that was printed before we came"
    desk.venue = {"BTCUSDT": 501}
    await desk.look(400)
    assert desk.replaced[:1] == [("BTCUSDT", "stale")]


async def test_what_was_never_seen_is_not_quiet_at_the_first_word(desk: Desk) -> None:
    desk.venue = {"BTCUSDT": 8, "ETHUSDT": -1}
    assert await desk.continuity.confirm(SYMBOLS) == {"ETHUSDT"}, "it never traded at all"
    assert await desk.continuity.confirm(SYMBOLS) == set(SYMBOLS)
    desk.venue["ETHUSDT"] = 0
    assert await desk.continuity.confirm(SYMBOLS) == {"BTCUSDT"}


async def test_a_quiet_symbol_with_tickers_costs_no_request(desk: Desk) -> None:
    desk.symbols = ("BTCUSDT",)
    desk.trade(1, 2, 3)
    for _ in range(700):
        desk.tell(3)
        await desk.look()
    assert (desk.asked, desk.reached, desk.replaced) == ([], [], [])


async def test_a_silent_symbol_without_tickers_is_asked_for(desk: Desk) -> None:
    desk.symbols = ("BTCUSDT",)
    for trade_id in range(1, 121):  # one a second
        desk.trade(trade_id)
        await desk.look()
    desk.venue = {"BTCUSDT": 120}
    await desk.look(200)
    assert 1 <= len(desk.asked) <= 5, "it grows more patient"
    assert (desk.reached, desk.replaced) == ([], [])
    desk.venue = {"BTCUSDT": 125}
    await desk.look(400)
    assert desk.reached[0] == ("BTCUSDT", 125)
    assert desk.replaced[0] == ("BTCUSDT", "stale")


async def test_silence_while_the_feed_is_down_says_nothing(desk: Desk) -> None:
    for trade_id in range(1, 61):
        desk.trade(trade_id)
        await desk.look()
    desk.live = False
    desk.venue = dict.fromkeys(SYMBOLS, 500)
    await desk.look(900)
    assert (desk.asked, desk.reached, desk.replaced) == ([], [], [])


async def test_confirm_returns_those_without_newer_trades(desk: Desk) -> None:
    desk.continuity.seed({"ETHUSDT": Bounds(50)})
    desk.trade(7)
    desk.venue = {"BTCUSDT": 8, "ETHUSDT": 50}
    assert await desk.continuity.confirm(SYMBOLS) == {"ETHUSDT"}
    assert desk.reached == [("BTCUSDT", 8)], "a silent market brings no trade that shows the hole"
    desk.trade(8)
    assert await desk.continuity.confirm(SYMBOLS) == set(SYMBOLS)


async def test_silent_symbols_are_asked_for_after_a_break(desk: Desk) -> None:
    desk.continuity.seed({"ETHUSDT": Bounds(50)})
    desk.trade(7)
    desk.venue = {"BTCUSDT": 9, "ETHUSDT": 53}
    await desk.look(10)
    assert desk.asked == [], "nothing was broken"
    desk.breaks = (1, False)
    await desk.look(10)
    assert desk.asked == [], "it is not mended yet"
    desk.breaks = (1, True)
    await desk.look()
    desk.trade(10)  # its jump shows the hole
    desk.failures = 1
    with pytest.raises(VenueError):
        await desk.look(20)
    await desk.look(30)
    assert desk.asked == [("ETHUSDT",)] * 3, "that failed, and that it goes on is another question"
    assert desk.reached == [("ETHUSDT", 53)] * 2
    assert desk.replaced == []


async def test_a_symbol_that_stays_mute_after_a_break_is_found_by_asking_twice(desk: Desk) -> None:
    desk.trade(7)
    desk.trade(7, symbol="ETHUSDT")
    await desk.look()
    desk.breaks = (1, True)
    desk.venue = {"BTCUSDT": 9, "ETHUSDT": 9}
    await desk.look(7)
    assert desk.asked == [SYMBOLS]
    assert desk.reached == [("BTCUSDT", 9), ("ETHUSDT", 9)]
    desk.continuity.seed({"BTCUSDT": Bounds(9), "ETHUSDT": Bounds(9)})
    desk.venue["ETHUSDT"] = 12
    await desk.look(6)
    assert desk.asked == [SYMBOLS] * 2
    assert desk.replaced == [("ETHUSDT", "stale")], "the other printed nothing more"
    await desk.look(3)
    assert desk.asked == [SYMBOLS] * 2


async def test_a_symbol_that_falls_silent_with_its_tickers_is_asked_for_soon(desk: Desk) -> None:
    for trade_id in range(1, 30):
        for symbol in SYMBOLS:
            desk.trade(trade_id, symbol=symbol)
            desk.tell(trade_id, symbol)
        await desk.look()
    desk.venue = {"BTCUSDT": 40}
    for trade_id in range(30, 38):
        desk.trade(trade_id, symbol="ETHUSDT")
        desk.tell(trade_id, "ETHUSDT")
        await desk.look()
    assert desk.asked == [("BTCUSDT",)]
    assert desk.replaced == [("BTCUSDT", "stale")]


async def test_when_all_fall_silent_it_is_the_connection(desk: Desk) -> None:
    for trade_id in range(1, 30):
        for symbol in SYMBOLS:
            desk.trade(trade_id, symbol=symbol)
            desk.tell(trade_id, symbol)
        await desk.look()
    await desk.look(9)
    assert desk.asked == []


async def test_a_break_costs_no_request_where_tickers_come(desk: Desk) -> None:
    desk.trade(7)
    desk.breaks = (1, True)
    await desk.look()
    desk.tell(7)
    await desk.look(20)
    assert (desk.asked, desk.reached) == ([], [])


def whole(desk: Desk) -> list[str]:
    return [symbol for symbol in SYMBOLS if desk.continuity.is_whole(symbol)]


async def test_nobody_is_whole_before_something_shows_it(desk: Desk) -> None:
    desk.continuity.seed({"BTCUSDT": Bounds(100), "ETHUSDT": Bounds(50)})
    assert whole(desk) == []
    desk.tell(100)
    assert whole(desk) == ["BTCUSDT"]
    desk.venue = {"ETHUSDT": 53}
    await desk.continuity.look_back()
    assert whole(desk) == ["BTCUSDT"], "the venue has printed what we lack"
    desk.continuity.seed({"ETHUSDT": Bounds(53)})
    assert whole(desk) == ["BTCUSDT"], "it is stored, and nothing tells what came since"
    assert await desk.continuity.confirm(SYMBOLS) == set(SYMBOLS)
    assert whole(desk) == list(SYMBOLS)


async def test_a_symbol_that_is_behind_is_not_whole(desk: Desk) -> None:
    desk.trade(1, 2, 3)
    desk.trade(1, symbol="ETHUSDT")
    await desk.look()
    assert whole(desk) == list(SYMBOLS)
    desk.tell(4)
    await desk.look()
    assert whole(desk) == list(SYMBOLS), "its trade may be on its way"
    await desk.look(TOLD_GRACE_S)
    assert whole(desk) == ["ETHUSDT"]
    desk.trade(4)
    await desk.look()
    assert whole(desk) == list(SYMBOLS)


async def test_a_jump_is_not_whole_until_the_ledger_shows_the_hole(desk: Desk) -> None:
    desk.trade(1, 2, 3)
    desk.continuity.seed({"BTCUSDT": Bounds(3)})
    desk.trade(7)
    assert whole(desk) == []
    desk.continuity.seed({"BTCUSDT": Bounds(7)})
    assert whole(desk) == ["BTCUSDT"]


async def test_nobody_is_whole_by_a_word_from_before_the_first_connection(desk: Desk) -> None:
    desk.continuity.seed({symbol: Bounds(5) for symbol in SYMBOLS})
    desk.breaks = (0, False)
    desk.live = False
    desk.venue = dict.fromkeys(SYMBOLS, 5)
    await desk.look()
    await desk.continuity.look_back()
    await desk.look()
    assert whole(desk) == []
    desk.breaks, desk.live = (0, True), True
    desk.venue["ETHUSDT"] = 7
    desk.tell(5)
    await desk.look(7)
    assert whole(desk) == ["BTCUSDT"]
    assert desk.reached == [("ETHUSDT", 7)]


async def test_what_was_told_too_high_does_not_stay(desk: Desk) -> None:
    desk.trade(7)
    desk.venue = {"BTCUSDT": 5007}
    assert await desk.continuity.confirm(["BTCUSDT"]) == set()
    assert whole(desk) == []
    desk.venue = {"BTCUSDT": 7}
    assert await desk.continuity.confirm(["BTCUSDT"]) == {"BTCUSDT"}
    assert whole(desk) == ["BTCUSDT"]


async def test_a_break_asks_everybody_to_show_itself_again(desk: Desk) -> None:
    desk.trade(1)
    desk.trade(1, symbol="ETHUSDT")
    await desk.look()
    desk.breaks = (1, False)
    await desk.look()
    assert whole(desk) == []
    desk.breaks = (1, True)
    desk.trade(2)
    assert whole(desk) == ["BTCUSDT"]
    desk.venue = {"ETHUSDT": 1}
    await desk.look(10)
    assert whole(desk) == list(SYMBOLS)
    assert desk.asked == [("ETHUSDT",)]


async def test_a_first_trade_while_the_venue_is_asked(desk: Desk) -> None:
    ask = desk.continuity._ask_last_ids

    async def slowly(symbols: Sequence[str]) -> Mapping[str, int]:
        desk.trade(7)
        return await ask(symbols)

    desk.continuity._ask_last_ids = slowly
    desk.venue = {"BTCUSDT": 7, "ETHUSDT": -1}
    assert await desk.continuity.confirm(SYMBOLS) == set(SYMBOLS)


async def test_a_symbol_that_comes_back_has_to_show_itself_anew(desk: Desk) -> None:
    for symbol in SYMBOLS:
        desk.trade(5, symbol=symbol)
    desk.continuity.seed({symbol: Bounds(5) for symbol in SYMBOLS})
    await desk.look(2)
    assert whole(desk) == list(SYMBOLS)
    desk.symbols = ("ETHUSDT",)
    await desk.look()
    desk.symbols = SYMBOLS
    assert whole(desk) == ["ETHUSDT"]
    await desk.look()
    assert whole(desk) == ["ETHUSDT"]
    desk.venue = {"BTCUSDT": 9}
    await desk.continuity.look_back()
    assert (desk.asked, desk.reached) == ([("BTCUSDT",)], [("BTCUSDT", 9)])
    desk.continuity.seed({"BTCUSDT": Bounds(9)})
    desk.tell(9)
    assert whole(desk) == list(SYMBOLS)
    assert desk.replaced == []


async def test_the_connection_of_a_dead_symbol_is_replaced_less_and_less_often(desk: Desk) -> None:
    desk.trade(1)
    for last_id in range(2, 302):
        desk.tell(last_id)
        await desk.look()
    assert 3 <= len(desk.replaced) <= 8


async def test_minutes_without_trades_are_no_silence(desk: Desk) -> None:
    """Where only klines come, a quiet minute tells of no trade."""
    desk.trade(1)
    desk.trade(1, symbol="ETHUSDT")
    for _ in range(30):
        desk.tell(1)
        await desk.look()
    for _ in range(9):
        desk.capture.feed(compact(TICKER.replaced(s="BTCUSDT", L=-1, F=-1, n=0)))
        await desk.look()
    assert desk.asked == []


async def test_symbols_that_left_are_forgotten(desk: Desk) -> None:
    desk.trade(1)
    desk.trade(1, symbol="ETHUSDT")
    await desk.look(3)
    desk.symbols = ("ETHUSDT",)
    desk.tell(9)
    await desk.look(10)
    assert desk.reached == []
