"""Where the time of a trade goes, end to end and saturated: nanoseconds of CPU by part.

    python bench/bench_profile.py        needs perf (apt-get install linux-perf) and root, mostly

perf samples the daemon from outside while exchange, daemon and PostgreSQL share the machine; each
sample belongs to the part that its leaf, or its kernel path, stands for. What PostgreSQL takes is
read from the clocks of its processes. What a part costs by itself (by removal) is in the tables of
bench_receive.py, bench_parse.py, bench_encode.py and bench_flush.py.
"""

import argparse
import asyncio
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import asyncpg
from _database import database, server
from _harness import fingerprint, print_machine, print_rows
from _processes import daemon, exchange
from _truth import compare
from bench_e2e import LIST, STORED, environ, saturated_by, until_stored

TRADES = 3_000_000
FROM, TO = 0.2, 0.9  # of the trades: neither start nor end
FREQUENCY_HZ = 4000
LIMIT_S = 30.0

KERNEL = (
    ("read from the socket", r"recvmsg|sock_read|ksys_read"),
    ("send to PostgreSQL", r"sendmsg|sock_write|ksys_write|__sys_sendto"),
    ("wait for what comes", r"epoll"),
    ("page faults", r"page_fault|exc_page"),
)
LEAVES = (
    ("frames (picows)", r"/picows"),
    ("event loop (uvloop)", r"/uvloop"),
    ("parse", r"_fastparse|_slowparse"),
    ("capture: order, ring slot, checksum, counts", r"capture\.|_listener\.|_ring\.|sequence\."),
    ("look at the batch, histograms", r"_walks\.|numpy"),
    ("encode", r"_copyenc\."),
    ("asyncpg", r"asyncpg"),
    ("copies (libc)", r"libc\.so"),
    ("Python: flusher, sink, ledger, asyncio", r"libpython|python3"),
)


def part_of(chain: list[tuple[str, str]]) -> str:
    """Return the part that a sample, (symbol, file) from the leaf on, belongs to."""
    symbol_path = " ".join(symbol for symbol, file in chain if "kernel" in file)
    leaf_file = chain[0][1]
    if "kernel" in leaf_file:
        return next((name for name, p in KERNEL if re.search(p, symbol_path)), "kernel, the rest")
    return next((name for name, p in LEAVES if re.search(p, leaf_file)), "other libraries")


def parts_of(script: str) -> Counter[str]:
    """Return how many samples of `perf script` each part has."""
    found: Counter[str] = Counter()
    for sample in script.split("\n\n"):
        chain = re.findall(r"^\s+[0-9a-f]+ (.+) \((.+)\)$", sample, re.M)
        if chain:
            found[part_of(chain)] += 1
    return found


def server_pids(data_dir: str) -> dict[int, str]:
    """Return the processes of the server with this data directory, and what they are."""
    first = int(Path(data_dir, "postmaster.pid").read_text().split()[0])
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            title = entry.joinpath("cmdline").read_text().rstrip("\0")
        except OSError:
            continue
        if parent == first:
            found[int(entry.name)] = title.partition("postgres: ")[2] or title
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far (Linux: the clock of another process)."""
    return time.clock_gettime((~pid << 3) | 2)


def used_since(before: dict[int, float], titles: dict[int, str]) -> Counter[str]:
    """Return the CPU nanoseconds of each kind of process since `before`; the dead are left out."""
    used: Counter[str] = Counter()
    for pid, began_s in before.items():
        with suppress(OSError):
            title = titles[pid].removesuffix(" idle").removesuffix(" COPY")
            used[title] += round((cpu_s(pid) - began_s) * 1e9)
    return used


def read_samples(file: Path) -> str:
    """Return the samples as text: an empty line between two, a line for each frame."""
    command = ("perf", "script", "-i", file, "-F", "ip,sym,dso")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def profile(server_dsn: str, file: Path) -> tuple[float, dict[str, float]]:
    """Sample into `file`; return the CPU of the daemon and of each kind of process of PostgreSQL,
    in nanoseconds a trade."""
    async with (
        database(server_dsn, "bench_profile") as dsn,
        exchange("--symbols", LIST, *saturated_by(TRADES)) as (venue, ws),
        daemon(environ(dsn, ws, venue.http, "trade")) as running,
    ):
        pid, connection = running.process.pid, await asyncpg.connect(dsn)
        try:
            await until_stored(connection, int(FROM * TRADES))
            titles = server_pids(await connection.fetchval("SHOW data_directory"))
            perf = await asyncio.create_subprocess_exec(
                *("perf", "record", "-q", "-g", "-F", str(FREQUENCY_HZ)),
                *("-o", str(file), "-p", str(pid)),
            )
            first, own_s = await connection.fetchval(STORED), cpu_s(pid)
            theirs = {one: cpu_s(one) for one in titles}
            await until_stored(connection, int(TO * TRADES))
            count = await connection.fetchval(STORED) - first
            own_s, used = cpu_s(pid) - own_s, used_since(theirs, titles)
            perf.send_signal(signal.SIGINT)
            await asyncio.wait_for(perf.wait(), LIMIT_S)
            await until_stored(connection, TRADES)
            assert await compare(connection, venue) == TRADES
        finally:
            await connection.close()
    return own_s * 1e9 / count, {title: ns / count for title, ns in used.items()}


async def main() -> None:
    """Measure and print."""
    if shutil.which("perf") is None:
        raise SystemExit("perf is not installed (apt-get install linux-perf)")
    with tempfile.TemporaryDirectory(prefix="tc-bench-") as folder:
        file = Path(folder) / "perf.data"
        async with server() as dsn:
            own_ns, theirs = await profile(dsn, file)
        parts = parts_of(await asyncio.to_thread(read_samples, file))
    total = sum(parts.values())
    rows = [("part of the daemon", "ns a trade", "share")]
    for name, count in parts.most_common():
        rows.append((name, f"{own_ns * count / total:.1f}", f"{100 * count / total:.0f} %"))
    rows.append(("all", f"{own_ns:.0f}", f"{total:,} samples"))
    print_rows(rows, right={1, 2})
    print()
    others = [(name, f"{ns:,.0f}") for name, ns in sorted(theirs.items(), key=itemgetter(1))]
    others = [row for row in reversed(others) if row[1] != "0"]
    print_rows([("process of PostgreSQL", "ns a trade"), *others], right={1})
    print_machine(fingerprint())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    asyncio.run(main())
