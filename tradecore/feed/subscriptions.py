"""Which streams go over which connection, and the requests that ask for them."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil

import orjson

from tradecore.schema import STREAM_KLINE, STREAM_TICKER, STREAM_TRADE

MAX_STREAMS = 1024
"""Streams that the venue allows on one connection."""

MAX_REQUEST_BYTES = 3500
"""Requests above 4,088 bytes were seen to be ignored without a word; stay well below."""

_LATE = (STREAM_KLINE, STREAM_TICKER)

_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def stream_name(symbol: str, stream: str) -> str:
    """Return the venue's stream name; only ASCII letters are lowered (`币安人生usdt@trade`)."""
    return f"{symbol.translate(_ASCII_LOWER)}@{stream}"


@dataclass(frozen=True, slots=True)
class Share:
    """What one connection carries: all `kinds` ("trade", "ticker", ...) of each of its symbols."""

    symbols: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def streams(self) -> tuple[str, ...]:
        """The venue's names in the order in which they are asked for.

        A full connection takes several requests, half a second apart, and what comes late has
        missed something: trades are first, and tickers, which only repeat themselves, last.
        """
        kinds = sorted(self.kinds, key=lambda kind: _LATE.index(kind) if kind in _LATE else -1)
        return tuple(stream_name(symbol, kind) for kind in kinds for symbol in self.symbols)

    @property
    def traded(self) -> tuple[str, ...]:
        """The symbols whose trades come over this connection: all or none."""
        return self.symbols if STREAM_TRADE in self.kinds else ()

    @property
    def ticks(self) -> bool:
        """Whether a ticker, which comes about every second, is among the streams."""
        return STREAM_TICKER in self.kinds and bool(self.symbols)


def spread(
    symbols: Sequence[str], kinds: Sequence[str], max_streams: int = MAX_STREAMS
) -> list[Share]:
    """Deal the streams out to as few connections as the venue allows, evenly.

    All streams of a symbol stay together. Symbols are dealt like cards, because busy symbols stand
    side by side in most lists (ordered by turnover, or BTCUSDC next to BTCUSDT).
    """
    unique = list(dict.fromkeys(symbols))
    hands = ceil(len(unique) / (max_streams // len(kinds)))
    return [Share(tuple(unique[hand::hands]), tuple(kinds)) for hand in range(hands)]


def rearrange(
    shares: Sequence[Share],
    symbols: Sequence[str],
    kinds: Sequence[str],
    max_streams: int = MAX_STREAMS,
) -> tuple[list[Share], list[Share]]:
    """Return (the new share of each present connection, shares of new connections).

    A symbol stays where it is, unless more kinds of streams do not fit there any more. New symbols
    go to the emptiest connection with room. A present connection may be left with nothing.
    """
    room = max_streams // len(kinds)
    homeless = dict.fromkeys(symbols)
    hands: list[list[str]] = []
    for share in shares:
        kept = [symbol for symbol in share.symbols if symbol in homeless][:room]
        for symbol in kept:
            del homeless[symbol]
        hands.append(kept)
    # A connection that lost all its symbols is not filled anew while the others have room.
    heap = [(len(hand) or room - 1, index) for index, hand in enumerate(hands) if len(hand) < room]
    heapify(heap)
    rest = deque(homeless)
    while rest and heap:
        filled, index = heappop(heap)
        hands[index].append(rest.popleft())
        if len(hands[index]) < room:
            heappush(heap, (max(filled + 1, len(hands[index])), index))
    new = spread(rest, kinds, max_streams) if rest else []
    return [Share(tuple(hand), tuple(kinds)) for hand in hands], new


def request(method: str, streams: Sequence[str] | None, request_id: int) -> bytes:
    """Encode one control request; symbols go out as raw UTF-8."""
    body: dict[str, object] = {"method": method}
    if streams is not None:
        body["params"] = streams
    return orjson.dumps(body | {"id": request_id})


def batches(
    streams: Sequence[str], max_bytes: int = MAX_REQUEST_BYTES
) -> Iterator[tuple[str, ...]]:
    """Cut streams into runs whose request stays within `max_bytes`, whatever method and id."""
    empty = len(request("UNSUBSCRIBE", (), 2**63 - 1))
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
