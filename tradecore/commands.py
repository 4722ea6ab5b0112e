"""The short commands: migrate, verify, health. Each prints its outcome and returns an exit code."""

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson

from tradecore import clock
from tradecore.errors import EXIT_BUG, EXIT_OK, DataDirError, StoreError, UsageError
from tradecore.settings import Settings, http_address
from tradecore.values import symbols

if TYPE_CHECKING:
    import asyncpg

    from tradecore.store.verify import VerifyReport

HEALTH_LIMIT_S = 3.0
PROGRESS_S = 5.0
_SHOWN_DIFFERENCES = 20


@asynccontextmanager
async def open_database(
    settings: Settings, *, make: bool = False
) -> AsyncIterator["asyncpg.Connection"]:
    """Connect to DATABASE_URL, or to the embedded database, which is started when none runs it.

    A running daemon keeps its server: it is used and left alone. With `make` an embedded database
    that is not there is made. Raises StoreError or DataDirError.
    """
    import asyncpg

    from tradecore.store.pool import connect

    async with AsyncExitStack() as stack:
        if settings.database_url:
            dsn = settings.database_url.reveal()
        else:
            dsn = await start_embedded(settings, stack, make=make)
        connection = await connect(dsn)
        stack.push_async_callback(connection.close, timeout=5)
        try:
            yield connection
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise StoreError(f"the database broke off: {error}; try again") from error


async def start_embedded(settings: Settings, stack: AsyncExitStack, *, make: bool) -> str:
    """Return the DSN of the embedded database; what is started ends with `stack`.

    Raises StoreError or DataDirError.
    """
    from tradecore.datadir import DataDir
    from tradecore.store.embedded import EmbeddedPostgres

    if not make and not (settings.data_dir / "postgres" / "cluster").exists():
        raise StoreError(
            f"DATA_DIR {settings.data_dir} holds no database yet and DATABASE_URL is not set:"
            " `tradecore run` makes one"
        )
    server = EmbeddedPostgres(settings.data_dir)
    try:
        stack.callback(DataDir(settings.data_dir).close)
    except DataDirError:
        # A daemon has the folder. Its server is there to share, but is not ours to start or stop.
        if not (settings.data_dir / "postgres" / "cluster" / "postmaster.pid").exists():
            raise
        return await server.start()
    stack.push_async_callback(server.stop)
    return await server.start()


async def migrate(settings: Settings, *, only_check: bool, raise_level: bool = False) -> int:
    """Apply what is pending, or only say what is; pending ones then end with EXIT_DATABASE.

    With `raise_level` the tables become what the server can do by now as well.
    """
    from tradecore.store.migrate import check
    from tradecore.store.migrate import migrate as apply

    async with open_database(settings, make=not only_check) as connection:
        if only_check:
            state = await check(connection)
            state.raise_unusable()
            if state.pending:
                raise StoreError(
                    f"the schema is behind, {', '.join(state.pending)} pending:"
                    " run `tradecore migrate`"
                )
            print(f"the schema is up to date ({state.applied[-1]}, {state.level})")
            return EXIT_OK
        applied = await apply(connection)
        if raise_level:
            from tradecore.store.raise_level import raise_level as lift

            before, after = await lift(connection, tell=print)
            print(f"level {before}" + (f" raised to {after}" if after != before else ": kept"))
    print(f"applied {', '.join(applied)}" if applied else "the schema is up to date")
    return EXIT_OK


async def verify(settings: Settings, *, symbol: str | None) -> int:
    """Recount the table against the ledger; raises DifferenceError when they differ.

    UsageError for a `symbol` of which there is nothing: a misspelt one must not look proved.
    """
    from tradecore.store.verify import verify as recount

    symbol = None if symbol is None else _one_symbol(symbol)
    on_terminal = sys.stdout.isatty()
    async with open_database(settings) as connection:
        with _Progress(on_terminal) as progress:
            report = await recount(connection, symbol=symbol, progress=progress.show)
    if symbol and not report.symbols:
        raise UsageError(f"--symbol {symbol}: no trade of it is stored; check its spelling")
    if on_terminal:
        _print_report(report)
    else:
        for difference in report.differences:
            print_json("difference", asdict(difference))
        for hole in report.holes:
            print_json("hole", asdict(hole))
        counts = {
            name: getattr(report, name)
            for name in ("symbols", "ranges", "rows", "expected_rows", "difference_count")
        }
        counts |= {"horizon": report.horizon and report.horizon.isoformat()}
        counts |= {"holes": len(report.open_holes), "absent": len(report.absent_holes)}
        print_json("verified", counts)
    report.raise_if_different()
    return EXIT_OK


