"""The small benches under pytest-benchmark: `pytest bench -o addopts= --benchmark-only`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_encode
import bench_parse
import bench_ring
import pytest
from _harness import Case

CASES = [*bench_parse.cases(), *bench_encode.cases(), *bench_ring.cases()]
NOT_SHOWN = {"prepare", "repeats"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.bench}: {case.subject}")
def test_bench(case: Case, tmp_path: Path, benchmark: Any) -> None:
    setup, work = case.prepare(tmp_path)

    def prepare_round() -> None:
        setup()

    benchmark.group = case.bench
    benchmark.extra_info.update({k: v for k, v in asdict(case).items() if k not in NOT_SHOWN})
    benchmark.pedantic(work, setup=prepare_round, rounds=case.repeats, warmup_rounds=1)
