"""`tradecore simulate`: a local exchange that speaks the venue's protocol from a seed."""

import argparse
import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tradecore import clock
from tradecore.errors import EXIT_OK, UsageError
from tradecore.simulate.dumps import Dumps
from tradecore.simulate.gate import Gate
from tradecore.simulate.hub import Hub
from tradecore.simulate.live import FaultDesk
from tradecore.simulate.market import Market
from tradecore.simulate.options import Options, add_arguments, epoch_us, options_from
from tradecore.simulate.player import Player
from tradecore.simulate.replay import Recording, ReplayPlayer
from tradecore.simulate.rest import Rest
from tradecore.simulate.streams import StreamServer
from tradecore.simulate.tape import Tape

__all__ = ["Exchange", "add_arguments", "run"]

_RENDER_US = 8
"""Generous estimate of the time that one prerendered trade takes."""
_SHUTDOWN_TIMEOUT_S = 1.0


class Exchange:
    """The whole exchange: one market or recording, one port for WebSocket and REST."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.hub = Hub()
        self.done = False
        """True when `--count` is reached or the recording has ended."""
        self.source: Tape | Recording
        self.player: Player | ReplayPlayer
        if options.replay is not None:
            self.source = Recording(options.replay)
            self.player = ReplayPlayer(
                self.hub, self.source, options.replay_speed, self._report_done
            )
        else:
            self.source, self.player = self._make_market()
        self.app = web.Application()
        self.gate = Gate(self.hub, options)
        self.streams = StreamServer(self.hub, options)
        player = self.player if isinstance(self.player, Player) else None
        for part in (
            Rest(self.gate, options, self.source, lambda: self.player.now_us),
            Dumps(options, self.source, self.gate, lambda: self.player.now_us),
            self.streams,
            FaultDesk(self.streams, self.gate, player),
        ):
            part.add_routes(self.app.router)
        self.app.router.add_get("/sim/state", self._state)

    def _make_market(self) -> tuple[Tape, Player]:
        options = self.options
        tape = Tape(self._market(), options.faults, options.count)
        player = Player(self.hub, tape, options.rate > 0, self._report_done, options.step)
        player.prerender(options.prerender, options.prerender_micro)
        return tape, player

    def description(self) -> dict[str, Any]:
        """Return what a checker needs: `epoch_us`, and `market`, the arguments of `Market`."""
        if isinstance(self.source, Recording):
            return {"epoch_us": self.source.messages[0].event_us, "market": None}
        market = self.source.market
        return {"epoch_us": market.epoch_us, "market": market.arguments()}

    def _market(self) -> Market:
        options = self.options
        start_us = epoch_us(options)
        if options.prerender and options.rate and options.epoch is None:
            start_us += options.prerender * _RENDER_US  # no trade is due before all are rendered
        rate = options.rate or options.virtual_rate
        pauses = {
            symbol: [[start_us + round(second * 1e6) for second in span] for span in spans]
            for symbol, spans in options.pauses.items()
        }
        return Market(
            options.seed,
            options.symbol_list,
            rate,
            start_us,
            options.first_ids,
            options.absent,
            options.absent_every,
            pauses,
        )

    def _report_done(self) -> None:
        self.done = True
        _print({"event": "done", "trades": self.source.total})

    async def _state(self, request: web.Request) -> web.Response:
        symbols = {
            symbol: {"first_id": first, "last_id": last, "trades": last - first + 1}
            for symbol, (first, last) in self.source.sent.items()
        }
        return web.json_response(
            {
                **self.description(),
                "now_us": self.player.now_us,
                "trades": self.source.total,
                "done": self.done,
                "connections": len(self.hub.connections),
                "connects": self.streams.connects,
                "refused": self.streams.refused,
                "upgrades_while_banned": self.streams.ban.early,
                "reconnect_s": [round(seconds, 4) for seconds in self.hub.reconnect_s],
                "rest": dict(self.gate.requests),
                "rest_while_banned": self.gate.limit.early[418],
                "rest_while_limited": self.gate.limit.early[429],
                "symbols": symbols,
                "counts": dict(self.hub.counts),
                "late_ms": dict(self.player.late_ms),
            }
        )


async def run(
    args: argparse.Namespace, make_exchange: Callable[[Options], Exchange] = Exchange
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Prints one JSON line when ready. UsageError for wrong options or a port that is taken.
    """
    options = options_from(args)
    exchange = make_exchange(options)
    runner = web.AppRunner(
        exchange.app,
        access_log=None,
        shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
        handler_cancellation=True,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as exc:
            raise UsageError(
                f"cannot listen on {options.host} port {options.port}: {exc.strerror}; "
                "choose another --port, 0 for any free one"
            ) from exc
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{runner.addresses[0][1]}"
        ready = {"event": "ready", "ws": f"ws://{address}", "rest": f"http://{address}"}
        _print({**ready, **exchange.description(), "started_us": clock.wall_ns() // 1000})
        await _play_until(exchange, stopping)
    finally:
        await runner.cleanup()
    return EXIT_OK


async def _play_until(exchange: Exchange, stopping: asyncio.Event) -> None:
    """Run the player; a bug in it ends the exchange loudly, its normal end does not."""
    playing = asyncio.create_task(exchange.player.run())
    waiting = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((playing, waiting), return_when=asyncio.FIRST_COMPLETED)
        if playing.done():
            playing.result()
            await waiting
    finally:
        for task in (playing, waiting):
            task.cancel()
        await asyncio.gather(playing, waiting, return_exceptions=True)


def _print(event: dict[str, Any]) -> None:
    print(json.dumps(event, ensure_ascii=False, separators=(",", ":")), flush=True)
