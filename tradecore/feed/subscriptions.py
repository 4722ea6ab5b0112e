"""Which streams go over which connection, and the requests that ask for them."""

from collections.abc import Iterator, Sequence
from math import ceil

import orjson

MAX_STREAMS = 1024
"""Streams that the venue allows on one connection."""

MAX_REQUEST_BYTES = 3500
"""Requests above 4,088 bytes were seen to be ignored without a word; stay well below."""

_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def stream_name(symbol: str, stream: str) -> str:
    """Return the venue's stream name; only ASCII letters are lowered (`币安人生usdt@trade`)."""
    return f"{symbol.translate(_ASCII_LOWER)}@{stream}"


def spread(
    symbols: Sequence[str], streams: Sequence[str], max_streams: int = MAX_STREAMS
) -> list[tuple[str, ...]]:
    """Deal the streams out to as few connections as the venue allows, evenly.

    All streams of a symbol stay together. Symbols are dealt like cards, because busy symbols stand
    side by side in most lists (ordered by turnover, or BTCUSDC next to BTCUSDT).
    """
    per_connection = max_streams // len(streams)
    unique = list(dict.fromkeys(symbols))
    hands = ceil(len(unique) / per_connection)
    return [
        tuple(stream_name(symbol, stream) for symbol in unique[hand::hands] for stream in streams)
        for hand in range(hands)
    ]


def request(method: str, streams: Sequence[str] | None, request_id: int) -> bytes:
    """Encode one control request; symbols go out as raw UTF-8."""
    body: dict[str, object] = {"method": method}
    if streams is not None:
        body["params"] = streams
    return orjson.dumps(body | {"id": request_id})


def batches(
    streams: Sequence[str], max_bytes: int = MAX_REQUEST_BYTES
) -> Iterator[tuple[str, ...]]:
    """Cut streams into runs whose SUBSCRIBE request stays within `max_bytes`, whatever its id."""
    empty = len(request("SUBSCRIBE", (), 2**63 - 1))
    batch: list[str] = []
    size = empty
    for stream in streams:
        cost = len(orjson.dumps(stream)) + 1
        if batch and size + cost > max_bytes:
            yield tuple(batch)
            batch, size = [], empty
        batch.append(stream)
        size += cost
    if batch:
        yield tuple(batch)
