"""The SQL of the sink. Names of tables carry no schema: the connection's search_path decides.

A symbol's row in trade_symbols is the lock of its ledger: trade_coverage and trade_gaps are read
and written by its holder only. It is taken in one statement and the ledger is read in the next:
a statement that waits for a lock goes on with the snapshot it began with. Beside it all writers
share one advisory lock, so that who takes it alone knows that no transaction with trades is open:
whatever it then writes into store_state is seen by the next ones.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from tradecore._copyenc import CopySlices, encode_klines, encode_tickers, encode_trades
from tradecore.schema import KLINE_COLUMNS, TICKER_COLUMNS, TRADE_COLUMNS

# The planner must not pick a scan of the whole ledger while it is small and stay with it. A batch
# that is acknowledged is on disk, whatever the role's default is.
BEGIN = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SET LOCAL statement_timeout = '30s';
SET LOCAL lock_timeout = '10s';
SET LOCAL idle_in_transaction_session_timeout = '30s';
SET LOCAL enable_seqscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL jit = off;
SELECT set_config('synchronous_commit', 'on', true)
WHERE current_setting('synchronous_commit') = 'off'
"""

WRITERS_KEY = 0x74637772  # "tcwr"; the second key of the lock is the schema

# The symbols first, always: who locks both in the other order could meet a writer half way. The
# fence is asked for once all symbols have been counted, and each of them gives a row.
_LOCK = f"""
WITH locked AS MATERIALIZED (
    SELECT FROM trade_symbols WHERE symbol = ANY({{symbols}}) ORDER BY symbol FOR UPDATE
), fence AS MATERIALIZED (
    SELECT pg_advisory_xact_lock_shared({WRITERS_KEY}, hashtext(current_schema()))
    FROM (SELECT count(*) FROM locked) AS all_of_them
)
SELECT FROM locked CROSS JOIN fence
"""

LOCK = _LOCK.format(symbols="$1::text[]")
"""Has a row for each of the symbols that have one in trade_symbols."""


def begin(symbols: Collection[str]) -> str:
    """Return what begins a transaction and locks `symbols`, as `LOCK` does, in one trip."""
    if not symbols:
        return BEGIN
    # One constant, whatever the number of symbols: pg_stat_statements has one entry for it.
    return f"{BEGIN}; {_LOCK.format(symbols=_array(symbols))}"


def _array(texts: Iterable[str]) -> str:
    """Return a constant of SQL, whatever the server's settings of strings are."""
    quoted = [text.replace("\\", r"\\").replace('"', r"\"") for text in texts]
    elements = ",".join(f'"{text}"' for text in quoted)
    constant = elements.replace("\\", r"\\").replace("'", "''")
    return f"E'{{{constant}}}'::text[]"


LOCK_OUT_WRITERS = f"SELECT pg_advisory_xact_lock({WRITERS_KEY}, hashtext(current_schema()))"

ADD_SYMBOLS = """
INSERT INTO trade_symbols SELECT symbol FROM unnest($1::text[]) AS symbol
ORDER BY symbol COLLATE "C" ON CONFLICT DO NOTHING
"""

# For each id range $2..$3 - 1 of symbol $1: what overlaps or adjoins it, and the nearest below and
# above. `n` is the number of the range.
_NEIGHBOURS = """
SELECT p.n, t.first_id, t.last_id, {columns}
FROM unnest($1::text[], $2::int8[], $3::int8[]) WITH ORDINALITY AS p (symbol, first_id, reach, n)
CROSS JOIN LATERAL (
    (SELECT * FROM {table} WHERE symbol = p.symbol AND first_id < p.first_id
     ORDER BY first_id DESC LIMIT 1)
    UNION ALL
    (SELECT * FROM {table} WHERE symbol = p.symbol AND first_id BETWEEN p.first_id AND p.reach)
    UNION ALL
    (SELECT * FROM {table} WHERE symbol = p.symbol AND first_id > p.reach
     ORDER BY first_id LIMIT 1)
) AS t
"""

_READ_RANGES = _NEIGHBOURS.format(
    table="trade_coverage",
    columns="(extract(epoch FROM t.first_time) * 1000000)::int8 AS first_us,"
    " (extract(epoch FROM t.last_time) * 1000000)::int8 AS last_us",
)

# With the state of the store as row 0, which saves a question of its own.
READ_RANGES = f"""
{_READ_RANGES}
UNION ALL
SELECT 0, 0, 0,
       CASE WHEN isfinite(raw_from) THEN (extract(epoch FROM raw_from) * 1000000)::int8 END,
       CASE WHEN isfinite(candles_through)
            THEN (extract(epoch FROM candles_through) * 1000000)::int8 END
FROM store_state
"""

ADD_WINDOW = "INSERT INTO candle_windows (minutes) VALUES ($1::tstzmultirange)"
READ_GAPS = _NEIGHBOURS.format(
    table="trade_gaps",
    columns="t.id, t.cause, t.detected_at, t.state, t.filled_by, t.evidence::text",
)

_RANGES = """
    SELECT symbol, first_id, last_id,
           timestamptz 'epoch' + first_us * interval '1 microsecond' AS first_time,
           timestamptz 'epoch' + last_us * interval '1 microsecond' AS last_time
    FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int8[], $5::int8[])
        AS n (symbol, first_id, last_id, first_us, last_us)
"""

