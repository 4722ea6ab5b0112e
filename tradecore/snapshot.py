"""The whole daemon at one moment: what metrics, health and the terminal line read.

The observer builds a `Snapshot` on demand from plain C and Python integers; nothing here runs
in the per-trade path. Fields carry their unit in the name; ages are by the monotonic clock.
"""

import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

CONNECTION_STATES = (
    "connecting",
    "subscribing",
    "live",
    "stale",
    "backing_off",
    "draining",
    "closed",
)
"""Every state of a feed connection, in the order of its life."""

LIVE = "live"

SLICE_SYMBOLS = 200
"""Read in one go when `SymbolStates.read` does it: takes a millisecond."""

_PAGE_BYTES = resource.getpagesize()

_HUSHED = "see the log"

_P = TypeVar("_P", "DatabaseState", "Repair", "Lifecycle", "RedisUse")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in fixed buckets.

    `bounds` are the inclusive upper bounds, rising; `counts` has one more item, for what lies
    above the last bound, and is not cumulative; `sum` is the sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.bounds)} bounds need {len(self.bounds) + 1} counts")


class SymbolState(NamedTuple):
    """One symbol since the daemon started; id and age are None before its first trade."""

    symbol: str
    trades_received: int
    last_trade_id: int | None
    last_trade_age_s: float | None
    holes: int = 0
    ids_missing: int = 0
    """In its open holes."""
    complete_through_us: int | None = None
    """Every trade up to this time is stored, as far as anyone can know; None before the first."""
    proven_through_us: int | None = None
    """Up to this time every minute equals the venue's own kline; None before the first."""
    stale: bool = False
    """The venue prints its trades and they do not come."""


def _raising(exc: BaseException) -> Iterator[SymbolState]:
    raise exc
    yield


