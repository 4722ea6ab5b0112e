"""Divides symbols into shards, the same way on every host and in every release."""

from collections.abc import Collection, Iterable
from zlib import crc32


def shard_of(symbol: str, shards: int) -> int:
    """Return the shard of `symbol`, in 0..shards - 1: CRC-32 of its UTF-8 bytes, modulo `shards`.

    Python's own hash differs from process to process. Raises ValueError unless `shards` > 0.
    """
    if shards < 1:
        raise ValueError(f"the number of shards must be at least 1, not {shards}")
    return crc32(symbol.encode()) % shards


def symbols_of(symbols: Iterable[str], shards: int, held: Collection[int]) -> tuple[str, ...]:
    """Return those of `symbols` whose shard is in `held`, in their order."""
    return tuple(symbol for symbol in symbols if shard_of(symbol, shards) in held)