REMOVE_RANGES = """
DELETE FROM trade_coverage AS c USING unnest($1::text[], $2::int8[]) AS n (symbol, first_id)
WHERE c.symbol = n.symbol AND c.first_id = n.first_id
"""

EXTEND_RANGES = f"""
UPDATE trade_coverage AS c
SET last_id = n.last_id, first_time = n.first_time, last_time = n.last_time
FROM ({_RANGES}) AS n WHERE c.symbol = n.symbol AND c.first_id = n.first_id
"""

ADD_RANGES = f"""
INSERT INTO trade_coverage (symbol, first_id, last_id, first_time, last_time) {_RANGES}
"""

OPEN_GAPS = """
INSERT INTO trade_gaps (symbol, first_id, last_id, cause)
SELECT * FROM unnest($1::text[], $2::int8[], $3::int8[], $4::text[])
"""

# What both statements take: the fields of ledger.Gap without its origin.
_GAPS = """
    unnest($1::int8[], $2::int8[], $3::int8[], $4::text[], $5::text[], $6::text[], $7::bool[])
        AS n (id, first_id, last_id, state, filled_by, evidence, turned)
"""

COPY_GAPS = f"""
INSERT INTO trade_gaps
    (symbol, first_id, last_id, cause, detected_at, state, filled_by, filled_at, evidence)
SELECT g.symbol, n.first_id, n.last_id, g.cause, g.detected_at, n.state, n.filled_by,
       CASE WHEN n.state = 'open' THEN NULL WHEN n.turned THEN now() ELSE g.filled_at END,
       n.evidence::jsonb
FROM {_GAPS} JOIN trade_gaps AS g ON g.id = n.id
"""

ALTER_GAPS = f"""
UPDATE trade_gaps AS g
SET first_id = n.first_id,
    last_id = n.last_id,
    state = n.state,
    filled_by = n.filled_by,
    filled_at = CASE WHEN n.state = 'open' THEN NULL WHEN n.turned THEN now()
                ELSE g.filled_at END,
    evidence = n.evidence::jsonb
FROM {_GAPS} WHERE g.id = n.id
"""

REMOVE_GAPS = "DELETE FROM trade_gaps WHERE id = ANY($1::int8[])"

PARK = """
INSERT INTO dead_letters (kind, symbol, trade_id, payload, sqlstate, reason)
SELECT $1::text, symbol, trade_id, payload::jsonb, sqlstate, reason
FROM unnest($2::text[], $3::int8[], $4::text[], $5::text[], $6::text[])
    AS n (symbol, trade_id, payload, sqlstate, reason)
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Where rows of one kind go."""

    kind: str
    """As in dead_letters."""
    table: str
    columns: tuple[str, ...]
    encode: Callable[..., CopySlices]
    time_field: str
    """Field of the row that `timestamp` comes from, in microseconds."""
    key: str
    choice: str
    """Of several rows of one batch with the same key: the first in this order, then the last."""
    merge: str
    """What is done when the table has a row with that key."""

    @property
    def staging(self) -> str:
        return f"tradecore_new_{self.table}"

    @property
    def make_staging(self) -> str:
        """Lives as long as the session and is empty at each commit."""
        return (
            f"CREATE TEMP TABLE IF NOT EXISTS {self.staging} (LIKE {self.table})"
            " ON COMMIT DELETE ROWS"
        )

    @property
    def insert_staged(self) -> str:
        """Move the staged rows to the table; counts what was inserted or updated."""
        columns = ", ".join(self.columns)
        return (
            f"INSERT INTO {self.table} ({columns})"
            f" SELECT DISTINCT ON ({self.key}) {columns} FROM {self.staging}"
            f" ORDER BY {self.key}, {self.choice}ctid DESC"
            f" ON CONFLICT ({self.key}) DO {self.merge}"
        )


def _update(columns: tuple[str, ...], condition: str) -> str:
    changed = [column for column in columns if column not in ("timestamp", "symbol")]
    pairs = ", ".join(f"{column} = excluded.{column}" for column in changed)
    return f"UPDATE SET {pairs} WHERE {condition}"


TRADES = Target(
    kind="trade",
    table="raw_trades",
    columns=TRADE_COLUMNS,
    encode=encode_trades,
    time_field="trade_us",
    key="timestamp, symbol, trade_id",
    choice="",
    merge="NOTHING",
)

TICKERS = Target(
    kind="ticker",
    table="tickers",
    columns=TICKER_COLUMNS,
    encode=encode_tickers,
    time_field="event_us",
    key="timestamp, symbol",
    choice="event_time DESC, ",
    merge=_update(TICKER_COLUMNS, "excluded.event_time > tickers.event_time"),
)

KLINES = Target(
    kind="kline",
    table="klines",
    columns=KLINE_COLUMNS,
    encode=encode_klines,
    time_field="open_us",
    key="timestamp, symbol",
    choice="is_closed DESC, event_time DESC, ",
    # One that is closed is final; a candle from REST has no event time.
    merge=_update(
        KLINE_COLUMNS,
        "NOT klines.is_closed AND (excluded.is_closed OR klines.event_time IS NULL"
        " OR excluded.event_time > klines.event_time)",
    ),
)


def affected(status: str) -> int:
    """Return the row count of a command's status, such as "INSERT 0 7"."""
    return int(status.rpartition(" ")[2])


def columns_of(rows: list[tuple[Any, ...]]) -> list[list[Any]]:
    """Turn rows into the arrays that unnest takes."""
    return [list(column) for column in zip(*rows, strict=True)]
