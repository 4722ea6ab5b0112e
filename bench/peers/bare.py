"""The lower bound: it parses, encodes and copies, with tradecore's own C and nothing around it.

No ledger, no duplicates, no gaps, no recovery, no retries, no metrics: a trade costs no less here.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

import asyncpg
import uvloop
from _bare import Listener
from picows import ws_connect

from tradecore._copyenc import CopySlices, encode_trades
from tradecore._symbols import SymbolTable
from tradecore.schema import TRADE_COLUMNS

BATCH_ROWS = 100
BATCH_AGE_S = 1.0
MAX_BATCH_ROWS = 32768
"""Those three as the daemon has them."""


async def store(url: str, dsn: str, count: int) -> int:
    """Store `count` trades; return how many were."""
    symbols = SymbolTable()
    for stream in parse_qs(urlsplit(url).query)["streams"][0].split("/"):
        symbols.add(stream.partition("@")[0].upper())
    enough = asyncio.Event()
    listener = Listener(symbols, enough.set, BATCH_ROWS)
    connection = await asyncpg.connect(dsn)
    transport, _ = await ws_connect(lambda: listener, url)
    stored = 0
    while stored < count:
        rows = listener.peek(MAX_BATCH_ROWS)
        if len(rows) < BATCH_ROWS:
            enough.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), BATCH_AGE_S)
            rows = listener.peek(MAX_BATCH_ROWS)
        if len(rows):
            await connection.copy_to_table(
                "raw_trades",
                source=one_by_one(encode_trades(rows, symbols)),
                columns=TRADE_COLUMNS,
                format="binary",
            )
            listener.release(len(rows))
            stored += len(rows)
    transport.disconnect()
    await connection.close()
    return stored


async def one_by_one(slices: CopySlices) -> AsyncIterator[memoryview]:
    """Give asyncpg the slices as it wants them."""
    for piece in slices:
        yield piece


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="ws://.../stream?streams=...&timeUnit=MICROSECOND")
    parser.add_argument("dsn")
    parser.add_argument(
        "count", type=int, nargs="?", default=sys.maxsize, help="trades to store; else no end"
    )
    options = parser.parse_args()
    trades = uvloop.run(store(options.url, options.dsn, options.count))
    print(json.dumps({"trades": trades}))


if __name__ == "__main__":
    main()
