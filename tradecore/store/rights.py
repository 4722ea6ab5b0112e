"""Tells which of our tables belong to somebody else, as after a restore by another role."""

import asyncpg

_OURS = (
    *("raw_trades", "tickers", "klines", "trade_symbols", "trade_coverage", "trade_gaps"),
    *("dead_letters", "schema_migrations", "trade_times", "nodes", "leases", "audit_state"),
    *("trade_audits", "store_state", "candle_windows", "candles_1m", "candles_5m", "candles_15m"),
    *("candles_1h", "candles_4h", "candles_1d"),
)
_NAMED = 5


async def of_another_role(conn: asyncpg.Connection, role: str) -> list[str]:
    """Name our tables, partitions and views that the role does not own; many of them at once."""
    strangers = await conn.fetch(
        """
        SELECT c.oid::regclass::text AS name, c.relnamespace::regnamespace::text AS schema
        FROM pg_class c
        LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_class p ON p.oid = i.inhparent
        WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
          AND c.relkind IN ('r', 'p', 'v', 'm')
          AND coalesce(p.relname, c.relname) = ANY($1)
          AND NOT pg_has_role(c.relowner, 'USAGE')
        ORDER BY 1
        """,
        _OURS,
    )
    names = [stranger["name"] for stranger in strangers]
    if len(names) <= _NAMED:
        return [
            f"{name} belongs to another role: ALTER TABLE {name} OWNER TO {role}" for name in names
        ]
    return [
        f"{len(names)} tables belong to another role ({', '.join(names[:_NAMED])}, ...): give them"
        f" to {role} as their owner, in psql: SELECT format('ALTER TABLE %s OWNER TO {role}',"
        f" oid::regclass) FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm') AND relnamespace ="
        f" '{strangers[0]['schema']}'::regnamespace \\gexec"
    ]
