"""The SQL of the cross-check. Names of tables carry no schema: the search_path decides.

Every statement on raw_trades bounds the timestamp, which leads the only key there.
"""

# A scan of a minute must not be planned once for all minutes, and one minute can be millions of
# rows: no loop over the symbols may go through them again and again, and they must not be sorted,
# whatever the planner believes of a partition that was never analysed.
LIMITS = """
SET LOCAL statement_timeout = '50s';
SET LOCAL plan_cache_mode = force_custom_plan;
SET LOCAL enable_hashjoin = on
"""
NO_LOOPS = "SET LOCAL enable_nestloop = off; SET LOCAL enable_sort = off"
LOOPS = "SET LOCAL enable_nestloop = on; SET LOCAL enable_sort = on"

ADD_SYMBOLS = """
INSERT INTO audit_state (symbol) SELECT symbol FROM unnest($1::text[]) AS symbol
ORDER BY symbol COLLATE "C" ON CONFLICT DO NOTHING
"""

# Closed klines that nobody looked at yet, $3 of each symbol at most. A symbol begins with its first
# stored trade; one without trades has its quiet minutes of the last day looked at.
TO_DO = """
SELECT s.symbol, k.timestamp AS open_time
FROM audit_state AS s
CROSS JOIN LATERAL (
    SELECT greatest((SELECT ledger_from FROM store_state), coalesce(
        s.audited_through,
        (SELECT date_trunc('minute', first_time) FROM trade_coverage
         WHERE symbol = s.symbol ORDER BY first_id LIMIT 1),
        $2::timestamptz - interval '1 day')) AS since
) AS f
CROSS JOIN LATERAL (
    SELECT timestamp FROM klines
    WHERE symbol = s.symbol AND timestamp >= f.since AND timestamp < $2::timestamptz AND is_closed
    ORDER BY timestamp LIMIT $3::int
) AS k
WHERE s.symbol = ANY($1::text[])
ORDER BY 2, 1
"""

# Minutes that are not proven and may be now. Holes are disjoint, so the nearest open one below the
# end tells whether there is one inside; a kline without ids has to be looked at after every fill.
# A fill may carry a time from before our look at it, when it was committed after: hence the
# minute's grace.
DUE = """
WITH s AS MATERIALIZED (
    SELECT n.symbol, c.last_id, c.last_time,
           (SELECT max(filled_at) FROM trade_gaps WHERE symbol = n.symbol) AS filled_at
    FROM unnest($1::text[]) AS n (symbol)
    LEFT JOIN LATERAL (SELECT last_id, last_time FROM trade_coverage WHERE symbol = n.symbol
                       ORDER BY first_id DESC LIMIT 1) AS c ON true
    WHERE EXISTS (SELECT FROM trade_audits WHERE symbol = n.symbol)
)
SELECT a.symbol, a.open_time
FROM s JOIN trade_audits AS a ON a.symbol = s.symbol
WHERE a.open_time < $2::timestamptz AND CASE
    WHEN a.retry_at <= clock_timestamp() THEN true
    WHEN a.reason = 'tail' AND a.last_id IS NOT NULL THEN a.last_id <= s.last_id
    WHEN a.reason = 'tail' THEN a.open_time + interval '1 minute' <= s.last_time
    WHEN a.reason = 'hole' AND a.last_id IS NOT NULL THEN NOT coalesce(
        (SELECT g.last_id >= a.first_id FROM trade_gaps AS g
         WHERE g.symbol = a.symbol AND g.state = 'open' AND g.first_id <= a.last_id
         ORDER BY g.first_id DESC LIMIT 1), false)
    WHEN s.filled_at > a.audited_at - interval '1 minute' THEN a.reason = 'hole'
        OR a.state = 'mismatch' AND a.first_id IS NOT NULL AND (
            EXISTS (SELECT FROM trade_gaps AS g
                    WHERE g.symbol = a.symbol AND g.first_id BETWEEN a.first_id AND a.last_id
                      AND g.filled_at > a.audited_at - interval '1 minute')
            OR coalesce((
                SELECT g.last_id >= a.first_id AND g.filled_at > a.audited_at - interval '1 minute'
                FROM trade_gaps AS g
                WHERE g.symbol = a.symbol AND g.first_id < a.first_id
                ORDER BY g.first_id DESC LIMIT 1), false))
    END
ORDER BY a.open_time DESC, a.symbol LIMIT $3::int
"""

