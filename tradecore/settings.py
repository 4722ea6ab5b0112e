"""Settings by environment variable: one table of names, defaults, bounds and meanings.

`load` reports every wrong value in one go, each with what would be right, and takes a misspelt
name of ours for an error. Secrets come from NAME, from the file named by NAME_FILE, or from a
systemd credential called NAME or name, and are held in a type that does not print them.
"""

# ruff: noqa: RUF009 - `_env` returns a dataclass field, which is what the rule wants

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any

from tradecore import sources, values
from tradecore.errors import SettingsError
from tradecore.redis import address
from tradecore.values import DAY_S, YEAR_S, Secret

_SHOWN_CHARACTERS = 60

_FOREIGN = frozenset(
    (
        "BINANCE_TEST_URL",
        "DATABASE_URI",
        "DATADIR",
        "HTTPS_HOST",
        "HTTPS_PORT",
        "HTTPS_PORTS",
        "HTTP_PORTS",
        "HTTP_PROXY",
        "LOGLEVEL",
        "REDIS_URI",
        "UPSTREAMS",
    )
)
"""Names that other programs use and that look like a misspelt one of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable."""

    name: str
    default: str
    """As one would write it; "" = unset, which gives `unset`."""
    meaning: str
    parse: Callable[[str], Any]
    """Raises ValueError that says what would be right."""
    secret: bool
    unset: Any

    def default_value(self) -> Any:
        """Return the value of a variable that is not set."""
        return self.parse(self.default) if self.default else self.unset


