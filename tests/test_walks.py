"""The walks over batches against slow walks."""

import numpy as np
from copy_oracle import slow_runs
from hypothesis import given
from hypothesis import strategies as st
from test_copyenc import trades

from tradecore._walks import RUN_DTYPE, Survey, find_runs, mask_rows, observe_latency, survey
from tradecore.schema import FLAG_VOID

NARROW = st.fixed_dictionaries(
    {
        "trade_id": st.one_of(st.integers(0, 6), st.integers(2**63 - 3, 2**63 - 1)),
        "trade_us": st.integers(0, 5),
        "symbol_id": st.one_of(st.integers(0, 2), st.just(2**32 - 1)),
        "flags": st.integers(0, 3),
    }
)


WIDE = st.fixed_dictionaries(
    {
        "trade_us": st.integers(-(2**63), 2**63 - 1),
        "symbol_id": st.integers(0, 2**32 - 1),
        "flags": st.integers(0, 2**16 - 1),
    }
)


@given(st.lists(WIDE, max_size=12))
def test_a_survey_has_the_bounds_of_all_rows(values: list[dict[str, int]]) -> None:
    seen = survey(trades(*values))
    if not values:
        assert seen == Survey(0, 0, 0, 0)
        return
    times, symbols = [v["trade_us"] for v in values], [v["symbol_id"] for v in values]
    flags = 0
    for value in values:
        flags |= value["flags"]
    assert seen == Survey(min(times), max(times), flags, max(symbols) + 1)


@given(st.lists(NARROW, max_size=40), st.data())
def test_runs_equal_the_slow_walk(values: list[dict[str, int]], data: st.DataObject) -> None:
    rows = trades(*values)
    keep = np.array([data.draw(st.integers(0, 1)) for _ in values], np.uint8)
    names = [name for name in RUN_DTYPE.names or () if name != "unused"]
    for flags in (keep, np.ones(len(values), np.uint8)):
        runs = find_runs(rows, 3, flags)
        assert runs.dtype == RUN_DTYPE
        assert [tuple(int(run[n]) for n in names) for run in runs] == slow_runs(rows, 3, flags)


@given(st.lists(NARROW, max_size=40), st.sets(st.tuples(st.integers(0, 2), st.integers(0, 6))))
def test_mask_clears_the_rows_of_the_cuts(
    values: list[dict[str, int]], ids: set[tuple[int, int]]
) -> None:
    rows = trades(*values)
    cuts = np.zeros(len(ids), RUN_DTYPE)
    for cut, (owner, trade_id) in zip(cuts, sorted(ids), strict=True):
        cut["symbol_id"], cut["first_id"], cut["last_id"] = owner, trade_id, trade_id
    keep = np.ones(len(rows), np.uint8)
    hit = [
        (int(row["symbol_id"]), int(row["trade_id"])) in ids and not int(row["flags"]) & FLAG_VOID
        for row in rows
    ]
    assert mask_rows(rows, cuts, keep) == sum(hit)
    assert keep.tolist() == [not h for h in hit]


def test_latency_histogram_counts_each_row_once() -> None:
    bounds = np.array([10, 100], np.int64)
    counts = np.zeros(3, np.int64)
    recv = [990, 989, 900, 899, 1, 0, 1001]
    rows = trades(*({"recv_ns": ns} for ns in recv), {"recv_ns": 995, "flags": FLAG_VOID})
    assert observe_latency(rows, 1000, bounds, counts) == (5, 10 + 11 + 100 + 101 + 999, 1)
    assert counts.tolist() == [1, 2, 2]


@given(st.lists(st.sampled_from([1, 700, 899, 900, 989, 990, 999, 1000, 1001]), max_size=30))
def test_latencies_of_one_read_share_their_place(recv: list[int]) -> None:
    counts = np.zeros(3, np.int64)
    latencies = [1000 - ns for ns in recv if ns <= 1000]
    found = observe_latency(
        trades(*({"recv_ns": ns} for ns in recv)), 1000, np.array([10, 100], np.int64), counts
    )
    assert found == (len(latencies), sum(latencies), len(recv) - len(latencies))
    assert counts.tolist() == [
        sum(ns <= 10 for ns in latencies),
        sum(10 < ns <= 100 for ns in latencies),
        sum(ns > 100 for ns in latencies),
    ]
