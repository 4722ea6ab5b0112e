#!/bin/sh
# Writes requirements/*.txt for the image: the newest of everything that pyproject.toml allows, with
# hashes, for every Python from 3.11 on, without the name of a host. $1 has the programs.
set -eu
bin=$1

compile() {
    "$bin/uv" pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --custom-compile-command "make requirements" "$@" >/dev/null
}

mkdir -p requirements
compile pyproject.toml --output-file requirements/tradecore.txt
"$bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
' | compile - --no-annotate --output-file requirements/build.txt
