"""The units under a real systemd, in a machine that is booted for the test."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from tests.daemon import free_port
from tests.fakes import SimulatedExchange, simulated_exchange
from tests.levels.server import FAST
from tests.machine import Machine, UnavailableError, booted
from tests.test_daemon import assert_exact, finished
from tradecore.store.embedded import EmbeddedPostgres

pytestmark = pytest.mark.timeout(400)  # the first one may have to unpack Debian

INSTALLER = Path(__file__).parents[1] / "deploy" / "systemd" / "install.sh"
PASSWORD = "hunter2-hunter2"
SYMBOLS = "BTCUSDT,ETHUSDT,BNBUSDT,SOLUSDT,ADAUSDT,XRPUSDT,DOGEUSDT,PEPEUSDT"

STUCK = """
import asyncio, sys
from pathlib import Path
from tradecore import cli, watchdog
from tradecore.store.store import Store

async def hang(*_, **__):
    await asyncio.Event().wait()

mark = Path("was_stuck")
if not mark.exists():
    mark.touch()
    watchdog.WRITER_LIMIT_S = 1.0
    Store.write_trades = hang
sys.exit(cli.main(["run"]))
"""
"""The daemon, with a bug that shows at the first start only: a write that never ends."""


@pytest.fixture
async def database(short_dir: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A server that users of the machine reach, at /srv/test/postgres."""
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    (short_dir / "postgres").chmod(0o711)
    (short_dir / "postgres" / ".s.PGSQL.5432").chmod(0o777)
    yield server
    await server.stop()


@pytest.fixture
def machine(short_dir: Path) -> Iterator[Machine]:
    try:
        with booted({short_dir: "/srv/test"}) as one:
            yield one
    except UnavailableError as error:
        pytest.skip(str(error))


def install(machine: Machine, instances: dict[str, str], **settings: Any) -> None:
    """Do what the installer and the operator do; `instances` are units with their settings file."""
    subprocess.run(
        ["sh", INSTALLER, "units"],
        env={**os.environ, "DESTDIR": str(machine.root)},
        check=True,
        capture_output=True,
    )
    shared = "".join(f"{name}={value}\n" for name, value in settings.items())
    machine.write("etc/tradecore/tradecore.conf", shared)
    for name, text in instances.items():
        machine.write(f"etc/tradecore/{name}.conf", text)
    dsn = f"postgresql://tradecore:{PASSWORD}@/tradecore?host=/srv/test/postgres"
    machine.write("etc/tradecore/credentials/database_url", dsn, 0o600)
    # Restarts and the watchdog in the seconds of a test.
    drop_in = "[Service]\nWatchdogSec=3\nRestartSec=100ms\n"
    for folder in ("tradecore.service.d", "tradecore@.service.d"):
        machine.write(f"etc/systemd/system/{folder}/test.conf", drop_in)
    machine.run("systemctl", "daemon-reload")


def address(port: int) -> dict[str, str]:
    return {
        "BINANCE_WEBSOCKET_URL": f"ws://127.0.0.1:{port}",
        "BINANCE_REST_URL": f"http://127.0.0.1:{port}",
        "BATCH_TIMEOUT": "50",
        "RECONNECT_DELAY": "50",
        "MAX_RECONNECT_DELAY": "500",
        "RING_CAPACITY": "65536",
    }


async def ask(port: int, path: str = "/health") -> dict[str, Any]:
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as response,
        ):
            return dict(json.loads(await response.read()))
    except aiohttp.ClientError:
        return {}


async def until_stored(dsn: str, exchange: SimulatedExchange) -> dict[str, tuple[int, int]]:
    """Wait until the table has all that the exchange has sent, which then ends."""
    sent = await finished(exchange)
    total = sum(last - first + 1 for first, last in sent.values())
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(60):
            while await connection.fetchval("SELECT count(*) FROM raw_trades") < total:
                await asyncio.sleep(0.1)
    finally:
        await connection.close()
    return sent


def active(state: dict[str, str]) -> bool:
    return state["ActiveState"] == "active"