def _one_symbol(text: str) -> str:
    """Return a symbol as SUPPORTED_SYMBOLS would have it; UsageError unless it is just one."""
    try:
        (symbol,) = symbols(text)
    except ValueError:
        raise UsageError(f"--symbol {text!r}: give one symbol, such as BTCUSDT") from None
    return symbol


class _Progress:
    """A bar on a terminal, a JSON line every few seconds elsewhere."""

    def __init__(self, on_terminal: bool) -> None:
        self._bar: Any = None
        self._next_ns = clock.mono_ns() + int(PROGRESS_S * 1e9)
        if on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(desc="counting", unit=" rows", unit_scale=True, leave=False)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, counted: int, expected: int) -> None:
        if self._bar is not None:
            self._bar.total = expected
            self._bar.n = counted
            self._bar.refresh()
        elif clock.mono_ns() >= self._next_ns:
            self._next_ns = clock.mono_ns() + int(PROGRESS_S * 1e9)
            print_json("progress", {"counted": counted, "expected": expected})


def _print_report(report: "VerifyReport") -> None:
    for difference in report.differences[:_SHOWN_DIFFERENCES]:
        print(difference)
    if report.difference_count > _SHOWN_DIFFERENCES:
        print(f"... and {report.difference_count - _SHOWN_DIFFERENCES:,} more differences")
    for holes, word in ((report.open_holes, "hole"), (report.absent_holes, "absent at the venue")):
        for hole in holes[:_SHOWN_DIFFERENCES]:
            print(f"{hole.symbol} {hole.first_id}..{hole.last_id}: {word}")
        if len(holes) > _SHOWN_DIFFERENCES:
            print(f"... and {len(holes) - _SHOWN_DIFFERENCES:,} more ({word})")
    print(
        f"{report.rows:,} rows of {report.symbols} symbols counted, "
        f"{report.expected_rows:,} by the ledger, {len(report.open_holes):,} holes, "
        f"{len(report.absent_holes):,} absent at the venue"
        + (f", from {report.horizon:%Y-%m-%d} on" if report.horizon else "")
    )


def print_json(event: str, fields: Mapping[str, Any]) -> None:
    """Print one line for a program to read."""
    sys.stdout.write(orjson.dumps({"event": event, **fields}).decode() + "\n")
    sys.stdout.flush()


def health(environ: Mapping[str, str], *, live: bool = False) -> int:
    """Ask the running daemon for /ready, or for /live; print one line, return 0 if it is, else 1.

    It is live while its event loop turns, whatever venue and database do: what is not has to be
    killed.
    """
    from http.client import HTTPConnection, HTTPException

    word = "live" if live else "ready"
    host, port = http_address(environ)
    # Where it listens on all, it is asked on loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # nosec B104
    shown = f"[{host}]" if ":" in host else host
    try:
        connection = HTTPConnection(host, port, timeout=HEALTH_LIMIT_S)
        connection.request("GET", f"/{word}")
        response = connection.getresponse()
        status, body = response.status, response.read(65536)
        connection.close()
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        print(f"not {word}: http://{shown}:{port}/{word} does not answer: {reason}")
        return EXIT_BUG
    if status == 200:
        print(word)
        return EXIT_OK
    print(f"not {word}: {_reasons(body) or f'HTTP {status}'}")
    return EXIT_BUG


def _reasons(body: bytes) -> str:
    """Return the daemon's own reasons as one printable line; "" when it is not its answer."""
    try:
        reasons = "; ".join(str(reason["text"]) for reason in json.loads(body)["reasons"])
    except (ValueError, KeyError, TypeError):
        return ""
    return "".join(c if c.isprintable() else " " for c in reasons)[:500]
