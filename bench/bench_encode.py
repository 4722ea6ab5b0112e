"""Encode: ring rows into the bytes of a binary COPY.

The baseline makes the tuples with Decimal that asyncpg's `copy_records_to_table` wants; asyncpg's
own encoding of them is not even in it.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
from _harness import Case, Prepared, main_small
from _workload import SYMBOLS, symbol_table, trade_rows
from numpy.typing import NDArray

from tradecore._copyenc import encode_trades

COUNT = 16_384
TUPLES = "tuples with Decimal"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_copy_bytes(_folder: Path) -> Prepared:
    """Prepare tradecore's encoder; the slices are walked and not kept, as asyncpg does."""
    rows, symbols = trade_rows(COUNT), symbol_table()

    def work() -> int:
        slices = encode_trades(rows, symbols)
        for _ in slices:
            pass
        return slices.encoded

    assert work() == COUNT
    return lambda: None, work


def to_tuples(_folder: Path) -> Prepared:
    """Prepare the records for `copy_records_to_table`."""
    rows = trade_rows(COUNT)
    assert len(records(rows)) == COUNT
    return lambda: None, lambda: records(rows)


def records(rows: NDArray[np.void]) -> list[tuple[object, ...]]:
    """Return the rows in COPY order as Python values, as exact as the table."""
    names, epoch = SYMBOLS, EPOCH
    return [
        (
            epoch + timedelta(microseconds=trade_us),
            names[symbol_id],
            Decimal(price_e8).scaleb(-8),
            Decimal(quantity_e8).scaleb(-8),
            "SELL" if flags & 1 else "BUY",
            trade_id,
            epoch + timedelta(microseconds=recv_ns // 1000),
        )
        for (
            _,
            trade_id,
            price_e8,
            quantity_e8,
            trade_us,
            recv_ns,
            symbol_id,
            flags,
            *_,
        ) in rows.tolist()
    ]


def cases() -> list[Case]:
    """Return the cases of this bench."""
    unit = "ns/trade"
    return [
        Case(
            bench="encode",
            subject="tradecore, binary COPY",
            items=COUNT,
            unit=unit,
            prepare=to_copy_bytes,
            baseline=TUPLES,
            repeats=200,
        ),
        Case(bench="encode", subject=TUPLES, items=COUNT, unit=unit, prepare=to_tuples),
    ]


if __name__ == "__main__":
    raise SystemExit(main_small("encode", __doc__))
