"""The ring: cursors, wrap, rewind, the file's life, and what a killed process leaves behind."""

import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tradecore.errors import DataDirError
from tradecore.ring import BASE_AT, DURABLE_AT, ROWS_AT, SYMBOL_SLOTS, Ring
from tradecore.schema import FLAG_VOID, TRADE_DTYPE

CAPACITY = 1024


def trades(first_id: int, count: int) -> NDArray[np.void]:
    rows = np.zeros(count, TRADE_DTYPE)
    rows["trade_id"] = np.arange(first_id, first_id + count)
    rows["price_e8"] = rows["trade_id"] * 7
    rows["recv_ns"] = 1
    return rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ring"


def drain(ring: Ring) -> list[int]:
    ids: list[int] = []
    while ring.pending:
        rows = ring.peek(100)
        ids += rows["trade_id"].tolist()
        ring.release(len(rows))
        ring.check()
    return ids


def test_rows_leave_in_order_across_the_wrap(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    ring.append(trades(0, 1000))
    ring.release(600)
    assert ring.append(trades(1000, 500)) == 500
    assert len(ring.peek(5000)) == CAPACITY - 600, "a view ends at the wrap"
    assert drain(ring) == list(range(600, 1500))


def test_a_full_ring_refuses_and_overwrites_nothing(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    assert ring.append(trades(0, CAPACITY + 5)) == CAPACITY
    assert ring.append(trades(9999, 1)) == 0
    ring.release(1)
    assert ring.append(trades(CAPACITY, 1)) == 1
    assert drain(ring) == list(range(1, CAPACITY + 1))


def test_an_empty_ring_rewinds_to_the_first_slot(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    for first in range(0, 5000, 700):
        ring.append(trades(first, 700))
        assert ring.span(1)[0] == 0
        drain(ring)
    assert ring.base_seq == ring.durable_seq == ring.published_seq == 1 + 8 * 700


def test_releasing_more_than_is_pending_is_refused(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    ring.append(trades(0, 3))
    with pytest.raises(ValueError, match="cannot release 4 of 3"):
        ring.release(4)
    for count in (-1, 2**63 - 1):
        with pytest.raises(ValueError, match=f"cannot release {count}"):
            ring.release(count)
    assert drain(ring) == [0, 1, 2]


def test_the_next_start_finds_rows_and_symbols(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    assert [ring.intern(s) for s in ("BTCUSDT", "币安人生USDT", "BTCUSDT")] == [0, 1, 0]
    rows = trades(0, 900)
    rows["symbol_id"] = 1
    ring.append(rows)
    ring.release(800)
    ring.append(trades(900, 500))
    again = Ring(path, CAPACITY)
    assert (again.pending, again.torn) == (600, 0)
    assert [again.symbols.name(i) for i in range(2)] == ["BTCUSDT", "币安人生USDT"]
    assert again.intern("ETHUSDT") == 2
    assert again.peek(1)["symbol_id"].item() == 1
    assert drain(again) == list(range(800, 1400))
    # Empty at the next start: the ids of symbols begin anew.
    third = Ring(path, CAPACITY)
    assert third.pending == 0
    assert third.published_seq == again.published_seq
    assert third.intern("ETHUSDT") == 0


def test_torn_rows_become_void_and_the_rows_around_them_survive(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    ring.intern("BTCUSDT")
    ring.append(trades(0, 10))
    ring.sync()
    with path.open("r+b") as file:
        for slot in (3, 4, 9):
            file.seek(ROWS_AT + slot * 64 + 16)
            file.write(b"\xff" * 5)
    again = Ring(path, CAPACITY)
    assert (again.pending, again.torn) == (9, 2), "the last row is torn, so it was never published"
    flags = again.peek(9)["flags"]
    assert [i for i in range(9) if flags[i] & FLAG_VOID] == [3, 4]
    assert again.append(trades(10, 1)) == 1


@pytest.mark.parametrize("byte", range(64))
def test_the_checksum_covers_every_byte_of_a_row(path: Path, byte: int) -> None:
    ring = Ring(path, CAPACITY)
    ring.append(trades(12345, 1))
    ring.sync()
    with path.open("r+b") as file:
        file.seek(ROWS_AT + byte)
        old = file.read(1)[0]
        file.seek(ROWS_AT + byte)
        file.write(bytes([old ^ 0x10]))
    assert Ring(path, CAPACITY).pending == 0


def test_capacity_changes_only_when_nothing_waits(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    ring.intern("BTCUSDT")
    ring.append(trades(0, 5))
    held = Ring(path, 2 * CAPACITY)
    assert held.capacity == CAPACITY
    assert drain(held) == [0, 1, 2, 3, 4]
    grown = Ring(path, 2 * CAPACITY)
    assert grown.capacity == 2 * CAPACITY
    assert grown.published_seq == 6, "sequences are never used again"


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "says"),
    [
        (0, b"notaring", "not a ring"),
        (8, struct.pack("<I", 99), "another version"),
        (12, b"\0\0\0\0", "another version"),
        (16, struct.pack("<q", 2048), "does not fit its size"),
        (BASE_AT, struct.pack("<q", 50), "does not fit its size"),
        (BASE_AT, struct.pack("<q", -5), "does not fit its size"),
        (DURABLE_AT, struct.pack("<q", 2**63 - 1), "does not fit its size"),
        (40, struct.pack("<q", SYMBOL_SLOTS + 1), "symbol table"),
        (40, struct.pack("<q", 0), "symbols that its table does not hold"),
        (4096, b"\3\0\xff\xfe\xfd", "symbol table"),
    ],
)
def test_a_damaged_file_is_named_and_left_alone(
    path: Path, at: int, data: bytes, says: str
) -> None:
    ring = Ring(path, CAPACITY)
    ring.intern("BTCUSDT")
    ring.append(trades(0, 5))
    ring.sync()
    damage(path, at, data)
    before = path.read_bytes()
    with pytest.raises(DataDirError, match=says):
        Ring(path, CAPACITY)
    assert path.read_bytes() == before


@pytest.mark.parametrize("capacity", [0, 100])
def test_a_capacity_that_is_no_power_of_two_is_damage(path: Path, capacity: int) -> None:
    Ring(path, CAPACITY)
    damage(path, 16, struct.pack("<q", capacity))
    os.truncate(path, ROWS_AT + capacity * TRADE_DTYPE.itemsize)
    with pytest.raises(DataDirError, match="its header"):
        Ring(path, CAPACITY)


def test_a_short_file_and_a_folder_in_the_way(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"tradring")
    with pytest.raises(DataDirError, match="too short"):
        Ring(short, CAPACITY)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataDirError, match="cannot open"):
        Ring(tmp_path / "folder", CAPACITY)


def test_a_full_disk_is_a_sentence_at_the_start(path: Path) -> None:
    with pytest.raises(DataDirError, match=r"cannot allocate the ring .* free disk room"):
        Ring(path, 1 << 40)
    assert not list(path.parent.iterdir())


def test_the_symbol_table_is_bounded(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    for i in range(SYMBOL_SLOTS):
        ring.intern(f"S{i}")
    with pytest.raises(DataDirError, match="symbol table is full"):
        ring.intern("ONEMORE")
    assert ring.intern("S17") == 17


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 90)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_order_of_appends_and_releases_keeps_the_queue(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]]
) -> None:
    path = tmp_path_factory.mktemp("ring") / "ring"
    ring = Ring(path, 64)
    ring.intern("BTCUSDT")
    queue: list[int] = []
    next_id = 0
    for append, count in steps:
        if append:
            taken = ring.append(trades(next_id, count))
            assert taken == min(count, 64 - len(queue))
            queue += range(next_id, next_id + taken)
            next_id += taken
        else:
            rows = ring.peek(count)
            assert rows["trade_id"].tolist() == queue[: len(rows)]
            assert len(rows) or not queue or not count
            ring.release(len(rows))
            queue = queue[len(rows) :]
        ring.check()
        assert ring.pending == len(queue)
    assert drain(Ring(path, 64)) == queue


WRITER = """
import sys
import numpy as np
from pathlib import Path
from tradecore.ring import Ring
from tradecore.schema import TRADE_DTYPE

ring = Ring(Path(sys.argv[1]), 4096)
ring.intern("BTCUSDT")
row = np.zeros(1, TRADE_DTYPE)
next_id = int(sys.argv[2])
print("ready", flush=True)
while True:
    if ring.pending > 3000:
        durable = int(ring.peek(2000)["trade_id"][-1])
        ring.release(2000)
        print("durable", durable, flush=True)
    if next_id % 100_000 == 0:
        while ring.pending:
            ring.release(len(ring.peek(4096)))
    row["trade_id"] = next_id
    row["quantity_e8"] = next_id * 3
    row["recv_ns"] = 1
    ring.append(row)
    if next_id % 64 == 0:
        print("published", next_id, flush=True)
    next_id += 1
"""


def test_published_rows_survive_kill_9_at_random_points(path: Path) -> None:
    """Kill a real writer again and again: what it said it had published or released is so.

    Ids and sequences go side by side over all runs (id = sequence - 1), so every row is known.
    """
    rng = random.Random(20261122)
    next_id = 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(next_id)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        # Some of its reports as the clock of the killing: a point anywhere in its work.
        reports = [writer.stdout.readline() for _ in range(rng.randrange(50, 400))]
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(timeout=10)
        reports += [line for line in writer.stdout if line.endswith("\n")]
        writer.stdout.close()
        said = {"published": -1, "durable": -1}
        for line in reports:
            said[line.split()[0]] = int(line.split()[1])
        ring = Ring(path, 4096)
        ring.check()
        assert ring.torn == 0
        assert said["published"] < ring.published_seq - 1
        assert said["durable"] < ring.durable_seq - 1
        first_id, next_id = ring.durable_seq - 1, ring.published_seq - 1
        ids: list[int] = []
        while ring.pending:
            rows = ring.peek(500)
            assert (rows["quantity_e8"] == rows["trade_id"] * 3).all()
            ids += rows["trade_id"].tolist()
            ring.release(len(rows))
        assert ids == list(range(first_id, next_id))


def test_pages_of_a_backlog_leave_resident_memory(path: Path) -> None:
    """A long backlog is built up and drained without keeping the whole file in memory."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    ring = Ring(path, 1 << 19)
    ring.intern("BTCUSDT")
    empty, worst = resident(), 0
    for first in range(0, 1 << 19, 1 << 12):
        ring.append(trades(first, 1 << 12))
        worst = max(worst, resident())
    assert worst - empty < 8 << 20, "a backlog of 32 MiB is in the file, not in our memory"
    worst = 0
    ids: list[int] = []
    while ring.pending:
        rows = ring.peek(1 << 12)
        ids += rows["trade_id"].tolist()
        ring.release(len(rows))
        if len(ids) % (1 << 15) == 0:
            worst = max(worst, resident() - sys.getsizeof(ids) - 32 * len(ids))
    assert worst - empty < 8 << 20
    assert ids == list(range(1 << 19)), "what was unmapped comes back as it was"


def test_cursors_lie_where_the_layout_says(path: Path) -> None:
    ring = Ring(path, CAPACITY)
    ring.append(trades(0, 10))
    ring.release(4)
    ring.sync()
    header = path.read_bytes()[:48]
    assert header[:8] == b"tradring"
    assert struct.unpack_from("<qqqq", header, 16) == (CAPACITY, 1, 5, 0)
    assert struct.unpack_from("<q", header, DURABLE_AT) == (5,)
