"""The numpy row layouts and their C twins are one and the same, byte for byte."""

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest

from tradecore import _fastparse, schema

PXD = Path(schema.__file__).with_name("_rows.pxd").read_text()

C_TYPES: dict[str, Any] = {
    "uint16_t": ctypes.c_uint16,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
}

ROWS = {
    "trade_row_t": (schema.TRADE_DTYPE, ()),
    "ticker_row_t": (schema.TICKER_DTYPE, schema.TICKER_DECIMALS),
    "kline_row_t": (schema.KLINE_DTYPE, schema.KLINE_DECIMALS),
    "decimal128_t": (schema.DECIMAL128, ()),
}


def struct_members(name: str) -> list[tuple[str, str, int]]:
    """Return (type, name, array length) of each member of a struct of `_rows.pxd`."""
    body = re.search(rf"^ctypedef struct {name}:\n((?:    .*\n)+)", PXD, re.M)
    assert body, name
    members = []
    for line in body[1].splitlines():
        found = re.fullmatch(r"    (\w+) (\w+)(?:\[(\d+)\])?", line)
        assert found, line
        members.append((found[1], found[2], int(found[3] or 1)))
    return members


def c_struct(name: str) -> type[ctypes.Structure]:
    """Lay a struct of `_rows.pxd` out as the platform's C compiler does."""
    fields: list[tuple[str, Any]] = []
    for type_name, member, count in struct_members(name):
        kind = C_TYPES.get(type_name) or c_struct(type_name)
        fields.append((member, kind * count if count > 1 else kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize("name", ROWS)
def test_every_field_stands_where_its_c_twin_stands(name: str) -> None:
    dtype, decimals = ROWS[name]
    struct = c_struct(name)
    expected: dict[str, tuple[int, int, str]] = {}
    for type_name, member, count in struct_members(name):
        offset = getattr(struct, member).offset
        if type_name == "decimal128_t":
            assert count == len(decimals)
            for number, decimal in enumerate(decimals):
                expected[decimal] = (offset + 16 * number, 16, "V")
        else:
            size = ctypes.sizeof(C_TYPES[type_name])
            expected[member] = (offset, size, "u" if type_name.startswith("u") else "i")
    assert dtype.fields is not None
    found = {
        key: (field[1], field[0].itemsize, field[0].kind) for key, field in dtype.fields.items()
    }
    assert found == expected
    assert dtype.itemsize == ctypes.sizeof(struct)


@pytest.mark.parametrize("name", ["trade", "ticker", "kline"])
def test_the_compiled_rows_have_the_size_of_the_dtypes(name: str) -> None:
    assert _fastparse.row_sizes()[name] == ROWS[f"{name}_row_t"][0].itemsize


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_little_endian_and_without_padding(name: str) -> None:
    dtype, _ = ROWS[name]
    assert dtype.fields is not None
    assert sum(field[0].itemsize for field in dtype.fields.values()) == dtype.itemsize
    assert dtype.newbyteorder("<") == dtype
    assert dtype.itemsize % 8 == 0


def test_a_trade_is_one_cache_line() -> None:
    assert schema.TRADE_DTYPE.itemsize == 64
    assert list(schema.TRADE_DTYPE.names or ())[-1] == "checksum"


def test_constants_are_the_same_in_c() -> None:
    enum = re.search(r"^cdef enum:\n((?:    .*\n)+)", PXD, re.M)
    assert enum
    constants = dict(re.findall(r"(\w+) = (\d+)", enum[1]))
    named = {name for name in vars(schema) if name.startswith("FLAG_")} | {"SYMBOL_MAX_BYTES"}
    assert named == set(constants)
    for name, value in constants.items():
        assert getattr(schema, name) == int(value), name


def test_flags_of_one_row_do_not_collide() -> None:
    flags = [
        value for name, value in vars(schema).items()
        if name.startswith("FLAG_") and name != "FLAG_CLOSED"
    ]  # fmt: skip
    assert len(flags) == 6
    assert sum(flags) == 2 ** len(flags) - 1


def test_decimals_have_the_names_of_the_venues_keys() -> None:
    assert [*map(oracle.TICKER_KEYS.get, "pPwxcQbBaAohlvq")] == [*schema.TICKER_DECIMALS]
    assert [*map(oracle.KLINE_KEYS.get, "ohlcvqVQ")] == [*schema.KLINE_DECIMALS]


def test_scale() -> None:
    assert schema.E8 == 10**8 == 10**schema.SCALE


@pytest.mark.parametrize("value", [0, 1, -1, 2**64 - 1, 2**64, -(2**64), 10**38 - 1, -(10**38) + 1])
def test_a_wide_decimal_splits_into_lo_and_hi(value: int) -> None:
    row = np.zeros(1, schema.DECIMAL128)
    row[0] = (value & (2**64 - 1), value >> 64)
    assert int.from_bytes(row.tobytes(), "little", signed=True) == value
