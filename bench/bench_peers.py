"""tradecore beside what a user would write or pick instead: the same frames, the same PostgreSQL.

Each of them gets trades as fast as it reads them, on the same two cores as the exchange and the
database, in turns. It is measured from outside, all in the same way: from the receive time of the
first stored trade to the last commit, so without the start. After each run every row is compared
with what was sent. `make peers` gets what is not tradecore's own; what is missing is left out, and
said.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import asyncpg
from _database import database, server
from _harness import (
    HERE,
    ROOT,
    Figure,
    append_json,
    arguments,
    figure,
    fingerprint,
    print_machine,
    print_rows,
    with_ratios,
)
from _processes import Running, cpu_clock, daemon, exchange
from bench_e2e import make_partitions, saturated_by

from tradecore.simulate.market import Market
from tradecore.simulate.proof import Proof, prove
from tradecore.simulate.words import Trade

REPEATS = 3
CORES = 2
SYMBOLS = "BTCUSDT,ETHUSDT,SOLUSDT,XRPUSDT,DOGEUSDT,PEPEUSDT,LUNCUSDT"
"""Seven that trade, of all sizes: one quantity in 512 of the last is 92233720368.54775807, the
largest that the venue's engine holds."""
STREAMS = "/".join(f"{symbol.lower()}@trade" for symbol in SYMBOLS.split(","))

PROGRAMS = HERE / "peers"
INSTALLED = ROOT / ".venv" / "peers"
LOOK_S = 0.25
SETTLED_S = 3.0
"""A table that has not grown for so long, when all is sent, gets no more rows."""
LIMIT_S = 120.0

AS_OURS = """
    DROP TABLE raw_trades;
    CREATE VIEW raw_trades AS SELECT timestamp AT TIME ZONE 'UTC' AS timestamp,
        replace(symbol, '-', '') AS symbol, price, amount AS quantity, upper(side) AS side,
        trade_id::bigint AS trade_id FROM trades
"""
"""cryptofeed's own table, as ours would have its rows."""
SPAN = """
    SELECT extract(epoch FROM min({received}))::float8,
        (SELECT extract(epoch FROM max(pg_xact_commit_timestamp(xid)))::float8
         FROM (SELECT DISTINCT xmin AS xid FROM {table}) AS transactions)
    FROM {table}
"""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One of those that are compared."""

    name: str
    trades: int
    """So many are sent to it: a slow one need not run for a minute."""
    program: str = ""
    """In bench/peers; "" is the daemon."""
    python: Path = Path(sys.executable)
    options: tuple[str, ...] = ()
    own_table: bool = False
    """cryptofeed's: its own table, times in milliseconds."""


TRADECORE = Peer(name="tradecore", trades=600_000)
BARE = Peer(name="bare prototype: parse, encode, COPY", trades=600_000, program="bare.py")
WITH_PICOWS = Peer(
    name="picows, orjson, Decimal, copy_records_to_table",
    trades=200_000,
    program="with_picows.py",
    python=INSTALLED / "scripts" / "bin" / "python",
)
WITH_WEBSOCKETS = replace(
    WITH_PICOWS, name="websockets, the rest the same", program="with_websockets.py"
)
CRYPTOFEED_2 = Peer(
    name="cryptofeed 2.4.1 as shipped",
    trades=80_000,
    program="with_cryptofeed.py",
    python=INSTALLED / "cryptofeed-2.4.1" / "bin" / "python",
    own_table=True,
)
CRYPTOFEED_3 = replace(
    CRYPTOFEED_2,
    name="cryptofeed 3.0.1 as shipped",
    python=INSTALLED / "cryptofeed-3.0.1" / "bin" / "python",
)
BLOCKING = replace(
    CRYPTOFEED_3, name="cryptofeed 3.0.1, its queue made to wait", options=("--block",)
)
PEERS = (TRADECORE, BARE, WITH_PICOWS, WITH_WEBSOCKETS, CRYPTOFEED_2, CRYPTOFEED_3, BLOCKING)
TARGETS = {WITH_PICOWS: (3.0, 12.0)}
"""How many times the rate, and less CPU, tradecore is to have at least."""


