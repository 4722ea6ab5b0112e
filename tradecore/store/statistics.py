"""Tells how much is stored: rows, sizes, days, compression, and the ledger as others may see it.

Rows of raw_trades are counted by the ledger, which is exact and costs nothing; those of the other
tables are the server's own estimates, and named so.
"""

from typing import Any

import asyncpg

from tradecore.store.pool import read_timescale

TABLES = (
    *("raw_trades", "tickers", "klines"),
    *(f"candles_{width}" for width in ("1m", "5m", "15m", "1h", "4h", "1d")),
)

_US = "(extract(epoch FROM {}) * 1000000)::int8"

_TRADES = f"""
SELECT c.symbol, count(*) AS ranges,
       sum(c.last_id - c.first_id + 1 - (c.first_time < s.ledger_from)::int)::int8 AS trades,
       min(c.first_id) AS first_id, max(c.last_id) AS last_id,
       {_US.format("min(c.first_time)")} AS first_us, {_US.format("max(c.last_time)")} AS last_us,
       coalesce(max(h.holes), 0) AS holes, coalesce(max(h.ids), 0)::int8 AS ids_missing,
       {_US.format("max(a.proven_through)")} AS proven_through_us
FROM trade_coverage AS c CROSS JOIN store_state AS s
LEFT JOIN (SELECT symbol, count(*) AS holes, sum(last_id - first_id + 1) AS ids
           FROM trade_gaps WHERE state = 'open' GROUP BY symbol) AS h ON h.symbol = c.symbol
LEFT JOIN audit_state AS a ON a.symbol = c.symbol
WHERE $1::text IS NULL OR c.symbol = $1 GROUP BY c.symbol ORDER BY c.symbol
"""
# Made by the server: 1,400 rows as Python objects would hold the loop for 10 ms.
_ALL_TRADES = f"SELECT coalesce(json_agg(one), '[]')::text FROM ({_TRADES}) AS one"
_TOTALS = f"""
SELECT coalesce(sum(trades), 0)::int8 AS trades,
       coalesce(sum(ids_missing), 0)::int8 AS ids_missing FROM ({_TRADES}) AS one
"""
_RANGES = f"""
SELECT first_id, last_id, {_US.format("first_time")} AS first_us,
       {_US.format("last_time")} AS last_us
FROM trade_coverage WHERE symbol = $1 AND last_id >= $2 ORDER BY first_id LIMIT $3
"""
_HOLES = f"""
SELECT first_id, last_id, cause, {_US.format("detected_at")} AS detected_us
FROM trade_gaps WHERE state = 'open' AND symbol = $1 AND last_id >= $2
    AND ($4::int8 IS NULL OR first_id <= $4) ORDER BY first_id LIMIT $3
"""
_HORIZON = "SELECT raw_from, candles_through FROM store_state"

_PLAIN_SIZES = """
SELECT name, sum(pg_total_relation_size(c.oid))::int8 AS bytes,
       count(p.relid) FILTER (WHERE p.isleaf) AS parts,
       sum(greatest(c.reltuples, 0)) FILTER (WHERE c.relkind = 'r')::int8 AS rows
FROM unnest($1::text[]) AS name LEFT JOIN LATERAL pg_partition_tree(name::regclass) AS p ON true
JOIN pg_class AS c ON c.oid = coalesce(p.relid, name::regclass) GROUP BY name
"""
# A continuous aggregate is a view here: its size is that of the hypertable below it.
_HYPERTABLES = """
SELECT t.name, {schema}.hypertable_size(t.place) AS bytes,
       {schema}.approximate_row_count(t.place) AS rows,
       (SELECT count(*) FROM timescaledb_information.chunks AS c
        WHERE format('%I.%I', c.hypertable_schema, c.hypertable_name)::regclass = t.place) AS parts,
       (SELECT count(*) FROM timescaledb_information.chunks AS c
        WHERE format('%I.%I', c.hypertable_schema, c.hypertable_name)::regclass = t.place
            AND c.is_compressed) AS compressed
FROM (
    SELECT hypertable_name::text AS name,
           format('%I.%I', hypertable_schema, hypertable_name)::regclass AS place
    FROM timescaledb_information.hypertables
    WHERE hypertable_schema = current_schema() AND hypertable_name = ANY($1::text[])
    {aggregates}
) AS t
"""
_AGGREGATES = """
    UNION ALL
    SELECT view_name::text, format('%I.%I', materialization_hypertable_schema,
                                   materialization_hypertable_name)::regclass
    FROM timescaledb_information.continuous_aggregates
    WHERE view_schema = current_schema() AND view_name = ANY($1::text[])
"""
_COMPRESSION = """
SELECT coalesce(sum(before_compression_total_bytes), 0)::int8 AS before_bytes,
       coalesce(sum(after_compression_total_bytes), 0)::int8 AS after_bytes
FROM {schema}.hypertable_compression_stats('raw_trades')
"""


