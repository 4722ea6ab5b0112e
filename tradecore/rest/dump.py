"""The venue's daily dumps: every trade of a symbol and day as one zipped CSV file.

<base>/data/spot/daily/trades/<SYM>/<SYM>-trades-<YYYY-MM-DD>.zip, its SHA-256 beside it under the
same name and .CHECKSUM (binance.md §8). Times are in us from 2025 on, in ms before.
"""

import asyncio
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from tradecore import _history, clock
from tradecore.backoff import Backoff
from tradecore.errors import DataDirError, UsageError
from tradecore.rest.budget import RestError
from tradecore.rest.client import read_body, safe_base
from tradecore.schema import TRADE_DTYPE
from tradecore.tls import tls_of

if TYPE_CHECKING:
    import aiohttp

BLOCK_ROWS = 16_384
MAX_ZIP_BYTES = 8 << 30
"""Longest file that is fetched; the venue's longest days are near half a gigabyte."""
TRIES = 3

_CONNECT_S = 10.0
_SILENCE_S = 30.0
_WHOLE_S = 3600.0
_RETRY_S = (1.0, 10.0)
_MAX_CHECKSUM_BYTES = 4096
_PIECE = 1 << 20
_MAX_LINE = 4096
_MAX_RATIO = 100
"""Text to zip: trades shrink to about a fifth."""
_MEND = "fetch the file anew from the venue, or leave it out"


class DumpError(UsageError):
    """A dump file that is not what the venue publishes; names file and line."""


class DumpName(NamedTuple):
    """What a file's name tells: `when` is a day, 2026-11-24, or a month, 2026-11."""

    symbol: str
    when: str


def dump_name(path: Path) -> DumpName | None:
    """Read the name of a daily or monthly file of trades, zip or csv; None for any other file."""
    found = re.fullmatch(r"(.+)-trades-([0-9]{4}-[0-9]{2}(?:-[0-9]{2})?)\.(?:zip|csv)", path.name)
    if found is None:
        return None
    try:
        date.fromisoformat(f"{found[2]}-01"[:10])
    except ValueError:
        return None
    return DumpName(found[1], found[2])


# -- fetching -------------------------------------------------------------------------------------


async def fetch_day(
    base_url: str, symbol: str, day: date, folder: Path, *, tries: int = TRIES
) -> Path | None:
    """Fetch the dump of a day into `folder` and return its path; None when the venue has none yet.

    The file is there only when its checksum is right: read it with `proven=True`. Raises RestError
    (unreachable after `tries`, refused, broken) and DataDirError for a full disk.
    """
    import aiohttp

    base = safe_base(base_url, "BINANCE_DUMP_URL")
    name = f"{symbol}-trades-{day:%Y-%m-%d}.zip"
    url = f"{base}/data/spot/daily/trades/{quote(symbol, safe='')}/{quote(name, safe='')}"
    backoff = Backoff(*_RETRY_S)
    backoff.next_delay_s()  # the first, without a delay, was that of the first try
    timeout = aiohttp.ClientTimeout(
        total=_WHOLE_S, sock_connect=_CONNECT_S, connect=_CONNECT_S, sock_read=_SILENCE_S
    )
    while True:
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=tls_of(base)),
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity", "User-Agent": "tradecore"},
            ) as session:
                return await _fetch(session, url, folder / name)
        except ValueError as error:
            raise RestError("broken", _failed(name, f"a broken answer ({error})")) from error
        except (aiohttp.ClientError, OSError) as error:
            failure = RestError("unreachable", _failed(name, f"no answer ({error or 'timeout'})"))
            failure.__cause__ = error
        except RestError as error:
            if error.kind != "unreachable":
                raise
            failure = error
        tries -= 1
        if tries <= 0:
            raise failure
        await asyncio.sleep(backoff.next_delay_s())


async def _fetch(session: "aiohttp.ClientSession", url: str, path: Path) -> Path | None:
    from yarl import URL

    async with session.get(URL(f"{url}.CHECKSUM", encoded=True), allow_redirects=False) as answer:
        if not _is_there(answer, path.name):
            return None
        line = await read_body(answer, _MAX_CHECKSUM_BYTES)
    wanted = _checksum(line, path.name)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may fetch it at once
    _sweep(path)
    try:
        async with session.get(URL(url, encoded=True), allow_redirects=False) as answer:
            if not _is_there(answer, path.name):
                return None
            found = await _save(answer, draft, path.name)
        if found != wanted:
            text = f"its checksum is {found}, its .CHECKSUM says {wanted}; the venue may be"
            raise RestError("broken", _failed(path.name, f"{text} replacing it: try again later"))
        with on_disk(path):
            draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def _sweep(path: Path) -> None:
    """Remove what killed processes have left of earlier tries."""
    with suppress(OSError):
        for draft in path.parent.glob("*.part"):
            if clock.wall_ns() / 1e9 - draft.lstat().st_mtime > 2 * _WHOLE_S:
                draft.unlink(missing_ok=True)


def _is_there(answer: "aiohttp.ClientResponse", name: str) -> bool:
    """Tell 200 from 404; RestError for any other status."""
    if answer.status in (200, 404):
        return answer.status == 200
    kind = "unreachable" if answer.status >= 500 else "refused"
    hint = "check BINANCE_DUMP_URL" if answer.status < 500 else "try later"
    raise RestError(
        "limited" if answer.status == 429 else kind,
        _failed(name, f"HTTP {answer.status}; {hint}"),
        status=answer.status,
    )


