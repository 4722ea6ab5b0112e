"""The image as an operator runs it: without rights, on a read-only root, in little memory.

It is built from the Dockerfile with hashed requirements; `make image` does that beforehand.
"""

import asyncio
import json
import subprocess
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

import aiohttp
import pytest
import scene

from tests import images
from tests.compose_file import make_secrets, read_compose
from tests.container import LOCKED, MEMORY_MIB, PIDS, STOP_LIMIT_S, ULIMITS, Container, container
from tests.fakes import SimulatedExchange, simulated_exchange
from tests.redis_desk import needs_redis, redis_server
from tests.torture.link import PORT, Link
from tradecore.simulate.proof import prove

pytestmark = pytest.mark.timeout(900)  # where the image is not built yet

SYMBOLS = "BTCUSDT,ETHUSDT,PEPEUSDT"
RATE = 5000
TRADES = 30_000


@pytest.fixture(scope="module")
def image() -> str:
    try:
        return images.build()
    except images.UnavailableError as error:
        pytest.skip(str(error))


class Store:
    """A database that the container reaches over a socket in a folder, by a DSN in a file."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.dsn = dsn
        self.folder = folder / "socket"
        self.link = Link(self.folder, dsn)

    async def open(self) -> None:
        await self.link.open()
        (self.folder / f".s.PGSQL.{PORT}").chmod(0o777)
        dsn_file = self.folder / "dsn"
        dsn_file.write_text(self.link.dsn.replace(str(self.folder), "/run/postgresql"))
        dsn_file.chmod(0o644)


@pytest.fixture
async def store(short_dir: Path, migrated_database: str) -> Any:
    store = Store(short_dir, migrated_database)
    await store.open()
    yield store
    await store.link.close()


def options(exchange: SimulatedExchange, store: Store) -> dict[str, Any]:
    return {
        "mounts": {store.folder: "/run/postgresql"},
        "DATABASE_URL_FILE": "/run/postgresql/dsn",
        "BINANCE_WEBSOCKET_URL": exchange.ws,
        "BINANCE_REST_URL": exchange.rest,
        "SUPPORTED_SYMBOLS": SYMBOLS,
    }


async def assert_all_stored(store: Store, exchange: SimulatedExchange) -> None:
    """Every trade that was printed is in the table, equal in every column, once."""
    state = await exchange.state()
    sent = {name: (one["first_id"], one["last_id"]) for name, one in state["symbols"].items()}
    async with scene.connected(store.dsn) as conn:
        proofs = await prove(conn, exchange.truth, sent)
    assert sum(proof.sent for proof in proofs.values()) == TRADES
    assert all(proof.holds for proof in proofs.values()), proofs


async def test_it_captures_in_its_cage_and_a_kill_loses_nothing(
    tmp_path: Path, image: str, store: Store
) -> None:
    """The last trades are in the ring only when it is killed: a new one has them by the volume."""
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=RATE, count=TRADES) as exchange,
        # No trade comes from the venue's history: what is stored at the end was in the ring.
        container(tmp_path, image, **options(exchange, store), BACKFILL_MAX_AGE="off") as one,
    ):
        await one.until_stored(TRADES // 3)
        assert await one.is_healthy()
        await assert_caged(one)
        store.link.stall()
        await one.until(lambda health: health["counts"]["trades_received"] >= TRADES)
        memory = await one.memory_bytes()
        assert memory["limit"] == MEMORY_MIB << 20
        assert memory["kills"] == 0
        assert memory["anonymous"] + memory["mapped"] < (MEMORY_MIB << 20) * 3 // 4, memory
        await one.kill()
        store.link.flow()
        store.link.cut()

        await one.start()
        await one.until(lambda health: health["ring"]["rows"] == 0 and health["database"])
        begin = time.monotonic()
        assert await one.terminate() == 0
        assert time.monotonic() - begin < STOP_LIMIT_S
        await assert_all_stored(store, exchange)
        scene.assert_readable(one)


async def assert_caged(one: Container) -> None:
    """Nobody in there has a right, or can write anywhere but on the volume."""
    status = await one.run("cat", "/proc/1/status")
    shown = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert shown["Uid"].split() == ["10001"] * 4
    assert {int(shown[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert shown["NoNewPrivs"] == "1"
    write = (
        "import pathlib\n"
        "for folder in ('/', '/tmp', '/opt/tradecore', '/etc', '/data'):\n"
        "    try:\n"
        "        pathlib.Path(folder, 'probe').touch()\n"
        "        print(folder)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    assert (await one.run("python", "-c", write)).split() == ["/data"]


async def test_a_stop_stores_what_waits(tmp_path: Path, image: str, store: Store) -> None:
    """SIGTERM comes while trades flow; all that came before it is in the table."""
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=RATE) as exchange,
        container(tmp_path, image, **options(exchange, store), BATCH_TIMEOUT=60_000) as one,
    ):
        await one.until_stored(RATE)
        assert await one.terminate() == 0
        await scene.assert_exact(store.dsn, exchange)


@needs_redis
async def test_it_runs_as_compose_sets_it(tmp_path: Path, image: str, store: Store) -> None:
    """Secrets come by file, the address is a public one, and Redis asks for a password."""
    secrets = tmp_path / "secrets"
    make_secrets(secrets)
    users = ("--aclfile", str(secrets / "redis_users"))
    async with (
        simulated_exchange(symbols=SYMBOLS, rate=500) as exchange,
        redis_server(store.folder, *users) as redis,
    ):
        password = (secrets / "redis_password").read_text()
        url = (secrets / "redis_url").read_text().replace("redis:6379", f"127.0.0.1:{redis.port}")
        (secrets / "redis_url").write_text(url)
        (secrets / "database_url").write_text((store.folder / "dsn").read_text())
        service = read_compose("production")["services"]["tradecore"]
        assert int(service["mem_limit"]) == MEMORY_MIB << 20
        assert (service["pids_limit"], service["stop_grace_period"]) == (PIDS, "1m0s")
        redis.login = ("--no-auth-warning", "--user", "tradecore", "--pass", password)
        given = service["environment"] | options(exchange, store) | {"HTTP_HOST": "0.0.0.0"}
        given["DATABASE_URL_FILE"] = service["environment"]["DATABASE_URL_FILE"]
        for secret in service["secrets"]:
            given["mounts"][secrets / secret["source"]] = secret["target"]
        async with container(tmp_path, image, **given) as one:
            await one.until_stored(500)
            assert await one.is_healthy()
            await redis.until_last(lambda events: len(events) >= 3)
            token = (secrets / "http_token").read_text()
            known, called = {"Authorization": f"Bearer {token}"}, {"Host": "tradecore:3000"}
            stranger = {"Host": "rebound.example"}
            assert await status(one, "/metrics", called) == 200
            assert await status(one, "/metrics", stranger) == 421
            assert await status(one, "/api/coverage", called) == 401
            for path in ("/api/coverage", "/"):
                assert await status(one, path, called | known) == 200
            assert token not in one.log and password not in one.log
            assert await one.terminate() == 0


async def status(one: Container, path: str, headers: dict[str, str]) -> int:
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"http://127.0.0.1:{one.port}{path}") as response,
    ):
        return response.status


async def test_the_exchange_of_the_development_profile(tmp_path: Path, image: str) -> None:
    service = read_compose("dev")["services"]["exchange"]
    async with container(tmp_path, image, *service["command"], network="none") as one:
        kind, *check = service["healthcheck"]["test"]
        assert kind == "CMD"
        await until_done(one, *check)
        assert await one.terminate() == 0


async def until_done(one: Container, *command: str) -> str:
    """Wait until the command succeeds in there; return its output."""
    async with asyncio.timeout(STOP_LIMIT_S):
        while True:
            try:
                return await one.run(*command)
            except subprocess.CalledProcessError:
                assert one.process is not None and one.process.returncode is None, one.log
                await asyncio.sleep(0.1)


async def test_without_database_and_venue_it_lives_unhealthy_and_stops(
    tmp_path: Path, image: str
) -> None:
    """As the image comes: HTTP on all addresses, here of a network that has none but loopback."""
    environ = {
        "DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/nothing",
        "BINANCE_WEBSOCKET_URL": "ws://127.0.0.1:1",
        "BINANCE_REST_URL": "http://127.0.0.1:1",
        "HTTP_HOST": "0.0.0.0",
        "HTTP_PORT": 3000,
    }
    async with container(tmp_path, image, network="none", **environ) as one:
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:3000/live').status)"
        assert (await until_done(one, "python", "-c", code)).strip() == "200"
        assert not await one.is_healthy()
        assert await one.terminate() == 0
        assert "secret" not in one.log


def test_one_that_hangs_is_killed(image: str) -> None:
    """By podman's own action; its timers want systemd, so the check is run by hand here."""
    name = f"tradecore-{token_hex(4)}"
    environ = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "BINANCE_WEBSOCKET_URL": "ws://127.0.0.1:1",
        "BINANCE_REST_URL": "http://127.0.0.1:1",
    }

    def until_live() -> None:
        end_s = time.monotonic() + STOP_LIMIT_S
        while not is_live():
            assert time.monotonic() < end_s
            time.sleep(0.1)

    def is_live() -> bool:
        try:
            images.podman("exec", name, "tradecore", "health", "--live")
        except subprocess.CalledProcessError:
            return False
        return True

    try:
        images.podman(
            *("run", "--detach", f"--name={name}", "--network=none", "--log-driver=none", *LOCKED),
            *(f"--volume={name}:/data", "--health-cmd=tradecore health --live"),
            *("--health-retries=2", "--health-start-period=0s", "--health-on-failure=kill"),
            *(f"--env={variable}={value}" for variable, value in environ.items()),
            image,
        )
        until_live()
        images.podman("healthcheck", "run", name)
        images.podman("kill", "--signal=STOP", name)
        for _ in range(2):
            with pytest.raises(subprocess.CalledProcessError):
                images.podman("healthcheck", "run", name)
        assert images.podman("wait", name).strip() == "137"
    finally:
        images.podman("rm", "--force", "--time=0", "--ignore", name)
        images.podman("volume", "rm", "--force", name)


async def test_a_wrong_setting_is_said_at_once(tmp_path: Path, image: str) -> None:
    async with container(tmp_path, image, network="none", BATCH_SIZE="many") as one:
        assert await one.ended() == 2
        assert "BATCH_SIZE is 'many'" in one.log


def test_the_image_holds_what_it_needs_and_says_what_it_is(image: str) -> None:
    (shown,) = json.loads(images.podman("image", "inspect", image))
    config = shown["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "tradecore"
    assert labels["org.opencontainers.image.licenses"] == "MIT"
    assert {f"org.opencontainers.image.{name}" for name in ("version", "source", "revision")} <= (
        labels.keys()
    )
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["tradecore"] and config["Cmd"] == ["run"]
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert list(config["Volumes"]) == ["/data"]
    assert shown["Healthcheck"]["Test"] == ["CMD", "tradecore", "health"]
    tools = "for tool in gcc cc ld make; do command -v $tool; done; cat /etc/pip.conf; true"
    # No compiler, and nothing of the settings of whoever built it.
    found = images.podman(
        *("run", "--rm", "--network=none", "--entrypoint=sh", *ULIMITS, image, "-c", tools)
    )
    assert not found.strip()
