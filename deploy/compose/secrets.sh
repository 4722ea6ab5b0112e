#!/bin/sh
# Makes the secrets of compose.yaml in ./secrets, or in the folder $1; what is there is kept.
# The folder is for its owner alone. The files are not: users of several containers read them.
set -eu
umask 022
folder=${1:-secrets}
mkdir -p -m 0700 "$folder"

keep() { # name: standard input, unless there is a file of that name
    [ -e "$folder/$1" ] || cat >"$folder/$1"
}
random() { od -An -N 24 -t x1 /dev/urandom | tr -d ' \n'; }
secret() { cat "$folder/$1"; }

for name in postgres_password database_password redis_password http_token \
    grafana_admin_password grafana_database_password; do
    random | keep "$name"
done
printf 'postgresql://tradecore:%s@timescaledb/tradecore\n' "$(secret database_password)" |
    keep database_url
printf 'redis://tradecore:%s@redis:6379/0\n' "$(secret redis_password)" | keep redis_url
# Whoever has no password may see that the server is there, and nothing else.
keep redis_users <<END
user default on nopass resetkeys resetchannels -@all +ping
user tradecore on #$(secret redis_password | sha256sum | cut -d ' ' -f 1) ~tradecore:* &tradecore:* +@all -@admin -@dangerous +info
END
