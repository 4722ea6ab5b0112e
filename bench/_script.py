"""The baseline of the end-to-end bench: the script that one would write without tradecore.

picows, orjson, Decimal and `copy_records_to_table`, in batches of all that waits. It is exact as
long as nothing fails: no spool, no duplicates, no gaps, no retries, no reconnect.
"""

import argparse
import asyncio
import json
import resource
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import orjson
import uvloop
from picows import WSFrame, WSListener, WSTransport, ws_connect

COLUMNS = ("timestamp", "symbol", "price", "quantity", "side", "trade_id", "received_at")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BATCH_ROWS = 1000
BATCH_AGE_S = 0.1


class Listener(WSListener):
    """Collects rows; the flusher takes them."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.enough = asyncio.Event()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        data = orjson.loads(frame.get_payload_as_memoryview())["data"]
        self.rows.append(
            (
                EPOCH + timedelta(microseconds=data["T"]),
                data["s"],
                Decimal(data["p"]),
                Decimal(data["q"]),
                "SELL" if data["m"] else "BUY",
                data["t"],
                datetime.now(UTC),
            )
        )
        if len(self.rows) >= BATCH_ROWS:
            self.enough.set()


async def store(url: str, dsn: str, count: int) -> dict[str, float]:
    """Store `count` trades; return trades, seconds from first row to last commit, CPU seconds."""
    connection = await asyncpg.connect(dsn)
    listener = Listener()
    transport, _ = await ws_connect(lambda: listener, url)
    stored, started = 0, 0.0
    while stored < count:
        with suppress(TimeoutError):
            await asyncio.wait_for(listener.enough.wait(), BATCH_AGE_S)
        listener.enough.clear()
        rows, listener.rows = listener.rows, []
        if rows:
            started = started or rows[0][-1].timestamp()
            await connection.copy_records_to_table("raw_trades", records=rows, columns=COLUMNS)
            stored += len(rows)
    seconds = time.time() - started
    transport.disconnect()
    await connection.close()
    use = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "trades": stored,
        "seconds": seconds,
        "cpu_s": use.ru_utime + use.ru_stime,
        "rss_bytes": use.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("dsn")
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    print(json.dumps(uvloop.run(store(options.url, options.dsn, options.count))))
