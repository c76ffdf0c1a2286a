#!/usr/bin/env bash
# Starts a coordinator and a worker, and checks them with the Python client (run.sh).
#
#   tests/clients/python/check.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
cargo build --workspace --bins
bin=${CARGO_TARGET_DIR:-target}/debug
work=$(mktemp -d)
started=()
finish() {
  for process in "${started[@]}"; do kill -KILL "$process" 2>/dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT

# Prints field "$2" of the message `listening` in the JSON log "$1", once it is logged.
listening() {
  for _ in $(seq 600); do
    if grep -q '"listening"' "$1"; then
      sed -n 's/.*"listening".*"'"$2"'":"\([^"]*\)".*/\1/p' "$1" | head -1
      return
    fi
    sleep 0.1
  done
  cat "$1" >&2
  return 1
}

"$bin/lora-coordinator" --set state_dir="$work/state" --set grpc.listen=127.0.0.1:0 \
  --set http.listen= --set log.format=json 2>"$work/coordinator.log" &
started+=($!)
address=$(listening "$work/coordinator.log" address)
"$bin/lora-worker" --set cache_dir="$work/cache" --set coordinator="http://$address" \
  --set peer.listen=127.0.0.1:0 --set http.listen=127.0.0.1:0 --set log.format=json 2>"$work/worker.log" &
started+=($!)
http=$(listening "$work/worker.log" http)
# The worker is ready once it is connected.
timeout 60 bash -c "until exec 3<>/dev/tcp/${http/:/\/} &&
  printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3 && grep -q '200 OK' <&3; do sleep 0.1; done"
tests/clients/python/run.sh "$address" || { tail -n 50 "$work"/*.log; exit 1; }
for process in "${started[@]}"; do
  kill "$process"
  wait "$process" || { tail -n 50 "$work"/*.log; exit 1; }
done
started=()
