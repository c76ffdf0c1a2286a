#!/usr/bin/env bash
# Checks a running coordinator that has a worker, with a gRPC client in Python.
#
#   tests/clients/python/run.sh HOST:PORT
#
# The client needs neither generated stubs nor .proto files, because it uses server reflection.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! python3 -m venv "$work/venv" 2>/dev/null; then
  apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
  python3 -m venv --clear "$work/venv"
fi
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
PYTHONDONTWRITEBYTECODE=1 "$work/venv/bin/python" check.py "$1" ../../../examples/dates