# Klines that came after all.
LATE_KLINES = """
SELECT s.symbol, k.timestamp AS open_time
FROM audit_state AS s
CROSS JOIN LATERAL unnest(s.no_kline) AS gap
CROSS JOIN LATERAL (
    SELECT timestamp FROM klines
    WHERE symbol = s.symbol AND timestamp >= lower(gap)
      AND timestamp < least(upper(gap), $2::timestamptz) AND is_closed
    ORDER BY timestamp DESC LIMIT $3::int
) AS k
WHERE s.symbol = ANY($1::text[]) AND NOT isempty(s.no_kline)
ORDER BY 2 DESC, 1 LIMIT $3::int
"""

# $2: the minute.
LOCK = """
SELECT symbol, proven_from, audited_through, no_kline @> $2::timestamptz AS had_no_kline
FROM audit_state WHERE symbol = ANY($1::text[]) ORDER BY symbol FOR UPDATE SKIP LOCKED
"""

LOCK_BEHIND = """
SELECT symbol FROM audit_state
WHERE symbol = ANY($1::text[]) AND (audited_through IS NULL OR audited_through < $2::timestamptz)
ORDER BY symbol FOR UPDATE SKIP LOCKED
"""

# Symbols without a kline of a minute that was over $3 ago, nor any later one before $2. By the
# venue's clock, as far as it is known: the host's may be ahead. A symbol that was never audited
# begins with its first whole minute, a day ago at most.
SILENT = """
WITH venue AS MATERIALIZED (
    SELECT least($2::timestamptz, date_trunc('minute', greatest(
        (SELECT max(timestamp) FROM klines), (SELECT max(last_time) FROM trade_coverage)
    ))) - $3::interval AS until
)
SELECT s.symbol, f.since, venue.until
FROM venue CROSS JOIN audit_state AS s
LEFT JOIN LATERAL (
    SELECT date_trunc('minute', first_time) AS minute FROM trade_coverage
    WHERE symbol = s.symbol ORDER BY first_id LIMIT 1
) AS c ON s.audited_through IS NULL
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.minute IS NULL THEN s.audited_through
           ELSE greatest(c.minute + interval '1 minute', venue.until - interval '1 day')
           END AS since
) AS f
WHERE s.symbol = ANY($1::text[]) AND f.since < venue.until AND NOT EXISTS (
    SELECT FROM klines AS k
    WHERE k.symbol = s.symbol AND k.timestamp >= coalesce(s.audited_through, c.minute)
      AND k.timestamp < $2::timestamptz AND k.is_closed)
"""

EARLIER = """
SELECT symbol, state, reason, tries, asked_at, reopened_at FROM trade_audits
WHERE open_time = $1::timestamptz AND symbol = ANY($2::text[])
"""

SKIPPED = """
SELECT s.symbol FROM unnest($1::text[], $2::timestamptz[]) AS s (symbol, since)
WHERE EXISTS (SELECT FROM klines AS k WHERE k.symbol = s.symbol AND k.is_closed
              AND k.timestamp >= s.since AND k.timestamp < $3::timestamptz)
"""

KLINES = """
SELECT symbol, nullif(first_id, -1), CASE WHEN first_id <> -1 THEN last_id END,
       coalesce(trade_count, -1), open, high, low, close, volume, quote_volume,
       taker_buy_base_volume, taker_buy_quote_volume
FROM klines WHERE timestamp = $1::timestamptz AND symbol = ANY($2::text[]) AND is_closed
"""

# The one scan of a minute for all symbols. Grouped by side first, so that price x quantity is
# computed once a trade. $4, $5: first and last id by the kline.
MINUTES = """
SELECT symbol, sum(n)::int8, min(first_id), max(last_id), sum(id_sum), max(open), max(high),
       min(low), max(close), sum(volume), sum(quote_volume),
       coalesce(sum(volume) FILTER (WHERE side = 'BUY'), 0),
       coalesce(sum(quote_volume) FILTER (WHERE side = 'BUY'), 0)
FROM (
    SELECT t.symbol, t.side, count(*) AS n, min(t.trade_id) AS first_id,
           max(t.trade_id) AS last_id, sum(t.trade_id) AS id_sum,
           max(t.price) FILTER (WHERE t.trade_id = k.first_id) AS open,
           max(t.price) AS high, min(t.price) AS low,
           max(t.price) FILTER (WHERE t.trade_id = k.last_id) AS close,
           sum(t.quantity) AS volume, sum(t.price * t.quantity) AS quote_volume
    FROM raw_trades AS t
    JOIN unnest($3::text[], $4::int8[], $5::int8[]) AS k (symbol, first_id, last_id)
        ON k.symbol = t.symbol
    WHERE t.timestamp >= $1::timestamptz AND t.timestamp < $2::timestamptz
      AND t.symbol = ANY($3::text[])
    GROUP BY t.symbol, t.side
) AS sides GROUP BY symbol
"""

