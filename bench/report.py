"""Measure what grows with the work and write docs/scaling.md: its tables and its picture.

`make bench-report` takes ten minutes and leaves out two lines, 100 million rows and nine of ten
minutes; --full takes half an hour. --saved measures nothing: it makes tables and picture of
bench/scaling.json, where the last run left its figures.
"""

import argparse
import asyncio
import re

import bench_memory
import bench_scale
from _database import server
from _harness import ROOT
from _plot import draw
from _scaling import Scaling

PAGE = ROOT / "docs" / "scaling.md"
PICTURE = ROOT / "docs" / "images" / "scaling.png"
TABLES = re.compile(r"(?<=<!-- bench/report\.py -->\n).*(?=<!-- end -->)", re.DOTALL)


async def measure(full: bool) -> Scaling:
    """Run both benches."""
    streams = bench_scale.STREAMS if full else bench_scale.SHORT_STREAMS
    rows = bench_scale.ROWS if full else bench_scale.SHORT_ROWS
    found = await bench_scale.main(streams, rows)
    async with server() as dsn:
        found.add_memory(*await bench_memory.measure(dsn, 10.0 if full else 1.0))
    found.save()
    return found


def main() -> int:
    """Parse the command line, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--saved", action="store_true")
    options = parser.parse_args()
    found = Scaling.load() if options.saved else asyncio.run(measure(options.full))
    draw(found, PICTURE)
    text = found.markdown()
    PAGE.write_text(TABLES.sub(lambda _: f"\n{text}\n\n", PAGE.read_text()))
    print(f"{text}\n\nwritten: {PICTURE.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
