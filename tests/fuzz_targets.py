"""What the fuzzer throws bytes at, each held against a plain Python reading of the same bytes.

A target is called with bytes and returns whether they meant anything; AssertionError when code and
oracle differ. `seeds` are where mutation begins: frames and files of our own making.
"""

import json
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import copy_oracle
import numpy as np
import oracle
import orjson
from codec_check import Check, make_table
from plain_frames import KLINE, SYMBOLS, TICKER, TRADE, compact, corpus, in_microseconds
from ws_frames import payloads

from tradecore import _copyenc, _history, _walks
from tradecore._reframe import COMBINED, KINDS, reframe
from tradecore.capture import Capture
from tradecore.conflator import Conflator
from tradecore.errors import DataDirError
from tradecore.ring import HEADER, ROWS_AT, SYMBOL_SLOT, SYMBOLS_AT, Ring
from tradecore.schema import (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    FLAG_VOID,
    KLINE_DECIMALS,
    KLINE_DTYPE,
    TICKER_DTYPE,
    TRADE_DTYPE,
)

E8 = 10**8
_WIDE = Context(prec=500)


@dataclass(frozen=True)
class Target:
    """One thing to fuzz."""

    make: Callable[[], Callable[[bytes], bool]]
    seeds: Callable[[], list[bytes]]


# -- frames of the venue --------------------------------------------------------------------------


def events() -> Callable[[bytes], bool]:
    check = Check()
    return lambda data: check(data) is not None


class Reframed:
    """What the fan-out sends means what the venue sent, whichever way it was made."""

    NAME = "btcusdt@x"

    def __init__(self) -> None:
        self.ids = {name: number for number, name in enumerate(SYMBOLS)}

    def __call__(self, data: bytes) -> bool:
        try:
            event, _ = oracle.read_event(data, self.ids)
        except oracle.Refused:
            return False
        if event not in ("trade", "ticker", "kline"):
            return False
        kind = ("trade", "ticker", "kline").index(event)
        for mode in range(4):
            wanted = self.converted(data, kind, bool(mode & ~COMBINED))
            if mode & COMBINED:
                wanted = {"stream": self.NAME, "data": wanted}
            for path in ("slow", "fast"):
                try:
                    frame = reframe(kind, data, self.NAME.encode(), mode, path)
                except ValueError:
                    assert path == "fast", data
                    continue
                (sent,) = payloads(frame)
                assert read(sent) == wanted, (data, mode, path, sent)
        return True

    @staticmethod
    def converted(data: bytes, kind: int, micro: bool) -> Any:
        event = read(data)
        event = event if "e" in event else event["data"]
        places = [(event, "E")]
        places += [(event, key) for key in ("T", "OC", "")[kind]]
        places += [(event["k"], key) for key in "tT" * (KINDS[kind] == "kline_1m")]
        for where, key in places:
            if where[key] < 10**14 and micro:
                where[key] = where[key] * 1000 + 999 * (where is not event and key == "T")
            elif where[key] >= 10**14 and not micro:
                where[key] //= 1000
        return event


def read(text: bytes) -> Any:
    """Read JSON; numbers that no event needs are doubles, or None beyond their range."""

    def number(digits: str) -> float | None:
        value = float(digits)
        return value if abs(value) != float("inf") else None

    def integer(digits: str) -> int | float | None:
        return int(digits) if len(digits) < 19 else number(digits)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_float=number, parse_int=integer, parse_constant=refuse)


