"""Run every bench and print one table: `make bench`, a few minutes; --quick leaves out the daemon.

Exit code 1 when a target is missed: the machine was busy, or tradecore has become slower.
"""

import bench_e2e
import bench_flush
import bench_receive
import bench_storage
import uvloop
from _database import server
from _harness import Figure, arguments, report, run_small


async def _large() -> list[Figure]:
    async with server() as dsn:
        return [
            *await bench_receive.measure(),
            *await bench_flush.measure(dsn),
            *await bench_storage.measure(dsn),
            *await bench_e2e.measure(dsn),
        ]


def main() -> int:
    """Parse the command line, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="only parse, encode and ring")
    options = parser.parse_args()
    figures = run_small(["parse", "encode", "ring"])
    if not options.quick:
        figures += uvloop.run(_large())
    return report(figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
