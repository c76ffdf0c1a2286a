#!/usr/bin/env bash
# Builds the wheel, installs it in an empty virtual environment without network access, and runs the
# program.
#
#   tests/wheel.sh
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/build"
"$work/build/bin/pip" install --quiet 'maturin>=1.9,<2'
"$work/build/bin/maturin" build --release --out "$work/dist"
python3 -m venv "$work/empty"
"$work/empty/bin/pip" install --quiet --no-index "$work"/dist/loractl-*.whl
cd "$work"
PATH=$work/empty/bin:/usr/bin:/bin loractl --version
PATH=$work/empty/bin:/usr/bin:/bin loractl plan "$root/examples/dates/job.yaml" > plan
grep -q '276,480' plan
ls -l dist