def _checksum(line: bytes, name: str) -> str:
    """Take a line of sha256sum apart: 64 hex digits, blanks, the file's name."""
    words = line.decode(errors="replace").split()
    if (
        len(words) != 2
        or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0])
        or words[1].removeprefix("*") != name
    ):
        raise RestError("broken", _failed(name, f"its .CHECKSUM is {line[:120]!r}"))
    return words[0].lower()


async def _save(answer: "aiohttp.ClientResponse", draft: Path, name: str) -> str:
    """Write a body to `draft` and return its SHA-256; disk and digest work in a thread."""
    digest = hashlib.sha256()
    size = 0
    with on_disk(draft):
        draft.parent.mkdir(parents=True, exist_ok=True)
        file = draft.open("wb")
    try:
        piece = bytearray()

        def put() -> None:
            with on_disk(draft):
                file.write(piece)
            digest.update(piece)

        async for chunk in answer.content.iter_chunked(_PIECE):
            size += len(chunk)
            if size > MAX_ZIP_BYTES:
                raise RestError("broken", _failed(name, f"it is longer than {MAX_ZIP_BYTES} bytes"))
            piece += chunk
            if len(piece) >= _PIECE:
                await asyncio.to_thread(put)
                piece = bytearray()
        await asyncio.to_thread(put)
    finally:
        with on_disk(draft):
            file.close()
    return digest.hexdigest()


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn what making and writing a file can raise into DataDirError."""
    try:
        yield
    except OSError as error:
        raise DataDirError(
            f"{path} cannot be written: {error.strerror or error}; "
            "free disk room or give this user write access"
        ) from error


def _failed(name: str, text: str) -> str:
    return f"the dump {name} was not fetched: {text}"


# -- reading --------------------------------------------------------------------------------------


def read_dump(path: Path, symbol: str, *, proven: bool = False) -> Iterator[NDArray[Any]]:
    """Yield the trades of a dump, zip or csv, as TRADE_DTYPE rows, at most BLOCK_ROWS at a time.

    Rows have symbol_id, recv_ns, sequence 0; ids ascend strictly over the whole file. Unless
    `proven`, a zip is first held against the .CHECKSUM beside it and against its own CRC, so that
    no row of a damaged file is ever given out; this takes seconds for a long file, and so may each
    block some milliseconds: an event loop should call it in a thread.
    Raises DumpError.
    """
    told = dump_name(path)
    if told is not None and told.symbol != symbol:
        raise DumpError(f"{path} holds trades of {told.symbol}, not of {symbol}")
    reader = _history.LineReader()
    with _open(path, proven) as file:
        carry = b""
        while piece := _piece(path, file):
            end = piece.rfind(b"\n") + 1
            if end:
                yield from _blocks(path, reader, carry + piece[:end])
                carry = piece[end:]
            else:
                carry += piece
            if len(carry) > _MAX_LINE:
                raise DumpError(f"{path}, line {reader.line + 1}: it is too long; {_MEND}")
        if carry:
            yield from _blocks(path, reader, carry + b"\n")


def _blocks(path: Path, reader: _history.LineReader, lines: bytes) -> Iterator[NDArray[Any]]:
    text = lines + bytes(_history.PADDING)
    at = 0
    while at < len(lines):
        rows = np.empty(BLOCK_ROWS, TRADE_DTYPE)
        try:
            count, at = reader.read(text, at, rows)
        except ValueError as error:
            raise DumpError(f"{path}, line {reader.line}: {error}; {_MEND}") from error
        if count:
            yield rows[:count]


def _piece(path: Path, file: IO[bytes]) -> bytes:
    with _readable(path):
        return file.read(_PIECE)


@contextmanager
def _open(path: Path, proven: bool) -> Iterator[IO[bytes]]:
    """Open a csv, or the one member of a zip."""
    file: IO[bytes]
    if path.suffix.lower() != ".zip":
        with _readable(path):
            file = path.open("rb")
        with file:
            yield file
        return
    import zipfile

    if not proven:
        _hold_against_checksum(path)
    with _readable(path):
        archive = zipfile.ZipFile(path)
    with archive:
        members = [one for one in archive.infolist() if not one.is_dir()]
        if len(members) != 1:
            raise DumpError(f"{path} holds {len(members)} files, not one; {_MEND}")
        if members[0].file_size > _MAX_RATIO * max(members[0].compress_size, 1024):
            raise DumpError(f"{path} unpacks to {members[0].file_size:,} bytes; {_MEND}")
        with _readable(path):
            if not proven and archive.testzip() is not None:
                raise DumpError(f"{path} is damaged: its CRC is wrong; {_MEND}")
            file = archive.open(members[0])
        with file:
            yield file


def _hold_against_checksum(path: Path) -> None:
    """Compare with the .CHECKSUM beside the file, if there is one."""
    beside = path.with_name(path.name + ".CHECKSUM")
    with _readable(path):
        if not beside.exists():
            return
        with beside.open("rb") as file:
            line = file.read(_MAX_CHECKSUM_BYTES)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    words = line.decode(errors="replace").split()
    if not words or words[0].lower() != found:
        raise DumpError(f"{path} has the SHA-256 {found}, {beside.name} says otherwise; {_MEND}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading a file and unpacking it can raise into DumpError."""
    import zipfile

    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DumpError(f"{path} is no whole zip file ({error}); {_MEND}") from error
    except (NotImplementedError, RuntimeError) as error:  # other packings, encryption
        raise DumpError(f"{path} cannot be unpacked ({error}); {_MEND}") from error
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror or error}") from error
