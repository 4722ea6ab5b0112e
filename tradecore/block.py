"""How long the venue must not be asked, remembered on disk and shared by processes.

A ban is the venue's answer to an address, not to a process: it is written before anything else
happens, and read at the start and whenever the file has changed. While a process runs, only the
monotonic clock counts. On disk the end stands by both clocks: the monotonic one is right as long
as the machine has not been booted anew, the wall clock after that. No length passes three days,
the longest ban that the venue gives (binance.md §4), so a clock that is wrong cannot keep us out.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import orjson

from tradecore import clock
from tradecore.datadir import open_owned

Kind = Literal["banned", "limited", "refused"]
"""418; 429 or no weight left; anything else that more requests would make worse (403, 451)."""

LONGEST_S = 3 * 86_400.0
MARGIN_S = 1.0
"""Retry-After is in whole seconds: a venue that rounds it down must not see us too early."""
_LIMITED_S = 60.0
_FIREWALL_S = 300.0
_COUNTRY_S = 60.0
_FIRST_BAN_S = 120.0
_BANNED_UNTIL = re.compile(rb"banned until (\d{10,17})")
_DAMAGED_S = 120.0
"""How long nobody asks when the file cannot be understood: it may have held a ban."""
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
_LOCK_TRIES = 50
_LOCK_PAUSE_S = 0.01

_log = logging.getLogger(__name__)


class Block(NamedTuple):
    """Nobody asks before `until_s` of the monotonic clock; the later one is the greater."""

    until_s: float
    length_s: float
    kind: Kind


class Memory(NamedTuple):
    """What is remembered of a host. `minute_ends_s` is of the monotonic clock, 0 = unknown."""

    block: Block | None = None
    strikes: int = 0
    used_weight: int = 0
    minute_ends_s: float = 0.0
    ceiling: int = 0


def mono_s() -> float:
    """Return seconds of the monotonic clock."""
    return clock.mono_ns() / 1e9


class BlockFile:
    """The file of all hosts; None keeps nothing. Never raises: what fails is logged."""

    def __init__(self, path: Path | None, host: str) -> None:
        self._path = path
        self._host = host
        self._seen: tuple[int, int, int] | None = None
        self._boot = _boot_id()
        self.failures = 0
        self._failing = False

    def changed(self) -> bool:
        """Tell whether the file is another one than that last read or written. One stat call."""
        return self._path is not None and self._signature() != self._seen

    def read(self) -> Memory:
        """Return what the file holds about the host; a damaged one is written anew."""
        if self._path is None:
            return Memory()
        self._seen = self._signature()
        try:
            found = self._content().get(self._host)
            return Memory() if found is None else self._from_json(found)
        except _DAMAGE as error:
            _log.warning(
                "%s is damaged (%r) and may have held a ban: it is written anew, and the venue is "
                "left alone for %d s; if you know that there is no ban, delete it and start again",
                *(self._path, error, _DAMAGED_S),
            )
            block = Block(mono_s() + _DAMAGED_S, _DAMAGED_S, "limited")
            # At once: or else each start would find the damage and wait again.
            return self.write(Memory(block), durable=True)

    def write(self, memory: Memory, *, durable: bool) -> Memory:
        """Put `memory` into the file, keep the longer block, and return what then stands there.

        `durable`: not before it is on the disk, in a folder that is made if need be.
        """
        if self._path is None or not (durable or self._path.parent.is_dir()):
            return memory
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                content, there = dict[str, Any](), Memory()
                with suppress(*_DAMAGE):
                    content = self._content()
                    if (stored := content.get(self._host)) is not None:
                        there = self._from_json(stored)
                if there.block and (memory.block is None or memory.block < there.block):
                    memory = memory._replace(block=there.block)
                content[self._host] = self._to_json(memory)
                self._replace(self._path, orjson.dumps(content), durable)
                self._seen = self._signature()
                self._failing = False
        except OSError as error:
            self.failures += 1
            if not durable and self._failing:
                return memory  # told already
            self._failing = True
            _log.error(
                "%s cannot be written (%s): a ban would be forgotten at a restart; free disk "
                "room or give this user write access",
                *(self._path, error.strerror or error),
            )
        return memory

    def _content(self) -> dict[str, Any]:
        assert self._path is not None
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            _log.warning("%s cannot be read: %s", self._path, error.strerror)
            return {}
        content = orjson.loads(data)
        if not isinstance(content, dict):
            raise TypeError("no object")
        return content

    def _signature(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino, stat.st_size)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the file; after half a second go on without it.

        A process that was stopped while it held the lock must not stop us too; the rename is
        atomic in any case.
        """
        assert self._path is not None
        lock = open_owned(Path(f"{self._path}.lock"), os.O_RDWR)
        try:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_PAUSE_S)
            yield
        finally:
            os.close(lock)

    @staticmethod
    def _replace(path: Path, data: bytes, durable: bool) -> None:
        draft = Path(f"{path}.{os.getpid()}")
        try:
            file = open_owned(draft, os.O_WRONLY | os.O_TRUNC)
            try:
                os.write(file, data)
                if durable:
                    os.fsync(file)
            finally:
                os.close(file)
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise
        if durable:
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _to_json(self, memory: Memory) -> dict[str, Any]:
        now_s, wall_s = mono_s(), clock.wall_ns() / 1e9
        block = memory.block
        return {
            "boot": self._boot,
            "block": block
            and {
                "kind": block.kind,
                "until_mono_s": block.until_s,
                "until_wall_s": wall_s + block.until_s - now_s,
                "length_s": block.length_s,
            },
            "strikes": memory.strikes,
            "used_weight": memory.used_weight,
            "minute_ends_wall_s": wall_s + memory.minute_ends_s - now_s,
            "ceiling": memory.ceiling,
        }

    def _from_json(self, found: dict[str, Any]) -> Memory:
        now_s, wall_s = mono_s(), clock.wall_ns() / 1e9
        block = None
        if stored := found["block"]:
            if stored["kind"] not in get_args(Kind):
                raise ValueError(stored["kind"])
            length_s = min(float(stored["length_s"]), LONGEST_S)
            left_s = float(stored["until_wall_s"]) - wall_s
            if found["boot"] == self._boot:
                left_s = max(left_s, float(stored["until_mono_s"]) - now_s)
            left_s = min(left_s, length_s)
            if left_s > 0:
                block = Block(now_s + left_s, length_s, stored["kind"])
        minute_s = min(max(float(found["minute_ends_wall_s"]) - wall_s, 0.0), 60.0)
        return Memory(
            block,
            min(int(found["strikes"]), 20),
            int(found["used_weight"]) if minute_s else 0,
            now_s + minute_s,
            int(found["ceiling"]),
        )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown {os.getpid()}"


