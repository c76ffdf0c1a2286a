#!/usr/bin/env bash
# Runs the quickstart of README.md, checks the accuracy after training, and verifies the result.
# loractl is built alone here, as users build it, with other features than in the workspace: a
# warning is an error.
#
#   tests/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo build --release -p loractl 2>&1 | tee "$work/build"
if grep '^warning' "$work/build"; then
  echo "quickstart.sh: the build of loractl has warnings" >&2
  exit 1
fi
time cargo run --release -p loractl -- quickstart --out "$work/result" | tee "$work/table"
after=$(sed -n 's/^exact match after *\([0-9.]*\) %$/\1/p' "$work/table")
awk -v after="$after" 'BEGIN { exit !(after >= 90) }' ||
  { echo "quickstart.sh: the exact match after training is $after %, below 90 %" >&2; exit 1; }
cargo run --release -p loractl -- verify "$work/result"
