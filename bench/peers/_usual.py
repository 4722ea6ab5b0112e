"""What the usual scripts share: orjson, Decimal and `copy_records_to_table`.

Exact as long as nothing fails: no spool, no duplicates, no gaps, no retries, no reconnect.
"""

import argparse
import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import orjson
import uvloop

COLUMNS = ("timestamp", "symbol", "price", "quantity", "side", "trade_id", "received_at")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BATCH_ROWS = 1000
BATCH_AGE_S = 0.1


class Rows:
    """Collects rows; `store` takes all of them when there are 1,000, or after 100 ms."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._enough = asyncio.Event()

    def add(self, frame: bytes | str | memoryview) -> None:
        """Take one frame of a combined stream with `timeUnit=MICROSECOND`."""
        data = orjson.loads(frame)["data"]
        self._rows.append(
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
        if len(self._rows) >= BATCH_ROWS:
            self._enough.set()

    async def store(self, dsn: str, count: int) -> dict[str, float]:
        """Store `count` trades; return trades, seconds from first row to last commit, CPU."""
        connection = await asyncpg.connect(dsn)
        stored, started = 0, 0.0
        while stored < count:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._enough.wait(), BATCH_AGE_S)
            self._enough.clear()
            rows, self._rows = self._rows, []
            if rows:
                started = started or rows[0][-1].timestamp()
                await connection.copy_records_to_table("raw_trades", records=rows, columns=COLUMNS)
                stored += len(rows)
        seconds = time.time() - started
        await connection.close()
        use = resource.getrusage(resource.RUSAGE_SELF)
        return {"trades": stored, "seconds": seconds, "cpu_s": use.ru_utime + use.ru_stime}


Receive = Callable[[str, Rows], Coroutine[Any, Any, None]]


async def _run(receive: Receive, url: str, dsn: str, count: int) -> dict[str, float]:
    rows = Rows()
    async with asyncio.TaskGroup() as group:
        receiving = group.create_task(receive(url, rows))
        result = await rows.store(dsn, count)
        receiving.cancel()
    return result


def main(description: str | None, receive: Receive) -> None:
    """Store what `receive` adds to the rows; print what it took."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("url", help="ws://.../stream?streams=...&timeUnit=MICROSECOND")
    parser.add_argument("dsn")
    parser.add_argument(
        "count", type=int, nargs="?", default=sys.maxsize, help="trades to store; else no end"
    )
    options = parser.parse_args()
    print(json.dumps(uvloop.run(_run(receive, options.url, options.dsn, options.count))))
