#!/usr/bin/env bash
# Everything that can be checked on a machine with a GPU, by prebuilt programs: nothing is compiled
# here.
#
#   tests/gpu/selftest.sh BIN_DIR        BIN_DIR: lora-gpu and lora-worker (built with the feature cuda), loractl
#
# Every kernel against the CPU, gradients, whole models against Transformers + PEFT, training
# against the CPU's, the same bits again (lora-gpu); then jobs with real processes: the same adapter
# from 1, 2 and 4 workers, through TCP and NCCL (workers beyond the GPUs share them); with a worker
# killed on the way.
#
# From the environment: STEPS (200) of each job: a GPU needs longer for 200 steps than it takes to
# find and kill a worker. JOBS (all): which of the checks below run, in the order given here; `one`
# runs if another job is compared with it.
set -uo pipefail
bin=$(cd "${1:?usage: selftest.sh BIN_DIR}" && pwd) || exit 2
cd "$(dirname "$0")/../.." || exit 2
steps=${STEPS:-200}
all="doctor ops one tcp2 nccl2 tcp4 nccl4 killed-tcp killed-nccl cpu"
jobs=" ${JOBS:-$all} "
for name in $jobs; do
  case " $all " in
    *" $name "*) ;;
    *) echo "selftest.sh: invalid name in JOBS: $name; valid names: $all" >&2; exit 2 ;;
  esac
done
wanted() { [[ $jobs == *" $1 "* ]]; }
# shellcheck source=tests/gpu/libraries.sh
source tests/gpu/libraries.sh
find_libraries "$bin/lora-worker" "${PYTHON:-python3}" || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# A line of the table; "$2" is ok or WRONG.
line() {
  printf '%-5s %-44s %s\n' "$2" "$1" "${3:-}"
  if [ "$2" != ok ]; then failures=$((failures + 1)); fi
}

# A job of "$1" steps. The learning rate is constant, so that the first steps do not depend on the
# number of steps.
job_file() {
  cat <<YAML
name: selftest
model: {base: $PWD/examples/dates/base}
adapter: {r: 8, lora_alpha: 16, lora_dropout: 0.05}
data: {train: $PWD/examples/dates/train.jsonl}
training:
  max_steps: $1
  global_batch_size: 8
  micro_batch_size: 2
  learning_rate: 1.0e-3
  lr_scheduler_type: constant
  logging_steps: 1
workers: {min: 1, max: 4}
YAML
}
job_file "$steps" > "$work/job.yaml"
file=$work/job.yaml

# Runs the job of "$file" as "$1" with "$2" workers and further flags; its output is in
# "$work/$1.log".
job() {
  local name=$1 workers=$2
  shift 2
  timeout 900 "$bin/loractl" run "$file" --workers "$workers" --worker "$bin/lora-worker" \
    --out "$work/$name" "$@" >"$work/$name.log" 2>&1
}
field() { # name of a job, field of its receipt
  sed -n 's/^ *"'"$2"'": "\(.*\)",\{0,1\}$/\1/p' "$work/$1/receipt.json" 2>/dev/null | head -1
}

if wanted doctor; then
  "$bin/loractl" doctor --device cuda --worker "$bin/lora-worker"
  status=$?
  line doctor "$([ $status = 0 ] && echo ok || echo WRONG)" "exit code $status"
fi

if wanted ops; then
  "$bin/lora-gpu"
  status=$?
  line "operations, models, training" "$([ $status = 0 ] && echo ok || echo WRONG)" "exit code $status"
fi

# One worker is the reference of all that follow.
if [[ $jobs =~ \ (one|tcp|nccl|killed|cpu) ]]; then
  if job one 1 --device cuda; then
    line "1 worker" ok "$(field one adapter_sha256), $(field one numerics_id)"
  else
    line "1 worker" WRONG "$(tail -n 3 "$work/one.log")"
  fi
