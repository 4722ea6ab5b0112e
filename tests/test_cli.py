"""The command line as an operator meets it: real processes, their output and exit codes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest

from tradecore import __version__, cli, errors, log
from tradecore.store.partitions import Partitions

LIMIT_S = 60


class Outcome(NamedTuple):
    code: int | None
    out: str
    err: str


def environment(**settings: str) -> dict[str, str]:
    keep = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in keep if name in os.environ} | settings


async def start(*arguments: str, **settings: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tradecore", *arguments),
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def finish(process: asyncio.subprocess.Process) -> Outcome:
    try:
        out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    except TimeoutError:
        process.kill()
        raise
    return Outcome(process.returncode, out.decode(), err.decode())


async def tradecore(*arguments: str, **settings: str) -> Outcome:
    return await finish(await start(*arguments, **settings))


# -- the command line itself ----------------------------------------------------------------------


async def test_version_and_help() -> None:
    version, top, run = await asyncio.gather(
        tradecore("--version"), tradecore("--help"), tradecore("run", "--help")
    )
    assert version == (0, f"tradecore {__version__}\n", "")
    for command in ("run", "check", "migrate", "verify", "simulate", "health"):
        assert f"\n    {command} " in top.out
    for name, code in vars(errors).items():
        if name.startswith("EXIT_"):
            assert f"\n  {code}    " in top.out
    assert "SUPPORTED_SYMBOLS" in run.out and "[BTCUSDT,ETHUSDT," in run.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("rnu", "unknown command rnu; did you mean run?"),
        ("verfy --symbol X", "unknown command verfy; did you mean verify?"),
        ("xyz", "unknown command xyz"),
        ("run --hlep", "unknown option --hlep; did you mean --help?"),
        ("migrate --chek", "unknown option --chek; did you mean --check?"),
        ("migrate --che", "unknown option --che; did you mean --check?"),
        ("verify --symbl=BTCUSDT", "unknown option --symbl; did you mean --symbol?"),
        ("simulate --sed 5", "unknown option --sed; did you mean --seed?"),
        ("--verison", "unknown option --verison; did you mean --version?"),
        ("health now", "unknown argument now"),
        ("verify --symbol", "argument --symbol: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments.split())
    assert caught.value.code == errors.EXIT_USAGE
    usage, told = capsys.readouterr().err.rstrip().rsplit("\n", 1)
    assert usage.startswith("usage: tradecore")
    assert told == f"tradecore: {sentence}"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == errors.EXIT_USAGE
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "migrate", "verify"])
async def test_wrong_settings_are_told_all_at_once(command: str, tmp_path: Path) -> None:
    done = await tradecore(command, BATCH_SIZ="1", HTTP_PORT="web", DATA_DIR=str(tmp_path / "d"))
    assert done == (
        errors.EXIT_USAGE,
        "",
        "tradecore: BATCH_SIZ is no setting of tradecore: did you mean BATCH_SIZE?\n"
        "tradecore: HTTP_PORT is 'web': give a whole number from 0 to 65535\n",
    )
    assert not (tmp_path / "d").exists(), "nothing was made"


def test_commands_import_only_what_they_need() -> None:
    code = (
        "import sys; from tradecore import cli; cli.main(['health']); "
        "print(sorted({'numpy', 'aiohttp', 'asyncpg', 'asyncio', 'tqdm'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(HTTP_PORT="1"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_bug_is_called_one_and_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fall(*_: object) -> int:
        raise RuntimeError("cannot use postgresql://u:hunter2@h/d")

    monkeypatch.setattr(cli, "_health", fall)
    assert cli.main(["health"]) == errors.EXIT_BUG
    told = capsys.readouterr().err
    assert told.startswith("tradecore: this is a bug") and "RuntimeError" in told
    assert "hunter2" not in told
    log.stop()


# -- migrate and verify ---------------------------------------------------------------------------


async def test_migrate_and_check(database: str) -> None:
    pending = await tradecore("migrate", "--check", DATABASE_URL=database)
    assert pending.code == errors.EXIT_DATABASE and pending.out == ""
    assert pending.err.startswith("tradecore: the schema is behind, 001_tables, ")
    applied = await tradecore("migrate", DATABASE_URL=database)
    assert applied.code == 0 and applied.out.startswith("applied 001_tables, ")
    again = await tradecore("migrate", DATABASE_URL=database)
    assert again == (0, "the schema is up to date\n", "")
    done = await tradecore("migrate", "--check", DATABASE_URL=database)
    assert done.code == 0 and done.out.startswith("the schema is up to date (")


async def test_a_newer_schema_is_refused(
    connection: asyncpg.Connection, migrated_database: str
) -> None:
    await connection.execute(
        "INSERT INTO schema_migrations (version, name, checksum) VALUES (999, '999_later', 'x')"
    )
    for command in (["migrate"], ["migrate", "--check"]):
        done = await tradecore(*command, DATABASE_URL=migrated_database)
        assert done.code == errors.EXIT_DATABASE
        assert done.err.count("\n") == 1 and "run a newer tradecore" in done.err


@pytest.mark.parametrize("command", ["migrate", "verify"])
async def test_no_database_is_one_sentence_without_the_password(command: str) -> None:
    done = await tradecore(command, DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/d")
    assert done.code == errors.EXIT_DATABASE and done.out == ""
    assert done.err.startswith("tradecore: the database cannot be reached: ")
    assert done.err.count("\n") == 1 and "hunter2" not in done.err


DAY = datetime(2026, 1, 1, tzinfo=UTC)


async def record(connection: asyncpg.Connection, symbol: str, first: int, last: int) -> None:
    await Partitions().ensure(connection, "raw_trades", [DAY.date()])
    await connection.executemany(
        "INSERT INTO raw_trades (timestamp, symbol, price, quantity, side, trade_id)"
        " VALUES ($1, $2, 1, 1, 'BUY', $3)",
        [(DAY, symbol, number) for number in range(first, last + 1)],
    )
    await connection.execute(
        "INSERT INTO trade_coverage VALUES ($1, $2, $3, $4, $4)", symbol, first, last, DAY
    )


async def test_verify(connection: asyncpg.Connection, migrated_database: str) -> None:
    await record(connection, "BTCUSDT", 1, 50)
    await record(connection, "ETHUSDT", 7, 9)
    done = await tradecore("verify", DATABASE_URL=migrated_database)
    assert done.code == 0 and done.err == ""
    assert json.loads(done.out) == {
        "event": "verified",
        **{"symbols": 2, "ranges": 2, "rows": 53, "expected_rows": 53},
        **{"difference_count": 0, "holes": 0, "absent": 0, "horizon": None},
    }
    await connection.execute("DELETE FROM raw_trades WHERE trade_id BETWEEN 20 AND 22")
    done = await tradecore("verify", DATABASE_URL=migrated_database)
    assert done.code == errors.EXIT_DIFFERENCE
    assert json.loads(done.out.splitlines()[0]) == {
        "event": "difference",
        **{"kind": "missing", "symbol": "BTCUSDT", "first_id": 20, "last_id": 22},
    }
    assert done.err.startswith("tradecore: raw_trades and its ledger differ in 1 places")
    only = await tradecore("verify", "--symbol", "ETHUSDT", DATABASE_URL=migrated_database)
    assert only.code == 0 and json.loads(only.out)["rows"] == 3


@pytest.mark.parametrize("symbol", ["ETHUSD", "", "ETHUSDT,BTCUSDT"])
async def test_verify_of_nothing_is_no_proof(
    connection: asyncpg.Connection, migrated_database: str, symbol: str
) -> None:
    await record(connection, "ETHUSDT", 7, 9)
    done = await tradecore("verify", "--symbol", symbol, DATABASE_URL=migrated_database)
    assert done.code == errors.EXIT_USAGE
    assert done.out == "" and done.err.startswith("tradecore: --symbol")
    lower = await tradecore("verify", "--symbol", "ethusdt", DATABASE_URL=migrated_database)
    assert lower.code == 0 and json.loads(lower.out)["rows"] == 3


async def test_verify_on_a_terminal(
    connection: asyncpg.Connection, migrated_database: str, terminal: tuple[int, int]
) -> None:
    await record(connection, "BTCUSDT", 1, 50)
    await record(connection, "BTCUSDT", 60, 61)
    await connection.execute(
        "INSERT INTO trade_gaps (symbol, first_id, last_id, cause, state)"
        " VALUES ('BTCUSDT', 51, 55, 'test', 'absent'), ('BTCUSDT', 56, 59, 'test', 'open')"
    )
    master, slave = terminal
    termios.tcsetwinsize(slave, (24, 100))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tradecore", "verify"),
        env=environment(DATABASE_URL=migrated_database, TERM="xterm"),
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = await asyncio.to_thread(read_all, master)
    assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
    assert shown.endswith(
        "BTCUSDT 56..59: hole\r\nBTCUSDT 51..55: absent at the venue\r\n"
        "52 rows of 1 symbols counted, 52 by the ledger, 1 holes, 1 absent at the venue\r\n"
    )
    assert "52.0/52.0" in shown, "the progress bar"


def read_all(descriptor: int) -> str:
    data = b""
    try:
        while more := os.read(descriptor, 4096):
            data += more
    except OSError:  # how a terminal says that nobody writes any more
        pass
    os.close(descriptor)
    return data.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_a_command_cleanly(
    number: signal.Signals, connection: asyncpg.Connection, migrated_database: str
) -> None:
    async with connection.transaction():
        await connection.execute("LOCK TABLE trade_coverage IN ACCESS EXCLUSIVE MODE")
        process = await start("verify", DATABASE_URL=migrated_database)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        while not await connection.fetchval(waiting):
            assert process.returncode is None
            await asyncio.sleep(0.02)
        process.send_signal(number)
        assert await finish(process) == (128 + number, "", "")


async def test_embedded_database_is_started_shared_and_stopped(short_dir: Path) -> None:
    """Without DATABASE_URL, the first command makes the database and takes it down again."""
    settings = {"DATA_DIR": str(short_dir / "data")}
    pid_file = short_dir / "data" / "postgres" / "cluster" / "postmaster.pid"
    done = await tradecore("migrate", **settings)
    assert done.code == 0 and done.out.startswith("applied "), done.err
    assert not pid_file.exists()
    done = await tradecore("verify", **settings)
    assert done.code == 0 and json.loads(done.out)["rows"] == 0, done.err
    assert not pid_file.exists()


async def test_a_folder_that_is_taken_by_a_daemon_with_another_database(short_dir: Path) -> None:
    from tradecore.datadir import DataDir

    folder = DataDir(short_dir / "data")
    try:
        done = await tradecore("migrate", DATA_DIR=str(short_dir / "data"))
    finally:
        folder.close()
    assert done.code == errors.EXIT_DATA_DIR
    assert done.err.count("\n") == 1 and f"process {os.getpid()}" in done.err


async def test_the_database_of_a_running_daemon_is_used_and_left_alone(short_dir: Path) -> None:
    from tradecore.datadir import DataDir
    from tradecore.store.embedded import EmbeddedPostgres

    data = short_dir / "data"
    folder, server = DataDir(data), EmbeddedPostgres(data, settings={"fsync": "off"})
    try:
        await server.start()
        done = await tradecore("migrate", DATA_DIR=str(data))
        assert done.code == 0 and done.out.startswith("applied "), done.err
        assert server.running
    finally:
        await server.stop()
        folder.close()


# -- health ---------------------------------------------------------------------------------------

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield str(server.sockets[0].getsockname()[1])
    finally:
        server.close()


def answering(status: str, body: bytes, path: str = "/ready") -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(f"GET {path} HTTP/1.1\r\n".encode())
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    return handler


NOT_READY = {"reasons": [{"text": "the database is away\x1b"}, {"text": "no stream is live"}]}


@pytest.mark.parametrize(
    ("status", "body", "code", "line"),
    [
        ("200 OK", b"{}", 0, "ready"),
        (
            "503 Service Unavailable",
            json.dumps(NOT_READY).encode(),
            1,
            "not ready: the database is away ; no stream is live",
        ),
        ("503 Service Unavailable", b"nonsense", 1, "not ready: HTTP 503"),
        ("404 Not Found", b"[1]", 1, "not ready: HTTP 404"),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_health(host: str, status: str, body: bytes, code: int, line: str) -> None:
    async with listening(answering(status, body)) as port:
        done = await tradecore("health", HTTP_HOST=host, HTTP_PORT=port, BATCH_SIZE="nonsense")
    assert done == (code, f"{line}\n", "")


async def test_health_live_asks_for_no_more_than_life() -> None:
    async with listening(answering("200 OK", b"{}", "/live")) as port:
        done = await tradecore("health", "--live", HTTP_PORT=port)
    assert done == (0, "live\n", "")
    done = await tradecore("health", "--live", HTTP_PORT=port)
    assert done.code == 1 and done.err == ""
    assert done.out.startswith(f"not live: http://127.0.0.1:{port}/live does not answer")


async def test_health_without_a_daemon() -> None:
    async with listening(answering("200 OK", b"")) as port:
        pass
    done = await tradecore("health", HTTP_PORT=port)
    assert done.code == 1 and done.err == ""
    assert done.out.startswith(f"not ready: http://127.0.0.1:{port}/ready does not answer")


async def test_health_with_a_server_that_speaks_no_http() -> None:
    async def handler(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0\r\n")
        writer.close()

    async with listening(handler) as port:
        done = await tradecore("health", HTTP_PORT=port)
    assert done.code == 1 and done.out.startswith("not ready: ") and done.err == ""


async def test_health_has_a_time_limit() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # never answers; ends when the other side does
        writer.close()

    async with listening(handler) as port:
        done = await tradecore("health", HTTP_PORT=port)
    assert done == (1, f"not ready: http://127.0.0.1:{port}/ready does not answer: timed out\n", "")


@pytest.mark.parametrize("arguments", [("verify",), ("migrate", "--check")])
async def test_looking_makes_no_database(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = await tradecore(*arguments, DATA_DIR=str(tmp_path / "data"))
    assert done.code == errors.EXIT_DATABASE
    assert "`tradecore run` makes one" in done.err
    assert not (tmp_path / "data" / "postgres").exists()
