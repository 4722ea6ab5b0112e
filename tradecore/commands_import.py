"""`tradecore import`: the venue's dump files of trades into the database, exactly once."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tradecore.commands_shared import Progress, open_store
from tradecore.errors import (
    EXIT_DIFFERENCE,
    EXIT_OK,
    UsageError,
)
from tradecore.settings import Settings
from tradecore.values import symbols

if TYPE_CHECKING:
    from tradecore.backfill.write import Writer

CAUSE = "import"


@dataclass(slots=True)
class _File:
    """What became of one file."""

    path: Path
    symbol: str
    rows: int = 0
    stored: int = 0
    duplicate: int = 0
    parked: int = 0
    expired: int = 0
    """Below the retention horizon."""
    error: str = ""

    @property
    def line(self) -> str:
        text = f"{self.path}: {self.symbol or '?'}, {self.rows:,} trades, {self.stored:,} stored"
        if self.duplicate:
            text += f", {self.duplicate:,} were there already"
        if self.expired:
            text += f", {self.expired:,} too old: RETENTION has given up their days"
        if self.parked:
            text += f", {self.parked:,} refused by the database (see dead_letters)"
        return f"{text}: {self.error}" if self.error else text

    @property
    def failed(self) -> bool:
        return bool(self.error or self.parked)


async def run(settings: Settings, paths: Iterable[str], *, symbol: str | None) -> int:
    """Import files and folders; goes on after a bad one, and then ends with EXIT_DIFFERENCE.

    Raises UsageError for paths that are not there, before anything is read.
    """
    from tradecore.backfill.write import Writer

    symbol = None if symbol is None else _one_symbol(symbol)
    files = _find([Path(path) for path in paths], symbol)
    done: list[_File] = []
    async with open_store(settings, make=True) as store:
        write = Writer(store, Counter())
        with Progress("importing") as progress:
            for file in files:
                await _import(write, file, progress, sum(one.rows for one in done))
                done.append(file)
                fields = {name: getattr(file, name) for name in _File.__slots__}
                progress.tell("file", file.line, **{**fields, "path": str(file.path)})
            failed = sum(file.failed for file in done)
            stored = sum(file.stored for file in done)
            rows = sum(file.rows for file in done)
            expired = sum(file.expired for file in done)
            old = f", {expired:,} too old" if expired else ""
            progress.tell(
                "imported",
                f"{len(done)} files, {rows:,} trades, {stored:,} stored{old},"
                f" {failed} files failed",
                files=len(done),
                rows=rows,
                stored=stored,
                duplicate=sum(file.duplicate for file in done),
                expired=expired,
                failed=failed,
            )
    return EXIT_DIFFERENCE if failed else EXIT_OK


def _one_symbol(text: str) -> str:
    try:
        (symbol,) = symbols(text)
    except ValueError:
        raise UsageError(f"--symbol {text!r}: give one symbol, such as BTCUSDT") from None
    return symbol


def _find(paths: list[Path], symbol: str | None) -> list[_File]:
    """Return the files to import, each once; in folders only those with the venue's names."""
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UsageError(f"there is no {', '.join(missing)}: give dump files or folders with them")
    by_path = dict(one for path in paths for one in _walk(path, symbol))
    found = [_File(path, name) for path, name in by_path.items()]
    if not found:
        raise UsageError(
            f"no dump in {', '.join(map(str, paths))}: files are named"
            " BTCUSDT-trades-2026-01-31.zip or .csv; --symbol takes .zip and .csv of other names"
        )
    return found


def _walk(path: Path, symbol: str | None) -> Iterator[tuple[Path, str]]:
    from tradecore.rest.dump import dump_name

    if not path.is_dir():
        yield path, _symbol_of(path, symbol)
        return
    for one in sorted(path.rglob("*")):
        wanted = dump_name(one) or (symbol and one.suffix.lower() in (".zip", ".csv"))
        if wanted and one.is_file():
            yield one, _symbol_of(one, symbol)


def _symbol_of(path: Path, symbol: str | None) -> str:
    from tradecore.rest.dump import dump_name

    name = dump_name(path)
    return name.symbol if name else symbol or ""


async def _import(write: "Writer", file: _File, progress: Progress, before: int) -> None:
    """Import one file; what goes wrong with it is noted in it."""
    from tradecore.backfill.dumps import blocks
    from tradecore.rest.dump import DumpError

    if not file.symbol:
        file.error = "its name does not tell the symbol: give --symbol"
        return
    try:
        if file.path.suffix.lower() != ".zip":  # the reader does that for a zip
            await asyncio.to_thread(_hold_against_checksum, file.path)
        async for rows in blocks(file.path, file.symbol):
            result = await write(file.symbol, rows, "dump", CAUSE)
            file.rows += len(rows)
            file.stored += result.stored
            file.duplicate += result.duplicate
            file.parked += result.parked
            file.expired += result.expired
            progress.show(before + file.rows, None, file=str(file.path))
    except (DumpError, _ChecksumError, OSError) as error:
        file.error = str(error)


class _ChecksumError(Exception):
    """A file is not what the checksum beside it says."""


def _hold_against_checksum(path: Path) -> None:
    """Hold a file against NAME.CHECKSUM beside it, if that is there: one line of sha256sum."""
    import hashlib

    beside = path.with_name(f"{path.name}.CHECKSUM")
    if not beside.exists():
        return
    words = beside.read_bytes()[:4096].decode(errors="replace").split()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not words or words[0].lower() != found:
        raise _ChecksumError(
            f"it has the SHA-256 {found}, {beside.name} says otherwise; fetch both files again"
        )
