import asyncpg

from tradecore.store.migrate import check, migrate


async def test_migrate_an_empty_database_once(database: str) -> None:
    connection = await asyncpg.connect(database)
    assert (await check(connection)).pending
    applied = await migrate(connection)
    assert applied[0] == "001_tables"
    assert (await check(connection)).current
    assert await migrate(connection) == []
    await connection.close()
