#!/bin/sh
# Makes the virtual environment $1 and installs tradecore in it, or says what is missing.
set -eu
venv=$1

say() { printf 'tradecore: %s\n' "$*" >&2; }

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    say "Python 3.11 or newer is needed${PYTHON:+ and $PYTHON is not one}. Install it:" \
        "apt-get install python3.11 python3.11-venv python3.11-dev"
    exit 1
fi

missing=
package=$(basename "$python")
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing $package-venv"
"$python" -c '
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
' || missing="$missing $package-dev"
program='#include <stdio.h>
int main(void) { return 0; }'
printf '%s' "$program" | "${CC:-cc}" -x c -o /dev/null - 2>/dev/null || missing="$missing gcc libc6-dev"
if [ -n "$missing" ]; then
    say "building needs more packages. Install them: apt-get install$missing"
    exit 1
fi

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
say "installing into $venv and compiling, which takes a minute or two"
# What builds is installed too, so that changed sources compile again without a network.
"$venv/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
' >"$venv/build-requires.txt"
pip install --requirement "$venv/build-requires.txt"
pip install --no-build-isolation --editable '.[dev]'
