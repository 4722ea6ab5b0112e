"""Recorded messages go out as they are; REST serves the trades among them."""

import gzip
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes import SimulatedExchange, simulated_exchange

FRAMES = Path(__file__).resolve().parents[2] / "shared" / "frames"
MIXED = FRAMES / "btcusdt_mixed_20240808.jsonl.gz"
TRADES = FRAMES / "btcusdt_trade_20240809.jsonl.gz"
recorded = pytest.mark.skipif(not TRADES.exists(), reason="no recorded frames here")

LINES = [
    '{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161255343,"s":"BTCUSDT","t":7,'
    '"p":"61837.63000000","q":"0.02000000","T":1723161255342,"m":true,"M":true}}',
    '{"e":"trade","E":1723161255543,"s":"ETHUSDT","t":9,"p":"2683.14","q":"1.5",'
    '"T":1723161255342000,"m":false,"M":true}',
    "this is no JSON",
    '{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161255643,"s":"BTCUSDT","t":8,'
    '"p":"61837.64000000","q":"0.04000000","T":1723161255642,"m":false,"M":true}}',
]


async def received(exchange: SimulatedExchange, path: str, count: int) -> list[str]:
    """Return the first `count` messages on a path."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(exchange.ws + path) as socket,
    ):
        return [await socket.receive_str(timeout=30) for _ in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
async def test_lines_go_to_their_streams(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"recording{suffix}"
    body = "\n".join(LINES).encode()
    path.write_bytes(gzip.compress(body) if suffix.endswith("gz") else body)
    async with simulated_exchange(replay=path, replay_speed=0) as exchange:
        assert exchange.market is None
        both = await received(exchange, "/stream?streams=btcusdt@trade/ethusdt@trade", 4)
        wrapped = '{"stream":"ethusdt@trade","data":' + LINES[1] + "}"
        assert both == [LINES[0], wrapped, LINES[2], LINES[3]]
        assert await exchange.next_event() == {"event": "done", "trades": 3}
        rows = await exchange.get("/api/v3/historicalTrades", symbol="BTCUSDT", fromId=1)
        assert [(r["id"], r["price"], r["qty"], r["time"]) for r in rows] == [
            (7, "61837.63000000", "0.02000000", 1723161255342),
            (8, "61837.64000000", "0.04000000", 1723161255642),
        ]
        assert (await exchange.get("/api/v3/trades", symbol="XRPUSDT"))["code"] == -1121
        kline = (await exchange.get("/api/v3/klines", symbol="BTCUSDT", interval="1m"))[-1]
        assert kline[1:6] == [rows[0]["price"], rows[1]["price"], rows[0]["price"],
                              rows[1]["price"], "0.06000000"]  # fmt: skip
        state = await exchange.state()
        assert state["symbols"]["BTCUSDT"] == {"first_id": 7, "last_id": 8, "trades": 2}
    async with simulated_exchange(replay=path, replay_speed=1) as exchange:
        raw = await received(exchange, "/ws/btcusdt@trade", 3)
        assert raw == [json_data(LINES[0]), LINES[2], json_data(LINES[3])]


def json_data(line: str) -> str:
    """Return the payload of a wrapped line."""
    return json.dumps(json.loads(line)["data"], separators=(",", ":"))


@recorded
async def test_the_recorded_trades_arrive_byte_for_byte() -> None:
    lines = gzip.decompress(TRADES.read_bytes()).decode().splitlines()
    assert len(lines) == 19_904
    async with simulated_exchange(replay=TRADES, replay_speed=0) as exchange:
        path = "/stream?streams=btcusdt@trade/btcusdt@ticker"
        assert await received(exchange, path, len(lines)) == lines
        assert (await exchange.next_event())["trades"] == len(lines)
        trade: dict[str, Any] = json.loads(lines[12_345])["data"]
        rows = await exchange.get(
            "/api/v3/historicalTrades", symbol="BTCUSDT", fromId=trade["t"], limit=1
        )
        found = [rows[0][key] for key in ("id", "price", "qty", "time", "isBuyerMaker")]
        assert found == [trade[key] for key in "tpqTm"]


@recorded
async def test_only_the_wanted_streams_are_sent() -> None:
    lines = gzip.decompress(MIXED.read_bytes()).decode().splitlines()
    depth = [line for line in lines if line.startswith('{"stream":"btcusdt@depth@100ms"')]
    async with simulated_exchange(replay=MIXED, replay_speed=0) as exchange:
        path = "/stream?streams=btcusdt@depth@100ms"
        assert await received(exchange, path, len(depth)) == depth


async def test_a_missing_recording_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended with code 2"):
        async with simulated_exchange(replay=tmp_path / "none.jsonl"):
            pass
