"""`tradecore backfill`: fills open holes of any age, and history before the first trade."""

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tradecore import clock
from tradecore.backfill import plan
from tradecore.backfill.work import WrongReplyError
from tradecore.backoff import Backoff
from tradecore.commands_shared import Progress, moment, open_store, shown
from tradecore.errors import (
    EXIT_DIFFERENCE,
    EXIT_OK,
    UsageError,
)
from tradecore.settings import Settings
from tradecore.values import symbols as parse_symbols

if TYPE_CHECKING:
    from tradecore.backfill.engine import Backfill, FillStats, Work
    from tradecore.backfill.history import History
    from tradecore.rest.client import RestClient
    from tradecore.store.holes import OpenHole
    from tradecore.store.store import Store

SOURCES = ("auto", "rest", "dump")
_ROUND_HOLES = 10_000
_SHOWN_HOLES = 20
_MAX_ROUNDS = 1000
_DRAFT = "backfill-run-"
_FRESH_S = 60.0
_HISTORY_TRIES = 10
_BAN_PATIENCE_S = 900.0


@dataclass(slots=True)
class _Outcome:
    """What the command has done."""

    stored: Counter[str] = field(default_factory=Counter)
    """Trades by source."""
    ids_missing: int = 0
    """Of the holes that were there at the beginning."""
    left: list["Work"] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Why history could not be fetched as far as was asked."""
    failed: bool = False

    @property
    def trades(self) -> int:
        return sum(self.stored.values())


async def run(
    settings: Settings,
    *,
    symbols: Sequence[str],
    from_text: str | None,
    to_text: str | None,
    source: str,
) -> int:
    """Fill what lies between the two times; ends with EXIT_DIFFERENCE when something is left.

    Raises UsageError for a symbol of which nothing is stored and for times that make no sense.
    """
    from_us = None if from_text is None else moment("--from", from_text)
    to_us = clock.wall_ns() // 1000 if to_text is None else moment("--to", to_text)
    if from_us is not None and from_us >= to_us:
        raise UsageError(f"--from {from_text} is not before --to {to_text or 'now'}")
    names = _names(symbols)
    async with open_store(settings, make=False) as store:
        bounds = await store.bounds()
        if unknown := [name for name in names if name not in bounds]:
            raise UsageError(
                f"--symbol {', '.join(unknown)}: no trade of it is stored; check its spelling, or"
                " let `tradecore run` or `tradecore import` store its first trades"
            )
        kept_us = _kept_from_us(settings, store)
        window = _Window(names or list(bounds), from_us, to_us, source, kept_us)
        return await _fill(settings, store, window)


def _kept_from_us(settings: Settings, store: "Store") -> int:
    """Return from when on trades are kept: older ones would be dropped again."""
    kept_us = store.horizon_us or 0
    if settings.retention_s is not None:
        since_us = clock.wall_ns() // 1000 - settings.retention_s * 1_000_000
        kept_us = max(kept_us, since_us // plan.DAY_US * plan.DAY_US)
    return kept_us


def _names(texts: Sequence[str]) -> list[str]:
    """Return the symbols as SUPPORTED_SYMBOLS would have them, each once."""
    try:
        return list(dict.fromkeys(name for text in texts for name in parse_symbols(text)))
    except ValueError as error:
        raise UsageError(f"--symbol: {error}") from None


@dataclass(frozen=True, slots=True)
class _Window:
    """What is to be filled."""

    symbols: list[str]
    from_us: int | None
    to_us: int
    source: str
    kept_us: int
    """Older trades are below the retention horizon, or would be soon."""

    def holds(self, hole: "OpenHole") -> bool:
        """Tell whether a trade of the hole may lie in the window."""
        after = hole.above_us >= max(self.from_us or 0, self.kept_us)
        return after and hole.below_us <= self.to_us


async def _fill(settings: Settings, store: "Store", window: _Window) -> int:
    from tradecore.backfill.dumps import Dumps
    from tradecore.backfill.engine import Backfill, FillPolicy
    from tradecore.backfill.history import History
    from tradecore.backfill.write import Writer

    outcome = _Outcome()
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(Progress("filling"))
        folder = stack.enter_context(_draft_folder(settings.data_dir))
        client = open_client(settings)
        stack.push_async_callback(client.close)
        policy = FillPolicy(
            max_age_s=float("inf"),
            dump_url=settings.dump_url,
            folder=folder,
            source=window.source,
            refused_base_s=0.0,  # each hole has its try
        )

        def show(_: object = None) -> None:
            done = outcome.trades + backfill.stats.ids_absent
            progress.show(done, max(outcome.ids_missing, done) or None)

        def on_stored(source: str, rows: int) -> None:
            backfill.stats.filled[source] += rows
            show()

        backfill = Backfill(store, client, policy, on_progress=show)
        outcome.stored = backfill.stats.filled
        history = History(
            client,
            Dumps(settings.dump_url, folder, write := Writer(store, backfill.stats.retries)),
            write,
            source=window.source,
            on_stored=on_stored,
        )
        await _fill_holes(store, backfill, window, outcome)
        if window.from_us is not None and window.from_us < window.kept_us:
            outcome.failed = True
            outcome.notes.append(
                f"history is fetched back to {shown(window.kept_us)} only: RETENTION gives up what"
                " is older; set a longer one, or off, before its days are given up"
            )
            window = replace(window, from_us=window.kept_us)
        if window.from_us is not None:
            await _extend(store, history, window, outcome)
            await _fill_holes(store, backfill, window, outcome)
        _sum_up(backfill.stats, outcome, progress)
    return EXIT_DIFFERENCE if outcome.left or outcome.failed else EXIT_OK


@contextmanager
def _draft_folder(data_dir: Path) -> Iterator[Path]:
    """Make a folder for dumps while they are read; take away those of commands that were killed."""
    # A long day has gigabytes: where /tmp is memory that would be too much.
    place = data_dir if data_dir.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=place) as name:
        held = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            for other in data_dir.glob(f"{_DRAFT}*"):
                _sweep(other)
            yield Path(name)
        finally:
            os.close(held)


def _sweep(folder: Path) -> None:
    """Remove a folder that no living command holds; one that was just made is not held yet."""
    with suppress(OSError):
        if clock.wall_ns() / 1e9 - folder.stat().st_mtime < _FRESH_S:
            return
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)


def open_client(settings: Settings) -> "RestClient":
    """Return a client of the venue that shares its budget with a daemon of the same DATA_DIR.

    A ban makes the folder if need be, so that the next call knows of it.
    """
    from tradecore.rest.budget import Budget
    from tradecore.rest.client import RestClient

    return RestClient(settings.rest_url, Budget.of(settings.data_dir, settings.rest_url))


async def _fill_holes(
    store: "Store", backfill: "Backfill", window: _Window, outcome: _Outcome
) -> None:
    """Fill the open holes in the window, until none is left but those that cannot be filled."""
    for _ in range(_MAX_ROUNDS):
        given_up = {(work.symbol, work.first_id, work.last_id) for work in outcome.left}
        holes = []
        for symbol in window.symbols:
            found = await store.open_holes(symbol=symbol, limit=_ROUND_HOLES + len(given_up))
            holes += [h for h in found if window.holds(h) and h[:3] not in given_up]
        if not holes:
            return
        outcome.ids_missing += sum(hole.ids for hole in holes)
        outcome.left += await backfill.fill(holes)


async def _extend(
    store: "Store",
    history: "History",
    window: _Window,
    outcome: _Outcome,
) -> None:
    """Fetch what lies before the first captured trade of each symbol."""
    from tradecore.backfill.dumps import DumpTrouble

    assert window.from_us is not None
    for symbol in window.symbols:
        pause = Backoff(1.0, 30.0)
        tried_at = -1
        while True:
            bounds = (await store.bounds(symbol))[symbol]
            if bounds.first_id != tried_at:
                pause.reset()
            tried_at = bounds.first_id
            try:
                begin = await history.extend(
                    symbol, bounds.first_id, bounds.first_us, window.from_us
                )
            except (WrongReplyError, *DumpTrouble) as error:
                waits_s = getattr(error, "retry_after_s", 0.0), getattr(error, "delay_s", 0.0)
                delay_s = max(*waits_s, pause.next_delay_s())
                if pause.attempts >= _HISTORY_TRIES or delay_s > _BAN_PATIENCE_S:
                    outcome.failed = True
                    outcome.notes.append(f"{symbol}: history before {bounds.first_id}: {error}")
                    break
                await asyncio.sleep(delay_s)
                continue
            outcome.failed |= not begin.is_all
            if begin.why:
                outcome.notes.append(
                    f"{symbol}: history begins at {begin.first_id}, {shown(begin.first_us)}:"
                    f" {begin.why}"
                )
            break


def _sum_up(stats: "FillStats", outcome: _Outcome, progress: Progress) -> None:
    for note in outcome.notes:
        progress.tell("note", note, text=note)
    for at, work in enumerate(outcome.left):
        if progress.on_terminal and at == _SHOWN_HOLES:
            more = len(outcome.left) - at
            progress.tell("more", f"... and {more:,} more holes", holes=more)
            break
        progress.tell(
            "left",
            f"{work}: {work.why}",
            symbol=work.symbol,
            first_id=work.first_id,
            last_id=work.last_id,
            why=work.why,
        )
    total = sum(outcome.stored.values())
    progress.tell(
        "backfilled",
        f"{total:,} trades stored ({outcome.stored['rest']:,} by REST,"
        f" {outcome.stored['dump']:,} from dumps), {stats.holes_filled:,} holes filled,"
        f" {stats.holes_absent:,} absent at the venue, {len(outcome.left):,} left",
        stored=total,
        by=outcome.stored,
        holes_filled=stats.holes_filled,
        holes_absent=stats.holes_absent,
        ids_absent=stats.ids_absent,
        holes_left=len(outcome.left),
    )