def sentence(status: int, told_s: float, strikes: int) -> tuple[Kind, float]:
    """Return what a 418, 429, 403 or 451 means, and for how many seconds nobody asks.

    `told_s`: what the venue said itself, 0 = nothing. `strikes`: how many bans were before.
    """
    if status == 418:
        return "banned", told_s or _FIRST_BAN_S * 2**strikes
    if status == 429:
        return "limited", told_s or _LIMITED_S
    return "refused", told_s or (_FIREWALL_S if status == 403 else _COUNTRY_S)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that Retry-After tells, LONGEST_S at most; 0.0 when it tells none.

    A number or an HTTP date, which is held against the clock of whoever wrote it.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return min(float(text), LONGEST_S)
    until_s = _http_date_s(text)
    return min(max(until_s - _answered_s(headers), 0.0), LONGEST_S) if until_s else 0.0


def told_s(headers: Mapping[str, str], body: bytes) -> float:
    """Return the seconds of the ban that a body tells ("banned until <ms>"), 0.0 when none."""
    found = _BANNED_UNTIL.search(body)
    if found is None:
        return 0.0
    until_ms = int(found[1])
    if until_ms > 10**14:  # microseconds
        until_ms //= 1000
    return max(until_ms / 1e3 - _answered_s(headers), 0.0)


def _answered_s(headers: Mapping[str, str]) -> float:
    """Return when an answer was given, in seconds since 1970: by its Date, else our clock."""
    return _http_date_s(headers.get("Date", "")) or clock.wall_ns() / 1e9


def _http_date_s(text: str) -> float:
    """Read "Tue, 24 Nov 2026 03:41:26 GMT" as seconds since 1970; 0.0 when it is anything else."""
    try:
        return parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
