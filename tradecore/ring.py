"""The ring's file: its layout, how it is opened, and how a former process's rows are recovered.

    byte 0       header, one page       magic, layout version, dtype checksum, capacity, cursors
    byte 4096    symbol table           SYMBOL_SLOTS slots of 48 bytes: u16 size, UTF-8 bytes
    byte ROWS_AT rows                   capacity x 64 bytes, schema.TRADE_DTYPE

The file is allocated in full when it is made (a full disk is an error at start, never a SIGBUS
later) and survives the death of the process; what a crash of the host leaves depends on what the
kernel had written back, so its rows are trusted by checksum only.
"""

import logging
import mmap
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tradecore._ring import RingBuffer
from tradecore._symbols import SymbolTable
from tradecore.errors import DataDirError
from tradecore.schema import SYMBOL_MAX_BYTES, TRADE_DTYPE

log = logging.getLogger(__name__)

MAGIC = b"tradring"
LAYOUT_VERSION = 1
HEADER = struct.Struct("<8sIIqqqq")
"""magic, layout version, dtype checksum, capacity, base_seq, durable_seq, symbol count."""
BASE_AT = 24
DURABLE_AT = 32
SYMBOL_COUNT_AT = 40

SEQUENCE_END = 1 << 62
"""No ring ever counts so far."""

FIRST_SEQ = 1
"""Sequence of the first row of all."""

SYMBOLS_AT = 4096
SYMBOL_SLOTS = 4096
SYMBOL_SLOT = struct.Struct(f"<H{SYMBOL_MAX_BYTES}s6x")
ROWS_AT = SYMBOLS_AT + SYMBOL_SLOTS * SYMBOL_SLOT.size

DTYPE_CHECKSUM = zlib.crc32(repr(TRADE_DTYPE.descr).encode())


class Ring(RingBuffer):
    """A preallocated ring of trade rows on a mapped file; it is the spool as well."""

    def __init__(self, path: Path, capacity: int) -> None:
        """Open the ring at `path`, making it if it is not there, and recover its rows.

        `capacity` (rows, a power of two) applies when the file is new or holds no pending row;
        otherwise the file keeps its own until a later start. Raises DataDirError when the file
        cannot be made, is damaged or was written by another layout.
        """
        self.path = path
        fresh = not path.exists()
        if fresh:
            _create(path, capacity)
        self._mapped, found = _open(path)
        super().__init__(self._mapped, ROWS_AT, BASE_AT, DURABLE_AT, found)
        self.torn = 0 if fresh else self.recover()
        if self.pending == 0 and found != capacity:
            next_seq = self.published_seq
            _create(path, capacity, next_seq)
            self._mapped, found = _open(path)
            super().__init__(self._mapped, ROWS_AT, BASE_AT, DURABLE_AT, found)
        elif found != capacity:
            log.warning(
                "the ring keeps its capacity until its rows are stored; then restart to change it",
                extra={"capacity": found, "wanted": capacity, "pending": self.pending},
            )
        self.recovered = self.pending
        self.rows: NDArray[np.void] = np.frombuffer(
            self._mapped, TRADE_DTYPE, count=found, offset=ROWS_AT
        )
        self.symbols = SymbolTable()
        if self.pending:
            self._load_symbols()
            log.info(
                "recovered rows of the last run",
                extra={"rows": self.pending, "torn": self.torn},
            )
        else:
            self._set_symbol_count(0)

    @property
    def was_used(self) -> bool:
        """Whether a trade was ever in it."""
        return self.published_seq > FIRST_SEQ

    def intern(self, symbol: str) -> int:
        """Return the id of `symbol`, writing it into the file's table if it is new.

        Raises DataDirError when the table is full.
        """
        known = self.symbols.get(symbol)
        if known is not None:
            return known
        symbol_id = len(self.symbols)
        if symbol_id == SYMBOL_SLOTS:
            raise DataDirError(
                f"the ring's symbol table is full ({SYMBOL_SLOTS} symbols): capture fewer symbols"
            )
        name = symbol.encode()
        self.symbols.add(symbol)
        at = SYMBOLS_AT + symbol_id * SYMBOL_SLOT.size
        SYMBOL_SLOT.pack_into(self._mapped, at, len(name), name)
        # The count comes last: a killed process leaves no half-written name behind it.
        self._set_symbol_count(symbol_id + 1)
        return symbol_id

    def peek(self, max_rows: int) -> NDArray[np.void]:
        """Return a view of the oldest pending rows, at most `max_rows`, shorter at the wrap."""
        slot, count = self.span(max_rows)
        return self.rows[slot : slot + count]

    def sync(self) -> None:
        """Write the mapped pages to the disk (a clean stop does; a crash of the host may not)."""
        self._mapped.flush()

    def check(self) -> None:
        """Assert what always holds between the cursors (tests call it after every step)."""
        assert 0 <= self.pending <= self.capacity
        assert self.base_seq <= self.durable_seq <= self.published_seq

    def _load_symbols(self) -> None:
        (count,) = struct.unpack_from("<q", self._mapped, SYMBOL_COUNT_AT)
        try:
            if not 0 <= count <= SYMBOL_SLOTS:
                raise ValueError(f"symbol count {count}")
            for i in range(count):
                at = SYMBOLS_AT + i * SYMBOL_SLOT.size
                size, name = SYMBOL_SLOT.unpack_from(self._mapped, at)
                if self.symbols.add(name[:size].decode()) != i:
                    raise ValueError(f"symbol {i} stands twice")
        except ValueError as exc:
            raise _damaged(self.path, f"its symbol table cannot be read ({exc})") from exc
        slot, side_by_side = self.span(self.pending)
        spans = (slot, slot + side_by_side), (0, self.pending - side_by_side)
        if any(int(self.rows[a:b]["symbol_id"].max(initial=0)) >= count for a, b in spans):
            raise _damaged(self.path, "rows name symbols that its table does not hold")

    def _set_symbol_count(self, count: int) -> None:
        struct.pack_into("<q", self._mapped, SYMBOL_COUNT_AT, count)