fi
same() { # what, job
  if [ -n "$(field "$2" adapter_sha256)" ] && [ "$(field "$2" adapter_sha256)" = "$(field one adapter_sha256)" ]; then
    line "$1" ok "the same adapter"
  else
    line "$1" WRONG "adapter '$(field "$2" adapter_sha256)'; $(tail -n 3 "$work/$2.log")"
  fi
}
for workers in 2 4; do
  if wanted "tcp$workers"; then
    job "tcp$workers" $workers --device cuda --collective tcp
    same "$workers workers, TCP" "tcp$workers"
  fi
  wanted "nccl$workers" || continue
  if job "nccl$workers" $workers --device cuda --collective nccl; then
    same "$workers workers, NCCL" "nccl$workers"
  elif grep -q "collective" "$work/nccl$workers.log"; then
    printf '%-5s %-44s %s\n' "--" "$workers workers, NCCL" "not here: $(grep -m 1 collective "$work/nccl$workers.log")"
  else
    line "$workers workers, NCCL" WRONG "$(tail -n 3 "$work/nccl$workers.log")"
  fi
done

# Sets `up` to the parent of process "$1", or to nothing. No process is started here and below: a
# machine has hundreds of processes, and a GPU's job is over in seconds.
parent() {
  local key value
  up=''
  while read -r key value; do
    if [ "$key" = PPid: ]; then
      up=$value
      return
    fi
  done 2>/dev/null <"/proc/$1/status"
}

# The id of a worker among the descendants of process "$1"; nothing if there is none.
worker_of() {
  local process pid name up
  for process in /proc/[0-9]*; do
    name=''
    { read -r name <"$process/comm"; } 2>/dev/null
    [ "$name" = lora-worker ] || continue
    pid=${process#/proc/}
    up=$pid
    while [ "${up:-0}" -gt 1 ]; do
      parent "$up"
      if [ "$up" = "$1" ]; then
        echo "$pid"
        return
      fi
    done
  done
}

# A worker that is killed is started again, and no step is lost.
killed() { # what, job, flags
  local what=$1 name=$2 victim
  shift 2
  job "$name" 2 --device cuda "$@" &
  local run=$!
  for _ in $(seq 15000); do
    [ "$(grep -c . "$work/$name/metrics.jsonl" 2>/dev/null)" -ge 2 ] 2>/dev/null && break
    kill -0 $run 2>/dev/null || break
    sleep 0.02
  done
  victim=$(worker_of $run)
  if [ -z "$victim" ] || ! kill -KILL "$victim" 2>/dev/null; then
    line "$what" WRONG "there was no worker to kill"
  fi
  wait $run
  same "$what" "$name"
}
if wanted killed-tcp; then killed "2 workers, one killed, TCP" killed-tcp --collective tcp; fi
if wanted killed-nccl; then killed "2 workers, one killed, NCCL" killed-nccl --collective nccl; fi

# The CPU computes the first steps of the same job in f32 over the same bf16 weights: losses agree
# within bf16, and differ more with each step, because the parameters differ by then.
losses() { head -n "$cpu_steps" "$work/$1/metrics.jsonl" 2>/dev/null | sed 's/.*"loss":\([0-9.e-]*\).*/\1/'; }
if wanted cpu; then
  cpu_steps=$((steps < 5 ? steps : 5))
  file=$work/cpu-job.yaml
  job_file "$cpu_steps" > "$file"
  job cpu 1 --device cpu
  compared=$(paste -d' ' <(losses cpu) <(losses one) | awk -v steps="$cpu_steps" '
    NF == 2 {
      d = ($1 - $2) / $1
      if (d < 0) d = -d
      if (d > 0.01 + 0.005 * n) wrong = 1
      n++
      all = all sprintf(" %.2g", d)
    }
    END { print (wrong || n != steps ? "WRONG" : "ok"), n + 0 " of " steps " steps, off by" all " of the loss" }')
  line "losses as on the CPU" "${compared%% *}" "${compared#* }"
fi

if [ $failures -gt 0 ]; then
  echo "$failures of the lines above are WRONG"
  exit 1
fi
echo "all right"