async def test_the_service_from_its_start_to_its_end(
    machine: Machine, database: EmbeddedPostgres
) -> None:
    venue_port, http_port = free_port(), free_port()
    install(
        machine, {}, **address(venue_port), HTTP_PORT=http_port, SUPPORTED_SYMBOLS="BTCUSDT,ETHUSDT"
    )
    unit = "tradecore.service"
    machine.run("systemctl", "start", "--no-block", unit)
    state = await machine.until(unit, lambda now: "no trade comes in" in now["StatusText"])
    assert state["ActiveState"] == "activating", "the venue is away"
    async with simulated_exchange(
        port=venue_port, rate=1000, count=10_000, symbols="BTCUSDT,ETHUSDT"
    ) as exchange:
        state = await machine.until(unit, active)
        assert (await ask(http_port, "/ready"))["ready"]
        assert (await ask(http_port))["database"]["embedded"] is False, "the credential is read"
        pid = state["MainPID"]
        for place in ("environ", "cmdline"):
            assert PASSWORD.encode() not in (machine.root / "proc" / pid / place).read_bytes()
        assert PASSWORD not in machine.journal(unit)
        assert "trades/s" in state["StatusText"]
        assert 61184 <= int(state["UID"]) <= 65519, "a user that is there while the service is"
        ring = (machine.root / "var/lib/private/tradecore/ring").stat()
        assert (ring.st_uid, ring.st_mode & 0o777) == (int(state["UID"]), 0o600)
        folder = (machine.root / "var/lib/private/tradecore").stat()
        assert (folder.st_uid, folder.st_mode & 0o777) == (int(state["UID"]), 0o700)
        assert "CapEff:\t0000000000000000" in (machine.root / "proc" / pid / "status").read_text()

        conf = (machine.root / "etc/tradecore/tradecore.conf").read_text()
        machine.write("etc/tradecore/tradecore.conf", conf.replace("BTCUSDT,", ""))
        machine.run("systemctl", "reload", unit)
        await machine.until(unit, lambda now: "streams 3/3" in now["StatusText"])
        machine.write("etc/tradecore/tradecore.conf", conf)
        machine.run("systemctl", "reload", unit)
        await machine.until(unit, lambda now: "streams 6/6" in now["StatusText"])

        assert state["MemoryMax"] == str(1 << 30)
        assert (machine.root / "proc" / pid / "oom_score_adj").read_text() == "200\n"
        # Whoever can write into its folder cannot choose what it runs.
        machine.write("var/lib/private/tradecore/asyncio.py", "raise SystemExit(9)")

        # A hang: no sign of life, killed, started anew, and what it missed is filled.
        machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", unit)
        state = await machine.until(unit, lambda now: now["NRestarts"] == "1" and active(now))
        assert state["MainPID"] != pid
        journal = machine.journal(unit)
        assert "Watchdog timeout" in journal
        assert "Fatal Python error: Aborted" in journal, "the journal tells where it was"
        warnings = machine.journal(unit, "--priority=warning")
        assert "connection to the venue ended" in warnings, "of the start without a venue"
        assert '"msg":"capturing"' in journal and '"msg":"capturing"' not in warnings

        sent = await until_stored(database.dsn, exchange)
        machine.run("systemctl", "stop", unit)
        state = machine.show(unit)
        assert (state["Result"], state["ExecMainStatus"]) == ("success", "0")
        assert '"rows_left":0' in machine.journal(unit), "the ring was drained"
        await assert_exact(database.dsn, exchange, sent)


async def test_a_capture_that_is_stuck_is_killed_and_started_anew(
    machine: Machine, database: EmbeddedPostgres
) -> None:
    venue_port, http_port = free_port(), free_port()
    install(machine, {}, **address(venue_port), HTTP_PORT=http_port, SUPPORTED_SYMBOLS="BTCUSDT")
    unit = "tradecore.service"
    machine.write("srv/stuck.py", STUCK)
    machine.write(
        f"etc/systemd/system/{unit}.d/stuck.conf",
        "[Service]\nExecStart=\nExecStart=/opt/tradecore/bin/python /srv/stuck.py\n",
    )
    machine.run("systemctl", "daemon-reload")
    async with simulated_exchange(
        port=venue_port, rate=500, count=5000, symbols="BTCUSDT"
    ) as exchange:
        machine.run("systemctl", "start", unit)
        state = await machine.until(unit, lambda now: now["NRestarts"] == "1" and active(now))
        journal = machine.journal(unit)
        assert "the capture is stuck" in journal
        assert "Watchdog timeout" in journal
        sent = await until_stored(database.dsn, exchange)
        assert active(state)
        # A command of the operator, with what the service has: its folder and its database.
        found = machine.run("/usr/local/bin/tradecore", "check", check=False)
        assert f"is used by a running tradecore (process {state['MainPID']})" in found, found
        assert "database tradecore, role tradecore" in found, found
        assert "holes" in machine.run("/usr/local/bin/tradecore", "verify")
        files = machine.root / "var/lib/private/tradecore"
        assert {path.stat().st_uid for path in files.iterdir()} == {int(state["UID"])}
        machine.run("systemctl", "stop", unit)
        await assert_exact(database.dsn, exchange, sent)


