#!/bin/sh
# Installs tradecore on this host as a service, or below DESTDIR. What an operator has edited stays.
#
#   sh deploy/systemd/install.sh          program, command, units and settings
#   sh deploy/systemd/install.sh units    all but the program
#
# PYTHON=/usr/bin/python3.13 chooses the interpreter, WHEEL=tradecore-....whl spares the compiler.
set -eu
cd "$(dirname "$0")/../.."
root=${DESTDIR:-}
home=$root/opt/tradecore
etc=$root/etc/tradecore
python=${PYTHON:-/usr/bin/python3}

say() { printf 'tradecore: %s\n' "$*" >&2; }

refuse() {
    say "$@"
    exit 1
}

look_at_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        refuse "$python is not Python 3.11 or newer: install one, or name it by PYTHON"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        refuse "$python has no venv: apt-get install python3-venv"
    case $("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')/ in
    /home/* | /root/* | /run/user/*)
        refuse "$python lies in a home folder, which the service does not see: name another by PYTHON"
        ;;
    esac
}

pip() {
    venv=$1 action=$2
    shift 2
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check --no-input "$action" "$@"
}

install_program() {
    look_at_python
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    wheel=${WHEEL:-}
    if [ -z "$wheel" ]; then
        say "fetching the compiler of the extensions"
        "$python" -m venv "$tmp/build"
        pip "$tmp/build" install --require-hashes --requirement requirements/build.txt
        # In a copy: what is compiled here would be root's in a tree that is an operator's.
        mkdir "$tmp/source"
        cp -R pyproject.toml setup.py MANIFEST.in README.md LICENSE sql tradecore "$tmp/source"
        find "$tmp/source" -name '*.so' -delete
        say "compiling, which takes a minute or two"
        pip "$tmp/build" wheel --no-build-isolation --no-deps --wheel-dir "$tmp" "$tmp/source"
        wheel=$(echo "$tmp"/*.whl)
    fi
    say "putting it and its packages into $home"
    # Beside the old one, which a failure leaves as it is.
    "$python" -m venv --clear "$home.new"
    pip "$home.new" install --no-compile --require-hashes --requirement requirements/tradecore.txt
    pip "$home.new" install --no-compile --no-deps "$wheel"
    # Nobody can write bytecode into it later, and its programs have to know where it will be. What is
    # not meant for this Python does not compile, and is not needed.
    "$home.new/bin/python" -m compileall -qq -s "$home.new" -p /opt/tradecore "$home.new/lib" || :
    for file in "$home.new"/bin/* "$home.new/pyvenv.cfg"; do
        [ -L "$file" ] || sed -i "s|$home.new|/opt/tradecore|g" "$file"
    done
    rm -rf "$home.old"
    [ ! -e "$home" ] || mv "$home" "$home.old"
    mv "$home.new" "$home"
    rm -rf "$home.old"
}

# Installs $2 of mode $1 as $3, unless there is such a file already.
keep() {
    [ -e "$3" ] || install -m "$1" "$2" "$3"
}

install_units() {
    install -d -m 755 "$root/etc/systemd/system" "$root/usr/local/bin" "$etc"
    install -d -m 700 "$etc/credentials"
    for unit in tradecore.service tradecore@.service; do
        install -m 644 "deploy/systemd/$unit" "$root/etc/systemd/system/$unit"
    done
    install -m 755 deploy/systemd/tradecore.sh "$root/usr/local/bin/tradecore"
    keep 644 deploy/systemd/tradecore.conf "$etc/tradecore.conf"
    keep 600 deploy/systemd/database_url "$etc/credentials/database_url"
}

umask 022
[ "${1:-}" = units ] || install_program
install_units
say "installed. What comes next:
  nano /etc/tradecore/credentials/database_url   # your database; settings are in tradecore.conf
  systemctl daemon-reload
  systemctl enable --now tradecore
  tradecore check                                # with the settings of the service"
