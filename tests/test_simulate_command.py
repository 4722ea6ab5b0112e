"""The command of the simulated exchange: options, ready line, exit codes."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest
from fakes import simulated_exchange

from tradecore.errors import EXIT_USAGE, UsageError
from tradecore.simulate.faults import Faults
from tradecore.simulate.frames import lower
from tradecore.simulate.options import Options, add_arguments, epoch_us, options_from


def parse(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(arguments))


def test_defaults_and_values() -> None:
    assert parse() == Options()
    options = parse(
        "--symbols=A, B",
        "--first-id=7",
        "--first-id=BTCUSDT=5000000000",
        "--drop-every=3",
        "--replay=x.jsonl",
        "--count=10",
        "--no-pong-check",
        "--pause=*=1-2.5",
        "--pause=A=0-1",
        "--pause=A=3-4",
    )
    assert options.symbol_list == ("A", "B")
    assert options.first_ids == {"*": 7, "BTCUSDT": 5_000_000_000}
    assert options.faults == Faults(drop_every=3)
    assert (options.replay, options.count) == (Path("x.jsonl"), 10)
    assert options.no_pong_check
    assert options.pauses == {"*": ((1.0, 2.5),), "A": ((0.0, 1.0), (3.0, 4.0))}


@pytest.mark.parametrize(
    "argument",
    [
        "--host=0.0.0.0",
        "--host=exchange.example",
        "--symbols=,",
        "--rate=-1",
        "--virtual-rate=0",
        "--drop-every=-2",
        "--reorder-every=1",
        "--first-id=BTCUSDT=x",
        "--cut-after=-1",
        "--port=65536",
        "--port=-1",
        "--rate=nan",
        "--rate=inf",
        "--step=0",
        "--step=2",
        "--pause=A",
        "--pause=A=2-1",
        "--pause=1-2",
        "--pause=A=1-inf",
    ],
)
def test_wrong_values_are_named(argument: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(argument)
    assert argument.partition("=")[0] in str(refusal.value)


def test_epoch_in_every_unit() -> None:
    wanted = 1_767_225_600_000_000
    for text in ("1767225600", "1767225600000", "1767225600000000"):
        assert epoch_us(parse(f"--epoch={text}")) == wanted
    assert epoch_us(parse()) - epoch_us(parse("--epoch=-60")) == pytest.approx(6e7, abs=1e6)


async def test_a_taken_port_is_one_clear_sentence() -> None:
    async with simulated_exchange(rate=1) as exchange:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tradecore.simulate",
            f"--port={exchange.port}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, out) == (EXIT_USAGE, b"")
        assert len(error.splitlines()) == 1
        assert str(exchange.port).encode() in error


async def test_a_prerendered_paced_market_sends_the_same_trades() -> None:
    async with (
        simulated_exchange(rate=1_000, prerender=20_000) as exchange,
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"{exchange.ws}/stream?streams="
            + "/".join(f"{lower(symbol)}@trade" for symbol in exchange.truth.symbols)
        ) as socket,
    ):
        ids: dict[str, int] = {}
        for _ in range(2_000):
            event = json.loads(await socket.receive_str(timeout=30))["data"]
            truth = exchange.truth.trade(event["s"], event["t"])
            assert event["T"] == truth.trade_us // 1000
            assert event["t"] == ids.get(event["s"], event["t"] - 1) + 1
            ids[event["s"]] = event["t"]


async def test_pauses_hold_from_the_start_and_lateness_is_told() -> None:
    options = {"symbols": "AAAUSDT", "rate": 1_000, "step": 0.001, "pause": "AAAUSDT=0.5-0.8"}
    async with (
        simulated_exchange(**options, prerender=2_000) as exchange,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{exchange.ws}/stream?streams=aaausdt@trade") as socket,
    ):
        begin_ms = exchange.truth.epoch_us // 1000
        pause_ms = range(begin_ms + 501, begin_ms + 800)
        while (event := json.loads(await socket.receive_str(timeout=30))["data"])["T"] < (
            pause_ms.stop
        ):
            assert event["T"] not in pause_ms
        assert sum((await exchange.state())["late_ms"].values()) > 500


async def test_sigterm_ends_it_with_exit_code_0() -> None:
    async with simulated_exchange(rate=100) as exchange:
        exchange.process.terminate()
        assert await asyncio.wait_for(exchange.process.wait(), 10) == 0
