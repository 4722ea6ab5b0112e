"""Lets `python -m tradecore` stand for `tradecore`."""

import sys

from tradecore.cli import main

if __name__ == "__main__":
    sys.exit(main())
