#!/bin/sh
# tradecore with the settings of its service, for the shell of an operator:
#
#   sudo tradecore check
#   sudo INSTANCE=a tradecore check      as tradecore@a has them
#
set -eu
etc=/etc/tradecore
export DATA_DIR="${DATA_DIR:-/var/lib/tradecore${INSTANCE:+-$INSTANCE}}"
export SETTINGS_FILE="${SETTINGS_FILE:-$etc/tradecore.conf}"
export CREDENTIALS_DIRECTORY="${CREDENTIALS_DIRECTORY:-$etc/credentials}"

if [ "${1:-}" = run ]; then
    echo "tradecore: its files would be root's: systemctl start tradecore${INSTANCE:+@$INSTANCE}" >&2
    exit 2
fi
if [ -n "${INSTANCE:-}" ]; then
    # Those of all instances, and after them its own, which win.
    both=$(cat "$etc/tradecore.conf" "$etc/$INSTANCE.conf")
    exec 3<<EOF
$both
EOF
    SETTINGS_FILE=/dev/fd/3
fi
exec /opt/tradecore/bin/python -P -m tradecore "$@"