class SymbolStates(Sequence[SymbolState]):
    """States that are read when somebody asks for them, the first time all of them.

    Most who take a snapshot never do, and those of 1,400 symbols take 7 ms.
    """

    def __init__(self, states: Iterable[SymbolState]) -> None:
        self._coming = iter(states)
        self._states: list[SymbolState] = []

    def read(self) -> Iterator[None]:
        """Read them in slices, so that others may have the loop in between."""
        while True:
            try:
                some = list(islice(self._coming, SLICE_SYMBOLS))
            except BaseException as exc:
                # Who asks again must not take what was read so far for all of them.
                self._coming = _raising(exc)
                raise
            if not some:
                return
            self._states += some
            yield

    def __iter__(self) -> Iterator[SymbolState]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, place: int) -> SymbolState: ...
    @overload
    def __getitem__(self, place: slice) -> list[SymbolState]: ...
    def __getitem__(self, place: int | slice) -> SymbolState | list[SymbolState]:
        return self._all()[place]

    def _all(self) -> list[SymbolState]:
        for _ in self.read():
            pass
        return self._states


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ConnectionState:
    """One feed connection. `name` comes from a bounded set ("A0"), never from an epoch."""

    name: str
    line: str
    state: str
    streams: int
    data_age_s: float | None
    """Seconds since the last market data (heartbeats are none); None before the first."""
    reconnects: Mapping[str, int] = field(default_factory=dict)
    """Sessions that broke, by reason; attempts that failed are not counted."""
    last_end: str | None = None
    """Why the last session or attempt ended: the reason, then ": " and words; None before one."""
    last_end_age_s: float | None = None
    endpoint: str | None = None
    """Host and port of the present session, or of the one before; None before the first."""
    symbols: tuple[str, ...] = ()
    """Whose streams it carries."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class DatabaseState:
    """The database as the flusher last met it; `last_error` carries no secret."""

    embedded: bool
    reachable: bool
    away_s: float | None
    """Seconds since it was last reachable (or since the start); None while it is reachable."""
    server_version: str | None
    edition: str | None
    """"plain", "timescale-apache" or "timescale-community"; None until it was asked."""
    level: str | None
    """What the tables are: "plain", "apache" or "community"; the server may be able to do more."""
    schema_version: int | None
    last_error: str | None
    parked_age_s: float | None
    """Seconds since it last refused rows for good; None when it has refused none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class RingUse:
    """Rows that wait in the ring for their commit."""

    rows: int
    capacity: int
    above_high_water: bool
    oldest_age_s: float
    """How long the oldest of them has waited: the lag of the tables. 0.0 when the ring is empty."""
    disk_free_bytes: int
    """Room for other files of DATA_DIR; the ring has its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class PoolUse:
    """Connections to the database, `limit` is DB_POOL_SIZE."""

    idle: int
    used: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Counters:
    """What only grows, from zero at start; each mapping holds all its keys from the start."""

    frames_received: int
    frames_refused: Mapping[str, int]
    trades_refused: Mapping[str, int]
    trades_duplicate: int
    trades_out_of_order: int
    gaps_detected: int
    trades_missing: int
    trades_missing_arrived: int
    """Of the missing ones: came late, by the other line or the older connection."""
    trades_far_below: int
    tickers_received: int
    klines_received: int
    trades_stored: int
    trades_parked: int
    trades_expired: int
    """Older than RETENTION when they came."""
    tickers_stored: int
    klines_stored: int
    klines_dropped: int
    flush_retries: Mapping[str, int]
    reconnects: Mapping[str, int]
    rollovers: Mapping[str, int]
    """Connections replaced without a break, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Holes:
    """Open holes in the stored trade ids."""

    open: int = 0
    ids_missing: int = 0
    oldest_age_s: float | None = None
    """Seconds since the oldest of them was detected; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Repair:
    """What the back-fill has done since the start."""

    trades_filled: Mapping[str, int]
    """By source: rest, dump."""
    holes_closed: Mapping[str, int]
    """By fate: filled, absent."""
    retries: Mapping[str, int]
    under_way: int
    """Holes being filled at this moment."""
    last_error: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class VenueRest:
    """The weight budget of the venue's REST interface."""

    used_weight: int
    limit_weight: int
    banned_s: float
    """Seconds until the venue may be asked again; 0.0 when it may be now."""
    requests: Mapping[tuple[str, str], int]
    """By endpoint and HTTP status, or a word where there was none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Audit:
    """The cross-check of stored minutes against the venue's klines."""

    matched: int
    mismatches: Mapping[str, int]
    """By reason."""
    unproven: int
    """Minutes that are over and not proven yet."""
    age_s: float | None
    """Seconds since a check left out no minute of any symbol but the latest; None before one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Lifecycle:
    """Retention and compression of past days; tables are raw_trades and tickers."""

    horizon_us: int | None
    """Older trades are given up; None: none are, or it is not known yet."""
    waits: str
    """Why the horizon does not stand where RETENTION puts it; "" when it does."""
    waits_s: float
    """For how long, as far as this daemon knows."""
    chunks: Mapping[tuple[str, str], int]
    """Days by table and state: open, compressed, partial."""
    dropped: Mapping[str, int]
    compressed: Mapping[str, int]
    """Days since the start, by table."""
    saved: Mapping[str, tuple[int, int]]
    """By table: bytes of heap and index before its compressed days were, and after."""
    jobs: Mapping[str, int]
    """TimescaleDB's jobs by state."""
    job_failures: int
    """Failed runs of these jobs, by the server's count."""
    job_trouble: str
    """What is wrong with them, "" when nothing is."""
    failures: Mapping[str, int]
    """By step."""
    trouble: Mapping[str, str]
    """Steps that failed the last time, each with the error."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Line:
    """One feed line, as seen from the trades."""

    name: str
    first: int
    """Trades that it brought first."""
    late: int
    """Trades that the other line, or another connection, had brought before."""
    missing: int
    """Ids that it jumped over."""
    lag_s_sum: float
    lag_count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Shards:
    """The share of the symbols; both 0 when SHARDS is off."""

    held: int = 0
    total: int = 0
    settled: bool = True
    """Whether it is known which are ours, and they are subscribed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Candles:
    """The candles, as far as this daemon refreshes them; another one of the database may do it."""

    minutes_waiting: int = 0
    """Closed minutes, touched by late or old trades, whose candles are not computed anew yet."""
    minutes_refreshed: int = 0
    failures: int = 0
    age_s: float | None = None
    """Seconds since the candles under way were last computed; None before the first time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class FanOut:
    """The live streams that clients of ours have; each mapping holds all its keys."""

    clients: int = 0
    events: Mapping[str, int] = field(default_factory=dict)
    """By kind of stream: encoded once, whatever the number of clients."""
    conflated: Mapping[str, int] = field(default_factory=dict)
    """By kind of stream: of a slow client, given up for a newer one."""
    closed: Mapping[str, int] = field(default_factory=dict)
    """Connections by why they ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class HttpUse:
    """What the side server has answered and refused."""

    requests: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By route and class of status, such as ("/ready", "2xx")."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """By reason; connections that never became a request are among them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class HostClock:
    """How far our clock is ahead of the venue's, in seconds, give or take `bound_s`."""

    offset_s: float
    bound_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class RedisUse:
    """What is published in Redis; only with REDIS_URL."""

    up: bool
    away_s: float | None
    """Seconds since it last took values, or since the start; None while it does."""
    age_s: float
    """Seconds since it last answered."""
    reconnects: int
    batches: int
    values: int
    """Taken by Redis: others that were not newer than what it had are left out."""
    conflated: int
    """Given up for a newer one before they were sent."""
    trades: int
    """In the stream of all trades."""
    trades_dropped: int
    """Of these: found no room, or their answer did not come."""
    errors: Mapping[str, int]
    """By reason."""
    last_error: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ProcessUse:
    """What the process takes from the machine."""

    resident_bytes: int
    cpu_s: float
    open_fds: int


