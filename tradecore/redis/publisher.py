"""Keeps the newest values in Redis, beside the capture: for readers who want no connection of ours.

Ten times a second what is news goes out in one batch. The next batch is begun when Redis has
answered; until then newer values take the place of older ones, so that nothing queues up however
slow Redis is. Whatever goes wrong ends the connection; with the next one all values are written.
What Redis misses meanwhile is missing there and nowhere else: it is a view, not the record.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import ceil

import orjson

from tradecore import clock
from tradecore._latest import Latest
from tradecore.backoff import Backoff
from tradecore.capture import Capture
from tradecore.http.health import assess
from tradecore.log import once_per
from tradecore.redis.address import Address, parse
from tradecore.redis.scripts import LAST, PUT, STATUS, SWEEP, TRADES
from tradecore.redis.wire import REASONS, RedisError, Wire, bulk, command
from tradecore.settings import Settings
from tradecore.sharing import node_of
from tradecore.snapshot import RedisUse, Snapshot

log = logging.getLogger(__name__)

INTERVAL_S = 0.1
STATUS_INTERVAL_S = 1.0
STATUS_EXPIRE_S = 5
SWEEP_INTERVAL_S = 60.0

BATCH_VALUES = 512
"""Values of one command at most: Redis does nothing else while it works it off, about a
millisecond."""

TRADES_MAX_BYTES = 4 << 20
"""Trades that wait at most, 27,000 or so; beyond that they are dropped and counted."""

LAST_BATCH_LIMIT_S = 0.5
"""How long a stop waits for the last batch."""

_RETRY_BASE_S = 0.2
_RETRY_CAP_S = 5.0


class Publisher:
    """Publishes what `capture` has; `run` it, and `close` it at the end."""

    def __init__(
        self,
        address: Address,
        capture: Capture,
        captured: Callable[[], Sequence[str]],
        snapshot: Callable[[], Snapshot],
        node: str,
        *,
        trades_kept: int = 0,
    ) -> None:
        """`captured()` are the symbols of now; of `snapshot()` readers are told under the name
        `node`. `trades_kept`: entries of the stream of all trades; 0 = none.
        """
        self._address = address
        self._capture = capture
        self._captured = captured
        self._snapshot = snapshot
        self._node = node
        self._trades_kept = trades_kept
        self._latest = Latest(capture, TRADES_MAX_BYTES if trades_kept else 0)
        channel = LAST + (f"@{address.database}" if address.database else "")
        self._put_head = b"".join(map(bulk, (b"EVAL", PUT.encode(), b"2", LAST.encode())))
        self._put_head += bulk(channel.encode())
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._up = False
        self._opened = 0
        self._batches = 0
        self._values = 0
        self._trades = 0
        self._trades_dropped = 0
        self._errors: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._last_error: str | None = None
        self._since_ns = self._success_ns = clock.mono_ns()
        self._status_due_s = self._sweep_due_s = 0.0

    def use(self) -> RedisUse:
        """Return what metrics and health show."""
        now_ns = clock.mono_ns()
        return RedisUse(
            up=self._up,
            away_s=None if self._up else (now_ns - self._since_ns) / 1e9,
            age_s=(now_ns - self._success_ns) / 1e9,
            reconnects=max(0, self._opened - 1),
            batches=self._batches,
            values=self._values,
            conflated=self._latest.conflated,
            trades=self._trades,
            trades_dropped=self._trades_dropped + self._latest.trades_dropped,
            errors=dict(self._errors),
            last_error=self._last_error,
        )

    async def run(self) -> None:
        """Publish until `close`; connect again after whatever goes wrong."""
        backoff = Backoff(_RETRY_BASE_S, _RETRY_CAP_S)
        try:
            while not self._stop.is_set():
                await self._wait(backoff.next_delay_s())
                try:
                    await self._connect_and_publish(backoff)
                except RedisError as error:
                    self._failed(error)
        finally:
            self._latest.close()
            self._ended.set()

    async def close(self) -> None:
        """Let `run` send what is news and end; return after LAST_BATCH_LIMIT_S at the latest."""
        self._stop.set()
        try:
            async with asyncio.timeout(LAST_BATCH_LIMIT_S):
                await self._ended.wait()
        except TimeoutError:
            log.warning("Redis did not take the last values in time")

    async def _wait(self, delay_s: float) -> None:
        """Wait so long, or until the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stop.wait()

    async def _connect_and_publish(self, backoff: Backoff) -> None:
        """Publish over one connection until `close`. Raises RedisError."""
        wire = await Wire.open(self._address)
        try:
            self._opened += 1
            self._latest.mark(self._ids())
            self._status_due_s = self._sweep_due_s = 0.0
            opened_s = clock.mono_ns() / 1e9
            while True:
                begin_s = clock.mono_ns() / 1e9
                if begin_s - opened_s > _RETRY_CAP_S:
                    backoff.reset()
                stopping = self._stop.is_set()
                await self._publish(wire, begin_s)
                if stopping:
                    await wire.call([command("DEL", STATUS + self._node)])
                    return
                await self._wait(begin_s + INTERVAL_S - clock.mono_ns() / 1e9)
        finally:
            wire.close()
            if self._up:
                self._up = False
                self._since_ns = clock.mono_ns()

    async def _publish(self, wire: Wire, now_s: float) -> None:
        """Send all that is news now, a command and its answer at a time."""
        for _ in range(ceil(self._latest.waiting / BATCH_VALUES)):
            count, values = self._latest.take(BATCH_VALUES)
            [kept] = await wire.call([b"*%d\r\n%b%b" % (5 + 2 * count, self._put_head, values)])
            self._batches += 1
            self._values += int(kept or 0)
            self._succeeded()
        trades, events = self._latest.take_trades()
        commands = [*self._due(now_s)]
        if trades:
            limit = ("MAXLEN", "~", self._trades_kept)
            commands.append(command("XADD", TRADES, *limit, "*", "count", trades, "trades", events))
        if commands:
            try:
                await wire.call(commands)
            except RedisError:
                self._trades_dropped += trades  # they may have come: nobody knows
                raise
            self._trades += trades
            self._succeeded()

    def _due(self, now_s: float) -> Iterable[bytes]:
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + STATUS_INTERVAL_S
            status = orjson.dumps(self._status())
            yield command("SET", STATUS + self._node, status, "EX", STATUS_EXPIRE_S)
        if now_s >= self._sweep_due_s:
            self._sweep_due_s = now_s + SWEEP_INTERVAL_S
            yield command("EVAL", SWEEP, 1, LAST, clock.wall_ns() // 1000)

    def _status(self) -> dict[str, object]:
        """Return what readers are told: whether to believe that what they find is new."""
        snapshot = self._snapshot()
        health = assess(snapshot)
        return {
            "node": self._node,
            "version": snapshot.version,
            "time_us": clock.wall_ns() // 1000,
            "started_us": int(snapshot.started_s * 1e6),
            "ready": health.ready,
            "status": health.status,
            "symbols": len(self._captured()),
            "streams_live": snapshot.live_streams,
            "trades_received_per_s": round(snapshot.received_per_s, 1),
        }

    def _ids(self) -> Iterable[int]:
        ids = (self._capture.symbols.get(symbol) for symbol in self._captured())
        return [one for one in ids if one is not None]

    def _succeeded(self) -> None:
        self._success_ns = clock.mono_ns()
        if not self._up:
            self._up = True
            self._last_error = None
            log.info("publishing to Redis", extra={"redis": str(self._address)})

    def _failed(self, error: RedisError) -> None:
        self._errors[error.reason] += 1
        self._last_error = str(error)
        once_per(log, "redis").warning(
            "Redis takes no values; capture goes on without it",
            extra={"redis": str(self._address), "reason": error.reason, "error": str(error)},
        )


def publisher_of(
    settings: Settings,
    capture: Capture,
    captured: Callable[[], Sequence[str]],
    snapshot: Callable[[], Snapshot],
) -> Publisher:
    """Return what REDIS_URL and REDIS_TRADES ask for; REDIS_URL is set."""
    assert settings.redis_url is not None
    return Publisher(
        parse(settings.redis_url.reveal()),
        capture,
        captured,
        snapshot,
        node_of(settings),
        trades_kept=settings.redis_trades,
    )
