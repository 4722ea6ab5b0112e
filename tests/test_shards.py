import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore.shards import shard_of, symbols_of


def crc32(data: bytes) -> int:
    """Bit by bit, from the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(st.text(max_size=30), st.integers(1, 1000))
def test_a_shard_is_the_crc_of_the_utf8_bytes(symbol: str, shards: int) -> None:
    assert shard_of(symbol, shards) == crc32(symbol.encode()) % shards


def test_the_check_value_of_crc_32() -> None:
    assert shard_of("123456789", 2**32) == 0xCBF43926


def test_another_process_divides_alike() -> None:
    symbols = [f"S{n}USDT" for n in range(50)]
    code = f"from tradecore.shards import shard_of; print([shard_of(s, 7) for s in {symbols!r}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert out.stdout.strip() == str([shard_of(symbol, 7) for symbol in symbols])


@given(st.lists(st.text(max_size=12), unique=True), st.integers(1, 20), st.data())
def test_each_symbol_is_in_one_part(symbols: list[str], shards: int, data: st.DataObject) -> None:
    held = data.draw(st.sets(st.integers(0, shards - 1)))
    others = set(range(shards)) - held
    mine, theirs = symbols_of(symbols, shards, held), symbols_of(symbols, shards, others)
    assert sorted(mine + theirs) == sorted(symbols)
    assert list(mine) == [symbol for symbol in symbols if symbol in mine]


def test_no_shards() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        shard_of("BTCUSDT", 0)
