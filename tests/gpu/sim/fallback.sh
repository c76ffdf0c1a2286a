#!/usr/bin/env bash
# Checks on simulated GPUs that a job reports it if `auto` falls back from NCCL to TCP between GPUs,
# and only then.
#
#   LD_LIBRARY_PATH=target/gpu-sim tests/gpu/sim/fallback.sh BIN_DIR
#
# BIN_DIR has lora-worker, built with the feature cuda, and loractl.
set -uo pipefail
bin=$(cd "${1:?usage: fallback.sh BIN_DIR}" && pwd) || exit 2
cd "$(dirname "$0")/../../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

cat > "$work/job.yaml" <<YAML
name: fallback
model: {base: $PWD/examples/dates/base}
adapter: {r: 8, lora_alpha: 16}
data: {train: $PWD/examples/dates/train.jsonl}
training: {max_steps: 2, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1}
workers: {min: 2, max: 2}
YAML

# check NAME EVENTS TEXT VARIABLE...: runs a job with two workers in an environment. Its log must
# have EVENTS events of the fallback, each with TEXT, and a warning from each worker for each event.
check() {
  local name=$1 expected=$2 text=$3 log=$work/$1.log
  shift 3
  env RUST_LOG=warn "$@" "$bin/loractl" run "$work/job.yaml" --device cuda --workers 2 \
    --worker "$bin/lora-worker" --out "$work/$name" >"$log" 2>&1
  local status=$? events warnings
  events=$(grep -c "^worker-[01], step 0: gradients travel between the GPUs over TCP.*$text" "$log")
  warnings=$(grep -c "NCCL is not used.*$text" "$log")
  if [ $status = 0 ] && [ "$events" = "$expected" ] && [ "$warnings" = $((2 * expected)) ]; then
    printf 'ok    %s\n' "$name"
  else
    printf 'WRONG %s: exit code %s, %s events, %s warnings\n' "$name" "$status" "$events" "$warnings"
    cat "$log"
    failures=$((failures + 1))
  fi
}

check nccl-between-gpus 0 . LORA_SIM_GPUS=2
check nccl-cannot-be-used 1 "NCCL_COMM_BLOCKING" LORA_SIM_GPUS=2 NCCL_COMM_BLOCKING=1
check nccl-fails-to-connect 1 "it failed when an earlier group formed" LORA_SIM_GPUS=2 LORA_SIM_NCCL_REFUSE=1
check one-gpu-is-shared 0 . LORA_SIM_GPUS=1 LORA_SIM_NCCL_VERSION=22809

[ $failures = 0 ]
