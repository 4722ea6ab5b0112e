#!/bin/sh
# Makes the virtual environment $1 with the clients of the venue that tests use, and nothing else:
# what they depend on would take the packages of the daemon back to older versions. Without them
# their tests skip, so that a failure is told and forgiven.
set -u
venv=$1
python=${2:-python3}

say() { printf 'tradecore: %s\n' "$*" >&2; }

say "installing the venue's clients into $venv, which takes half a minute"
"$python" -m venv --clear "$venv" &&
    "$python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["clients"], sep="\n")
' >"$venv/requires.txt" &&
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install \
        --requirement "$venv/requires.txt" &&
    exit 0
rm -rf "$venv"
say "the venue's clients cannot be installed here; their tests skip"
exit 1
