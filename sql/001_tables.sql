-- The tables of the recorder and of its ledger. All times are UTC, all decimals exact.
--
-- A line "-- level: plain", "-- level: timescale" or "-- level: any" says for which kind of server
-- the lines after it are meant: native daily partitions or hypertables. Everything goes into the
-- default schema of the connection.

-- One row per trade, exactly once. The sole unique key leads with the time: a key that only ever
-- appends loads faster and stays smaller than one with the symbol first.
CREATE TABLE raw_trades (
    timestamp   timestamptz      NOT NULL,  -- the venue's trade time, microseconds
    symbol      text COLLATE "C" NOT NULL,
    price       numeric(20, 8)   NOT NULL,
    quantity    numeric(20, 8)   NOT NULL,
    side        varchar(4)       NOT NULL,  -- of the taker: BUY or SELL
    trade_id    bigint           NOT NULL,
    received_at timestamptz,                -- host clock; NULL for rows fetched later
    UNIQUE (timestamp, symbol, trade_id)
)
-- level: plain
PARTITION BY RANGE (timestamp)
-- level: any
;

-- The rolling 24-hour statistics, at most one row a symbol and second.
CREATE TABLE tickers (
    timestamp              timestamptz      NOT NULL,  -- event_time cut to the second
    symbol                 text COLLATE "C" NOT NULL,
    event_time             timestamptz      NOT NULL,
    price_change           numeric(38, 8),
    price_change_percent   numeric(38, 8),
    weighted_average_price numeric(38, 8),
    previous_close_price   numeric(38, 8),
    last_price             numeric(38, 8),
    last_quantity          numeric(38, 8),
    best_bid_price         numeric(38, 8),
    best_bid_quantity      numeric(38, 8),
    best_ask_price         numeric(38, 8),
    best_ask_quantity      numeric(38, 8),
    open_price             numeric(38, 8),
    high_price             numeric(38, 8),
    low_price              numeric(38, 8),
    volume                 numeric(38, 8),
    quote_volume           numeric(38, 8),
    open_time              timestamptz,
    close_time             timestamptz,
    first_id               bigint,
    last_id                bigint,
    trade_count            bigint,
    received_at            timestamptz,
    UNIQUE (timestamp, symbol)
)
-- level: plain
PARTITION BY RANGE (timestamp)
-- level: any
;

-- The venue's one-minute candles; one that is closed is final.
CREATE TABLE klines (
    timestamp              timestamptz      NOT NULL,  -- open time of the minute
    symbol                 text COLLATE "C" NOT NULL,
    event_time             timestamptz,
    close_time             timestamptz,
    open                   numeric(38, 8),
    high                   numeric(38, 8),
    low                    numeric(38, 8),
    close                  numeric(38, 8),
    volume                 numeric(38, 8),
    quote_volume           numeric(38, 8),
    taker_buy_base_volume  numeric(38, 8),
    taker_buy_quote_volume numeric(38, 8),
    trade_count            bigint,
    first_id               bigint,
    last_id                bigint,
    is_closed              boolean          NOT NULL,
    received_at            timestamptz,
    PRIMARY KEY (timestamp, symbol)
);

-- level: timescale
SELECT create_hypertable('raw_trades', 'timestamp',
    chunk_time_interval => interval '1 day', create_default_indexes => false);
SELECT create_hypertable('tickers', 'timestamp',
    chunk_time_interval => interval '1 day', create_default_indexes => false);
SELECT create_hypertable('klines', 'timestamp',
    chunk_time_interval => interval '30 days', create_default_indexes => false);
-- level: any

-- The lock row of a symbol: whoever writes trades of it holds this row first.
CREATE TABLE trade_symbols (
    symbol text COLLATE "C" PRIMARY KEY
);

-- The ledger: disjoint id ranges that are stored, adjacent ones merged. A range holds
-- last_id - first_id + 1 rows, always; a hole is what lies between two ranges of a symbol.
CREATE TABLE trade_coverage (
    symbol     text COLLATE "C" NOT NULL,
    first_id   bigint           NOT NULL,
    last_id    bigint           NOT NULL,
    first_time timestamptz      NOT NULL,  -- least and greatest timestamp of the rows
    last_time  timestamptz      NOT NULL,
    PRIMARY KEY (symbol, first_id),
    CHECK (first_id <= last_id),
    CHECK (first_time <= last_time)
) WITH (fillfactor = 50);

-- The history of holes, written in the transaction that opens or fills the hole.
CREATE TABLE trade_gaps (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    symbol      text COLLATE "C" NOT NULL,
    first_id    bigint           NOT NULL,
    last_id     bigint           NOT NULL,
    cause       text             NOT NULL,
    detected_at timestamptz      NOT NULL DEFAULT now(),
    state       text             NOT NULL DEFAULT 'open',
    filled_by   text,
    filled_at   timestamptz,
    evidence    jsonb,                     -- what proves that the venue has no such trades
    CHECK (first_id <= last_id),
    CHECK (state IN ('open', 'filled', 'absent'))
);
CREATE INDEX trade_gaps_open ON trade_gaps (symbol, first_id) WHERE state = 'open';

-- Rows that the server refused, with its reason; they do not count as covered.
CREATE TABLE dead_letters (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind      text             NOT NULL,
    symbol    text COLLATE "C" NOT NULL,
    trade_id  bigint,
    payload   jsonb            NOT NULL,
    sqlstate  text,
    reason    text,
    parked_at timestamptz      NOT NULL DEFAULT now(),
    CHECK (kind IN ('trade', 'ticker', 'kline'))
);
CREATE UNIQUE INDEX dead_letters_trade ON dead_letters (symbol, trade_id) WHERE kind = 'trade';
