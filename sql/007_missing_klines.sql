-- Minutes without a kline come in long runs, the same for all symbols: one value holds them.
-- Before audited_through every minute is proven, or here, or has a row in trade_audits.
ALTER TABLE audit_state ADD COLUMN no_kline tstzmultirange NOT NULL DEFAULT '{}';

UPDATE audit_state AS s SET no_kline = a.minutes
FROM (SELECT symbol, range_agg(tstzrange(open_time, open_time + interval '1 minute')) AS minutes
      FROM trade_audits WHERE reason = 'kline' AND asked_at IS NULL GROUP BY symbol) AS a
WHERE a.symbol = s.symbol;
DELETE FROM trade_audits WHERE reason = 'kline' AND asked_at IS NULL;
