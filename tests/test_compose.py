"""compose.yaml, read by docker-compose itself and held against the daemon's settings and the tree.

No engine runs here: the image of our own runs in test_container.py, what compose.yaml hands to the
other services is given to a real TimescaleDB and a real redis-server.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from tests.compose_file import BIN, ROOT, SCRIPTS, make_secrets, read_compose
from tests.redis_desk import needs_redis, redis_server
from tradecore import __version__
from tradecore.settings import VARIABLES, load
from tradecore.store.binaries import find_binaries
from tradecore.store.migrate import migrate

PROFILES = ("dev", "production")
BUILT = {"dev": {"tradecore-dev", "exchange"}, "production": {"tradecore"}}
BOUGHT = {"timescaledb", "redis", "prometheus", "grafana"}
ADVICE = ("sizing", "runbook")
SET_HERE = {
    *("DATA_DIR", "DATABASE_URL", "REDIS_URL", "HTTP_TOKEN"),  # by the image and by secrets
    *("SHARDS", "NODE_NAME"),  # one daemon has this database, and no other host reaches it
    "DB_POOL_SIZE",  # the database here takes as many as it needs
    "SETTINGS_FILE",  # nothing reloads it
}
OUTSIDE = "com.docker.network.bridge.enable_ip_masquerade"


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def read(profile: str) -> dict[str, Any]:
    return read_compose(profile)


@pytest.fixture(scope="module")
def services(read: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(read["services"])


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_profile_has_its_services(profile: str, services: dict[str, Any]) -> None:
    assert services.keys() == BUILT[profile] | BOUGHT


def test_every_service_is_locked_up_and_bounded(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert int(service["mem_limit"]) <= 2 << 30, name
        assert 0 < service["pids_limit"] <= 256, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name


def test_nobody_is_root(services: dict[str, Any]) -> None:
    """Our own image has its user in the Dockerfile."""
    for name in BOUGHT:
        assert int(services[name]["user"].split(":")[0]) > 0, name
    assert re.search(r"^USER 10001:10001$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_images_are_pinned(profile: str, services: dict[str, Any]) -> None:
    for name in BOUGHT:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-\w+)?", services[name]["image"]), name
    for name in BUILT[profile]:
        assert services[name]["image"] == f"tradecore:{__version__}"
        assert services[name]["pull_policy"] == "build"  # no stranger's image of that name
    assert f"ARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text()


def test_ports_are_for_this_host_only(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    assert len({port["published"] for port in published}) == len(published)


def test_only_the_daemon_can_reach_out(profile: str, read: dict[str, Any]) -> None:
    ways_out = {
        name
        for name, network in read["networks"].items()
        if not network.get("internal") and network.get("driver_opts", {}).get(OUTSIDE) != "false"
    }
    services = read["services"]
    assert "default" not in read["networks"]
    reaching = {name for name, one in services.items() if ways_out & one.get("networks", {}).keys()}
    assert reaching == ({"tradecore"} if profile == "production" else set())
    assert all(one.get("networks") or name == "exchange" for name, one in services.items())


def test_settings_are_settings_of_the_daemon(profile: str, services: dict[str, Any]) -> None:
    known = {variable.name for variable in VARIABLES.values()}
    known |= {f"{variable.name}_FILE" for variable in VARIABLES.values() if variable.secret}
    (daemon,) = BUILT[profile] - {"exchange"}
    environ = services[daemon]["environment"]
    assert environ.keys() <= known
    asked_for = " ".join((ROOT / "docs" / f"{page}.md").read_text() for page in ADVICE)
    advised = known.intersection(re.findall(r"\b[A-Z_]+\b", asked_for)) - SET_HERE
    assert profile == "dev" or advised <= environ.keys(), "an operator is told to change these"
    plain = {name: value or "" for name, value in environ.items() if not name.endswith("_FILE")}
    assert load(plain).symbols


def test_secrets_are_files(read: dict[str, Any]) -> None:
    for name, service in read["services"].items():
        given = {secret["source"] for secret in service.get("secrets", ())}
        assert given <= read["secrets"].keys()
        for variable, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|DATABASE_URL|REDIS_URL", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value.removeprefix("/run/secrets/") in given, f"{name}: {variable}"
        assert not re.search(r"://[^/\s\"]*:[^/\s\"]*@", json.dumps(service)), name


def test_what_is_mounted_is_there(read: dict[str, Any]) -> None:
    volumes = [
        volume for service in read["services"].values() for volume in service.get("volumes", ())
    ]
    for volume in volumes:
        if volume["type"] == "bind":
            path = Path(volume["source"])
            assert path.exists() and volume["read_only"], volume
            assert path.is_file() or any(one.is_file() for one in path.rglob("*")), volume
        else:
            assert volume["source"] in read["volumes"]


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    make_secrets(folder)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    make_secrets(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
    return folder


def test_the_script_makes_the_secrets_that_are_used(secrets: Path, read: dict[str, Any]) -> None:
    made = {path.name for path in secrets.iterdir()}
    used = {Path(secret["file"]).name for secret in read["secrets"].values()}
    assert used <= made
    assert secrets.stat().st_mode & 0o777 == 0o700
    # Users of several containers read them.
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in secrets.iterdir())
    texts = [path.read_text() for path in secrets.iterdir()]
    assert len(set(texts)) == len(texts) and all(len(text) >= 48 for text in texts)
    files = ("database_url", "redis_url", "http_token")
    settings = load({f"{name.upper()}_FILE": str(secrets / name) for name in files})
    assert settings.database_url and settings.redis_url and settings.http_token


@needs_redis
async def test_redis_knows_the_daemon_only(secrets: Path, short_dir: Path) -> None:
    password = (secrets / "redis_password").read_text()
    users = ("--aclfile", str(secrets / "redis_users"))
    async with redis_server(short_dir, *users) as redis:  # it is pinged without a password
        assert "NOPERM" in await redis.cli("GET", "tradecore:last")
        redis.login = ("--no-auth-warning", "--user", "tradecore", "--pass", password)
        script = "return redis.call('HSET', KEYS[1], 'a', 'b') + redis.call('EXPIRE', KEYS[1], 9)"
        assert await redis.cli("EVAL", script, 1, "tradecore:last") == "2"
        assert await redis.cli("SET", "tradecore:status:node", "x", "EX", 9) == "OK"
        assert await redis.cli("XADD", "tradecore:trades", "MAXLEN", "~", 9, "*", "a", "b")
        assert await redis.cli("PUBLISH", "tradecore:last", "x") == "0"
        assert "redis_version" in await redis.cli("INFO", "server")
        for refused in (("SET", "other", "x"), ("CONFIG", "GET", "*"), ("FLUSHALL",)):
            assert "NOPERM" in await redis.cli(*refused)


@pytest.mark.every_level
@pytest.mark.only_levels("apache")
async def test_the_database_belongs_to_the_daemon_and_grafana_reads_it(
    secrets: Path, database: str
) -> None:
    """The script of the first start, on a real TimescaleDB; the daemon's role is no superuser."""
    parts = urlsplit(database)
    environ = {
        "PATH": f"{find_binaries().folder}{os.pathsep}{os.environ['PATH']}",  # psql
        "PGHOST": parse_qs(parts.query)["host"][0],
        "POSTGRES_DB": parts.path.removeprefix("/"),
        "SECRETS": str(secrets),
    }
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")  # the image does that
    process = await asyncio.create_subprocess_exec(SCRIPTS / "database.sh", env=environ)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    try:
        daemon = await asyncpg.connect(database, user="tradecore")
        await migrate(daemon)
        assert await daemon.fetchval("SELECT count(*) FROM raw_trades") == 0
        await daemon.close()
        reader = await asyncpg.connect(database, user="grafana")
        assert await reader.fetchval("SELECT count(*) FROM candles_1m") == 0
        await reader.execute("SET default_transaction_read_only = off")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.execute("DELETE FROM raw_trades")
        await reader.close()
        for role in ("tradecore", "grafana"):
            digest = "SELECT rolpassword FROM pg_authid WHERE rolname = $1"
            assert (await connection.fetchval(digest, role)).startswith("SCRAM-SHA-256$")
    finally:
        await connection.execute("REASSIGN OWNED BY tradecore TO postgres")
        await connection.execute("DROP OWNED BY tradecore, grafana")
        await connection.execute("DROP ROLE tradecore, grafana")
        await connection.close()


def test_the_scripts_are_plain_shell() -> None:
    shell = shutil.which("dash") or "sh"
    for script in (*SCRIPTS.glob("*.sh"), ROOT / "tools" / "requirements.sh"):
        subprocess.run([shell, "-n", script], check=True)
    # Whoever starts the database runs it, and does not read it into a shell of another kind.
    assert os.access(SCRIPTS / "database.sh", os.X_OK)