# Prices of single ids, for klines that do not tell their first and last id.
PRICES = """
SELECT t.symbol, t.trade_id, t.price
FROM raw_trades AS t
JOIN unnest($3::text[], $4::int8[]) AS e (symbol, trade_id)
    ON e.symbol = t.symbol AND e.trade_id = t.trade_id
WHERE t.timestamp >= $1::timestamptz AND t.timestamp < $2::timestamptz
  AND t.symbol = ANY($3::text[])
"""

_PART = """
SELECT coalesce(sum(least(r.last_id, p.last_id) - greatest(r.first_id, p.first_id) + 1), 0)::int8
FROM (
    (SELECT * FROM {table} WHERE symbol = p.symbol AND first_id < p.first_id
     ORDER BY first_id DESC LIMIT 1)
    UNION ALL
    (SELECT * FROM {table} WHERE symbol = p.symbol AND first_id BETWEEN p.first_id AND p.last_id)
) AS r WHERE r.last_id >= p.first_id {condition}
"""

# $1..$3: symbols, first and last ids by the klines; $4, $5: the minute.
KNOWN = f"""
SELECT p.symbol, low.first_id, high.last_id,
       ({_PART.format(table="trade_coverage", condition="")}),
       ({_PART.format(table="trade_gaps", condition="AND r.state = 'absent'")}),
       (extract(epoch FROM low.first_time) * 1000000)::int8,
       (extract(epoch FROM high.last_time) * 1000000)::int8,
       p.first_id IS NULL AND EXISTS (
           SELECT FROM trade_gaps AS g
           WHERE g.symbol = p.symbol AND g.state = 'open'
             AND (SELECT c.last_time FROM trade_coverage AS c
                  WHERE c.symbol = g.symbol AND c.first_id < g.first_id
                  ORDER BY c.first_id DESC LIMIT 1) < $5::timestamptz
             AND (SELECT c.first_time FROM trade_coverage AS c
                  WHERE c.symbol = g.symbol AND c.first_id > g.last_id
                  ORDER BY c.first_id LIMIT 1) >= $4::timestamptz)
FROM unnest($1::text[], $2::int8[], $3::int8[]) AS p (symbol, first_id, last_id)
LEFT JOIN LATERAL (SELECT first_id, first_time FROM trade_coverage WHERE symbol = p.symbol
                   ORDER BY first_id LIMIT 1) AS low ON true
LEFT JOIN LATERAL (SELECT last_id, last_time FROM trade_coverage WHERE symbol = p.symbol
                   ORDER BY first_id DESC LIMIT 1) AS high ON true
"""

# How many trades of the minute are not the kline's, and how many of the kline's are in a
# neighbouring minute.
MISPLACED = """
SELECT p.symbol,
       count(*) FILTER (WHERE t.timestamp >= $4::timestamptz AND t.timestamp < $5::timestamptz
                          AND NOT t.trade_id BETWEEN p.first_id AND p.last_id),
       count(*) FILTER (WHERE (t.timestamp < $4::timestamptz OR t.timestamp >= $5::timestamptz)
                          AND t.trade_id BETWEEN p.first_id AND p.last_id)
FROM raw_trades AS t
JOIN unnest($1::text[], $2::int8[], $3::int8[]) AS p (symbol, first_id, last_id)
    ON p.symbol = t.symbol
WHERE t.timestamp >= $4::timestamptz - interval '1 minute'
  AND t.timestamp < $5::timestamptz + interval '1 minute' AND t.symbol = ANY($1::text[])
GROUP BY p.symbol
"""

PROVEN = """
DELETE FROM trade_audits WHERE open_time = $1::timestamptz AND symbol = ANY($2::text[])
"""

# A minute whose kline is gone: it is missed again. $2: the minute.
GONE = """
WITH gone AS (
    DELETE FROM trade_audits
    WHERE open_time = lower($2::tstzrange) AND symbol = ANY($1::text[]) RETURNING symbol
)
UPDATE audit_state AS s SET no_kline = s.no_kline + tstzmultirange($2::tstzrange)
FROM gone WHERE s.symbol = gone.symbol
"""

