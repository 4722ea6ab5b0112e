-- Up to where old trades have been taken out of the ledger; not above raw_from, and equal to it but
-- for the minute in which a day is given up. Rows from here on are those of trade_coverage; older
-- ones may still lie in raw_trades, to be dropped, and count for nothing.
--
-- A range of trade_coverage that begins before ledger_from has no row for its first id any more:
-- that id is kept where a hole above it is open, or nothing else is stored of the symbol.
ALTER TABLE store_state ADD COLUMN ledger_from timestamptz NOT NULL DEFAULT '-infinity';