@dataclass
class Runs:
    """What came out, one entry a run."""

    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    peaks_mib: list[float] = field(default_factory=list)
    proof: Proof = field(default_factory=Proof)
    """The sums of all runs."""


class MillisecondMarket(Market):
    """The market as a client sees it that does not ask for microseconds."""

    def trades(self, symbol: str, first_id: int, end_id: int) -> list[Trade]:
        found = super().trades(symbol, first_id, end_id)
        return [trade._replace(trade_us=trade.trade_us // 1000 * 1000) for trade in found]


@asynccontextmanager
async def started(peer: Peer, venue: Running, ws: str, dsn: str) -> AsyncIterator[Running]:
    """Yield the peer as a process; what it says on stderr is shown when it fails."""
    if not peer.program:
        environ = {
            "DATABASE_URL": dsn,
            "BINANCE_WEBSOCKET_URL": ws,
            "BINANCE_REST_URL": venue.http,
            "SUPPORTED_SYMBOLS": SYMBOLS,
            "STREAMS": "trade",
        }
        async with daemon(environ) as running:
            yield running
        return
    unit = "" if peer.own_table else "&timeUnit=MICROSECOND"
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder, tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(peer.python, PROGRAMS / peer.program, f"{ws}/stream?streams={STREAMS}{unit}", dsn),
            *peer.options,
            # A thread of OpenBLAS would spin for a while after the import of numpy.
            env={"PATH": os.environ["PATH"], "HOME": folder, "OPENBLAS_NUM_THREADS": "1"},
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield Running(process, "")
            if process.returncode is not None:
                raise RuntimeError(f"{peer.name} ended with {process.returncode}")
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:].decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def measure_once(peer: Peer, server_dsn: str, runs: Runs) -> None:
    """Let a peer store its trades in a new database, and add what came out to `runs`."""
    options, table, received = list(saturated_by(peer.trades)), "raw_trades", "received_at"
    if peer.own_table:
        options.remove("--prerender-micro")
        table, received = "trades", "receipt_timestamp"
    async with (
        database(server_dsn, "bench_peers") as dsn,
        exchange("--symbols", SYMBOLS, *options) as (venue, ws),
    ):
        connection = await asyncpg.connect(dsn)
        try:
            if peer.program and not peer.own_table:
                today = venue.ready["epoch_us"] // 86_400_000_000
                await make_partitions(connection, [today, today + 1])
            async with started(peer, venue, ws, dsn) as running:
                async with cpu_clock(running) as cpu:
                    stored = await settled(connection, table, venue, peer.trades)
                runs.peaks_mib.append(running.memory_mib("VmHWM"))
            begin, end = await connection.fetchrow(SPAN.format(table=table, received=received))
            runs.rates.append(stored / (end - begin))
            runs.cpu_us.append(cpu.between(begin, end) * 1e6 / stored)
            if peer.own_table:
                await connection.execute(AS_OURS)
            await add_proof(peer, connection, venue, runs.proof)
        finally:
            await connection.close()


async def settled(connection: asyncpg.Connection, table: str, venue: Running, trades: int) -> int:
    """Wait until all is sent, and as much of it stored as will be; return how many rows that is."""
    assert venue.process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        done = json.loads(await venue.process.stdout.readline())
        assert done == {"event": "done", "trades": trades}, done
        stored, changed = 0, time.monotonic()
        while stored < trades and time.monotonic() - changed < SETTLED_S:
            now = await connection.fetchval(f"SELECT count(*) FROM {table}")
            if now > stored:
                stored, changed = now, time.monotonic()
            await asyncio.sleep(LOOK_S)
    return stored


async def add_proof(
    peer: Peer, connection: asyncpg.Connection, venue: Running, total: Proof
) -> None:
    """Compare every row with what was sent, and add what was found."""
    state = json.loads(await venue.get("/sim/state"))
    market = (MillisecondMarket if peer.own_table else Market)(**state["market"])
    sent = {s: (ids["first_id"], ids["last_id"]) for s, ids in state["symbols"].items()}
    for proof in (await prove(connection, market, sent)).values():
        for name in ("sent", "stored", "equal", "missing", "doubled", "wrong"):
            setattr(total, name, getattr(total, name) + getattr(proof, name))
        for text in proof.differences:
            total.differ(text)


def figures_of(found: dict[Peer, Runs]) -> list[Figure]:
    """Return the figures; tradecore's have the targets."""
    figures = []
    for peer, runs in found.items():
        least = TARGETS.get(peer, (None, None))
        figures += [
            figure("peers: rate", peer.name, runs.rates, "trades/s"),
            figure("peers: own CPU", peer.name, runs.cpu_us, "us/trade"),
            figure("peers: peak RSS", peer.name, runs.peaks_mib, "MiB"),
        ]
        if peer is not TRADECORE and TRADECORE in found:
            own = found[TRADECORE]
            beside = f"{TRADECORE.name} beside {peer.name}"
            figures += [
                figure(
                    bench,
                    beside,
                    values,
                    unit,
                    baseline=peer.name,
                    ratio_least=ratio_least,
                )
                for bench, values, unit, ratio_least in (
                    ("peers: rate", own.rates, "trades/s", least[0]),
                    ("peers: own CPU", own.cpu_us, "us/trade", least[1]),
                )
            ]
    return with_ratios(figures)


def print_comparison(found: dict[Peer, Runs], figures: Sequence[Figure]) -> None:
    """Print one row a peer."""
    ratios = {(f.bench, f.baseline): f for f in figures if f.baseline}
    head = ("", "trades/s", "own CPU us/trade", "peak RSS MiB", "sent", "equal", "missing",
            "doubled", "wrong", "tradecore: rate", "CPU", "target")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for peer, runs in found.items():
        proof = runs.proof
        counts = (proof.sent, proof.equal, proof.missing, proof.doubled, proof.wrong)
        beside = [ratios.get((bench, peer.name)) for bench in ("peers: rate", "peers: own CPU")]
        target = ", ".join(
            f"{word} >= {f.ratio_least:g}x {'met' if f.met else 'MISSED'}"
            for word, f in zip(("rate", "CPU"), beside, strict=True)
            if f and f.ratio_least
        )
        rows.append(
            (
                peer.name,
                f"{median(runs.rates):,.0f}",
                f"{median(runs.cpu_us):.2f}",
                f"{median(runs.peaks_mib):.0f}",
                *(f"{count:,}" for count in counts),
                *(f"{f.ratio:.3g}x" if f and f.ratio else "" for f in beside),
                target,
            )
        )
    print_rows(rows, right=set(range(1, 11)))


async def measure(peers: Sequence[Peer], repeats: int) -> dict[Peer, Runs]:
    """Run all peers in turns, so that a slow moment of the machine meets all of them."""
    found = {peer: Runs() for peer in peers}
    async with server() as dsn:
        for number in range(repeats):
            for peer, runs in found.items():
                await measure_once(peer, dsn, runs)
                print(
                    f"{number + 1}/{repeats} {peer.name}: {runs.rates[-1]:,.0f} trades/s,"
                    f" {runs.cpu_us[-1]:.3f} us/trade, {runs.peaks_mib[-1]:.0f} MiB",
                    file=sys.stderr,
                )
    return found


def main() -> int:
    """Parse the command line, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", default="", help="those whose name contains one of a,b,...")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    peers = [p for p in PEERS if any(word in p.name for word in options.only.split(","))]
    for peer in [p for p in peers if not p.python.exists()]:
        print(f"left out, not installed (make peers): {peer.name}", file=sys.stderr)
        peers.remove(peer)
    subprocess.run([sys.executable, PROGRAMS / "build_bare.py"], check=True)
    found = asyncio.run(measure(peers, options.repeats))
    figures, machine = figures_of(found), fingerprint()
    print_comparison(found, figures)
    for peer, runs in found.items():
        for text in runs.proof.differences[:1]:
            print(f"{peer.name}, for example: {text}")
    print_machine(machine)
    append_json(figures, options.json, machine)
    tradecore_wrong = TRADECORE in found and not found[TRADECORE].proof.holds
    return int(tradecore_wrong or any(f.met is False for f in figures))


if __name__ == "__main__":
    raise SystemExit(main())
