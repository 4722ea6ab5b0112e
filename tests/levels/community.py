"""TimescaleDB with all features in WebAssembly (PGlite), behind the front of `pglite/`.

One process of Node for each process of pytest. A fresh database is a new instance in memory that
loads a saved one (half a second), or the state of the present one taken back (a few hundredths).
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from tests.levels.server import CACHE, UnavailableError, lock
from tradecore.store.migrate import migrate

_SOURCE = Path(__file__).parent / "pglite"
_HOME = CACHE / "pglite"
_EMPTY = "empty"
_MIGRATED = "migrated"


def prepare() -> str:
    """Install the package unless it is there; return what there is."""
    wanted = json.loads((_SOURCE / "package.json").read_text())
    ((name, version),) = wanted["dependencies"].items()
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise UnavailableError("level community needs node and npm (Debian: apt-get install npm)")
    with lock("pglite"):
        if _installed(name) != version:
            shutil.rmtree(_HOME, ignore_errors=True)
            _HOME.mkdir(parents=True)
            shutil.copy(_SOURCE / "package.json", _HOME)
            # Without a network, npm would try for minutes.
            patience = ("--fetch-retries=1", "--fetch-retry-maxtimeout=5000")
            done = subprocess.run(
                [npm, "install", "--no-package-lock", "--no-audit", "--no-fund", *patience],
                cwd=_HOME,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )
            if done.returncode != 0 or _installed(name) != version:
                words = " ".join(done.stderr.split())[:300]
                raise UnavailableError(f"level community: npm could not get {name}: {words}")
    return f"{name} {version}"


def _installed(name: str) -> str | None:
    try:
        found = json.loads((_HOME / "node_modules" / name / "package.json").read_text())
    except FileNotFoundError:
        return None
    return str(found["version"])


def start() -> "PgliteServer":
    """Start what `prepare` has installed."""
    wanted = json.loads((_SOURCE / "package.json").read_text())
    ((name, version),) = wanted["dependencies"].items()
    if _installed(name) != version:
        raise UnavailableError("level community is not installed: `make levels` does it")
    node = shutil.which("node")
    if node is None:
        raise UnavailableError("level community needs node (Debian: apt-get install nodejs)")
    return PgliteServer(node)


class PgliteServer:
    """The front with one instance behind it; a test has it for itself."""

    def __init__(self, node: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tc-"))
        self.dsn = f"postgresql://postgres@/postgres?host={self._folder}"
        self._is_saved = False
        self._log = (self._folder / "log").open("w+")
        self._process = subprocess.Popen(
            [node, "--expose-gc", _SOURCE / "front.mjs", _HOME, self._folder / ".s.PGSQL.5432"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # A Ctrl-C at the terminal is for pytest; the end of its input stops Node.
            start_new_session=True,
        )
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    @asynccontextmanager
    async def database(self, *, migrated: bool) -> AsyncIterator[str]:
        if not migrated:
            self._tell("fresh", _EMPTY)
        elif self._is_saved:
            self._tell("fresh", _MIGRATED)
        else:
            self._tell("fresh", _EMPTY)
            connection = await asyncpg.connect(self.dsn)
            try:
                await migrate(connection)
            finally:
                await connection.close()
            self._tell("save", _MIGRATED)
            self._is_saved = True
        yield self.dsn

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        shutil.rmtree(self._folder)

    def _tell(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        self._await_ready()

    def _await_ready(self) -> None:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if answer != "ready":
            self._log.seek(0)
            raise RuntimeError(f"the front of PGlite says {answer!r}\n{self._log.read()[-2000:]}")
