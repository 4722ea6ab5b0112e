"""`make demo`: the daemon against the simulated exchange for half a minute, then the proof.

The exchange sends real-looking frames with some of the faults of real life: doubled trades, junk,
messages in fragments, keys in another order. Every 499th trade of a symbol it does not send at all:
the daemon finds the hole and fetches the trade over REST. At the end every trade that was printed
is looked up in the table and compared in every column. Exit code 0 = everything equal.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import asyncpg

from tradecore.simulate.market import Market
from tradecore.simulate.proof import Proof, prove
from tradecore.store.embedded import EmbeddedPostgres

FAULTS = ("--duplicate-every", "97", "--garbage-every", "501", "--fragment-every", "1499",
          "--shuffle-keys-every", "203", "--drop-every", "499")  # fmt: skip
START_LIMIT_S = 60.0
STOP_LIMIT_S = 60.0


async def start(*arguments: str, environ: dict[str, str] | None = None) -> Any:
    """Start one of our own programs."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **(environ or {})},
    )


def get(url: str) -> Any:
    """Return the JSON of a GET, whatever its status."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return json.load(error)
    except OSError:
        return None


async def show_progress(daemon: Any, exchange: dict[str, Any], http: str, total: int) -> None:
    """Draw printed and stored trades until all that the exchange printed is stored."""
    shown = 0.0
    while True:
        if daemon.returncode is not None:
            raise SystemExit(f"the daemon ended with exit code {daemon.returncode}")
        state = await asyncio.to_thread(get, f"{exchange['rest']}/sim/state")
        health = await asyncio.to_thread(get, f"{http}/health")
        sent = state["trades"] if state else 0
        counts = (
            health["counts"] if health else {"trades_stored": 0, "trades_filled": 0, "holes": 0}
        )
        stored = counts["trades_stored"] + counts["trades_filled"]
        now = asyncio.get_running_loop().time()
        if sys.stderr.isatty() or now - shown > 5:
            shown = now
            bar = "#" * (40 * stored // total)
            line = (
                f"[{bar:<40}] printed {sent:>7,}  stored {stored:>7,}  holes {counts['holes']:>3}"
            )
            print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        if state and state["done"] and stored >= sent:
            print(file=sys.stderr)
            return
        await asyncio.sleep(0.25)


def report(proofs: dict[str, Proof], health: dict[str, Any], state: dict[str, Any]) -> bool:
    """Print the proof; return whether it holds."""
    print(f"\n{'symbol':<16}{'printed':>10}{'stored':>10}{'equal':>10}")
    for symbol, proof in proofs.items():
        print(f"{symbol:<16}{proof.sent:>10,}{proof.stored:>10,}{proof.equal:>10,}")
        for difference in proof.differences:
            print("   ", difference)
    sent, stored, equal = (
        sum(getattr(proof, name) for proof in proofs.values())
        for name in ("sent", "stored", "equal")
    )
    print(f"{'all':<16}{sent:>10,}{stored:>10,}{equal:>10,}")
    faults = {name: n for name, n in state["counts"].items() if n and " " not in name}
    counts = health["counts"]
    print(
        "\nFaults in what the exchange sent: "
        + ", ".join(f"{name} {n:,}" for name, n in sorted(faults.items()))
    )
    print(
        f"The daemon refused {counts['frames_refused']:,} frames and dropped "
        f"{counts['trades_duplicate']:,} duplicates. {counts['trades_filled']:,} trades that the "
        "exchange did not send were missed, and fetched over REST."
    )
    holds = all(proof.holds for proof in proofs.values())
    print(
        f"\nPROOF: {sent:,} trades printed, {stored:,} stored, {equal:,} equal row by row. "
        + ("Nothing missing, nothing doubled." if holds else "THEY DIFFER.")
    )
    return holds


async def demo(seconds: float, rate: int) -> bool:
    """Run exchange and daemon, stop both, compare."""
    folder = Path(tempfile.mkdtemp(prefix="tradecore-demo-"))
    total = int(seconds * rate)
    exchange_process = await start(
        "tradecore.simulate", "--rate", str(rate), "--count", str(total), *FAULTS
    )
    daemon = None
    try:
        line = await asyncio.wait_for(exchange_process.stdout.readline(), START_LIMIT_S)
        exchange = json.loads(line)
        print(f"simulated exchange at {exchange['ws']}, {rate:,} trades/s", file=sys.stderr)
        with_port = free_port()
        daemon = await start(
            "tradecore",
            "run",
            environ={
                "DATA_DIR": str(folder),
                "BINANCE_WEBSOCKET_URL": exchange["ws"],
                "BINANCE_REST_URL": exchange["rest"],
                "SUPPORTED_SYMBOLS": ",".join(exchange["market"]["symbols"]),
                "HTTP_PORT": str(with_port),
                "LOG_LEVEL": "error",
            },
        )
        http = f"http://127.0.0.1:{with_port}"
        await asyncio.wait_for(
            show_progress(daemon, exchange, http, total), START_LIMIT_S + 3 * seconds
        )
        health = await asyncio.to_thread(get, f"{http}/health")
        state = await asyncio.to_thread(get, f"{exchange['rest']}/sim/state")
        daemon.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(daemon.wait(), STOP_LIMIT_S)
        if code != 0:
            raise SystemExit(f"the daemon ended with exit code {code}")
        sent = {s: (one["first_id"], one["last_id"]) for s, one in state["symbols"].items()}
        return report(await compare(folder, Market(**exchange["market"]), sent), health, state)
    finally:
        for process in (daemon, exchange_process):
            if process is not None and process.returncode is None:
                process.terminate()
                await process.wait()
        shutil.rmtree(folder, ignore_errors=True)


async def compare(
    folder: Path, market: Market, sent: dict[str, tuple[int, int]]
) -> dict[str, Proof]:
    """Start the stopped database once more and hold its table against the market."""
    postgres = EmbeddedPostgres(folder)
    conn = await asyncpg.connect(await postgres.start())
    try:
        return await prove(conn, market, sent)
    finally:
        await conn.close()
        await postgres.stop()


def free_port() -> int:
    """Return a port of the loopback that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=int, default=2000, help="trades per second")
    options = parser.parse_args()
    return 0 if asyncio.run(demo(options.seconds, options.rate)) else 1


if __name__ == "__main__":
    sys.exit(main())