class Captured:
    """Frames, a line each: the ring has every trade that any of them brought, as it was first."""

    def __init__(self) -> None:
        self.ring = Ring(Path(tempfile.mkdtemp(prefix="tc-fuzz-"), "ring"), 64)
        for symbol in SYMBOLS:
            self.ring.intern(symbol)
        self.ids = {name: number for number, name in enumerate(SYMBOLS)}

    def __call__(self, data: bytes) -> bool:
        ring = self.ring
        ring.release(ring.pending)
        capture = Capture(ring, ring.symbols, Conflator(len(SYMBOLS)))
        trades: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
        counts = dict.fromkeys(("trade", "ticker", "kline", "control", "refused"), 0)
        frames = data.split(b"\n")[:64]
        for frame in frames:
            status = capture.feed(frame, recv_ns=1)
            try:
                kind, fields = oracle.read_event(frame, self.ids)
            except oracle.Refused:
                counts["refused"] += 1
                assert status < 0, frame
                continue
            assert status > 0, frame
            counts[kind] = counts.get(kind, 0) + 1
            if kind == "trade":
                key = fields["symbol_id"], fields["trade_id"]
                trades.setdefault(key, []).append(fields)
        rows: dict[tuple[int, int], list[Any]] = {}
        for row in ring.peek(64):
            rows.setdefault((int(row["symbol_id"]), int(row["trade_id"])), []).append(row)
        assert rows.keys() == trades.keys(), data
        for key, found in rows.items():
            assert len(found) <= len(trades[key])
            fields = trades[key][0]
            for name in ("price_e8", "quantity_e8", "trade_us"):
                assert int(found[0][name]) == fields[name], data
            maker = bool(int(found[0]["flags"]) & FLAG_BUYER_IS_MAKER)
            assert maker == fields["buyer_is_maker"], data
        counters = capture.counters()
        assert counters["frames"] == len(frames)
        for name in ("trade", "ticker", "kline", "control"):
            assert counters[f"{name}s"] == counts[name], (name, data)
        assert sum(capture.refused().values()) == counts["refused"], data
        return bool(rows)


def frame_lists() -> list[bytes]:
    trades = [compact(TRADE.replaced(t=number, s=SYMBOLS[number % 2])) for number in range(12)]
    others = [compact(TICKER), compact(in_microseconds(KLINE)), b"{}", b'{"result":null,"id":1}']
    return [
        b"\n".join(trades),
        b"\n".join([*trades[6:], *others, *trades[:9]]),
        b"\n".join(corpus()[:20]),
    ]


# -- what the venue keeps -------------------------------------------------------------------------

_LINE = re.compile(
    rb"(0|[1-9][0-9]{0,17}),([0-9]+(?:\.[0-9]+)?),([0-9]+(?:\.[0-9]+)?),([0-9]+(?:\.[0-9]*)?),"
    rb"(0|[1-9][0-9]{0,17}),(?i:(true)|false),(?i:true|false)\r?\n"
)


def e8(text: str, end: int = 2**63) -> int | None:
    """A decimal at scale 1e-8, None when it has to be refused."""
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text, re.ASCII):
        return None
    value = Decimal(text).scaleb(8, _WIDE) if len(text) < 400 else None
    if value is None or value != value.to_integral_value(context=_WIDE) or not 0 <= value < end:
        return None
    return int(value)


def in_us(time: int) -> int | None:
    us = time * 1000 if time <= 10**14 else time
    return us if oracle.FIRST_TIME_US <= us < oracle.END_TIME_US else None


def read_lines(text: bytes) -> tuple[list[tuple[Any, ...]], int | None]:
    """Return the rows, and the number of the first line that has to be refused."""
    rows: list[tuple[Any, ...]] = []
    last, units = -1, set()
    for number, line in enumerate(re.findall(rb"[^\n]*\n", text), 1):
        if line in (b"\n", b"\r\n") or (number == 1 and line[:1].isalpha()):
            continue
        parts = _LINE.fullmatch(line)
        if parts is None or max(map(len, parts.groups()[1:4])) > 64:
            return rows, number
        trade_id, time = int(parts[1]), int(parts[5])
        price, quantity, us = e8(parts[2].decode()), e8(parts[3].decode()), in_us(time)
        units.add(time > 10**14)
        if None in (price, quantity, us) or trade_id <= last or len(units) > 1:
            return rows, number
        last = trade_id
        rows.append((trade_id, price, quantity, us, parts[6] is not None))
    return rows, None


