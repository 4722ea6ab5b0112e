"""Daily dumps: fetched whole or not at all, read exactly or refused with file and line."""

import asyncio
import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from rest_desk import odd_server

from tradecore import _history
from tradecore.errors import DataDirError, UsageError
from tradecore.rest import dump
from tradecore.rest.budget import RestError
from tradecore.rest.dump import DumpError, dump_name, fetch_day, read_dump
from tradecore.schema import E8, FLAG_BUYER_IS_MAKER, TRADE_DTYPE

DAY = date(2025, 1, 2)
NAME = "BTCUSDT-trades-2025-01-02.zip"
T_US = 1_735_776_000_000_000
Row = tuple[int, int, int, int, bool]
"""id, price_e8, quantity_e8, time in us, buyer is maker."""


def line(trade_id: Any = 7, price: str = "1.50000000", **change: Any) -> str:
    values = {"qty": "2.0", "quote": "3.0", "time": T_US, "maker": "True", "best": "True"} | change
    return ",".join(str(value) for value in (trade_id, price, *values.values())) + "\n"


def zipped(text: str | bytes, *names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("BTCUSDT-trades-2025-01-02.csv",):
            archive.writestr(name, text)
    return out.getvalue()


def checksum(data: bytes, name: str = NAME) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def write(folder: Path, content: str | bytes, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, symbol: str = "BTCUSDT", **options: Any) -> list[Row]:
    blocks = list(read_dump(path, symbol, **options))
    assert all(0 < len(block) <= 16_384 and block.dtype == TRADE_DTYPE for block in blocks)
    rows = np.concatenate([np.empty(0, TRADE_DTYPE), *blocks])
    for name in ("sequence", "recv_ns", "symbol_id", "line", "epoch", "checksum"):
        assert not rows[name].any()
    names = ["trade_id", "price_e8", "quantity_e8", "trade_us", "flags"]
    return [(*values, flags == FLAG_BUYER_IS_MAKER) for *values, flags in rows[names].tolist()]


def oracle(text: str) -> list[Row]:
    """Read with csv and Decimal."""
    rows = []
    for fields in csv.reader(io.StringIO(text)):
        trade_id, price, quantity, _, time, maker, _ = fields
        us = int(time) if len(time) >= 15 else int(time) * 1000
        values = (int(Decimal(price) * E8), int(Decimal(quantity) * E8))
        rows.append((int(trade_id), *values, us, maker.lower() == "true"))
    return rows


# -- reading --------------------------------------------------------------------------------------


def many(count: int, step: int = 1) -> str:
    return "".join(
        line(
            i * step,
            f"{i % 99_999}.{i * 7919 % 10**8:08d}",
            qty=f"0.{i * 31 % 10**5:05d}",
            time=T_US + i,
            maker=("True", "False")[i * 31 % 7 > 3],
        )
        for i in range(count)
    )


def test_a_long_file_zipped_and_plain(tmp_path: Path) -> None:
    text = many(100_000, step=3)
    expected = oracle(text)
    assert read(write(tmp_path, text)) == expected
    path = write(tmp_path, zipped(text), NAME)
    assert read(path) == expected
    write(tmp_path, checksum(path.read_bytes()), NAME + ".CHECKSUM")
    assert read(path) == expected


@pytest.mark.parametrize(
    "text",
    [
        line(time=T_US // 1000),
        line(time=T_US),
        line(maker="true", best="FALSE"),
        line(maker="fAlSe"),
        line(price="1"),
        line(price="0001.10"),
        line(price="0.00000001", qty="92233720368.54775807"),
        line(price="1.100000000000000000000000"),
        line(quote="9" * 64),
        line(10**18 - 1),
        line(0) + line(5) + line(9),
        line().rstrip("\n"),
        line().replace("\n", "\r\n") * 1,
    ],
)
def test_spellings_that_are_legal(tmp_path: Path, text: str) -> None:
    assert read(write(tmp_path, text)) == oracle(text)


def test_a_header_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    header = "id,price,qty,quote_qty,time,is_buyer_maker,is_best_match\n"
    expected = oracle(line(1) + line(2))
    assert read(write(tmp_path, header + line(1) + "\n\r\n" + line(2) + "\n\n")) == expected
    for text in ("", header, "\n\n", header.rstrip()):
        assert read(write(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (line("x"), "no trade id"),
        (line(-8), "no trade id"),
        (line("08"), "no trade id"),
        (line(10**18), "no trade id"),
        (line(7), "not greater"),
        (line(3), "not greater"),
        (line(8, "1e5"), "price"),
        (line(8, "-1"), "price"),
        (line(8, ""), "price"),
        (line(8, ".5"), "price"),
        (line(8, "0.123456789"), "price"),
        (line(8, "92233720368.54775808"), "price"),
        (line(8, "9" * 3000), "price"),
        (line(8, '"1.5"'), "price"),
        (line(8, qty="2,0"), "time"),
        (line(8, qty="NaN"), "quantity"),
        (line(8, quote="1e-7"), "fourth column"),
        (line(8, quote="1" * 65), "fourth column"),
        (line(8, time=1_735_776_000), "time is none"),
        (line(8, time="1735776000000.0"), "time is none"),
        (line(8, time="9" * 17), "time is none"),
        (line(8, time=T_US // 1000), "another unit"),
        (line(8, maker="1"), "True or False"),
        (line(8, maker=""), "True or False"),
        (line(8, best="Tru"), "True or False"),
        (line(8, best="True,1"), "more than seven"),
        (line(8, best="True "), "more than seven"),
        (line(8).replace(",True,True", ",True"), "True or False"),
        (line(8).replace("\n", "\r"), "more than seven"),
        ("id,price\n", "no trade id"),
        ("\0" * 50 + "\n", "no trade id"),
        ("8\n", "no trade id"),
        ("8,1.5\n", "price"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, wrong: str, text: str) -> None:
    path = write(tmp_path, line(7) + "\n" + wrong + line(99))
    with pytest.raises(DumpError, match=text) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert isinstance(caught.value, UsageError)


def test_a_line_without_end(tmp_path: Path) -> None:
    path = write(tmp_path, line(7) + "8" * 5_000_000)
    with pytest.raises(DumpError, match="line 2: it is too long"):
        read(path)


def test_a_wrong_line_in_the_middle_of_a_long_file(tmp_path: Path) -> None:
    lines = many(60_000).splitlines(keepends=True)
    lines[50_000] = line("x")
    path = write(tmp_path, zipped("".join(lines)), NAME)
    blocks = read_dump(path, "BTCUSDT")
    with pytest.raises(DumpError, match=r"line 50001: .*no trade id"):
        for block in blocks:
            assert (np.diff(block["trade_id"]) == 1).all()


def test_every_cut_of_a_file_is_a_whole_number_of_rows_or_an_error(tmp_path: Path) -> None:
    text = line(7) + line(8, best="False")
    expected = oracle(text)
    for end in range(len(text) + 1):
        try:
            found = read(write(tmp_path, text[:end]))
        except DumpError:
            continue
        assert found == expected[: len(found)]


def test_files_that_are_no_dump(tmp_path: Path) -> None:
    whole = zipped(many(3000))
    bad_crc = bytearray(whole)
    bad_crc[whole.index(b"PK\x01\x02") + 16] ^= 1
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for content, text in (
        (b"", "no whole zip"),
        (b"no zip", "no whole zip"),
        (whole[:-30], "no whole zip"),
        (bytes(bad_crc), "damaged|no whole zip"),
        (bytes(flipped), "damaged|no whole zip"),
        (zipped("", "a.csv", "b.csv"), "holds 2 files"),
        (zipped(b"\n" * 10_000_000), "unpacks to 10,000,000 bytes"),
    ):
        path = write(tmp_path, content, NAME)
        with pytest.raises(DumpError, match=text) as caught:
            next(read_dump(path, "BTCUSDT"))
        assert str(path) in str(caught.value)
    with pytest.raises(DumpError, match="cannot be read: No such file"):
        next(read_dump(tmp_path / "none.csv", "BTCUSDT"))
    with pytest.raises(DumpError, match="holds trades of BTCUSDT, not of ETHUSDT"):
        next(read_dump(write(tmp_path, whole, NAME), "ETHUSDT"))
    write(tmp_path, checksum(b"another"), NAME + ".CHECKSUM")
    with pytest.raises(DumpError, match="SHA-256"):
        next(read_dump(tmp_path / NAME, "BTCUSDT"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, ("BTCUSDT", "2025-01-02")),
        ("币安人生USDT-trades-2026-01.csv", ("币安人生USDT", "2026-01")),
        ("BTCUSDT-trades-2025-02-30.zip", None),
        ("BTCUSDT-trades-2025-13.zip", None),
        ("BTCUSDT-aggTrades-2025-01-02.zip", None),
        ("BTCUSDT-trades-2025-01-02.zip.CHECKSUM", None),
        ("-trades-2025-01.zip", None),
    ],
)
def test_names(name: str, expected: tuple[str, str] | None) -> None:
    assert dump_name(Path("/x/y") / name) == expected


# -- an oracle for lines --------------------------------------------------------------------------

money = st.one_of(
    st.integers(0, 2**63 - 1).map(lambda v: f"{v // E8}.{v % E8:08d}"),
    st.from_regex(r"[0-9]{1,9}(\.[0-9]{1,8})?", fullmatch=True),
)
flags = st.sampled_from(["True", "False", "true", "FALSE"])
records = st.tuples(money, money, money, st.integers(T_US, T_US + 86_400_000_000), flags, flags)


@settings(deadline=None)
@given(
    st.lists(records, max_size=30),
    st.lists(st.integers(1, 10**9), min_size=30, max_size=30),
    st.booleans(),
    st.integers(1, 40),
)
def test_lines_equal_the_oracle(
    found: Sequence[tuple[Any, ...]], steps: list[int], ms: bool, room: int
) -> None:
    ids = np.cumsum(steps)
    text = "".join(
        line(trade_id, price, qty=qty, quote=quote, time=us // (1000 if ms else 1), maker=m, best=b)
        for trade_id, (price, qty, quote, us, m, b) in zip(ids, found, strict=False)
    )
    reader = _history.LineReader()
    data, at = text.encode() + bytes(_history.PADDING), 0
    rows: list[Row] = []
    block = np.empty(room, TRADE_DTYPE)
    while at < len(text):
        count, at = reader.read(data, at, block)
        names = ["trade_id", "price_e8", "quantity_e8", "trade_us", "flags"]
        rows += [(*v, flags == 1) for *v, flags in block[names][:count].tolist()]
    assert rows == oracle(text)
    assert reader.line == len(found)


@settings(deadline=None)
@given(st.binary(max_size=200).map(lambda b: b.replace(b"\n", b"") + b"\n"))
def test_garbage_is_refused_or_empty(data: bytes) -> None:
    reader = _history.LineReader()
    block = np.empty(4, TRADE_DTYPE)
    try:
        count, at = reader.read(data + bytes(_history.PADDING), 0, block)
    except ValueError:
        return
    assert at == len(data) and (count == 0 or data.count(b",") == 6)


# -- fetching -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "_RETRY_S", (0.01, 0.02))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def test_a_day_is_fetched_and_read(tmp_path: Path) -> None:
    text = many(30_000)
    data = zipped(text)
    folder = tmp_path / "dumps"
    async with odd_server(checksum(data), data) as odd:
        path = await fetch_day(odd.url, "BTCUSDT", DAY, folder)
        assert path == folder / NAME and left(folder) == [NAME]
        base = f"/data/spot/daily/trades/BTCUSDT/{NAME}"
        assert [request.raw_path for request in odd.asked] == [f"{base}.CHECKSUM", base]
    assert read(path, proven=True) == oracle(text)


async def test_names_that_are_not_ascii(tmp_path: Path) -> None:
    name, data = "币安人生USDT-trades-2025-01-02.zip", zipped(line())
    async with odd_server(checksum(data, name), data) as odd:
        path = await fetch_day(odd.url, "币安人生USDT", DAY, tmp_path)
        assert path is not None and path.name == name
        assert odd.asked[1].raw_path.startswith("/data/spot/daily/trades/%E5%B8%81")
        assert odd.asked[1].path.endswith(name)


async def test_a_day_that_is_not_there_yet(tmp_path: Path) -> None:
    missing = (404, {}, b"NoSuchKey")
    for answers in ((missing,), (checksum(b""), missing)):
        async with odd_server(*answers) as odd:
            assert await fetch_day(odd.url, "BTCUSDT", DAY, tmp_path) is None
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("answers", "kind", "text", "asked"),
    [
        ((checksum(b"other"), zipped("")), "broken", "its checksum is", 2),
        ((checksum(b"", "other.zip"), b""), "broken", "its .CHECKSUM is", 1),
        ((b"", b""), "broken", "its .CHECKSUM is", 1),
        ((b"x" * 5000, b""), "broken", "longer than", 1),
        (((302, {"Location": "/x"}, b""),), "refused", "HTTP 302; check BINANCE_DUMP_URL", 1),
        (((403, {}, b""),), "refused", "HTTP 403", 1),
        (((429, {}, b""),), "limited", "HTTP 429", 1),
        (((503, {}, b""),), "unreachable", "HTTP 503", 3),
    ],
)
async def test_answers_that_bring_nothing(
    tmp_path: Path, answers: tuple[Any, ...], kind: str, text: str, asked: int
) -> None:
    async with odd_server(*answers) as odd:
        with pytest.raises(RestError, match=text) as caught:
            await fetch_day(odd.url, "BTCUSDT", DAY, tmp_path)
        assert caught.value.kind == kind and NAME in str(caught.value)
        assert len(odd.asked) == asked
    assert left(tmp_path) == []


async def test_a_body_that_breaks_off_is_fetched_again(tmp_path: Path) -> None:
    data = zipped(many(50_000))

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async with odd_server(checksum(data), half, checksum(data), data) as odd:
        path = await fetch_day(odd.url, "BTCUSDT", DAY, tmp_path)
        assert path is not None and path.read_bytes() == data
    assert left(tmp_path) == [NAME]


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    async with odd_server(b"") as odd:
        url = odd.url
    with pytest.raises(RestError, match="no answer") as caught:
        await fetch_day(url, "BTCUSDT", DAY, tmp_path)
    assert caught.value.kind == "unreachable"
    with pytest.raises(UsageError, match="BINANCE_DUMP_URL"):
        await fetch_day("http://data.binance.vision", "BTCUSDT", DAY, tmp_path)


async def test_a_body_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "MAX_ZIP_BYTES", 3 << 20)
    data = bytes(4 << 20)
    async with odd_server(checksum(data), data) as odd:
        with pytest.raises(RestError, match="longer than 3145728") as caught:
            await fetch_day(odd.url, "BTCUSDT", DAY, tmp_path)
    assert caught.value.kind == "broken" and left(tmp_path) == []


async def test_a_full_disk(tmp_path: Path) -> None:
    data = zipped(line())
    (tmp_path / "full").symlink_to("/dev/full")

    async def fetch(folder: Path) -> None:
        async with odd_server(checksum(data), data) as odd:
            await fetch_day(odd.url, "BTCUSDT", DAY, folder)

    draft = tmp_path / f"{NAME}.{os.getpid()}.part"
    draft.symlink_to("/dev/full")
    with pytest.raises(DataDirError, match="No space left on device; free disk room"):
        await fetch(tmp_path)
    assert left(tmp_path) == ["full"]
    with pytest.raises(DataDirError, match="cannot be written"):
        await fetch(tmp_path / "full" / "folder")


async def test_a_cancelled_fetch_leaves_nothing(tmp_path: Path) -> None:
    data = bytes(8 << 20)
    begun = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: 4 << 20])
        begun.set()
        await asyncio.sleep(60)
        return response

    async with odd_server(checksum(data), slow) as odd:
        task = asyncio.create_task(fetch_day(odd.url, "BTCUSDT", DAY, tmp_path))
        await asyncio.wait_for(begun.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert left(tmp_path) == []
