"""What a round happens in: exchange, database, the link between, and one or two daemons."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import asyncpg

from tests.daemon import Daemon
from tests.fakes import SimulatedExchange, simulated_exchange
from tests.torture.clock_shim import ClockShim, clock_shim
from tests.torture.link import Link
from tradecore import clock
from tradecore.simulate.market import Market
from tradecore.store.embedded import EmbeddedPostgres

SYMBOLS = ("BTCUSDT", "ETHUSDT", "PEPEUSDT", "BTTCUSDT", "币安人生USDT", "QUIETUSDT")
QUIET = "QUIETUSDT"
NEWCOMER = "SOLUSDT"
"""Listed at the exchange; recorded only after a change of the settings."""
DISK_BYTES = 384 << 20
_AHEAD_US = 300_000
_MARGIN_US = 1_000_000
_SETTINGS = {"autovacuum": "off", "shared_buffers": "32MB", "max_wal_size": "96MB",
             "min_wal_size": "32MB"}  # fmt: skip


@dataclass
class Arena:
    """Everything that faults act upon; `daemon_hand` and `database_hand` keep two faults apart."""

    folder: Path
    exchanges: list[SimulatedExchange]
    """Hosts of the venue: one, or two that serve the same market; REST is that of the first."""
    postgres: EmbeddedPostgres
    link: Link
    daemon: Daemon
    shim: ClockShim | None
    disk: Path | None
    """A small file system of its own for data; None when this machine does not let us mount."""
    symbols: list[str] = field(default_factory=lambda: list(SYMBOLS))
    """What the daemon is told to record at the moment."""
    first_ids: dict[str, int] = field(default_factory=dict)
    """The first id of each symbol that was ever stored."""
    daemon_hand: asyncio.Lock = field(default_factory=asyncio.Lock)
    database_hand: asyncio.Lock = field(default_factory=asyncio.Lock)
    mix: list[str] = field(default_factory=list)
    """The faults of the present round when it has several."""
    calm: list[tuple[int, int]] = field(default_factory=list)
    """The market's times between rounds, in microseconds, when everything was whole."""
    calm_from_us: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    """Fault -> why it cannot be had on this machine or with this daemon."""

    @property
    def dsn(self) -> str:
        """The database itself, past the link."""
        return self.postgres.dsn

    @property
    def exchange(self) -> SimulatedExchange:
        """The first host, with REST."""
        return self.exchanges[0]

    async def fault(self, random: Random, name: str, **more: object) -> None:
        """Order a fault of the venue: of one host or of all, the market's own always of all."""
        hosts = self.exchanges
        if name in ("pause", "resume", "quiet"):
            more["at_us"] = (await self.exchange.state())["now_us"] + _AHEAD_US
        elif name == "rest":
            hosts = hosts[:1]
        elif random.random() < 0.5:
            hosts = [random.choice(hosts)]
        for host in hosts:
            await host.fault(name, **more)

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection past the link; OSError or PostgresError while the server is away."""
        connection = await asyncpg.connect(self.dsn, timeout=10)
        try:
            yield connection
        finally:
            with suppress(Exception):
                await connection.close(timeout=5)

    def spare_daemon(self, number: int, **more: object) -> Daemon:
        """Another daemon for the same database, not started, with a DATA_DIR of its own."""
        folder = self.folder / f"second-{number}"
        folder.mkdir()
        environ = {k: v for k, v in self.daemon.environ.items() if k not in _OWN}
        return Daemon(folder, **environ, **more)

    def write_settings(self) -> None:
        """Write the file that the daemon reads again on SIGHUP."""
        text = f"SUPPORTED_SYMBOLS={','.join(self.symbols)}\n"
        (self.folder / "settings.env").write_text(text)

    async def begin_calm(self) -> None:
        """Note that nothing is broken from now on; what is printed is received."""
        self.calm_from_us = (await self.exchange.state())["now_us"] + _MARGIN_US

    async def end_calm(self) -> None:
        """Note that something may be broken from now on."""
        now_us = (await self.exchange.state())["now_us"]
        self.calm.append((self.calm_from_us, now_us - _MARGIN_US))

    def must_be_stored(self, symbol: str, market: Market) -> bool:
        """Tell whether a symbol has traded for sure while the daemon captured it."""
        return symbol != QUIET or any(
            market.next_id(symbol, end_us) > market.next_id(symbol, begin_us)
            for begin_us, end_us in self.calm
            if begin_us < end_us
        )

    async def note_first_ids(self) -> None:
        """Note the first stored id of symbols that were not stored before."""
        async with self.database() as connection:
            rows = await connection.fetch(
                "SELECT symbol, min(first_id) AS id FROM trade_coverage GROUP BY symbol"
            )
        for row in rows:
            self.first_ids.setdefault(row["symbol"], row["id"])


_OWN = ("DATA_DIR", "HTTP_PORT", "LD_PRELOAD", "TORTURE_CLOCK")


@asynccontextmanager
async def arena(
    folder: Path, random: Random, rate: int, lines: tuple[int, ...], absent: bool
) -> AsyncIterator[Arena]:
    """Set everything up and wait until each busy symbol is stored."""
    async with AsyncExitStack() as stack:
        skipped: dict[str, str] = {}
        disk = _mount(folder / "disk")
        if disk is None:
            skipped["disk_full"] = "this machine does not let us mount a small file system"
        else:
            stack.callback(_unmount, disk)
        home = disk or folder
        postgres = EmbeddedPostgres(home, settings=_SETTINGS)
        dsn = await postgres.start()
        stack.push_async_callback(postgres.stop)
        link = Link(folder / "link", dsn)
        await link.open()
        stack.push_async_callback(link.close)
        feed_lines = random.choice(lines)
        exchanges = await _exchanges(stack, random, rate, absent, random.choice((1, feed_lines)))
        shim = clock_shim(folder)
        if shim is None:
            skipped["clock_step"] = "there is no C compiler"
        daemon = Daemon(
            folder,
            DATA_DIR=home / "data",
            DATABASE_URL=link.dsn,
            BINANCE_WEBSOCKET_URL=",".join(exchange.ws for exchange in exchanges),
            BINANCE_REST_URL=exchanges[0].rest,
            BINANCE_DUMP_URL=exchanges[0].rest,
            SETTINGS_FILE=folder / "settings.env",
            FEED_LINES=feed_lines,
            CONNECTION_MAX_AGE=random.choice(("23h", "23h", "20s")),
            RING_CAPACITY=4096,
            LOG_LEVEL="info",
            **(shim.environ if shim else {}),
        )
        one = Arena(folder, exchanges, postgres, link, daemon, shim, disk, skipped=skipped)
        one.write_settings()
        stack.push_async_callback(_end, daemon)
        await daemon.start()
        await daemon.until(lambda health: health["counts"]["trades_stored"] > 0)
        await _until_all_stored(one)
        await one.begin_calm()
        yield one


async def _exchanges(
    stack: AsyncExitStack, random: Random, rate: int, absent: bool, hosts: int
) -> list[SimulatedExchange]:
    """Start the venue's hosts, all with one market."""
    epoch_s = clock.wall_ns() // 10**9 - 120
    options: dict[str, Any] = {
        "symbols": ",".join((*SYMBOLS, NEWCOMER)),
        "rate": rate,
        "seed": random.randrange(10**6),
        "epoch": epoch_s,
        "ping_interval": 2,
        "pong_timeout": 8,
        "connect_limit": 100_000,
        "absent_every": random.choice((0, 4999)) if absent else 0,
    }
    return [await stack.enter_async_context(simulated_exchange(**options)) for _ in range(hosts)]


async def _until_all_stored(one: Arena) -> None:
    busy = set(SYMBOLS) - {QUIET}
    async with asyncio.timeout(60):
        while not busy <= one.first_ids.keys():
            await asyncio.sleep(0.1)
            await one.note_first_ids()


async def _end(daemon: Daemon) -> None:
    if daemon.process is not None and daemon.process.returncode is None:
        daemon.process.send_signal(signal.SIGTERM)
        try:
            await daemon.ended()
        except TimeoutError:
            await daemon.kill()


def _mount(folder: Path) -> Path | None:
    """Mount a small tmpfs, when root may."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        return None
    folder.mkdir()
    options = f"size={DISK_BYTES},mode=711"
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=30)
    if done.returncode:
        folder.rmdir()
        return None
    return folder


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True, timeout=30)


def describe(arena: Arena) -> dict[str, Any]:
    """Return what tells this arena from others."""
    market = arena.exchange.truth
    return {
        "feed_lines": arena.daemon.environ["FEED_LINES"],
        "connection_max_age": arena.daemon.environ["CONNECTION_MAX_AGE"],
        "hosts": len(arena.exchanges),
        "absent_every": market.absences.every,
        "market_seed": market.seed,
    }
