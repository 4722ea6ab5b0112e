"""The exchange's options: one table for the command line and for the code."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from ipaddress import ip_address
from math import inf
from pathlib import Path
from typing import Any, get_args

from tradecore import clock
from tradecore.errors import UsageError
from tradecore.simulate.faults import Faults
from tradecore.simulate.profiles import DEFAULT_SYMBOLS


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """What the exchange does; the command line's names with `_` for `-`. Times are in seconds."""

    host: str = _option("127.0.0.1", "address to listen on, loopback only")
    port: int = _option(0, "port to listen on, 0 = any free one")
    seed: int = _option(1, "seed of the market")
    symbols: str = _option(",".join(DEFAULT_SYMBOLS), "listed symbols, the busiest first")
    strict_symbols: bool = _option(False, "refuse symbols that are not listed")
    rate: float = _option(100.0, "trades per second over all symbols; 0 = as the clients read")
    virtual_rate: float = _option(200_000.0, "with --rate 0: trades per second of virtual time")
    count: int | None = _option(None, "stop after so many trades in all")
    epoch: float | None = _option(
        None, "time of the first trades: s, ms or us since 1970, or negative: s before now"
    )
    step: float = _option(0.005, "time between two looks at what a paced market has to send")
    prerender: int = _option(0, "render so many trades before the start")
    prerender_micro: bool = _option(False, "render them for clients with timeUnit=MICROSECOND")
    replay: Path | None = field(
        default=None, metadata={"help": "send recorded messages (.jsonl or .jsonl.gz) instead"}
    )
    replay_speed: float = _option(1.0, "1 = as recorded, 2 = twice as fast, 0 = as clients read")
    ping_interval: float = _option(20.0, "time between the server's pings")
    pong_timeout: float = _option(60.0, "close a connection without pong for so long")
    no_pong_check: bool = _option(False, "do not mind missing pongs")
    nested_errors: bool = _option(False, 'answer {"error":{...}} in place of {"code":...}')
    connect_limit: int = _option(300, "connections per 5 minutes, more are refused")
    cut_after: float = _option(86_400.0, "cut each connection at this age, without a close frame")
    shutdown_after: float = _option(0.0, "send serverShutdown at this age of a connection")
    half_open_after: float = _option(0.0, "go silent without closing at this age of a connection")
    refuse_connects: int = _option(0, "refuse the first n connections")
    weight_limit: int = _option(6000, "REST weight per minute")
    ban_seconds: float = _option(120.0, "length of the ban after 429s were ignored")
    rest_lag: float = _option(0.0, "age at which a trade shows up in historicalTrades")
    rest_keep: int = _option(0, "historicalTrades keeps only the newest n trades, 0 = all")
    rest_error_every: int = _option(0, "answer every n-th REST request with 503")
    rest_hang: float = _option(0.0, "leave REST requests unanswered for so long after the start")
    dump_broken_checksum: bool = _option(False, "serve daily dumps with wrong checksums")
    dump_until: str | None = _option(None, "last day (YYYY-MM-DD) that has a daily dump")
    absent_every: int = _option(0, "every n-th trade id of a symbol does not exist at all")
    first_ids: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    pauses: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)

    @property
    def symbol_list(self) -> tuple[str, ...]:
        """The listed symbols."""
        return tuple(s.strip() for s in self.symbols.split(",") if s.strip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of the exchange to a command line parser."""
    for source in (Options, Faults):
        for item in fields(source):
            if "help" not in item.metadata:
                continue
            name = "--" + item.name.replace("_", "-")
            text = item.metadata["help"]
            if item.default is False:
                parser.add_argument(name, action="store_true", help=text)
                continue
            if item.default not in (None, 0):
                text += f" (default {item.default})"
            kind: Any = (*get_args(item.type), item.type)[0]  # int of `int | None`
            parser.add_argument(name, type=kind, default=item.default, help=text.replace("%", "%%"))
    parser.add_argument(
        "--first-id",
        action="append",
        default=[],
        metavar="[SYMBOL=]ID",
        help="id of the first trade, of all symbols or of one; may be repeated",
    )
    parser.add_argument(
        "--absent",
        action="append",
        default=[],
        metavar="SYMBOL=FIRST-LAST",
        help="ids that the venue does not have, neither live nor in REST or dumps; may be repeated",
    )
    parser.add_argument(
        "--pause",
        action="append",
        default=[],
        metavar="SYMBOL=FROM-TO",
        help="seconds after the first trades without trades of a symbol, or *; may be repeated",
    )


def options_from(args: argparse.Namespace) -> Options:
    """Build the options from a parsed command line; UsageError names what is wrong."""
    values = vars(args)
    faults = Faults(**{f.name: values[f.name] for f in fields(Faults)})
    plain = {f.name: values[f.name] for f in fields(Options) if "help" in f.metadata}
    options = Options(
        **plain,
        first_ids=_first_ids(values["first_id"]),
        absent=_absent(values["absent"]),
        pauses=_pauses(values["pause"]),
        faults=faults,
    )
    if not options.symbol_list:
        raise UsageError("--symbols is empty: name at least one symbol, such as BTCUSDT")
    if options.rate < 0 or options.virtual_rate <= 0:
        raise UsageError("--rate must be 0 or more, --virtual-rate more than 0")
    if not 0.001 <= options.step <= 1.0:
        raise UsageError("--step must be between 0.001 and 1 s")
    if options.faults.reorder_every == 1:
        raise UsageError("--reorder-every must be 0 or at least 2")
    wrong = [
        f.name
        for group in (options, faults)
        for f in fields(group)
        if f.name != "epoch"
        and isinstance(v := getattr(group, f.name), int | float)
        and not 0 <= v < inf  # catches nan as well
    ]
    if wrong:
        name = wrong[0].replace("_", "-")
        raise UsageError(f"--{name} must be a finite number of 0 or more")
    if options.absent_every == 1:
        raise UsageError("--absent-every must be 0 or at least 2")
    if options.dump_until is not None:
        try:
            date.fromisoformat(options.dump_until)
        except ValueError:
            raise UsageError(f"--dump-until {options.dump_until} is no YYYY-MM-DD") from None
    if options.port > 65535:
        raise UsageError(f"--port {options.port} is no port: use 1 to 65535, or 0 for any")
    if options.host != "localhost":
        try:
            loopback = ip_address(options.host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise UsageError(f"--host {options.host} is no loopback address: use 127.0.0.1")
    return options


def epoch_us(options: Options) -> int:
    """Return the time of the first trades in microseconds since 1970."""
    now_us = clock.wall_ns() // 1000
    if options.epoch is None:
        return now_us
    if options.epoch < 0:
        return now_us + round(options.epoch * 1_000_000)
    for unit_us, limit in ((1_000_000, 1e11), (1_000, 1e14)):
        if options.epoch < limit:
            return round(options.epoch * unit_us)
    return int(options.epoch)


def _first_ids(texts: list[str]) -> dict[str, int]:
    ids = {}
    for text in texts:
        symbol, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise UsageError(f"--first-id {text} is wrong: use ID or SYMBOL=ID, ID >= 0")
        ids[symbol or "*"] = int(number)
    return ids


def _absent(texts: list[str]) -> dict[str, tuple[tuple[int, int], ...]]:
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    for text in texts:
        symbol, _, span = text.rpartition("=")
        first, _, last = span.partition("-")
        if not (symbol and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UsageError(f"--absent {text} is wrong: use SYMBOL=FIRST-LAST, first <= last")
        ranges[symbol] = (*ranges.get(symbol, ()), (int(first), int(last)))
    return ranges


def _pauses(texts: list[str]) -> dict[str, tuple[tuple[float, float], ...]]:
    spans: dict[str, tuple[tuple[float, float], ...]] = {}
    for text in texts:
        symbol, _, span = text.rpartition("=")
        try:
            begin_s, end_s = map(float, span.split("-"))
        except ValueError:
            begin_s = end_s = 0.0
        if not (symbol and 0 <= begin_s < end_s < inf):
            raise UsageError(f"--pause {text} is wrong: use SYMBOL=FROM-TO in s, FROM < TO")
        spans[symbol] = (*spans.get(symbol, ()), (begin_s, end_s))
    return spans
