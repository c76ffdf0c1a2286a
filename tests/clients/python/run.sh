#!/usr/bin/env bash
# Checks a running coordinator, with a worker, by a plain gRPC client in Python:
#
#   tests/clients/python/run.sh HOST:PORT
#
# No stubs are generated and no .proto files are read: the client asks the server what it has.
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