def lines() -> Callable[[bytes], bool]:
    def check(data: bytes) -> bool:
        text = data.removesuffix(b"\n") + b"\n"
        wanted, refused = read_lines(text)
        reader = _history.LineReader()
        block = np.empty(3, TRADE_DTYPE)
        rows: list[tuple[Any, ...]] = []
        at = 0
        # What stands behind the last line must not matter; the sanitizers see the block's end.
        padded = np.frombuffer(text + b"7" * _history.PADDING, np.uint8).copy()
        names = ["trade_id", "price_e8", "quantity_e8", "trade_us", "flags"]
        try:
            while at < len(text):
                count, at = reader.read(padded, at, block)
                found = block[names][:count].tolist()
                rows += [(*values, flags == FLAG_BUYER_IS_MAKER) for *values, flags in found]
        except ValueError as error:
            assert reader.line == refused, (data, str(error), refused)
            assert rows == wanted[: len(rows)] and len(wanted) - len(rows) < 3, data
            return False
        assert refused is None and rows == wanted, (data, refused)
        return bool(rows)

    return check


def line_seeds() -> list[bytes]:
    line = b"%d,61837.63000000,0.02000000,1236.75260000,%d,True,False\n"
    ms, us = 1_735_776_000_000, 1_735_776_000_000_000
    odd = b"0,0001.1,92233720368.54775807,3.,1735776000000,fAlSe,TRUE\r\n\r\n"
    header = b"id,price,qty,quote_qty,time,is_buyer_maker,is_best_match\n"
    return [
        b"".join(line % (7 + i, us + i) for i in range(5)),
        header + odd + line % (10**17, ms),
        line % (9, ms) + b"10," + b"9" * 30 + b",1,1,1735776000000,true,true\n",
    ]


class Pages:
    """Pages of REST: each row exact, or the page is refused."""

    TIMES = (0, 6)
    DECIMALS = (1, 2, 3, 4, 5, 7, 9, 10)

    def __call__(self, data: bytes) -> bool:
        try:
            page = orjson.loads(data)
        except orjson.JSONDecodeError:
            return False
        if type(page) is not list:
            return False
        return bool(
            self.compare(_history.trade_rows, page, self.trades(page))
            | self.compare(
                lambda rows: _history.kline_rows(rows, 1_700_000_000_000_000),
                page,
                self.klines(page),
            )
        )

    @staticmethod
    def compare(read_page: Callable[[Any], Any], page: Any, wanted: Any) -> bool:
        try:
            rows = read_page(page)
        except ValueError as error:
            assert wanted is None, (page, str(error))
            return False
        assert wanted is not None and len(rows) == len(wanted), page
        for row, fields in zip(rows, wanted, strict=True):
            for name, value in fields.items():
                found = row[name]
                is_wide = name in KLINE_DECIMALS
                assert (copy_oracle.int128(found) if is_wide else int(found)) == value, page
        return len(rows) > 0

    @staticmethod
    def whole(value: Any) -> int | None:
        return value if type(value) is int and 0 <= value < 2**63 else None

    def time(self, value: Any) -> int | None:
        number = self.whole(value)
        return None if number is None else in_us(number)

    def trades(self, page: list[Any]) -> list[dict[str, Any]] | None:
        rows: list[dict[str, Any]] = []
        for one in page:
            if type(one) is not dict or type(one.get("isBuyerMaker")) is not bool:
                return None
            texts = one.get("price"), one.get("qty")
            if not all(type(text) is str for text in texts):
                return None
            row = {
                "trade_id": self.whole(one.get("id")),
                "price_e8": e8(texts[0]),
                "quantity_e8": e8(texts[1]),
                "trade_us": self.time(one.get("time")),
                "flags": FLAG_BUYER_IS_MAKER * one["isBuyerMaker"],
            }
            if None in row.values() or (rows and row["trade_id"] <= rows[-1]["trade_id"]):
                return None
            rows.append(row)
        return rows

    def klines(self, page: list[Any]) -> list[dict[str, Any]] | None:
        rows: list[dict[str, Any]] = []
        for one in page:
            if type(one) is not list or len(one) < 11:
                return None
            texts = [one[place] for place in self.DECIMALS]
            if not all(type(text) is str for text in texts):
                return None
            row = dict(zip(KLINE_DECIMALS, (e8(text, 10**38) for text in texts), strict=True))
            row["open_us"], row["close_us"] = self.time(one[0]), self.time(one[6])
            row["trade_count"] = self.whole(one[8])
            if None in row.values() or (rows and row["open_us"] <= rows[-1]["open_us"]):
                return None
            over = row["open_us"] + 60_000_000 <= 1_700_000_000_000_000
            rows.append(row | {"flags": FLAG_CLOSED * over, "first_id": -1, "last_id": -1})
        return rows


