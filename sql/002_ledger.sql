-- A range's neighbours in the history of holes, whatever became of them: a hole that is filled
-- page by page stays one row.
CREATE INDEX trade_gaps_range ON trade_gaps (symbol, first_id);