UNPROVEN = """
INSERT INTO trade_audits AS a
    (symbol, open_time, state, reason, detail, first_id, last_id, audited_at, tries, retry_at,
     reopened_at)
SELECT n.symbol, $1::timestamptz, n.state, n.reason, n.detail, n.first_id, n.last_id,
       clock_timestamp(), n.tries, clock_timestamp() + n.delay_s * interval '1 s',
       CASE WHEN n.reopened THEN clock_timestamp() END
FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::int8[], $7::int8[], $8::int[],
            $9::float8[], $10::bool[])
    AS n (symbol, state, reason, detail, first_id, last_id, tries, delay_s, reopened)
ON CONFLICT (symbol, open_time) DO UPDATE
SET state = excluded.state, reason = excluded.reason, detail = excluded.detail,
    first_id = excluded.first_id, last_id = excluded.last_id, audited_at = excluded.audited_at,
    tries = excluded.tries, retry_at = excluded.retry_at,
    reopened_at = coalesce(a.reopened_at, excluded.reopened_at)
"""

# After the rows of trade_audits: it reads them. $3: from where the proof begins, when it begins;
# $4: minutes that had no kline and are passed over; $5: the minute that was looked at.
ADVANCE = """
UPDATE audit_state AS s
SET audited_through = greatest(s.audited_through, n.through),
    proven_from = coalesce(s.proven_from, n.proven_from),
    audited_at = clock_timestamp(),
    no_kline = s.no_kline + n.passed - tstzmultirange($5::tstzrange),
    proven_through = CASE WHEN coalesce(s.proven_from, n.proven_from) IS NOT NULL THEN least(
        greatest(s.audited_through, n.through),
        lower(s.no_kline + n.passed - tstzmultirange($5::tstzrange)),
        (SELECT min(open_time) FROM trade_audits WHERE symbol = s.symbol)) END
FROM (SELECT symbol, through, proven_from, tstzmultirange(passed) AS passed
      FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[], $4::tstzrange[])
          AS r (symbol, through, proven_from, passed)) AS n
WHERE s.symbol = n.symbol
"""

# late: not looked at up to $2.
STATE = """
SELECT symbol, (extract(epoch FROM proven_through) * 1000000)::int8 AS proven_us,
       CASE WHEN upper(no_kline) = audited_through THEN
           (SELECT max(lower(gap)) FROM unnest(no_kline) AS gap)
       ELSE audited_through END < $2::timestamptz AS late
FROM audit_state WHERE symbol = ANY($1::text[]) AND audited_through IS NOT NULL
"""

UNPROVEN_COUNTS = """
SELECT a.unproven + k.minutes AS unproven, a.mismatching
FROM (SELECT count(*) AS unproven, count(*) FILTER (WHERE state = 'mismatch') AS mismatching
      FROM trade_audits WHERE symbol = ANY($1::text[])) AS a,
     (SELECT coalesce(sum(extract(epoch FROM upper(gap) - lower(gap)) / 60), 0)::int8 AS minutes
      FROM audit_state, unnest(no_kline) AS gap
      WHERE symbol = ANY($1::text[]) AND NOT isempty(no_kline)) AS k
"""

TAILS = """
SELECT symbol, max(last_id) FROM trade_audits
WHERE symbol = ANY($1::text[]) AND reason = 'tail' AND last_id IS NOT NULL
GROUP BY symbol ORDER BY symbol
"""

# Not those of minutes in the middle of an open hole: nothing is to be proven there yet, and while
# many symbols have a long one, a row for each of their minutes would be too many.
KLINES_MISSING = """
SELECT s.symbol, (extract(epoch FROM lower(gap)) * 1000000)::int8,
       (extract(epoch FROM upper(gap) - interval '1 minute') * 1000000)::int8
FROM audit_state AS s
CROSS JOIN LATERAL (
    SELECT s.no_kline - coalesce(range_agg(tstzrange(below.minute, above.minute)), '{}') AS minutes
    FROM trade_gaps AS g
    CROSS JOIN LATERAL (
        SELECT date_trunc('minute', last_time) + interval '1 minute' AS minute
        FROM trade_coverage WHERE symbol = g.symbol AND first_id < g.first_id
        ORDER BY first_id DESC LIMIT 1) AS below
    CROSS JOIN LATERAL (
        SELECT date_trunc('minute', first_time) AS minute
        FROM trade_coverage WHERE symbol = g.symbol AND first_id > g.last_id
        ORDER BY first_id LIMIT 1) AS above
    WHERE g.symbol = s.symbol AND g.state = 'open' AND below.minute < above.minute
) AS m
CROSS JOIN LATERAL (
    SELECT gap FROM unnest(m.minutes) AS gap ORDER BY lower(gap) DESC LIMIT 2
) AS newest
WHERE s.symbol = ANY($1::text[]) AND NOT isempty(s.no_kline)
ORDER BY 3 DESC, s.symbol LIMIT $2::int
"""