def page_seeds() -> list[bytes]:
    trade = {"price": "1.50000000", "qty": "2", "isBuyerMaker": True, "isBestMatch": True}
    trades = [{"id": i, "time": 1_700_000_000_000 + i, **trade} for i in (7, 8, 11)]
    kline = ["1.0", "2.5", "0.50000000", "1", "9" * 30]
    first, second = (
        [at, *kline, at + 59_999, "763412.12345678", 260, "6.1", "0.00000001", "0"]
        for at in (1_699_999_980_000, 1_700_000_040_000)
    )
    return [orjson.dumps(trades), orjson.dumps([first, second]), b"[]"]


# -- rows to the database -------------------------------------------------------------------------


def copies() -> Callable[[bytes], bool]:
    """Any rows at all: the first byte says of which kind, the next which to leave out."""
    table = make_table()
    kinds: list[tuple[Any, Any, Any]] = [
        (TRADE_DTYPE, _copyenc.encode_trades, copy_oracle.trade_bytes),
        (TICKER_DTYPE, _copyenc.encode_tickers, copy_oracle.ticker_bytes),
        (KLINE_DTYPE, _copyenc.encode_klines, copy_oracle.kline_bytes),
    ]

    def check(data: bytes) -> bool:
        dtype, encode, by_hand = kinds[data[0] % 3 if data else 0]
        count = (len(data) - 2) // dtype.itemsize
        if count < 1:
            return False
        rows = np.frombuffer(data, dtype, count, offset=2).copy()
        keep = np.array([data[1] >> i % 8 & 1 for i in range(count)], np.uint8)
        known = rows["symbol_id"] < len(SYMBOLS)
        is_void = rows["flags"] & FLAG_VOID if dtype is TRADE_DTYPE else np.zeros(count, int)
        taken = [i for i in range(count) if keep[i] and not is_void[i]]
        if all(known[i] for i in taken):
            wanted = [by_hand(rows[i], SYMBOLS[int(rows[i]["symbol_id"])]) for i in taken]
            sent = copy_oracle.joined(encode(rows, table, keep))
            assert sent == copy_oracle.stream_bytes(wanted), data
        else:
            try:
                copy_oracle.joined(encode(rows, table, keep))
            except ValueError:
                pass
            else:
                raise AssertionError(data)
        if dtype is TRADE_DTYPE:
            runs = _walks.find_runs(rows, len(SYMBOLS), keep)
            names = [name for name in runs.dtype.names if name != "unused"]
            found = [tuple(int(run[name]) for name in names) for run in runs]
            assert found == copy_oracle.slow_runs(rows, len(SYMBOLS), keep), data
        return bool(taken)

    return check


def copy_seeds() -> list[bytes]:
    seeds = []
    for number, dtype in enumerate((TRADE_DTYPE, TICKER_DTYPE, KLINE_DTYPE)):
        for fill in (0, 1, 0xFF):
            rows = np.frombuffer(bytes([fill]) * dtype.itemsize * 3, dtype).copy()
            rows["symbol_id"] = range(3)
            rows["flags"] = (0, 1, 4)
            seeds.append(bytes([number, 0xFF]) + rows.tobytes())
    return seeds


# -- the ring's file ------------------------------------------------------------------------------


