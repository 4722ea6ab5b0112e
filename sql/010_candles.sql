-- Candles of six widths, computed from raw_trades: never from the venue's klines, which are their
-- witness. The same names and columns everywhere: continuous aggregates where TimescaleDB has them
-- (level community), tables that the daemon refreshes elsewhere (level tables).
--
-- bucket: begin of the candle; open and close: price of the least and the greatest trade id;
-- quote_volume: the exact sum of price x quantity; taker_buy_*: of trades whose taker bought.

-- What is true of the whole database; one row.
CREATE TABLE store_state (
    singleton       boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    -- Candles of earlier minutes are up to date, but for those in candle_windows. Whoever stores
    -- older trades enters their minutes there, in the transaction of the trades.
    candles_through timestamptz NOT NULL DEFAULT '-infinity',
    -- The retention horizon, a midnight: older trades are dropped, or about to be, and none are
    -- stored any more. No refresh of candles reaches below it: it would delete them.
    raw_from        timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO store_state DEFAULT VALUES;

-- Minutes of trade time whose candles have to be computed anew; a row goes when that is done.
CREATE TABLE candle_windows (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    minutes tstzmultirange NOT NULL
);

-- level: tables
CREATE TABLE candles_1m (
    bucket                 timestamptz      NOT NULL,
    symbol                 text COLLATE "C" NOT NULL,
    open                   numeric          NOT NULL,
    high                   numeric          NOT NULL,
    low                    numeric          NOT NULL,
    close                  numeric          NOT NULL,
    volume                 numeric          NOT NULL,
    quote_volume           numeric          NOT NULL,
    trade_count            bigint           NOT NULL,
    taker_buy_base_volume  numeric          NOT NULL,
    taker_buy_quote_volume numeric          NOT NULL,
    first_id               bigint           NOT NULL,
    last_id                bigint           NOT NULL,
    PRIMARY KEY (symbol, bucket)
) WITH (fillfactor = 80);
CREATE INDEX candles_1m_bucket ON candles_1m (bucket);
CREATE TABLE candles_5m (LIKE candles_1m INCLUDING ALL) WITH (fillfactor = 80);
CREATE TABLE candles_15m (LIKE candles_1m INCLUDING ALL) WITH (fillfactor = 80);
CREATE TABLE candles_1h (LIKE candles_1m INCLUDING ALL) WITH (fillfactor = 80);
CREATE TABLE candles_4h (LIKE candles_1m INCLUDING ALL) WITH (fillfactor = 80);
CREATE TABLE candles_1d (LIKE candles_1m INCLUDING ALL) WITH (fillfactor = 80);

-- level: community
CREATE MATERIALIZED VIEW candles_1m
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(interval '1 minute', timestamp) AS bucket,
       symbol,
       first(price, trade_id) AS open,
       max(price) AS high,
       min(price) AS low,
       last(price, trade_id) AS close,
       sum(quantity) AS volume,
       sum(price * quantity) AS quote_volume,
       count(*) AS trade_count,
       sum(CASE WHEN side = 'BUY' THEN quantity ELSE 0 END) AS taker_buy_base_volume,
       sum(CASE WHEN side = 'BUY' THEN price * quantity ELSE 0 END) AS taker_buy_quote_volume,
       min(trade_id) AS first_id,
       max(trade_id) AS last_id
FROM raw_trades
GROUP BY 1, 2
WITH NO DATA;

CREATE MATERIALIZED VIEW candles_5m
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(interval '5 minutes', bucket) AS bucket,
       symbol,
       first(open, bucket) AS open,
       max(high) AS high,
       min(low) AS low,
       last(close, bucket) AS close,
       sum(volume) AS volume,
       sum(quote_volume) AS quote_volume,
       sum(trade_count)::bigint AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume,
       min(first_id) AS first_id,
       max(last_id) AS last_id
FROM candles_1m
GROUP BY 1, 2
WITH NO DATA;

CREATE MATERIALIZED VIEW candles_15m
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(interval '15 minutes', bucket) AS bucket,
       symbol,
       first(open, bucket) AS open,
       max(high) AS high,
       min(low) AS low,
       last(close, bucket) AS close,
       sum(volume) AS volume,
       sum(quote_volume) AS quote_volume,
       sum(trade_count)::bigint AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume,
       min(first_id) AS first_id,
       max(last_id) AS last_id
FROM candles_5m
GROUP BY 1, 2
WITH NO DATA;

CREATE MATERIALIZED VIEW candles_1h
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(interval '1 hour', bucket) AS bucket,
       symbol,
       first(open, bucket) AS open,
       max(high) AS high,
       min(low) AS low,
       last(close, bucket) AS close,
       sum(volume) AS volume,
       sum(quote_volume) AS quote_volume,
       sum(trade_count)::bigint AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume,
       min(first_id) AS first_id,
       max(last_id) AS last_id
FROM candles_15m
GROUP BY 1, 2
WITH NO DATA;

CREATE MATERIALIZED VIEW candles_4h
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(interval '4 hours', bucket) AS bucket,
       symbol,
       first(open, bucket) AS open,
       max(high) AS high,
       min(low) AS low,
       last(close, bucket) AS close,
       sum(volume) AS volume,
       sum(quote_volume) AS quote_volume,
       sum(trade_count)::bigint AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume,
       min(first_id) AS first_id,
       max(last_id) AS last_id
FROM candles_1h
GROUP BY 1, 2
WITH NO DATA;

CREATE MATERIALIZED VIEW candles_1d
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT time_bucket(interval '1 day', bucket) AS bucket,
       symbol,
       first(open, bucket) AS open,
       max(high) AS high,
       min(low) AS low,
       last(close, bucket) AS close,
       sum(volume) AS volume,
       sum(quote_volume) AS quote_volume,
       sum(trade_count)::bigint AS trade_count,
       sum(taker_buy_base_volume) AS taker_buy_base_volume,
       sum(taker_buy_quote_volume) AS taker_buy_quote_volume,
       min(first_id) AS first_id,
       max(last_id) AS last_id
FROM candles_4h
GROUP BY 1, 2
WITH NO DATA;

-- By default chunks are of ten days: a year of daily candles would lie in 37 of them.
SELECT set_chunk_time_interval(format('%I.%I', materialization_hypertable_schema,
                                      materialization_hypertable_name)::regclass, chunk)
FROM timescaledb_information.continuous_aggregates
JOIN (VALUES ('candles_15m', interval '30 days'), ('candles_1h', interval '90 days'),
             ('candles_4h', interval '360 days'), ('candles_1d', interval '1800 days'))
    AS wide (name, chunk) ON view_name = name
WHERE view_schema = current_schema();
