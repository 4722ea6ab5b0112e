"""How a transaction begins and ends."""

import asyncpg
import pytest
from store_desk import Database

from tradecore.errors import StoreError, TransientStoreError
from tradecore.store.coverage import add_symbols
from tradecore.store.transaction import session, transaction

ODD = ["BTCUSDT", "币安人生USDT", "A'B\\C", 'é"x', "{a,b}", "NULL", " "]


@pytest.mark.parametrize("strings", ["on", "off"])
async def test_symbols_of_any_name_are_locked(db: Database, strings: str) -> None:
    await add_symbols(db.pool, ODD)
    async with db.pool.acquire() as conn:
        await conn.execute(
            f"SET standard_conforming_strings = {strings}; SET backslash_quote = off;"
            " SET escape_string_warning = off"
        )
    try:
        async with transaction(db.pool, 5, ODD) as conn:
            assert await conn.fetchval("SHOW standard_conforming_strings") == strings
        with pytest.raises(TransientStoreError, match="trade_symbols"):
            async with transaction(db.pool, 5, [*ODD, "NONE"]):
                pytest.fail("it has no lock row")
    finally:
        async with session(db.pool, 5):
            pass  # puts the settings back


async def test_a_transaction_that_failed_unseen_is_not_committed(db: Database) -> None:
    with pytest.raises(StoreError, match="ROLLBACK"):
        async with transaction(db.pool, 5) as conn:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await conn.fetch("SELECT 1 / 0")
    async with transaction(db.pool, 5) as conn:
        assert await conn.fetchval("SELECT 1") == 1