def checksum(row: bytes) -> int:
    """The checksum of a row's first 60 bytes, as `_ring.pxd` has it."""
    words = [*struct.unpack_from("<7Q", row), *struct.unpack_from("<I", row, 56)]
    salts = (
        *(0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3),
        *(0x1D8E4E27C47D124F, 0xEB44ACCAB455D165, 0x2F9BE6CC5BE4F515, 0x9C06FAF4D023E3AB),
    )
    mixed = 0
    for i in range(0, 8, 2):
        product = (words[i] ^ salts[i]) * (words[i + 1] ^ salts[i + 1])
        mixed ^= (product ^ product >> 64) & (2**64 - 1)
    return (mixed ^ mixed >> 32) & 0xFFFFFFFF


class RingFile:
    """A ring's file after a crash of the host: a good one with bytes changed here and there.

    The input is a list of changes, five bytes each: three of place (in the header, the table of
    symbols or the rows), one of length, one of what is written.
    """

    ROWS = 64

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="tc-fuzz-"), "ring")
        ring = Ring(self.path, self.ROWS)
        for symbol in SYMBOLS:
            ring.intern(symbol)
        rows = np.zeros(50, TRADE_DTYPE)
        rows["trade_id"] = range(50)
        rows["symbol_id"] = np.arange(50) % len(SYMBOLS)
        ring.append(rows)
        ring.release(30)
        ring.append(rows[:30])
        self.good = self.path.read_bytes()

    def __call__(self, data: bytes) -> bool:
        image = bytearray(self.good)
        for at in range(0, len(data) - 4, 5):
            start, place = divmod(int.from_bytes(data[at : at + 3], "little"), 3)
            first = (0, SYMBOLS_AT, ROWS_AT)[place]
            length = (HEADER.size, 8 * SYMBOL_SLOT.size, len(image) - ROWS_AT)[place]
            start = first + start % length
            for i in range(start, min(start + data[at + 3] % 8 + 1, len(image))):
                image[i] = data[at + 4]
        self.path.write_bytes(image)
        try:
            ring = Ring(self.path, self.ROWS)
        except DataDirError:
            return False
        base, durable = struct.unpack_from("<qq", image, 24)
        good: dict[int, bytes] = {}
        for seq in range(durable, durable + self.ROWS):
            at = ROWS_AT + 64 * ((seq - base) % self.ROWS)
            row = bytes(image[at : at + 64])
            named = struct.unpack_from("<q", row)[0] == seq
            if named and checksum(row) == int.from_bytes(row[60:], "little"):
                good[seq] = row
        last = max(good, default=durable - 1)
        assert ring.pending == last + 1 - durable, data
        assert ring.torn == ring.pending - len(good), data
        for seq in range(durable, last + 1):
            (row,) = ring.peek(1)
            if seq in good:
                assert row.tobytes() == good[seq], data
            else:
                assert int(row["flags"]) == FLAG_VOID and int(row["trade_id"]) == 0, data
            ring.release(1)
        assert ring.append(np.zeros(self.ROWS + 1, TRADE_DTYPE)) == self.ROWS
        ring.check()
        return bool(good)


def ring_seeds() -> list[bytes]:
    def change(place: int, start: int, length: int, byte: int) -> bytes:
        return (3 * start + place).to_bytes(3, "little") + bytes([length - 1, byte])

    header = [change(0, at, 1, 1) for at in (0, 8, 12, 16, 24, 32, 40)]
    rows = [change(2, 64 * i + 5, 2, 0) for i in (0, 7, 19, 63)]
    return [*header, *rows, b"".join(rows), change(0, 31, 1, 0x7F), change(1, 0, 1, 0), b"\0" * 5]


TARGETS = {
    "events": Target(events, corpus),
    "reframed": Target(Reframed, corpus),
    "captured": Target(Captured, frame_lists),
    "lines": Target(lines, line_seeds),
    "pages": Target(Pages, page_seeds),
    "copies": Target(copies, copy_seeds),
    "ring": Target(RingFile, ring_seeds),
}
