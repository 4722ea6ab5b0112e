import asyncio
import os
import pwd
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import asyncpg
import pytest

from tradecore.errors import DataDirError
from tradecore.store import embedded, osuser
from tradecore.store.binaries import as_user, find_binaries
from tradecore.store.embedded import EmbeddedPostgres, find_cause
from tradecore.store.osuser import OsUser, let_through, open_for_reading, server_user

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
AS_ROOT = os.geteuid() == 0
FAST = {"fsync": "off", "autovacuum": "off"}

needs_root = pytest.mark.skipif(not AS_ROOT, reason="is about what root does for another OS user")


@pytest.fixture(params=["newest", "debian-15"])
def binaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with the PostgreSQL that tradecore chooses, and with Debian 12's."""
    if request.param == "debian-15":
        if not DEBIAN_15.exists():
            pytest.skip(f"no PostgreSQL in {DEBIAN_15}")
        monkeypatch.setenv("TRADECORE_PG_BIN", str(DEBIAN_15))


async def ask(dsn: str, *queries: str) -> list[object]:
    connection = await asyncpg.connect(dsn)
    try:
        return [await connection.fetchval(query) for query in queries]
    finally:
        await connection.close()


def listening_ports(pid: int | None) -> set[str]:
    """Return the TCP sockets that a process holds."""
    tcp = [line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    held = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return held & {f"socket:[{inode}]" for inode in tcp}


async def refuse(data_dir: Path) -> str:
    """Return why no server starts on `data_dir`; none may be left behind."""
    server = EmbeddedPostgres(data_dir, settings=FAST)
    with pytest.raises(DataDirError) as caught:
        await server.start()
    assert server.pid is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("binaries")
async def test_data_outlive_the_server(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir / "data")
    dsn = await server.start()
    answers = await ask(
        dsn,
        "CREATE TABLE kept AS SELECT 42 AS n",
        "SHOW server_encoding",
        "SELECT datcollate FROM pg_database WHERE datname = current_database()",
        "SHOW listen_addresses",
        "SHOW synchronous_commit",
        "SHOW fsync",
        "SHOW timezone",
        "SHOW max_wal_size",
        "SHOW data_checksums",
    )
    assert answers[1:] == ["UTF8", "C", "", "on", "on", "UTC", "2GB", "on"]
    await server.stop()
    assert server.pid is None
    with pytest.raises(OSError):
        await ask(dsn, "SELECT 1")
    again = EmbeddedPostgres(short_dir / "data")
    assert await again.start() == dsn
    assert await ask(dsn, "SELECT n FROM kept") == [42]
    await again.stop()


async def test_nobody_else_gets_in(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    home = short_dir / "postgres"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert home.stat().st_uid != 0
    if AS_ROOT:
        connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        stranger = await asyncio.create_subprocess_exec(
            *("/usr/bin/python3", "-c", connect, str(home / ".s.PGSQL.5432")),
            stderr=subprocess.PIPE,
            user=54321,
            group=54321,
            extra_groups=[],
        )
        _, error = await stranger.communicate()
        assert b"PermissionError" in error
    assert not listening_ports(server.pid)
    await server.stop()


@pytest.mark.usefixtures("binaries")
async def test_a_killed_daemon_leaves_a_server_to_be_found(short_dir: Path) -> None:
    program = f"""
    import asyncio, time
    from pathlib import Path
    from tradecore.store.embedded import EmbeddedPostgres
    server = EmbeddedPostgres(Path({str(short_dir)!r}))
    asyncio.run(server.start())
    print(server.pid, flush=True)
    time.sleep(60)
    """
    daemon = subprocess.Popen(  # noqa: ASYNC220 (killed below)
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    pid = int(await asyncio.to_thread(daemon.stdout.readline))
    assert os.getsid(pid) == pid != os.getsid(daemon.pid)  # a Ctrl-C does not reach it
    daemon.kill()
    daemon.communicate()
    server = EmbeddedPostgres(short_dir)
    dsn = await server.start()
    assert server.pid == pid
    assert await ask(dsn, "SELECT 1") == [1]
    await server.stop()
    assert not (short_dir / "postgres/cluster/postmaster.pid").exists()


@pytest.mark.usefixtures("binaries")
async def test_a_killed_server_comes_back_with_what_was_committed(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir, settings={"autovacuum": "off"})
    dsn = await server.start()
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")
    sleeper = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await sleeper
    await connection.close()
    assert await server.start() == dsn
    assert await ask(dsn, "SELECT count(*) FROM kept") == [1000]
    await server.stop()


async def test_open_transactions_do_not_hold_up_the_stop(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    connection = await asyncpg.connect(await server.start())
    await connection.execute("BEGIN")
    await connection.execute("CREATE TABLE undone (a int)")
    async with asyncio.timeout(10):
        await server.stop()
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.execute("COMMIT")


@pytest.mark.parametrize("both", [True, False])
async def test_stale_locks_that_name_a_living_process(short_dir: Path, both: bool) -> None:
    """After a crash of the host, or in a new container, the old number is another's."""
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    locks = [short_dir / "postgres/.s.PGSQL.5432.lock"]
    if both:
        locks.append(short_dir / "postgres/cluster/postmaster.pid")
    texts = [lock.read_text().splitlines() for lock in locks]
    await server.stop()
    # Of the same user: PostgreSQL takes others' processes for no servers.
    user = server_user(short_dir / "postgres/cluster")
    other = await asyncio.create_subprocess_exec("sleep", "60", **as_user(user))
    for lock, lines in zip(locks, texts, strict=True):
        lock.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
        if user is not None:
            os.chown(lock, user.uid, user.gid)
    await server.start()
    assert server.pid != other.pid and other.returncode is None
    await server.stop()
    other.kill()
    await other.wait()


async def test_a_killed_server_that_nobody_has_waited_for(short_dir: Path) -> None:
    """A zombie has its number still."""
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    again = EmbeddedPostgres(short_dir, settings=FAST)
    assert await ask(await again.start(), "SELECT 1") == [1]
    await again.stop()
    await server.stop()


async def test_a_cluster_that_was_left_half_made(short_dir: Path) -> None:
    (short_dir / "postgres/cluster.new/base").mkdir(parents=True)
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    await server.stop()
    assert not (short_dir / "postgres/cluster.new").exists()


@pytest.mark.parametrize("name", ["d" * 120, "with space, comma", "größe'"])
async def test_paths_that_do_not_suit_a_socket(short_dir: Path, name: str) -> None:
    server = EmbeddedPostgres(short_dir / name, settings=FAST)
    assert await ask(await server.start(), "SELECT 1") == [1]
    again = EmbeddedPostgres(short_dir / name)
    assert await again.start() == server.dsn  # finds it there as well
    (folder,) = await ask(server.dsn, "SHOW unix_socket_directories")
    await again.stop()
    await server.stop()
    assert str(server._socket_dir) == folder
    assert stat.S_IMODE(server._socket_dir.stat().st_mode) == 0o700
    server._socket_dir.rmdir()


async def test_a_stranger_in_the_place_of_the_socket(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_dir))
    data_dir = short_dir / ("d" * 120)
    server = EmbeddedPostgres(data_dir, settings=FAST)
    await server.start()
    await server.stop()
    server._socket_dir.chmod(0o777)
    assert "belongs to someone else" in await refuse(data_dir)


async def test_data_of_another_major_version(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    await server.stop()
    version = short_dir / "postgres/cluster/PG_VERSION"
    version.write_text("12\n")
    told = await refuse(short_dir)
    assert "made by PostgreSQL 12" in told
    assert "no PostgreSQL of version 12 found" in told
    version.write_text("rubbish\n")
    assert "damaged" in await refuse(short_dir)


@pytest.mark.skipif(not DEBIAN_15.exists(), reason=f"no PostgreSQL in {DEBIAN_15}")
async def test_older_data_get_the_binaries_they_need(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADECORE_PG_BIN", str(DEBIAN_15))
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    await server.stop()
    monkeypatch.delenv("TRADECORE_PG_BIN")
    assert find_binaries().major >= 15
    (version,) = await ask(await server.start(), "SHOW server_version")
    assert str(version).startswith("15.")
    await server.stop()


async def test_the_cause_comes_from_the_server(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    await server.stop()
    conf = short_dir / "postgres/cluster/postgresql.conf"
    conf.write_text(conf.read_text() + "nonsense_setting = 1\n")
    told = await refuse(short_dir)
    assert "did not start" in told
    assert "FATAL" in told
    conf.write_text(conf.read_text().replace("nonsense_setting = 1\n", ""))
    await server.start()
    await server.stop()


def test_the_cause_is_not_the_answer_to_our_own_knocking() -> None:
    text = """\
x [1] LOG:  starting PostgreSQL
x [2] FATAL:  the database system is not yet accepting connections
x [2] DETAIL:  Consistent recovery state has not been yet reached.
x [3] FATAL:  the database system is starting up
x [4] FATAL:  could not write to file "pg_wal/xlogtemp.4": No space left on device
x [1] LOG:  startup process (PID 4) exited with exit code 1
x [1] LOG:  aborting startup due to startup process failure
"""
    assert find_cause(text).endswith("No space left on device")
    assert find_cause(text[: text.index("x [4]")]).endswith("is starting up")


async def test_initdb_that_fails(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_binaries().folder
    fake = short_dir / "bin"
    fake.mkdir()
    (fake / "postgres").symlink_to(real / "postgres")
    # As good as a full disk: no file may grow past 100 blocks.
    (fake / "initdb").write_text(f'#!/bin/sh\nulimit -f 100\nexec {real}/initdb "$@"\n')
    (fake / "initdb").chmod(0o755)
    monkeypatch.setenv("TRADECORE_PG_BIN", str(fake))
    told = await refuse(short_dir / "data")
    assert "could not make its cluster" in told
    assert "removing" not in told
    assert not (short_dir / "data/postgres/cluster").exists()
    monkeypatch.delenv("TRADECORE_PG_BIN")
    server = EmbeddedPostgres(short_dir / "data", settings=FAST)
    await server.start()
    await server.stop()


async def test_no_binaries(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADECORE_PG_BIN", str(short_dir))
    assert "tradecore[embedded]" in await refuse(short_dir / "data")


async def test_a_data_dir_that_is_a_file(short_dir: Path) -> None:
    (short_dir / "data").write_text("x")
    assert "cannot be used" in await refuse(short_dir / "data")


async def test_a_server_that_does_not_answer_in_time(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tradecore.store.embedded._QUIT_LIMIT_S", 0.1)
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    other = EmbeddedPostgres(short_dir, start_limit_s=0.3, stop_limit_s=0.1)
    with pytest.raises(DataDirError, match="did not answer"):
        await other.start()
    os.kill(pid, signal.SIGCONT)
    await server.stop()


async def test_a_server_that_recovers_for_long_is_left_to_it(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    pid = server.pid

    async def starting_up(**_: object) -> None:
        raise asyncpg.CannotConnectNowError("the database system is starting up")

    other = EmbeddedPostgres(short_dir, start_limit_s=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(asyncpg, "connect", starting_up)
        with pytest.raises(DataDirError, match="start tradecore again"):
            await other.start()
    await other.start()
    assert other.pid == pid
    await other.stop()
    await server.stop()


async def test_a_cancelled_start_leaves_nothing(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    start = asyncio.ensure_future(server.start())
    while not (short_dir / "postgres").exists():
        await asyncio.sleep(0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert server.pid is None
    assert not (short_dir / "postgres/cluster/postmaster.pid").exists()


@needs_root
async def test_root_in_its_own_home(short_dir: Path) -> None:
    """A home of mode 0700 stays closed to all but the server, which may cross it."""
    home = short_dir / "home"
    home.mkdir(mode=0o700)
    server = EmbeddedPostgres(home / "tradecore/data", settings=FAST)
    assert await ask(await server.start(), "SELECT 1") == [1]
    await server.stop()
    assert home.stat().st_mode & stat.S_IRWXO == 0
    stranger = OsUser("stranger", 54321, 54321)
    assert subprocess.run(  # noqa: ASYNC221 (a moment)
        ["/usr/bin/ls", home / "tradecore"], user=stranger.uid, group=54321, capture_output=True
    ).returncode


@needs_root
def test_access_lists_are_kept_and_the_x_bit_is_the_last_resort(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = short_dir / "closed"
    folder.mkdir(mode=0o700)
    for uid in (54321, 54322, 54321):
        let_through(folder / "x", OsUser("u", uid, uid))
    for uid, refused in ((54321, False), (54322, False), (54323, True)):
        command = ["/usr/bin/test", "-x", folder]
        code = subprocess.run(command, user=uid, group=uid, extra_groups=[]).returncode
        assert bool(code) is refused
    assert folder.stat().st_mode & stat.S_IRWXO == 0

    def not_here(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(osuser.os, "setxattr", not_here)
    let_through(folder / "x", OsUser("u", 54323, 54323))
    assert folder.stat().st_mode & stat.S_IRWXO == stat.S_IXOTH


@needs_root
async def test_a_server_that_runs_is_used_and_nothing_is_opened_for_it(short_dir: Path) -> None:
    """What systemd keeps closed has to stay so, or the service does not start again."""
    home = short_dir / "private"
    home.mkdir(mode=0o700)
    server = EmbeddedPostgres(home / "data", settings=FAST)
    await server.start()
    os.removexattr(home, osuser._ACL)
    home.chmod(0o700)
    command = EmbeddedPostgres(home / "data", settings=FAST)
    assert await ask(await command.start(), "SELECT 1") == [1]
    assert command.pid == server.pid
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert osuser._ACL not in os.listxattr(home)
    await server.stop()


@needs_root
async def test_nothing_of_systemd_is_opened(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = short_dir / "private"
    (private / "tradecore").mkdir(mode=0o700, parents=True)
    private.chmod(0o700)
    link = short_dir / "tradecore"
    link.symlink_to(private / "tradecore")
    monkeypatch.setattr(osuser, "_SYSTEMD_FOLDERS", (private,))
    assert "systemctl start" in await refuse(link)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert not os.listxattr(private)
    assert not [*link.iterdir()]


@needs_root
async def test_a_user_without_a_name_is_told_what_lacks(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in the units where systemd's part of the name service is not installed."""
    short_dir.chmod(0o711)
    nameless = OsUser("64709", 64709, 64709)
    monkeypatch.setattr(embedded, "server_user", lambda _: nameless)
    said = await refuse(short_dir)
    assert "effective user ID 64709" in said and "libnss-systemd" in said


@needs_root
async def test_a_cluster_keeps_its_owner(short_dir: Path) -> None:
    server = EmbeddedPostgres(short_dir, settings=FAST)
    await server.start()
    await server.stop()
    owner = pwd.getpwnam("daemon")
    subprocess.run(["chown", "-R", "daemon", short_dir / "postgres"], check=True)  # noqa: ASYNC221
    await server.start()
    assert (short_dir / "postgres/.s.PGSQL.5432").stat().st_uid == owner.pw_uid
    await server.stop()
    subprocess.run(["chown", "-R", "root", short_dir / "postgres"], check=True)  # noqa: ASYNC221
    assert "chown -R" in await refuse(short_dir)


def test_program_files_that_a_strict_umask_closed(tmp_path: Path) -> None:
    tree = tmp_path / "pginstall"
    (tree / "bin").mkdir(parents=True, mode=0o700)
    tree.chmod(0o700)
    for name, mode in (("bin/postgres", 0o700), ("text", 0o600)):
        (tree / name).write_text("")
        (tree / name).chmod(mode)
    open_for_reading(tree)
    modes = [stat.S_IMODE((tree / name).stat().st_mode) for name in ("", "bin/postgres", "text")]
    assert modes == [0o705, 0o705, 0o604]
