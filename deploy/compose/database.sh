#!/bin/sh
# Runs once, when the database's volume is new: the daemon gets its database, Grafana may read it.
set -eu
secrets=${SECRETS:-/run/secrets}
DAEMON=$(cat "$secrets/database_password") READER=$(cat "$secrets/grafana_database_password")
export DAEMON READER

psql --quiet --no-psqlrc --set=ON_ERROR_STOP=1 \
    --username="${POSTGRES_USER:-postgres}" --dbname="$POSTGRES_DB" <<'END'
\getenv daemon DAEMON
\getenv reader READER
\getenv database POSTGRES_DB
CREATE ROLE tradecore LOGIN PASSWORD :'daemon';
ALTER DATABASE :"database" OWNER TO tradecore;
CREATE ROLE grafana LOGIN PASSWORD :'reader' IN ROLE pg_read_all_data;
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '30s';
END
