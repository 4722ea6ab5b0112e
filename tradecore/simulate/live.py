"""`POST /sim/fault`: faults at the moment when somebody asks for them, in JSON.

    {"fault": "cut"}   {"fault": "rest", "mode": "418", "seconds": 5}   {"fault": "drop", "n": 3}

`"connections": "one"` limits a fault of connections to the oldest of them. A pause of a market that
several processes serve is ordered of each of them, with one and the same `at_us` (microseconds
since 1970, some moments ahead of now).
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import web

from tradecore.simulate.edits import KINDS
from tradecore.simulate.gate import MODES, Gate
from tradecore.simulate.pauses import ALL
from tradecore.simulate.player import Player
from tradecore.simulate.streams import Connection, StreamServer

_MAX_S = 86_400.0


class Refused(Exception):
    """The request is wrong; the text says what would be right."""


class Order(NamedTuple):
    """The members of a request."""

    values: dict[str, Any]

    def number(self, name: str, default: float | None = None, most: float = _MAX_S) -> float:
        """Return a number between 0 and `most`."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{name} must be a number")
        if not (math.isfinite(value) and 0 <= value <= most):
            raise Refused(f"{name} must be between 0 and {most:g}")
        return value

    def count(self, name: str = "n") -> int:
        """Return a whole number, 1 unless given."""
        return int(self.number(name, 1, 1e9))

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise Refused(f"{name} must be a text")
        return value