def _env(
    name: str,
    default: str,
    meaning: str,
    parse: Callable[[str], Any],
    *,
    secret: bool = False,
    unset: Any = None,
) -> Any:
    variable = Variable(
        name=name, default=default, meaning=meaning, parse=parse, secret=secret, unset=unset
    )
    return field(default_factory=variable.default_value, metadata={"variable": variable})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, valid and in the units that their names say; `Settings()` has the defaults."""

    database_url: Secret | None = _env(
        "DATABASE_URL",
        "",
        "PostgreSQL as postgresql://user:password@host/name; unset = an own one in DATA_DIR",
        values.secret_url("postgresql", "postgres"),
        secret=True,
    )
    symbols: tuple[str, ...] = _env(
        "SUPPORTED_SYMBOLS",
        "BTCUSDT,ETHUSDT,BNBUSDT,SOLUSDT,ADAUSDT,XRPUSDT,DOGEUSDT",
        "symbols to record, commas between; doubled ones are merged",
        values.symbols,
    )
    streams: tuple[str, ...] = _env(
        "STREAMS", "trade,ticker,kline_1m", "streams of each symbol", values.streams
    )
    websocket_urls: tuple[str, ...] = _env(
        "BINANCE_WEBSOCKET_URL",
        "wss://stream.binance.com:9443",
        "the venue's streams, with or without /ws or /stream at the end; commas between several",
        values.several(values.base_url("wss", "ws", "/ws", "/stream")),
    )
    """Bases without a path, the preferred one first."""
    rest_url: str = _env(
        "BINANCE_REST_URL",
        "https://api.binance.com",
        "the venue's REST interface, with or without /api/v3 at the end",
        values.base_url("https", "http", "/api", "/api/v3"),
    )
    """Base without a path."""
    dump_url: str = _env(
        "BINANCE_DUMP_URL",
        "https://data.binance.vision",
        "the venue's daily files of trades, for holes that are too old for its REST interface",
        values.base_url("https", "http"),
    )
    """Base without a path."""
    feed_lines: int = _env(
        "FEED_LINES", "1", "connections that carry each stream, 1 or 2", values.whole(1, 2)
    )
    reconnect_delay_ms: int = _env(
        "RECONNECT_DELAY",
        "1000",
        "milliseconds before the second attempt to reconnect; doubled after each one",
        values.whole(1, 600_000),
    )
    max_reconnect_delay_ms: int = _env(
        "MAX_RECONNECT_DELAY",
        "30000",
        "milliseconds between two attempts at most",
        values.whole(1, 3_600_000),
    )
    connection_max_age_s: int = _env(
        "CONNECTION_MAX_AGE",
        "23h",
        "age at which a connection is replaced without a break; the venue cuts at 24 hours",
        values.duration(5, 23 * 3600, "23h"),
    )
    settings_file: Path | None = _env(
        "SETTINGS_FILE",
        "",
        "file of NAME=value lines that win over the environment; SIGHUP reads it again",
        values.folder,
    )
    data_dir: Path = _env(
        "DATA_DIR", "./data", "folder of the ring and of the own database", values.folder
    )
    ring_capacity: int = _env(
        "RING_CAPACITY",
        "1048576",
        "trades that wait there while the database is away, 64 bytes each; a power of two",
        values.capacity,
    )
    batch_size: int = _env(
        "BATCH_SIZE",
        "100",
        "trades that start a flush, 50 ms after the last one began or later",
        values.whole(1, 1_000_000),
    )
    batch_timeout_ms: int = _env(
        "BATCH_TIMEOUT",
        "1000",
        "milliseconds that a trade waits for others at most",
        values.whole(1, 60_000),
    )
    db_pool_size: int = _env(
        "DB_POOL_SIZE", "20", "database connections at most", values.whole(1, 1000)
    )
    auto_migrate: bool = _env(
        "AUTO_MIGRATE", "on", "bring the schema up to date at start, on or off", values.switch
    )
    backfill_max_age_s: int = _env(
        "BACKFILL_MAX_AGE",
        "24h",
        "age of the oldest hole that is filled from the venue, or off",
        values.duration(60, 10 * YEAR_S, "24h", off=0),
    )
    """0 = never fill."""
    shards: int = _env(
        "SHARDS",
        "0",
        "parts into which the symbols fall when several daemons share them; 0 = all are ours",
        values.whole(0, 1024),
    )
    node_name: str = _env(
        "NODE_NAME",
        "",
        "name of this daemon among those that share the symbols; unset = host and DATA_DIR",
        values.name,
        unset="",
    )
    retention_s: int | None = _env(
        "RETENTION",
        "2 years",
        "age at which trades are dropped, or off",
        values.duration(DAY_S, 100 * YEAR_S, "2 years", off=None),
    )
    """None = keep for ever."""
    compress_after_s: int | None = _env(
        "COMPRESS_AFTER",
        "7 days",
        "age at which trades are compressed, or off",
        values.duration(DAY_S, 100 * YEAR_S, "7 days", off=None),
    )
    """None = never."""
    http_host: str = _env(
        "HTTP_HOST", "127.0.0.1", "address of the health and metrics server", values.host
    )
    http_port: int = _env("HTTP_PORT", "3000", "its port; 0 = any free one", values.whole(0, 65535))
    http_hosts: tuple[str, ...] = _env(
        "HTTP_HOSTS",
        "",
        "names that it is called by, beside addresses, localhost and the machine's own name",
        values.host_names,
        unset=(),
    )
    http_token: Secret | None = _env(
        "HTTP_TOKEN",
        "",
        "what clients show for all but probes and /metrics: as Bearer, or as the password of Basic",
        values.token,
        secret=True,
    )
    http_auth: str = _env(
        "HTTP_AUTH",
        "token",
        "token, or off: a HTTP_HOST that is not loopback serves everything without one",
        values.choice("token", "off"),
    )
    cors_origins: tuple[str, ...] = _env(
        "CORS_ORIGINS",
        "",
        "origins of web pages that may read it, commas between",
        values.origins,
        unset=(),
    )
    redis_url: Secret | None = _env(
        "REDIS_URL",
        "",
        "Redis as redis://user:password@host:6379/0, rediss:// or unix://; unset = none",
        address.checked,
        secret=True,
    )
    redis_trades: int = _env(
        "REDIS_TRADES",
        "off",
        "entries of the stream of all trades there, a tenth of a second each, or off",
        values.whole(1, 1_000_000, off=0),
    )
    """0 = no such stream."""
    log_level: str = _env(
        "LOG_LEVEL",
        "info",
        "debug, info, warning, error or critical",
        values.choice(
            "debug", "info", "warning", "error", "critical", warn="warning", fatal="critical"
        ),
    )
    log_format: str = _env(
        "LOG_FORMAT",
        "auto",
        "json, text, or auto = text on a terminal and json elsewhere",
        values.choice("json", "text", "auto"),
    )


VARIABLES: dict[str, Variable] = {one.name: one.metadata["variable"] for one in fields(Settings)}
"""The variable of each field of `Settings`."""


def load(environ: Mapping[str, str]) -> Settings:
    """Read all settings; raise `SettingsError` that lists everything wrong in `environ`.

    An empty value counts as unset.
    """
    read: dict[str, Any] = {}
    problems = []
    given: dict[str, str] = {}
    try:
        given = sources.from_file(environ)
    except ValueError as error:
        problems.append(str(error))
    environ = {**environ, **given}
    problems += _misspelt(environ, given)
    for name, variable in VARIABLES.items():
        try:
            read[name] = _read(variable, environ)
        except ValueError as error:
            problems.append(str(error))
    problems += _contradictions(read)
    if problems:
        raise SettingsError(problems)
    return Settings(**read)


def http_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return only HTTP_HOST and HTTP_PORT, for the health probe; raise `SettingsError`."""
    try:
        environ = {**environ, **sources.from_file(environ)}
        return (
            _read(VARIABLES["http_host"], environ),
            _read(VARIABLES["http_port"], environ),
        )
    except ValueError as error:
        raise SettingsError([str(error)]) from None


