"""The look at a batch of trades against a slow one, row by row."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_copyenc import Symbols, trades

from tradecore.schema import FLAG_FAR_BELOW, FLAG_VOID
from tradecore.store.batch import days_of_batch, look_at_trades, mask_older, minutes_before

DAY_US = 86_400_000_000
FIRST_US = 20_000 * DAY_US
END_US = 7_258_118_400_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

TIMES = st.one_of(
    st.integers(FIRST_US, FIRST_US + 3 * DAY_US),
    st.sampled_from([-1, 0, END_US - 1, END_US, -(2**63), 2**63 - 1]),
)
ROW = st.fixed_dictionaries(
    {
        "trade_id": st.integers(0, 6),
        "trade_us": TIMES,
        "symbol_id": st.sampled_from([0, 1, 2, 3, 2**32 - 1]),
        "flags": st.sampled_from([0, 0, 0, 1, FLAG_VOID, FLAG_FAR_BELOW]),
    }
)
ORDINARY = st.fixed_dictionaries(
    {
        "trade_id": st.integers(0, 6),
        "trade_us": st.integers(FIRST_US, FIRST_US + 3 * DAY_US),
        "symbol_id": st.integers(0, 2),
        "flags": st.integers(0, 1),
    }
)
BATCHES = st.one_of(st.lists(ROW, max_size=12), st.lists(ORDINARY, max_size=12))


class Named(Symbols):
    def name(self, symbol_id: int) -> str:
        return self.names[symbol_id]


def is_void(row: dict[str, int]) -> bool:
    return bool(row["flags"] & FLAG_VOID)


def is_refused(row: dict[str, int]) -> bool:
    return (
        row["symbol_id"] > 2
        or not 0 <= row["trade_us"] < END_US
        or bool(row["flags"] & FLAG_FAR_BELOW)
    )


def kept(rows: list[dict[str, int]]) -> list[dict[str, int]]:
    """Return the first arrival of each id that can be stored."""
    first: dict[tuple[int, int], dict[str, int]] = {}
    for row in rows:
        if not is_void(row) and not is_refused(row):
            first.setdefault((row["symbol_id"], row["trade_id"]), row)
    return list(first.values())


def look(rows: list[dict[str, int]]) -> Any:
    return look_at_trades(trades(*rows), Named("A", "B", "C"))


@given(BATCHES)
def test_what_can_be_stored_is_kept_once(rows: list[dict[str, int]]) -> None:
    batch = look(rows)
    wanted = kept(rows)
    assert [
        row for row, keep in zip(rows, batch.keep, strict=True) if keep and not is_void(row)
    ] == wanted
    refused = [number for number, row in enumerate(rows) if is_refused(row) and not is_void(row)]
    assert [refusal.row for refusal in batch.refusals] == refused
    ids = {
        (symbol_id, trade_id)
        for symbol_id, pieces in batch.pieces.items()
        for piece in pieces
        for trade_id in range(piece.first_id, piece.last_id + 1)
    }
    assert ids == {(row["symbol_id"], row["trade_id"]) for row in wanted}
    live = [row for row in rows if not is_void(row) and not is_refused(row)]
    assert batch.repeats == len(live) - len(wanted)


@given(BATCHES, st.one_of(st.none(), st.integers(19_999, 20_004)))
def test_days_are_those_of_the_rows_to_keep(
    rows: list[dict[str, int]], from_day: int | None
) -> None:
    from_us = None if from_day is None else from_day * DAY_US
    found = days_of_batch(look(rows), from_us)
    least = from_us or 0
    days = {row["trade_us"] // DAY_US for row in kept(rows)}
    wanted = {date(1970, 1, 1) + timedelta(days=day) for day in days if day * DAY_US >= least}
    # When all rows are of one day that day may be named although none of them is kept.
    assert found == wanted or (not wanted and len(found) == 1)


@given(BATCHES, st.integers(FIRST_US - 1, FIRST_US + 4 * DAY_US))
def test_older_ones_are_masked(rows: list[dict[str, int]], from_us: int) -> None:
    batch = look(rows)
    wanted = kept(rows)
    assert mask_older(batch, None) == 0
    older = [row for row in wanted if row["trade_us"] < from_us]
    assert mask_older(batch, from_us) == len(older)
    left = [row for row, keep in zip(rows, batch.keep, strict=True) if keep and not is_void(row)]
    assert left == [row for row in wanted if row not in older or row["trade_us"] >= from_us]


@given(BATCHES, st.integers(FIRST_US - 1, FIRST_US + 4 * DAY_US))
def test_minutes_before_the_fence(rows: list[dict[str, int]], end_us: int) -> None:
    found = minutes_before(look(rows), end_us)
    wanted = {row["trade_us"] // 60_000_000 for row in kept(rows) if row["trade_us"] < end_us}
    minutes = set()
    for span in found or ():
        minute = span.lower
        while minute < span.upper:
            minutes.add((minute - EPOCH) // timedelta(minutes=1))
            minute += timedelta(minutes=1)
    assert minutes == wanted
    assert minutes_before(look(rows), None) is None


def test_no_rows_are_an_empty_batch() -> None:
    batch = look([])
    assert not batch.pieces
    assert not batch.refusals
    assert len(batch.keep) == 0
    assert np.array_equal(batch.keep, np.ones(0, np.uint8))
