"""The host loses power: of the ring's file only some pages are as new as they were in memory.

Which of them the kernel had written is drawn by lot, page by page. What is missing then is a hole
like others, and what is there is stored as it was.
"""

import mmap
from pathlib import Path
from random import Random

import pytest
from scene import assert_exact, assert_readable, until_whole

from tests.daemon import daemon
from tests.fakes import simulated_exchange
from tradecore.store.embedded import EmbeddedPostgres

SYMBOLS = ("BTCUSDT", "ETHUSDT")


@pytest.mark.timeout(240)
async def test_pages_of_the_ring_that_were_not_written(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    ring = tmp_path / "data" / "ring"
    random = Random(5)
    async with (
        simulated_exchange(symbols=",".join(SYMBOLS), rate=1000, epoch=-60) as exchange,
        daemon(
            tmp_path,
            DATABASE_URL=pg_server.dsn,
            BINANCE_WEBSOCKET_URL=exchange.ws,
            BINANCE_REST_URL=exchange.rest,
            BINANCE_DUMP_URL=exchange.rest,
            SUPPORTED_SYMBOLS=",".join(SYMBOLS),
        ) as one,
    ):
        for _ in range(3):
            await one.until_stored(500)
            await pg_server.stop()
            await one.until(lambda health: health["ring"]["rows"] > 500)
            written = ring.read_bytes()
            await one.until(lambda health: health["ring"]["rows"] > 1500)
            await one.kill()
            last = ring.read_bytes()
            assert len(last) == len(written)
            ring.write_bytes(
                b"".join(
                    random.choice((written, last))[at : at + mmap.PAGESIZE]
                    for at in range(0, len(last), mmap.PAGESIZE)
                )
            )
            await pg_server.start()
            await one.start()
            await until_whole(pg_server.dsn, exchange, SYMBOLS)
        assert await one.terminate() == 0
        await assert_exact(pg_server.dsn, exchange)
        assert one.log.count("recovered rows of the last run") == 3
        assert one.log.count('"torn":0') < 3, "no row was older than its cursor"
        assert_readable(one)
