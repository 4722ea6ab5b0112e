-- Drops days that the ledger has given up, as a job of TimescaleDB while no daemon does it. It knows
-- nothing of ages: what is not below ledger_from stays, whatever the clocks say.
COMMENT ON COLUMN store_state.ledger_from IS 'Older rows of raw_trades and tickers count for nothing'
    ' and may be dropped at any time.';

-- level: community
-- config: where our tables are (schema) and the functions of TimescaleDB (extension), for a job has
-- a search_path of its own. Whoever refreshes candles holds the lock of refresh_key and the schema.
CREATE PROCEDURE tradecore_drop_expired(job_id int, config jsonb)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    home        text := config ->> 'schema';
    extension   text := config ->> 'extension';
    refresh_key int  := 1952670564;
    given_up    timestamptz;
    relation    text;
    days        int;
BEGIN
    EXECUTE format('SELECT ledger_from FROM %I.store_state', home) INTO given_up;
    IF given_up IS NULL OR NOT isfinite(given_up) THEN
        RETURN;
    END IF;
    FOR relation IN
        SELECT format('%I.%I', home, name) FROM unnest(ARRAY['raw_trades', 'tickers']) AS name
    LOOP
        EXECUTE format('SELECT count(*) FROM %I.show_chunks(%L::regclass, older_than => $1)',
                       extension, relation) INTO days USING given_up;
        CONTINUE WHEN days = 0;
        BEGIN
            -- A refresh that began before the horizon moved would delete candles.
            PERFORM set_config('lock_timeout', '2min', true);
            PERFORM pg_advisory_lock(refresh_key, hashtext(home));
            PERFORM pg_advisory_unlock(refresh_key, hashtext(home));
            PERFORM set_config('lock_timeout', '2s', true);
            EXECUTE format('SELECT %I.drop_chunks(%L::regclass, older_than => $1)',
                           extension, relation) USING given_up;
        EXCEPTION WHEN lock_not_available THEN
            RAISE LOG 'old days of % are in use and are dropped later', relation;
        END;
    END LOOP;
END
$$;
