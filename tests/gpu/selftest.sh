#!/usr/bin/env bash
# Everything that can be checked on a machine with a GPU, by prebuilt programs: nothing is compiled here.
#
#   tests/gpu/selftest.sh BIN_DIR        BIN_DIR: lora-gpu and lora-worker (built with the feature cuda), loractl
#
# Every kernel against the CPU, gradients, whole models against Transformers + PEFT, training against the CPU's, the same
# bits again (lora-gpu); then jobs with real processes: the same adapter from 1, 2 and 4 workers, through TCP and NCCL
# (workers beyond the GPUs share them); with a worker killed on the way. STEPS: of each job (default 200,
# which a GPU needs longer for than it takes to find and kill a worker).
set -uo pipefail
bin=$(cd "${1:?usage: selftest.sh BIN_DIR}" && pwd) || exit 2
cd "$(dirname "$0")/../.."
steps=${STEPS:-200}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# A line of the table; "$2" is ok or WRONG.
line() {
  printf '%-5s %-44s %s\n' "$2" "$1" "${3:-}"
  if [ "$2" != ok ]; then failures=$((failures + 1)); fi
}

cat > "$work/job.yaml" <<YAML
name: selftest
model: {base: $PWD/examples/dates/base}
adapter: {r: 8, lora_alpha: 16, lora_dropout: 0.05}
data: {train: $PWD/examples/dates/train.jsonl}
training: {max_steps: $steps, global_batch_size: 8, micro_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1}
workers: {min: 1, max: 4}
YAML

# The job of "$1" with "$2" workers and further flags; what it printed is in "$work/$1.log".
job() {
  local name=$1 workers=$2
  shift 2
  timeout 900 "$bin/loractl" run "$work/job.yaml" --workers "$workers" --worker "$bin/lora-worker" --out "$work/$name" "$@" \
    >"$work/$name.log" 2>&1
}
field() { # name of a job, field of its receipt
  sed -n 's/^ *"'"$2"'": "\(.*\)",\{0,1\}$/\1/p' "$work/$1/receipt.json" 2>/dev/null | head -1
}

"$bin/loractl" doctor --device cuda --worker "$bin/lora-worker"
status=$?
line doctor "$([ $status = 0 ] && echo ok || echo WRONG)" "exit code $status"

"$bin/lora-gpu"
status=$?
line "operations, models, training" "$([ $status = 0 ] && echo ok || echo WRONG)" "exit code $status"

# One worker is the reference of all that follow.
if job one 1 --device cuda; then
  line "1 worker" ok "$(field one adapter_sha256), $(field one numerics_id)"
else
  line "1 worker" WRONG "$(tail -n 3 "$work/one.log")"
fi
same() { # what, job
  if [ -n "$(field "$2" adapter_sha256)" ] && [ "$(field "$2" adapter_sha256)" = "$(field one adapter_sha256)" ]; then
    line "$1" ok "the same adapter"
  else
    line "$1" WRONG "adapter '$(field "$2" adapter_sha256)'; $(tail -n 3 "$work/$2.log")"
  fi
}
for workers in 2 4; do
  job "tcp$workers" $workers --device cuda --collective tcp
  same "$workers workers, TCP" "tcp$workers"
  if job "nccl$workers" $workers --device cuda --collective nccl; then
    same "$workers workers, NCCL" "nccl$workers"
  elif grep -q "collective" "$work/nccl$workers.log"; then
    printf '%-5s %-44s %s\n' "--" "$workers workers, NCCL" "not here: $(grep -m 1 collective "$work/nccl$workers.log")"
  else
    line "$workers workers, NCCL" WRONG "$(tail -n 3 "$work/nccl$workers.log")"
  fi
done

# A worker that is killed is started again, and no step is lost.
killed() { # what, job, flags
  local what=$1 name=$2 loractl victim
  shift 2
  job "$name" 2 --device cuda "$@" &
  local run=$!
  for _ in $(seq 15000); do
    [ "$(grep -c . "$work/$name/metrics.jsonl" 2>/dev/null)" -ge 2 ] 2>/dev/null && break
    kill -0 $run 2>/dev/null || break
    sleep 0.02
  done
  loractl=$(pgrep -n -f "loractl run .*$work/$name ")
  victim=$(pgrep -P "${loractl:-0}" | tail -1)
  kill -KILL "$victim" 2>/dev/null || line "$what" WRONG "there was no worker to kill"
  wait $run
  same "$what" "$name"
}
killed "2 workers, one killed, TCP" killed-tcp --collective tcp
killed "2 workers, one killed, NCCL" killed-nccl --collective nccl

# The CPU computes the same job in f32 over the same bf16 weights: the first losses agree within bf16.
losses() { head -n 20 "$work/$1/metrics.jsonl" 2>/dev/null | sed 's/.*"loss":\([0-9.e-]*\).*/\1/'; }
job cpu 1 --device cpu
worst=$(paste -d' ' <(losses cpu) <(losses one) |
  awk '{ d = ($1 - $2) / $1; if (d < 0) d = -d; if (d > worst) worst = d; n++ } END { if (n) print worst; else print 1 }')
line "losses as on the CPU" "$(awk -v w="$worst" 'BEGIN { print (w <= 0.02) ? "ok" : "WRONG" }')" "off by $worst of the loss"

if [ $failures -gt 0 ]; then
  echo "$failures of the lines above are WRONG"
  exit 1
fi
echo "all right"
