"""Real frames of the venue, recorded in August 2024: every one equals the oracle's reading.

The recordings are no part of the project; they are looked for beside it, and the tests are
skipped where they are not.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from codec_check import Check, Outcome

from tradecore._fastparse import FrameError, parse_event

FRAMES = Path(__file__).resolve().parents[2] / "shared" / "frames"
TRADES = FRAMES / "btcusdt_trade_20240809.jsonl.gz"
MIXED = FRAMES / "btcusdt_mixed_20240808.jsonl.gz"

check = Check(("ETHUSDT", "BTCUSDT"))


def recorded(path: Path) -> list[bytes]:
    if not path.exists():
        pytest.skip(f"no recording {path.name} in ../shared/frames")
    with gzip.open(path) as lines:
        return [line.rstrip(b"\n") for line in lines]


def read_all(frames: list[bytes]) -> list[dict[str, int | bool]]:
    """Return the fields of every frame; each has been equal on all paths."""
    outcomes: list[Outcome] = [check(frame) for frame in frames]
    return [outcome[1] for outcome in outcomes if outcome is not None]


def test_all_recorded_trades_equal_the_oracle() -> None:
    frames = recorded(TRADES)
    trades = read_all(frames)
    assert len(trades) == len(frames) == 19_904
    ids = [trade["trade_id"] for trade in trades]
    assert ids == [*range(3735683259, 3735703163)]
    assert max(Counter(trade["trade_us"] for trade in trades).values()) == 735
    assert {trade["symbol_id"] for trade in trades} == {1}


def test_all_recorded_trades_take_the_fast_path_combined_and_raw() -> None:
    for frame in recorded(TRADES):
        combined = parse_event(frame, check.table, "fast")
        raw = frame.removeprefix(b'{"stream":"btcusdt@trade","data":').removesuffix(b"}")
        assert parse_event(raw, check.table, "fast") == combined


def test_recorded_trades_in_other_spellings_mean_the_same() -> None:
    for frame in recorded(TRADES)[::10]:
        wrapper = json.loads(frame)
        spread = json.dumps({key: wrapper[key] for key in reversed(wrapper)}, indent=1).encode()
        assert check(spread) == check(frame)


def test_of_the_mixed_recording_only_the_trades_are_taken() -> None:
    causes: Counter[str] = Counter()
    trades = 0
    for frame in recorded(MIXED):
        stream = json.loads(frame)["stream"]
        if check(frame) is not None:
            assert stream == "btcusdt@trade"
            trades += 1
            continue
        with pytest.raises(FrameError) as caught:
            parse_event(frame, check.table)
        causes[f"{stream} {caught.value.cause}"] += 1
    assert trades == 2_278
    assert causes == {
        "btcusdt@bookTicker missing_key": 8_638,
        "btcusdt@depth@100ms unknown_event": 1_084,
    }
