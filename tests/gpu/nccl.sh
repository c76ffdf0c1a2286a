#!/usr/bin/env bash
# Checks NCCL between processes on the GPUs of this machine, which may have a single GPU, with
# prebuilt programs. Nothing is compiled.
#
#   tests/gpu/nccl.sh BIN_DIR        BIN_DIR: lora-worker (built with the feature cuda), loractl
#
# Runs the all-reduce of `lora-worker probe` with two processes, and a job with one and with two
# workers, which must have the same adapter. If the machine has one GPU, the processes share it.
# The environment variable STEPS is the number of steps of the job (20).
set -uo pipefail
bin=$(cd "${1:?usage: nccl.sh BIN_DIR}" && pwd) || exit 2
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

line() { # ok or WRONG, name, details
  printf '%-5s %-44s %s\n' "$1" "$2" "$3"
  if [ "$1" != ok ]; then failures=$((failures + 1)); fi
}

cat > "$work/job.yaml" <<YAML
name: nccl
model: {base: $PWD/examples/dates/base}
adapter: {r: 8, lora_alpha: 16, lora_dropout: 0.05}
data: {train: $PWD/examples/dates/train.jsonl}
training:
  max_steps: ${STEPS:-20}
  global_batch_size: 8
  micro_batch_size: 2
  learning_rate: 1.0e-3
  logging_steps: 1
workers: {min: 1, max: 2}
YAML

answer=$(timeout 180 "$bin/lora-worker" probe --device auto --all-reduce 2 --collective nccl \
  2>"$work/probe.log")
case $answer in
  *'"through":"nccl"'*) line ok "all-reduce, 2 processes" "$answer" ;;
  *) line WRONG "all-reduce, 2 processes" "$answer $(tail -n 3 "$work/probe.log")" ;;
esac

# Runs the job as "$1" with "$2" workers, and prints the hash of its adapter.
adapter() {
  timeout 600 "$bin/loractl" run "$work/job.yaml" --device cuda --worker "$bin/lora-worker" --out "$work/$1" \
    --workers "$2" --collective nccl >"$work/$1.log" 2>&1 &&
    sed -n 's/^ *"adapter_sha256": "\(.*\)",\{0,1\}$/\1/p' "$work/$1/receipt.json"
}
one=$(adapter one 1)
line "$([ -n "$one" ] && echo ok || echo WRONG)" "1 worker" "${one:-$(tail -n 3 "$work/one.log")}"
two=$(adapter two 2)
line "$([ -n "$two" ] && [ "$two" = "$one" ] && echo ok || echo WRONG)" "2 workers, NCCL, the same adapter" \
  "${two:-$(tail -n 3 "$work/two.log")}"

[ $failures = 0 ]
