-- When a hole of a symbol was filled or closed last: the cross-check asks for it at every look.
CREATE INDEX trade_gaps_filled ON trade_gaps (symbol, filled_at) WHERE filled_at IS NOT NULL;
