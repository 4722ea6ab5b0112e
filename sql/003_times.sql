-- Where an id stands in time: the ledger's ranges are merged and can span months, so that every
-- 65,536th id leaves a mark, written in the transaction of its row. Ids that were stored before
-- this table was there have none; their times are between those of their range.
CREATE TABLE trade_times (
    symbol    text COLLATE "C" NOT NULL,
    trade_id  bigint           NOT NULL,
    timestamp timestamptz      NOT NULL,  -- that of the row in raw_trades
    PRIMARY KEY (symbol, trade_id)
);
