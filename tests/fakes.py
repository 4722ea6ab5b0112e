"""A simulated exchange as a process of its own, with its market at hand for the truth.

async with simulated_exchange(rate=1000, drop_every=50) as exchange:
    exchange.ws, exchange.rest, exchange.market, await exchange.state()
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tradecore.simulate.market import Market

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


@dataclass
class SimulatedExchange:
    """A running exchange; `market` is None when it replays a recording."""

    process: asyncio.subprocess.Process
    ws: str
    rest: str
    epoch_us: int
    market: Market | None

    @property
    def truth(self) -> Market:
        """The market, for exchanges that simulate one."""
        assert self.market is not None
        return self.market

    @property
    def port(self) -> int:
        """The port of both WebSocket and REST."""
        return int(self.rest.rpartition(":")[2])

    async def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON body of a GET request, whatever its status."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.rest + path, params=parameters) as response,
        ):
            return await response.json()

    async def state(self) -> dict[str, Any]:
        """Return `/sim/state`: ids sent so far by symbol, counts by fault, whether it is done."""
        state: dict[str, Any] = await self.get("/sim/state")
        return state

    async def asked(self) -> dict[str, int]:
        """Return the requests to REST by endpoint, without those for the time of its clock."""
        requests: dict[str, int] = (await self.state())["rest"]
        return {endpoint: count for endpoint, count in requests.items() if endpoint != "time"}

    async def fault(self, name: str, **more: Any) -> dict[str, Any]:
        """Order a fault of the running exchange; see `tradecore.simulate.live`."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.rest}/sim/fault", json={"fault": name, **more}) as response,
        ):
            body: dict[str, Any] = await response.json()
            assert response.status == 200, body
            return body

    async def truth_now(self) -> Market:
        """Return the market with the pauses that it has had by now."""
        return Market(**(await self.state())["market"])

    async def next_event(self) -> dict[str, Any]:
        """Return the next JSON line that the exchange prints, such as `{"event":"done"}`."""
        return await _next_line(self.process)

    async def kill(self) -> None:
        """End the process without warning."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def simulated_exchange(**options: Any) -> AsyncIterator[SimulatedExchange]:
    """Start `python -m tradecore.simulate` with `--option value` for each keyword.

    True stands for a flag, a list for a repeated option.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tradecore.simulate",
        *_arguments(options),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        ready = await _next_line(process)
        market = Market(**ready["market"]) if ready["market"] else None
        yield SimulatedExchange(process, ready["ws"], ready["rest"], ready["epoch_us"], market)
    finally:
        await _stop(process)


async def _next_line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        line = await process.stdout.readline()
    assert line, f"the exchange ended with code {await process.wait()}"
    event: dict[str, Any] = json.loads(line)
    return event


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _arguments(options: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"{flag}={v}" for v in values]
    return arguments
