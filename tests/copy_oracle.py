"""The COPY bytes of rows by a slow encoder, built by hand from the layout in `_copyenc.pyx`."""

import struct
from typing import Any

from tradecore.schema import (
    FLAG_BUYER_IS_MAKER,
    FLAG_CLOSED,
    FLAG_VOID,
    KLINE_COLUMNS,
    KLINE_DECIMALS,
    TICKER_COLUMNS,
    TICKER_DECIMALS,
    TRADE_COLUMNS,
)

EPOCH_US = 946_684_800_000_000


def field(data: bytes | None) -> bytes:
    return struct.pack(">i", -1) if data is None else struct.pack(">i", len(data)) + data


def time_field(unix_us: int) -> bytes:
    return field(struct.pack(">Q", (unix_us - EPOCH_US) % 2**64))


def received_field(recv_ns: int) -> bytes:
    return time_field(recv_ns // 1000) if recv_ns else field(None)


def int8_field(value: int) -> bytes:
    return field(struct.pack(">q", value))


def numeric_field(scaled: int) -> bytes:
    digits: list[int] = []
    rest, weight = abs(scaled), -3
    while rest:
        rest, digit = divmod(rest, 10000)
        digits.insert(0, digit)
        weight += 1
    while digits and digits[-1] == 0:
        digits.pop()
    sign = 0x4000 if scaled < 0 else 0
    head = struct.pack(">hhHh", len(digits), weight if digits else 0, sign, 8)
    return field(head + b"".join(struct.pack(">H", digit) for digit in digits))


def row_bytes(fields: list[bytes]) -> bytes:
    return struct.pack(">h", len(fields)) + b"".join(fields)


def stream_bytes(rows: list[bytes]) -> bytes:
    return b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"".join(rows) + b"\xff\xff"


def trade_bytes(row: Any, name: str) -> bytes:
    maker = int(row["flags"]) & FLAG_BUYER_IS_MAKER
    fields = {
        "timestamp": time_field(int(row["trade_us"])),
        "symbol": field(name.encode()),
        "price": numeric_field(int(row["price_e8"])),
        "quantity": numeric_field(int(row["quantity_e8"])),
        "side": field(b"SELL" if maker else b"BUY"),
        "trade_id": int8_field(int(row["trade_id"])),
        "received_at": received_field(int(row["recv_ns"])),
    }
    return row_bytes([fields[column] for column in TRADE_COLUMNS])


def int128(value: Any) -> int:
    return int(value["lo"]) + (int(value["hi"]) << 64)


def event_fields(row: Any, name: str) -> dict[str, bytes]:
    return {
        "symbol": field(name.encode()),
        "event_time": time_field(int(row["event_us"])),
        "open_time": time_field(int(row["open_us"])),
        "close_time": time_field(int(row["close_us"])),
        "first_id": int8_field(int(row["first_id"])),
        "last_id": int8_field(int(row["last_id"])),
        "trade_count": int8_field(int(row["trade_count"])),
        "received_at": received_field(int(row["recv_ns"])),
    }


def ticker_bytes(row: Any, name: str) -> bytes:
    fields = event_fields(row, name)
    fields["timestamp"] = time_field(int(row["event_us"]) // 1_000_000 * 1_000_000)
    fields |= {key: numeric_field(int128(row[key])) for key in TICKER_DECIMALS}
    return row_bytes([fields[column] for column in TICKER_COLUMNS])


def kline_bytes(row: Any, name: str) -> bytes:
    fields = event_fields(row, name)
    fields["timestamp"] = time_field(int(row["open_us"]))
    fields["is_closed"] = field(bytes([int(row["flags"]) & FLAG_CLOSED]))
    fields |= {key: numeric_field(int128(row[key])) for key in KLINE_DECIMALS}
    return row_bytes([fields[column] for column in KLINE_COLUMNS])


def joined(slices: Any) -> bytes:
    return b"".join([bytes(piece) for piece in slices])


def slow_runs(rows: Any, symbol_count: int, keep: Any) -> list[tuple[int, ...]]:
    runs: list[list[int]] = []
    newest: dict[int, int] = {}
    for i, row in enumerate(rows):
        if int(row["flags"]) & FLAG_VOID or not keep[i]:
            continue
        owner, trade_id, us = (int(row[key]) for key in ("symbol_id", "trade_id", "trade_us"))
        at = newest.get(owner)
        if at is not None and runs[at][1] + 1 == trade_id:
            runs[at][1] = trade_id
            runs[at][2] = min(runs[at][2], us)
            runs[at][3] = max(runs[at][3], us)
        else:
            if owner < symbol_count:
                newest[owner] = len(runs)
            runs.append([trade_id, trade_id, us, us, i, owner])
    return [tuple(run) for run in runs]