async def test_an_own_database_is_shared_with_commands_and_stays_closed(machine: Machine) -> None:
    """root's commands use the server of the service, and open nothing for one of their own."""
    # In the name service as libnss-systemd would have it, which this machine has not.
    with (machine.root / "etc/passwd").open("a") as users:
        users.write("tradecore:x:64709:64709::/:/usr/sbin/nologin\n")
    with (machine.root / "etc/group").open("a") as groups:
        groups.write("tradecore:x:64709:\n")
    http_port, unit, command = free_port(), "tradecore.service", "/usr/local/bin/tradecore"
    async with simulated_exchange(rate=500, symbols="BTCUSDT") as exchange:
        install(
            machine,
            {},
            **address(exchange.port),
            HTTP_PORT=http_port,
            SUPPORTED_SYMBOLS="BTCUSDT",
        )
        (machine.root / "etc/tradecore/credentials/database_url").unlink()
        machine.run("systemctl", "start", unit)
        async with asyncio.timeout(60):
            while not (await ask(http_port))["counts"]["trades_stored"]:
                await asyncio.sleep(0.1)
        assert "own PostgreSQL" in machine.run(command, "check", check=False)
        assert '"holes":0' in machine.run(command, "verify")
        machine.run("systemctl", "restart", unit)
        machine.run("systemctl", "stop", unit)
        said = machine.run(command, "verify", check=False)
        assert "start that (systemctl start tradecore)" in said, said
        assert machine.run("stat", "--format=%a", "/var/lib/private").strip() == "700"
        machine.run("systemctl", "start", unit)
        machine.run("systemctl", "stop", unit)


async def test_two_instances_share_the_symbols(
    machine: Machine, database: EmbeddedPostgres
) -> None:
    ports = {"a": free_port(), "b": free_port()}
    async with simulated_exchange(rate=500, symbols=SYMBOLS) as exchange:
        install(
            machine,
            {name: f"HTTP_PORT={port}\n" for name, port in ports.items()},
            **address(exchange.port),
            SUPPORTED_SYMBOLS=SYMBOLS,
            SHARDS=8,
        )
        machine.run("systemctl", "start", "tradecore@a", "tradecore@b")

        async def held() -> dict[str, int]:
            answers = {name: await ask(port, "/health/binance") for name, port in ports.items()}
            return {name: answer["shards"]["held"] for name, answer in answers.items() if answer}

        async def until_held(want: dict[str, int]) -> None:
            async with asyncio.timeout(60):
                while await held() != want:
                    await asyncio.sleep(0.1)

        await until_held({"a": 4, "b": 4})
        connection = await asyncpg.connect(database.dsn)
        nodes = {
            node.rpartition("-")[2] for (node,) in await connection.fetch("SELECT name FROM nodes")
        }
        await connection.close()
        assert nodes == {"a", "b"}
        found = machine.run("env", "INSTANCE=a", "/usr/local/bin/tradecore", "check", check=False)
        assert "DATA_DIR /var/lib/tradecore-a is used by a running tradecore" in found, found
        for name in ports:
            path = f"/var/lib/private/tradecore-{name}"
            assert machine.run("stat", "--format=%a", path).strip() == "700"
        machine.run("systemctl", "stop", "tradecore@a")
        await until_held({"b": 8})
        machine.run("systemctl", "stop", "tradecore@b")
        for name in ports:
            assert machine.show(f"tradecore@{name}")["Result"] == "success"
