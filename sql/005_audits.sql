-- The cross-check of stored trades with the venue's klines, minute by minute.

-- One row per symbol: what is proven.
CREATE TABLE audit_state (
    symbol          text COLLATE "C" PRIMARY KEY,
    proven_from     timestamptz,  -- where the proof begins; NULL: no whole minute was seen yet
    proven_through  timestamptz,  -- every minute from proven_from until here is proven
    audited_through timestamptz,  -- every minute until here is proven or has a row in trade_audits
    audited_at      timestamptz
);

-- One row per minute that is not proven; the row goes when it is.
CREATE TABLE trade_audits (
    symbol     text COLLATE "C" NOT NULL,
    open_time  timestamptz      NOT NULL,
    state      text             NOT NULL,  -- waiting: something is known to be missing yet
    reason     text             NOT NULL,  -- waiting: hole, tail (ids above all stored), kline
    detail     text,
    first_id   bigint,                     -- of the kline; NULL where it has none
    last_id    bigint,
    found_at   timestamptz      NOT NULL DEFAULT now(),
    audited_at timestamptz      NOT NULL DEFAULT now(),
    tries      integer          NOT NULL DEFAULT 0,
    retry_at   timestamptz      NOT NULL DEFAULT 'infinity',
    asked_at   timestamptz,                -- the venue was asked for the kline and has none
    PRIMARY KEY (symbol, open_time),
    CHECK (state IN ('waiting', 'mismatch'))
);

-- Klines of one symbol in their order.
CREATE INDEX klines_series ON klines (symbol, timestamp);
