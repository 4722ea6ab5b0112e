"""Run the simulated exchange by itself: `python -m tradecore.simulate --help`."""

import argparse
import sys

import uvloop

from tradecore.errors import TradecoreError
from tradecore.simulate.command import add_arguments, run


def main() -> int:
    """Parse the command line, serve, return the exit code."""
    parser = argparse.ArgumentParser(prog="tradecore simulate", allow_abbrev=False)
    add_arguments(parser)
    try:
        return int(uvloop.run(run(parser.parse_args())))
    except TradecoreError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code


if __name__ == "__main__":
    sys.exit(main())