def _create(path: Path, capacity: int, next_seq: int = FIRST_SEQ) -> None:
    """Make an empty ring file beside `path` and move it there."""
    size = ROWS_AT + capacity * TRADE_DTYPE.itemsize
    log.info("allocating the ring", extra={"path": str(path), "mib": size >> 20})
    header = HEADER.pack(MAGIC, LAYOUT_VERSION, DTYPE_CHECKSUM, capacity, next_seq, next_seq, 0)
    temporary = path.with_suffix(".new")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, header, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise DataDirError(
            f"cannot allocate the ring of {size >> 20} MiB at {path}: {exc.strerror}; "
            "free disk room, or set a smaller RING_CAPACITY or another DATA_DIR"
        ) from exc


def _open(path: Path) -> tuple[mmap.mmap, int]:
    """Map an existing ring file and return it with its capacity."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as exc:
        raise DataDirError(f"cannot open the ring at {path}: {exc.strerror}") from exc
    try:
        size = os.fstat(fd).st_size
        if size < ROWS_AT:
            raise _damaged(path, "it is too short")
        header = os.pread(fd, HEADER.size, 0)
        magic, version, dtype_checksum, capacity, base, durable, _ = HEADER.unpack(header)
        if magic != MAGIC:
            raise _damaged(path, "it is not a ring")
        if version != LAYOUT_VERSION or dtype_checksum != DTYPE_CHECKSUM:
            raise DataDirError(
                f"the ring at {path} was written by another version of tradecore (layout "
                f"{version}): start that version once to store its rows, or move the file away"
            )
        if (
            size != ROWS_AT + capacity * TRADE_DTYPE.itemsize
            or capacity.bit_count() != 1
            or not 1 <= base <= durable < SEQUENCE_END
        ):
            raise _damaged(path, "its header does not fit its size")
        return mmap.mmap(fd, size), capacity
    finally:
        os.close(fd)


def _damaged(path: Path, why: str) -> DataDirError:
    return DataDirError(
        f"the ring at {path} is damaged: {why}; move the file away to start with an empty ring "
        "(rows that it held and the database does not are then a hole)"
    )