class FaultDesk:
    """Carries out faults on a running exchange."""

    def __init__(self, streams: StreamServer, gate: Gate, player: Player | None) -> None:
        self._streams = streams
        self._gate = gate
        self._player = player
        """None: a recording, whose trades cannot be changed."""
        self._faults: dict[str, tuple[Callable[[Order], None], str]] = {
            "cut": (self._cut, "TCP reset of connections"),
            "half_open": (self._half_open, "connections go silent without an end; new ones work"),
            "stop_pong": (self._stop_pong, "connections answer no pings and send none"),
            "close": (self._close, "close frame with code (1001)"),
            "shutdown": (self._shutdown, "serverShutdown, cut after seconds (10)"),
            "refuse": (self._refuse, "the next n connects get 503; 0 ends it"),
            "ban": (self._ban, "upgrades get status (418) for seconds (10); retry_after 1|0"),
            "slow_handshake": (self._slow_handshake, "the next n upgrades take seconds (5)"),
            "mute": (self._born, "the next n connections get answers and no data; 0 ends it"),
            "tradeless": (self._born, "the next n connections get all but trades; 0 ends it"),
            "drop": (self._edit, "the next n trades are left out of each connection"),
            "duplicate": (self._edit, "the next n trades are sent twice"),
            "reorder": (self._edit, "the next n trades come after the one that follows"),
            "garbage": (self._edit, "n junk frames, one behind each of the next n trades"),
            "drop_stream": (self._drop_stream, "no more trades of symbol on these connections"),
            "rest": (self._rest, f"mode {'|'.join(MODES)} for seconds (10), endpoint, lag (60)"),
            "pause": (self._pause, "no symbol trades until resume; at_us (now)"),
            "resume": (self._resume, "the market goes on where it stopped; at_us (now)"),
            "quiet": (self._quiet, "symbol does not trade for seconds (60); at_us (now)"),
        }

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Put `/sim/fault` on a router."""
        router.add_post("/sim/fault", self._post)

    async def _post(self, request: web.Request) -> web.Response:
        try:
            try:
                values = json.loads(await request.text())
            except ValueError:
                values = None
            if not isinstance(values, dict):
                raise Refused('send a JSON object such as {"fault": "cut"}')
            reached = self._carry_out(Order(values))
        except Refused as refusal:
            known = {name: text for name, (_, text) in self._faults.items()}
            return web.json_response({"error": str(refusal), "faults": known}, status=400)
        return web.json_response({"fault": values["fault"], "connections": reached})

    def _carry_out(self, order: Order) -> int:
        name = order.text("fault", "")
        if name not in self._faults:
            raise Refused(f"there is no fault {name!r}")
        reached = len(self._reached(order))
        self._faults[name][0](order)
        return reached

    def _reached(self, order: Order) -> list[Connection]:
        which = order.text("connections", "all")
        if which not in ("all", "one"):
            raise Refused('connections must be "all" or "one"')
        oldest_first = sorted(self._streams.open, key=lambda connection: connection.number)
        return oldest_first if which == "all" else oldest_first[:1]

    # -- connections ---------------------------------------------------------------------------

    def _cut(self, order: Order) -> None:
        for connection in self._reached(order):
            connection.reset()

    def _half_open(self, order: Order) -> None:
        for connection in self._reached(order):
            connection.go_silent()

    def _stop_pong(self, order: Order) -> None:
        for connection in self._reached(order):
            connection.answers_pings = False

    def _close(self, order: Order) -> None:
        code = int(order.number("code", 1001, 4999))
        if code < 1000:
            raise Refused("code must be between 1000 and 4999")
        for connection in self._reached(order):
            connection.close(code)

    def _shutdown(self, order: Order) -> None:
        seconds = order.number("seconds", 10.0)
        for connection in self._reached(order):
            connection.announce_shutdown(seconds)

    def _refuse(self, order: Order) -> None:
        self._streams.to_refuse = order.count()

    def _ban(self, order: Order) -> None:
        status = int(order.number("status", 418, 599))
        if status < 400:
            raise Refused("status must be between 400 and 599")
        tells = order.number("retry_after", 1, 1) > 0
        self._streams.ban.begin(status, order.number("seconds", 10.0), tells=tells)

    def _slow_handshake(self, order: Order) -> None:
        self._streams.delay_s = order.number("seconds", 5.0)
        self._streams.to_delay += order.count()

    def _born(self, order: Order) -> None:
        self._streams.born[order.text("fault")] = order.count()

    # -- trades --------------------------------------------------------------------------------

    def _edit(self, order: Order) -> None:
        self._market_player()
        kind, count = order.text("fault"), order.count()
        assert kind in KINDS
        for connection in self._reached(order):
            connection.edits.left[kind] += count

    def _drop_stream(self, order: Order) -> None:
        self._market_player()
        symbol = order.text("symbol")
        for connection in self._reached(order):
            connection.edits.muted.add(symbol)

    def _pause(self, order: Order) -> None:
        player = self._market_player()
        player.tape.market.pauses.add(ALL, self._at_us(order) + 1)
        player.market_changed()

    def _resume(self, order: Order) -> None:
        player = self._market_player()
        player.tape.market.pauses.end(ALL, self._at_us(order))
        player.market_changed()

    def _quiet(self, order: Order) -> None:
        player = self._market_player()
        symbol, from_us = order.text("symbol"), self._at_us(order) + 1
        length_us = round(order.number("seconds", 60.0) * 1e6)
        player.tape.market.pauses.add(symbol, from_us, from_us + length_us)
        player.market_changed()

    def _at_us(self, order: Order) -> int:
        """Return the moment of a pause: two exchanges of one market need the very same."""
        return int(order.number("at_us", self._market_player().now_us, 1e17))

    def _market_player(self) -> Player:
        if self._player is None:
            raise Refused("this exchange sends a recording: its trades cannot be changed")
        return self._player

    # -- REST ----------------------------------------------------------------------------------

    def _rest(self, order: Order) -> None:
        mode = order.text("mode")
        if mode not in MODES:
            raise Refused(f"mode must be one of {', '.join(MODES)}")
        seconds, lag_s = order.number("seconds", 10.0), order.number("lag", 60.0)
        self._gate.set_mode(mode, seconds, order.text("endpoint", ""), lag_s)
