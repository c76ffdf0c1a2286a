#!/usr/bin/env bash
# Checks licences, bans and sources of the dependencies with cargo-deny and deny.toml, and their
# advisories if the advisory database can be fetched. Installs cargo-deny into the target directory
# if it is not on PATH.
#
#   tests/deny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.20.2
tools=$(realpath -m "${CARGO_TARGET_DIR:-target}")/tools
export PATH=$tools/bin:$PATH
if ! command -v cargo-deny >/dev/null; then
  # Without optimization: it runs for a second, and an optimized build takes minutes.
  CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --debug --locked --no-default-features \
    --root "$tools" "cargo-deny@$version"
fi
cargo deny --locked check --hide-inclusion-graph licenses bans sources
if ! fetched=$(cargo deny --locked fetch 2>&1); then
  echo "SKIPPED: advisories: the database cannot be fetched: $(grep -m 1 -i error <<<"$fetched")"
  exit
fi
cargo deny --locked check advisories
