"""What a capture needs of the venue: REST, its clock, the symbols, a connection for streams."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from difflib import get_close_matches
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import orjson

from tradecore import clock
from tradecore.checks.finding import CLOCK_SAMPLES, Finding, judge_clock
from tradecore.errors import EXIT_USAGE, EXIT_VENUE, TradecoreError
from tradecore.settings import Settings
from tradecore.venue_clock import RESOLUTION_S, offset_of, sample

VENUE_LIMIT_S = 15.0
_BODY_MAX_BYTES = 64 << 20
_INFO_WEIGHT = 20


async def check_venue(settings: Settings) -> AsyncIterator[Finding]:
    """Ask the venue as the daemon does: within the budget, and not at all while it bans us."""
    from tradecore.rest.budget import Budget, RestError
    from tradecore.rest.client import RestClient
    from tradecore.rest.trades import venue_time_us

    url = settings.rest_url
    client = RestClient(url, Budget.of(settings.data_dir, url), limit_s=VENUE_LIMIT_S)
    try:
        ask = partial(venue_time_us, client, wait_s=0, tries=1)
        samples = [await sample(ask) for _ in range(CLOCK_SAMPLES)]
        yield Finding("ok", "venue", f"{url} answers")
        yield judge_clock("venue", offset_of(samples, RESOLUTION_S))
        body = await client.get(
            "/api/v3/exchangeInfo",
            {"showPermissionSets": "false"},
            _INFO_WEIGHT,
            wait_s=0,
            tries=1,
            max_bytes=_BODY_MAX_BYTES,
        )
        for finding in _symbols(settings, orjson.loads(body)):
            yield finding
    except RestError as error:
        yield Finding("fail", "venue", str(error), exit_code=EXIT_VENUE)
    except (KeyError, TypeError, ValueError) as error:
        text = f"{url} does not answer as the venue does ({error!r})"
        yield _unreachable(text, "BINANCE_REST_URL")
    finally:
        await client.close()
    for one in settings.websocket_urls:
        yield await _websocket(one, settings.data_dir)
    if settings.feed_lines > 1 and len(hosts := _hosts(settings)) == 1:
        text = f"both lines go over {hosts.pop()} and fail together"
        yield Finding("warn", "venue", text, "give BINANCE_WEBSOCKET_URL a second host")


def _hosts(settings: Settings) -> set[str]:
    from tradecore.feed.lines import line_endpoints

    lines = range(settings.feed_lines)
    return {line_endpoints(settings.websocket_urls, line)[0].host for line in lines}


def _unreachable(text: str, variable: str) -> Finding:
    mend = f"check the network and {variable}"
    return Finding("fail", "venue", text, mend, EXIT_VENUE)


def _symbols(settings: Settings, info: Any) -> Iterator[Finding]:
    states: dict[str, str] = {one["symbol"]: one["status"] for one in info["symbols"]}
    trading = 0
    for symbol in settings.symbols:
        state = states.get(symbol)
        if state is None:
            near = get_close_matches(symbol, states, n=1, cutoff=0.7)
            mend = "correct SUPPORTED_SYMBOLS" + (f", did you mean {near[0]}?" if near else "")
            text = f"{symbol} is not listed at the venue"
            yield Finding("fail", "symbols", text, mend, EXIT_USAGE)
        elif state != "TRADING":
            yield Finding("warn", "symbols", f"{symbol} is not trading now ({state})")
        else:
            trading += 1
    if trading == len(settings.symbols):
        yield Finding("ok", "symbols", f"trading: {trading} of {trading}")


async def _websocket(url: str, folder: Path) -> Finding:
    """Open and close a connection in the very way that the feed does, and only when it may."""
    from picows import WSListener

    from tradecore.feed.endpoint import Endpoint, UpgradeRefusedError
    from tradecore.feed.gate import Gate

    endpoint, gate = Endpoint.parse(url), Gate(folder)
    if wait_s := gate.take_s(endpoint):
        text = f"{url} is not asked for a connection for another {ceil(wait_s)} s"
        mend = "wait: it has refused this address, or was asked too often"
        return Finding("fail", "venue", text, mend, EXIT_VENUE)
    begin_ns = clock.mono_ns()
    try:
        transport, _ = await endpoint.open(WSListener, VENUE_LIMIT_S)
        took_ms = (clock.mono_ns() - begin_ns) / 1e6
        transport.disconnect()
        await asyncio.wait_for(transport.wait_disconnected(), VENUE_LIMIT_S)
    except (OSError, TradecoreError) as error:
        if isinstance(error, UpgradeRefusedError):
            gate.refused(endpoint, error)
        return _unreachable(f"{url}: {error}", "BINANCE_WEBSOCKET_URL")
    return Finding("ok", "venue", f"{url} takes connections ({took_ms:.0f} ms)")
