-- A minute whose kline counts trades that were held absent has its hole opened again, once.
ALTER TABLE trade_audits ADD COLUMN reopened_at timestamptz;