async def coverage_of(conn: asyncpg.Connection, symbol: str) -> dict[str, Any] | None:
    """Return what the ledger holds and misses of a symbol, or None; times in microseconds."""
    row = await conn.fetchrow(_TRADES, symbol)
    return dict(row) if row is not None else None


async def coverage_of_all(conn: asyncpg.Connection) -> str:
    """Return the same of each symbol, as a list in JSON."""
    return str(await conn.fetchval(_ALL_TRADES, None))


async def totals(conn: asyncpg.Connection) -> dict[str, int]:
    """Return how many trades are stored, by the ledger, and how many ids are missing."""
    return dict(await conn.fetchrow(_TOTALS, None))


async def coverage_page(
    conn: asyncpg.Connection, symbol: str, from_id: int, limit: int
) -> dict[str, Any]:
    """Return the ranges that end at `from_id` or later, `limit` at most, and the holes so far.

    `next_id` is where the next page begins; None at the end.
    """
    rows = await conn.fetch(_RANGES, symbol, from_id, limit + 1)
    ranges = [dict(row) for row in rows[:limit]]
    until = ranges[-1]["last_id"] if len(rows) > limit else None
    holes = await conn.fetch(_HOLES, symbol, from_id, limit, until)
    return {
        "ranges": ranges,
        "holes": [dict(row) for row in holes],
        "next_id": until + 1 if until is not None else None,
    }


async def horizon(conn: asyncpg.Connection) -> dict[str, Any]:
    """Return since when trades are kept and until when candles are up to date, or None."""
    row = await conn.fetchrow(_HORIZON)
    finite = {name: value for name, value in row.items() if value.year not in (1, 9999)}
    return {name: finite.get(name) for name in ("raw_from", "candles_through")}


async def table_statistics(conn: asyncpg.Connection) -> dict[str, Any]:
    """Return size, days and estimated rows of each table, and what compression has saved."""
    found: dict[str, Any] = {}
    compression = None
    timescale = await read_timescale(conn)
    if timescale.version is not None and timescale.preloaded:
        schema = '"' + str(timescale.schema).replace('"', '""') + '"'
        statement = _HYPERTABLES.format(schema=schema, aggregates=_AGGREGATES)
        for row in await conn.fetch(statement, list(TABLES)):
            found[row["name"]] = {
                "bytes": row["bytes"],
                "rows_estimate": row["rows"],
                "chunks": row["parts"],
                "chunks_compressed": row["compressed"],
            }
        try:
            sizes = await conn.fetchrow(_COMPRESSION.format(schema=schema))
        except asyncpg.FeatureNotSupportedError:  # of the community edition
            pass
        else:
            before, after = sizes["before_bytes"], sizes["after_bytes"]
            compression = {"before_bytes": before, "after_bytes": after}
    rest = [table for table in TABLES if table not in found]
    for row in await conn.fetch(_PLAIN_SIZES, rest):
        found[row["name"]] = {
            "bytes": row["bytes"],
            "rows_estimate": row["rows"] or 0,
            "partitions": row["parts"],
        }
    tables = {table: found[table] for table in TABLES if table in found}
    return {"tables": tables, "raw_trades_compression": compression}
