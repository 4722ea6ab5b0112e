"""Fills holes from the venue's daily dumps, when REST no longer has the trades."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tradecore import clock
from tradecore.backfill import plan
from tradecore.backfill.plan import Hole, Jump
from tradecore.errors import DataDirError
from tradecore.rest import dump
from tradecore.rest.budget import RestError
from tradecore.store.sink import WriteResult

Rows = npt.NDArray[Any]

DumpTrouble = (RestError, dump.DumpError, DataDirError)
"""What fetching and reading a dump raises: not to be had, not as it should be, no room for it."""

FOLDER_NAME = "backfill-dumps"
"""Ours alone: what lies there is taken away. An operator's own dumps may lie beside it."""

LONGEST_S = 3600.0
_TROUBLE_S = (10.0, 60.0, 600.0)


def trouble_s(tries: int, longest_s: float = LONGEST_S) -> float:
    """Return the seconds to the next try after trouble, of which there was `tries` before.

    Most of it is over soon, and what is not stays for long. A dump that is not there is no trouble.
    """
    pause_s = _TROUBLE_S[tries] if tries < len(_TROUBLE_S) else longest_s
    return min(pause_s, longest_s) * random.uniform(0.75, 1.0)


class Passed(NamedTuple):
    """Ids of a hole that a dump passes over, and the times of the rows around them."""

    jump: Jump
    below_us: int
    above_us: int


class DumpRead(NamedTuple):
    """What one dump had of some holes. `sha256`: of the file, "" when it passes over nothing."""

    name: str
    sha256: str
    stored: int
    passed: tuple[Passed, ...]


class Dumps:
    """Fetches and reads dumps, one at a time: each may have hundreds of megabytes."""

    def __init__(
        self,
        base_url: str,
        folder: Path,
        write: Callable[[str, Rows, str], Awaitable[WriteResult]],
        *,
        longest_s: float = LONGEST_S,
    ) -> None:
        """`longest_s`: how long host and disk are left alone when they refuse again and again."""
        self._base_url = base_url
        self._folder = folder / FOLDER_NAME
        self._write = write
        self._turn = asyncio.Lock()
        self._is_clean = False
        self._longest_s = longest_s
        self._refusals = 0  # in a row
        self._silent_until_s = 0.0
        self._trouble = ""

    @property
    def is_busy(self) -> bool:
        """Whether one is being fetched or read."""
        return self._turn.locked()

    @property
    def silent_s(self) -> float:
        """For how many seconds nothing is fetched, since host or disk refused the last one."""
        return max(self._silent_until_s - clock.mono_ns() / 1e9, 0.0)

    async def read(self, symbol: str, day: date, holes: Sequence[Hole]) -> DumpRead | None:
        """Store what the dump of a day has of `holes`, which ascend; None when it is not there.

        Raises one of DumpTrouble, and TransientStoreError while the database is away.
        """
        async with self.fetched(symbol, day) as path:
            return None if path is None else await self._read(path, symbol, holes)

    @asynccontextmanager
    async def fetched(self, symbol: str, day: date) -> AsyncIterator[Path | None]:
        """Fetch the dump of a day for the block; None when it is not there."""
        async with self._turn:
            path = await self._fetch(symbol, day)
            try:
                yield path
            finally:
                if path is not None:
                    # What cannot be removed is fetched over, or taken away at the next start.
                    with suppress(OSError):
                        path.unlink()

    async def _fetch(self, symbol: str, day: date) -> Path | None:
        if wait_s := self.silent_s:
            raise RestError("limited", self._trouble, retry_after_s=wait_s)
        try:
            if not self._is_clean:
                await asyncio.to_thread(self._clean)
                self._is_clean = True
            path = await dump.fetch_day(self._base_url, symbol, day, self._folder)
        except (RestError, DataDirError) as error:
            # A broken file is the day's; all else is of the host or the disk, hence of all days.
            if not isinstance(error, RestError) or error.kind != "broken":
                pause_s = trouble_s(self._refusals, self._longest_s)
                self._silent_until_s = clock.mono_ns() / 1e9 + pause_s
                self._refusals += 1
                self._trouble = str(error)
            raise
        self._refusals = 0
        return path

    def _clean(self) -> None:
        """Make the folder; take away what a killed process has left there."""
        with dump.on_disk(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("*-trades-*.zip*"):
                path.unlink(missing_ok=True)

    async def _read(self, path: Path, symbol: str, holes: Sequence[Hole]) -> DumpRead:
        stored, passed = 0, list[Passed]()
        unfit: dict[Hole, str] = {}  # holes that the dump is not of, and why
        before: Rows | None = None  # the last row of the block before
        async for rows in blocks(path, symbol, proven=True):
            joined = rows if before is None else np.concatenate((before, rows))
            ids = joined["trade_id"]
            reached = plan.overlapping(holes, int(ids[0]), int(ids[-1]))
            for hole in reached:
                try:
                    plan.hold_against_times(joined, hole)
                except ValueError as error:
                    unfit.setdefault(hole, str(error))
            fit = [hole for hole in reached if hole not in unfit]
            for hole in fit:
                passed += _passed(joined[plan.around(ids, hole)], hole)
            chosen = plan.select(rows["trade_id"], fit)
            if chosen.any():
                stored += (await self._write(symbol, rows[chosen], "dump")).stored
            before = rows[-1:].copy()
            if int(ids[-1]) > holes[-1].last_id:
                break
        for why in unfit.values() if not stored else ():
            raise dump.DumpError(
                f"what {path.name} has is not stored: {why}; correct BINANCE_DUMP_URL, or record"
                " a symbol that is listed anew in another database"
            )
        sha256 = await asyncio.to_thread(_digest, path) if passed else ""
        return DumpRead(path.name, sha256, stored, tuple(passed))


def _passed(rows: Rows, hole: Hole) -> Iterator[Passed]:
    ids, times = rows["trade_id"], rows["trade_us"]
    for jump in plan.jumps(ids, hole):
        below, above = ids.searchsorted((jump.id_below, jump.id_above))
        yield Passed(jump, int(times[below]), int(times[above]))


def _digest(path: Path) -> str:
    with dump.on_disk(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def blocks(path: Path, symbol: str, *, proven: bool = False) -> AsyncIterator[Rows]:
    """Read a dump block by block in a thread, so that the loop goes on. Raises DumpError.

    `proven`: its checksum has been compared already.
    """
    source = dump.read_dump(path, symbol, proven=proven)
    while (rows := await asyncio.to_thread(next, source, None)) is not None:
        if len(rows):
            yield rows
