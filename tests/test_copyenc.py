"""The COPY bytes against a slow encoder."""

from typing import Any

import numpy as np
import pytest
from copy_oracle import (
    EPOCH_US,
    joined,
    kline_bytes,
    stream_bytes,
    ticker_bytes,
    trade_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

from tradecore._copyenc import (
    encode_klines,
    encode_tickers,
    encode_trades,
)
from tradecore.schema import (
    FLAG_VOID,
    KLINE_DECIMALS,
    KLINE_DTYPE,
    TICKER_DECIMALS,
    TICKER_DTYPE,
    TRADE_DTYPE,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
INT128 = st.integers(-(2**127), 2**127 - 1)
EXTREME = 2**63 - 1


class Symbols:
    """Stand-in for a SymbolTable."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def utf8(self, symbol_id: int) -> bytes:
        return self.names[symbol_id].encode()


def trades(*rows: dict[str, int]) -> Any:
    array = np.zeros(len(rows), TRADE_DTYPE)
    for i, row in enumerate(rows):
        for key, value in row.items():
            array[i][key] = value
    return array


# ---- trades ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaled",
    [0, 1, 9999, 10000, 10**8, 10**8 + 1, 12345678, 6_000_012_000_000, 10**16 - 1, 10**16]
    + [10**16 + 1, EXTREME, EXTREME - 7, -1, -(2**63), 99_990_000_0001_0000]
    + [10**k for k in range(19)],
)
def test_numeric_is_the_scaled_integer(scaled: int) -> None:
    rows = trades({"price_e8": scaled, "quantity_e8": scaled, "trade_us": EPOCH_US})
    assert joined(encode_trades(rows, Symbols("A"))) == stream_bytes([trade_bytes(rows[0], "A")])


TRADE = st.fixed_dictionaries(
    {
        "trade_id": INT64,
        "price_e8": INT64,
        "quantity_e8": INT64,
        "trade_us": INT64,
        "recv_ns": st.one_of(st.just(0), INT64),
        "symbol_id": st.integers(0, 2),
        "flags": st.integers(0, 3),
    }
)


@given(st.lists(TRADE, max_size=12), st.data())
def test_trades_equal_the_layout(values: list[dict[str, int]], data: st.DataObject) -> None:
    symbols = Symbols("BTCUSDT", "币安人生USDT", "X" * 40)
    rows = trades(*values)
    flags = st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows))
    keep = data.draw(st.one_of(st.none(), flags.map(lambda f: np.array(f, np.uint8))))
    expected = [
        trade_bytes(row, symbols.names[int(row["symbol_id"])])
        for i, row in enumerate(rows)
        if not int(row["flags"]) & FLAG_VOID and (keep is None or keep[i])
    ]
    slices = encode_trades(rows, symbols, keep)
    assert joined(slices) == stream_bytes(expected)
    assert slices.encoded == len(expected)


def test_long_streams_come_in_slices_of_one_buffer() -> None:
    rows = np.zeros(5000, TRADE_DTYPE)
    rows["trade_id"] = np.arange(5000)
    rows["price_e8"] = np.arange(5000) * 10**14
    symbols = Symbols("BTCUSDT")
    pieces, sizes, owners = [], [], set()
    for piece in encode_trades(rows, symbols):
        pieces.append(bytes(piece))
        sizes.append(len(piece))
        owners.add(id(piece.obj))
    assert b"".join(pieces) == stream_bytes([trade_bytes(row, "BTCUSDT") for row in rows])
    assert len(owners) == 1
    assert len(sizes) == 3
    assert all(131072 <= size < 131072 + 1280 for size in sizes[:-1])


def test_two_streams_at_once_do_not_share_a_buffer() -> None:
    rows = np.zeros(4000, TRADE_DTYPE)
    rows["trade_id"] = np.arange(4000)
    other = rows[::-1].copy()
    symbols = Symbols("BTCUSDT")
    pairs = list(
        zip(
            map(bytes, encode_trades(rows, symbols)),
            map(bytes, encode_trades(other, symbols)),
            strict=True,
        )
    )
    assert b"".join(a for a, _ in pairs) == joined(encode_trades(rows, symbols))
    assert b"".join(b for _, b in pairs) == joined(encode_trades(other, symbols))


def test_a_buffer_is_used_again_by_the_next_stream_only() -> None:
    rows, symbols = trades({"trade_id": 1}), Symbols("BTCUSDT")
    first = encode_trades(rows, symbols)
    buffer = next(first).obj
    second = encode_trades(rows, symbols)  # while the first one has not ended
    other = next(second).obj
    assert other is not buffer
    assert list(first) == list(second) == []
    assert list(first) == []
    third = encode_trades(rows, symbols)
    assert next(third).obj is other  # of the one that ended last
    left = encode_trades(rows, symbols)
    abandoned = next(left).obj
    del left  # never walked to its end: nobody knows who still looks at it
    assert list(third) == []
    fourth = encode_trades(rows, symbols)
    assert next(fourth).obj is other is not abandoned
    assert list(fourth) == []
    assert joined(encode_trades(rows, symbols)) == stream_bytes([trade_bytes(rows[0], "BTCUSDT")])


def test_no_rows_make_an_empty_stream() -> None:
    assert joined(encode_trades(np.zeros(0, TRADE_DTYPE), Symbols())) == stream_bytes([])


def test_symbol_id_beyond_the_table_is_refused() -> None:
    rows = trades({"symbol_id": 0}, {"symbol_id": 2})
    slices = encode_trades(rows, Symbols("A", "B"))
    with pytest.raises(ValueError, match="row 1"):
        next(slices)
    with pytest.raises(StopIteration):
        next(slices)
    for encode, dtype in ((encode_tickers, TICKER_DTYPE), (encode_klines, KLINE_DTYPE)):
        row = np.zeros(1, dtype)
        row["symbol_id"] = 2**32 - 1
        with pytest.raises(ValueError, match="row 0"):
            next(encode(row, Symbols("A")))


def test_symbols_added_later_are_seen() -> None:
    symbols = Symbols("A")
    rows = trades({"symbol_id": 0})
    joined(encode_trades(rows, symbols))
    symbols.names.append("BB")
    rows["symbol_id"] = 1
    assert joined(encode_trades(rows, symbols)) == stream_bytes([trade_bytes(rows[0], "BB")])


def test_wrong_arrays_are_refused() -> None:
    symbols = Symbols("A")
    with pytest.raises(TypeError):
        encode_trades(np.zeros(3, KLINE_DTYPE), symbols)
    with pytest.raises(ValueError, match="contiguous"):
        encode_trades(np.zeros(4, TRADE_DTYPE)[::2], symbols)
    with pytest.raises(ValueError, match="flags"):
        encode_trades(np.zeros(4, TRADE_DTYPE), symbols, np.ones(3, np.uint8))


# ---- tickers and klines ----------------------------------------------------------------------


def event_rows(dtype: Any, decimals: tuple[str, ...], values: list[dict[str, int]]) -> Any:
    rows = np.zeros(len(values), dtype)
    for row, value in zip(rows, values, strict=True):
        for key, number in value.items():
            if key in decimals:
                row[key]["lo"] = number % 2**64
                row[key]["hi"] = number >> 64
            else:
                row[key] = number
    return rows


def events(decimals: tuple[str, ...]) -> st.SearchStrategy[list[dict[str, int]]]:
    integers = ("event_us", "recv_ns", "open_us", "close_us", "first_id", "last_id", "trade_count")
    times = st.integers(-(2**62), 2**62)
    row = st.fixed_dictionaries(
        {key: times for key in integers}
        | {key: st.one_of(INT64, INT128) for key in decimals}
        | {"symbol_id": st.integers(0, 1), "flags": st.integers(0, 1)}
    )
    return st.lists(row, max_size=4)


@given(events(TICKER_DECIMALS))
def test_tickers_equal_the_layout(values: list[dict[str, int]]) -> None:
    symbols = Symbols("BTCUSDT", "Y" * 40)
    rows = event_rows(TICKER_DTYPE, TICKER_DECIMALS, values)
    expected = [ticker_bytes(row, symbols.names[row["symbol_id"]]) for row in rows]
    assert joined(encode_tickers(rows, symbols)) == stream_bytes(expected)


@given(events(KLINE_DECIMALS))
def test_klines_equal_the_layout(values: list[dict[str, int]]) -> None:
    symbols = Symbols("BTCUSDT", "Y" * 40)
    rows = event_rows(KLINE_DTYPE, KLINE_DECIMALS, values)
    expected = [kline_bytes(row, symbols.names[row["symbol_id"]]) for row in rows]
    assert joined(encode_klines(rows, symbols)) == stream_bytes(expected)


def test_the_longest_ticker_fits_the_room_behind_a_slice() -> None:
    rows = np.zeros(400, TICKER_DTYPE)
    for key in TICKER_DECIMALS:
        rows[key]["lo"] = 2**64 - 1
        rows[key]["hi"] = 2**63 - 1
    expected = ticker_bytes(rows[0], "Z" * 40)
    assert len(expected) <= 930
    assert joined(encode_tickers(rows, Symbols("Z" * 40))) == stream_bytes([expected] * 400)