def read_process() -> ProcessUse:
    """Read the process's own use from /proc/self only, so that it works under ProcSubset=pid."""
    resident_pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    use = resource.getrusage(resource.RUSAGE_SELF)
    return ProcessUse(
        resident_bytes=resident_pages * _PAGE_BYTES,
        cpu_s=use.ru_utime + use.ru_stime,
        open_fds=sum(1 for _ in Path("/proc/self/fd").iterdir()),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Snapshot:
    """The whole daemon at one moment."""

    version: str
    started_s: float
    """Host clock at start, seconds since 1970."""
    uptime_s: float
    connections: tuple[ConnectionState, ...]
    streams_wanted: int
    symbols: SymbolStates
    stale: tuple[str, ...] = ()
    """Symbols whose trades do not come although the venue prints them."""
    ring: RingUse
    database: DatabaseState
    pool: PoolUse
    counters: Counters
    holes: Holes
    repair: Repair
    rest: VenueRest
    audit: Audit
    lines: tuple[Line, ...]
    shards: Shards
    candles: Candles
    lifecycle: Lifecycle
    fan_out: FanOut = field(default_factory=FanOut)
    http: HttpUse = field(default_factory=HttpUse)
    redis: RedisUse | None = None
    """None without REDIS_URL."""
    received_per_s: float
    stored_per_s: float
    """Trades a second over the last few seconds."""
    flush_duration: Histogram
    flush_rows: Histogram
    exchange_receive_latency: Histogram
    receive_commit_latency: Histogram
    loop_lag: Histogram
    clock: HostClock | None = None
    """None while it is not known."""
    log_records_dropped: int = 0
    process: ProcessUse = field(default_factory=read_process)

    def without_errors(self) -> "Snapshot":
        """Return it without the texts of errors, which name hosts and roles."""
        return replace(
            self,
            database=_hushed(self.database, "last_error"),
            repair=_hushed(self.repair, "last_error"),
            lifecycle=_hushed(self.lifecycle, "job_trouble", "trouble"),
            redis=_hushed(self.redis, "last_error") if self.redis else None,
            connections=tuple(
                replace(
                    one,
                    last_end=one.last_end and one.last_end.partition(":")[0],
                    endpoint=None,
                )
                for one in self.connections
            ),
        )

    @property
    def trades_received(self) -> int:
        """Trades of all symbols that came in, duplicates left out."""
        return sum(state.trades_received for state in self.symbols)

    @property
    def live_streams(self) -> int:
        """Streams on connections that are live."""
        return sum(c.streams for c in self.connections if c.state == LIVE)

    @property
    def data_age_s(self) -> float | None:
        """Seconds since any connection brought market data; None before the first."""
        return min(
            (c.data_age_s for c in self.connections if c.data_age_s is not None), default=None
        )

    @property
    def absorbable_s(self) -> float:
        """Seconds of outage that the free slots hold at the present rate; infinity at rate 0."""
        free = self.ring.capacity - self.ring.rows
        return free / self.received_per_s if self.received_per_s > 0 else float("inf")


def _hushed(part: _P, *names: str) -> _P:
    """Return a part whose texts of these names say where they can be read."""
    texts: dict[str, Any] = {}
    for name in names:
        text = getattr(part, name)
        shown = dict.fromkeys(text, _HUSHED) if isinstance(text, Mapping) else text and _HUSHED
        texts[name] = shown
    return replace(part, **texts)
