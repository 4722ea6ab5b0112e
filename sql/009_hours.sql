COMMENT ON TABLE trade_times IS 'Where an id stands in time: every 65,536th id of a symbol, and the'
    ' first that was stored of each hour of trade time; an hour may have more.';