def describe() -> str:
    """Return the table of variables as text for a terminal."""
    width = max(len(variable.name) for variable in VARIABLES.values())
    return "\n".join(
        f"  {variable.name:<{width}}  {variable.meaning}\n"
        f"  {'':<{width}}  [{variable.default or 'unset'}]"
        for variable in VARIABLES.values()
    )


def _read(variable: Variable, environ: Mapping[str, str]) -> Any:
    text = (sources.secret_text if variable.secret else sources.plain_text)(variable.name, environ)
    if not text:
        return variable.default_value()
    try:
        if not text.isprintable():
            raise ValueError("take out the control characters and bytes that are not UTF-8")
        return variable.parse(text)
    except ValueError as error:
        shown = "has a wrong value" if variable.secret else f"is {_shown(text)}"
        raise ValueError(f"{variable.name} {shown}: {error}") from None


def _shown(text: str) -> str:
    text = re.sub(r"//\S*@", "//***@", text)
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")


def _misspelt(environ: Mapping[str, str], given: Mapping[str, str]) -> Iterator[str]:
    """Name what is no setting: in SETTINGS_FILE, `given`, all of it; else what is like one."""
    known = {variable.name for variable in VARIABLES.values()}
    known |= {f"{variable.name}_FILE" for variable in VARIABLES.values() if variable.secret}
    for name in sorted(given.keys() - known):
        meant = _meant(name, known)
        yield f"{name} in SETTINGS_FILE is no setting of tradecore" + (
            f": did you mean {meant}?" if meant else ": take it out"
        )
    for name in sorted(environ.keys() - given.keys() - known - _FOREIGN):
        meant = _meant(name, known)
        # With the right name set as well, the other one is most likely another program's; and
        # container platforms write the addresses of their services into names like ours.
        if meant and meant not in environ and not environ[name].startswith("tcp://"):
            yield f"{name} is no setting of tradecore: did you mean {meant}?"


def _meant(name: str, known: set[str]) -> str | None:
    bare = name.upper().removeprefix("TRADECORE_")
    if bare in known:
        return bare
    for right in get_close_matches(name, known, n=2, cutoff=0.85):
        # A word before or after (DD_LOG_LEVEL, LOG_LEVEL_ROOT) makes it another program's name.
        if not name.endswith(f"_{right}") and not name.startswith(f"{right}_"):
            changes = SequenceMatcher(None, name, right, autojunk=False).get_opcodes()
            if sum(max(b - a, d - c) for op, a, b, c, d in changes if op != "equal") <= 2:
                return right
    return None


def _contradictions(read: dict[str, Any]) -> Iterator[str]:
    """Hold settings against each other; those that are wrong by themselves are not in `read`."""
    low, high = read.get("reconnect_delay_ms"), read.get("max_reconnect_delay_ms")
    if low and high and low > high:
        yield f"MAX_RECONNECT_DELAY is {high}: give at least RECONNECT_DELAY, which is {low}"
    if read.get("http_token") and read.get("http_auth") == "off":
        yield "HTTP_AUTH is off and HTTP_TOKEN is set: take one of them out"
    compress_s, retain_s = read.get("compress_after_s"), read.get("retention_s")
    if compress_s and retain_s and compress_s >= retain_s:
        yield f"COMPRESS_AFTER is {values.spoken(compress_s)}: give less than RETENTION, or off"
    if read.get("redis_trades") and "redis_url" in read and read["redis_url"] is None:
        yield "REDIS_TRADES is set without REDIS_URL: set both, or none"
