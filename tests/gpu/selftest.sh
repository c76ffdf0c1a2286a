#!/usr/bin/env bash
# Runs all checks for a machine with a GPU, with prebuilt programs. Nothing is compiled.
#
#   tests/gpu/selftest.sh BIN_DIR
#
# BIN_DIR has lora-gpu and lora-worker, built with the feature cuda, and loractl.
#
# lora-gpu compares kernels, gradients and training with the CPU's, and whole models with
# Transformers + PEFT, and checks that a repetition gives the same bits. Jobs with real processes
# then check that 1, 2 and 4 workers give the same adapter, over TCP and NCCL, also if a
# worker is killed during the job. If there are more workers than GPUs, workers share a GPU.
#
# From the environment: STEPS (200): steps of each job; a GPU needs longer for 200 steps than it
# takes to find and kill a worker. JOB_SECONDS (900): the limit of a job. JOBS (all): the checks to
# run, out of the list `all` below, in its order; `one` also runs if another job is compared with
# it.
#
# The status of a check is ok, WRONG, stopped (at JOB_SECONDS) or -- (this machine cannot run it).
# If a check is not ok, the beginning and the end of its job's log are printed below it.
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
job_seconds=${JOB_SECONDS:-900}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# Runs a command in the background and waits for it, because bash handles a signal only after a
# foreground command has ended.
run() {
  "$@" &
  wait $!
}

# shellcheck disable=SC2329 # called by the trap
interrupt() {
  local log
  # shellcheck disable=SC2046 # one word each
  kill $(jobs -p) 2>/dev/null
  for log in "$work"/*.log; do
    if [ -e "$log" ]; then log_of "$(basename "$log" .log)"; fi
  done
  exit 143
}
trap interrupt TERM INT HUP

# Prints the log of job "$1", indented; of a long log, the beginning and the end.
log_of() {
  local log=$work/$1.log
  echo "    the log of $1:"
  if [ "$(wc -l <"$log")" -le 60 ]; then
    cat "$log"
  else
    head -n 20 "$log"
    echo ...
    tail -n 40 "$log"
  fi | sed 's/^/    /'
}

# Prints a line of the table: name "$1", status "$2", details "$3". If the status is not ok, the log
# of job "$4" follows.
line() {
  printf '%-7s %-44s %s\n' "$2" "$1" "${3:-}"
  if [ "$2" != ok ]; then
    failures=$((failures + 1))
    if [ -n "${4:-}" ]; then log_of "$4"; fi
  fi
}

# Prints a line for the command "$1", which ended with status "$2".
line_of_status() {
  line "$1" "$([ "$2" = 0 ] && echo ok || echo WRONG)" "exit code $2"
}

# Prints the file of a job of "$1" steps. The learning rate is constant, so that the first steps do
# not depend on the number of steps.
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
# "$work/$1.log". Returns 124 if it was stopped at its limit.
job() {
  local name=$1 workers=$2 begun=$SECONDS status=0
  shift 2
  # Only this command is redirected, so that a trap that runs meanwhile prints to the script's
  # stdout.
  timeout --kill-after=5 "$job_seconds" "$bin/loractl" run "$file" --workers "$workers" \
    --worker "$bin/lora-worker" --out "$work/$name" "$@" >"$work/$name.log" 2>&1 &
  wait $! || status=$?
  # `timeout` does not return 124 if it had to send SIGKILL, so the time is compared too.
  if [ $status != 0 ] && [ $((SECONDS - begun)) -ge "$job_seconds" ]; then status=124; fi
  return $status
}
# Prints line "$1" of job "$2", which is not ok and ended with status "$3"; "$4" is the reason.
bad() {
  if [ "$3" = 124 ]; then
    line "$1" stopped "after $job_seconds s" "$2"
  else
    line "$1" WRONG "${4:-exit code $3}" "$2"
  fi
}
# Prints field "$2" of the receipt of job "$1".
field() {
  sed -n 's/^ *"'"$2"'": "\(.*\)",\{0,1\}$/\1/p' "$work/$1/receipt.json" 2>/dev/null | head -1
}

if wanted doctor; then
  run "$bin/loractl" doctor --device cuda --worker "$bin/lora-worker"
  line_of_status doctor $?
fi

if wanted ops; then
  run "$bin/lora-gpu"
  line_of_status "operations, models, training" $?
fi

# The job with one worker is the reference for all jobs below.
if [[ $jobs =~ \ (one|tcp|nccl|killed|cpu) ]]; then
  if job one 1 --device cuda; then
    line "1 worker" ok "$(field one adapter_sha256), $(field one numerics_id)"
  else
    bad "1 worker" one $?
  fi
fi
# Prints line "$1" of job "$2", which ended with status "$3": its adapter must be that of `one`.
same() {
  local adapter
  adapter=$(field "$2" adapter_sha256)
  if [ "$3" = 0 ] && [ -n "$adapter" ] && [ "$adapter" = "$(field one adapter_sha256)" ]; then
    line "$1" ok "the same adapter"
  else
    bad "$1" "$2" "$3" "exit code $3, adapter '$adapter'"
  fi
}
for workers in 2 4; do
  if wanted "tcp$workers"; then
    job "tcp$workers" $workers --device cuda --collective tcp
    same "$workers workers, TCP" "tcp$workers" $?
  fi
  wanted "nccl$workers" || continue
  job "nccl$workers" $workers --device cuda --collective nccl
  status=$?
  reason=$(grep -m 1 collective "$work/nccl$workers.log")
  if [ $status != 0 ] && [ $status != 124 ] && [ -n "$reason" ]; then
    printf '%-7s %-44s %s\n' "--" "$workers workers, NCCL" "unavailable: $reason"
  else
    same "$workers workers, NCCL" "nccl$workers" $status
  fi
done

# Sets `up` to the parent of process "$1", or to nothing. This function and `worker_of` start no
# programs, because a machine has hundreds of processes and a job on a GPU ends within seconds.
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

# Prints the id of a worker among the descendants of process "$1", or nothing if there is none.
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

# Kills a worker of job "$2" after its second step and prints line "$1"; further arguments are
# flags of the job. The worker must be started again, and the adapter must be that of `one`.
killed() {
  local what=$1 name=$2 victim status
  shift 2
  # A subshell does not inherit the trap.
  { trap 'kill $(jobs -p)' TERM; job "$name" 2 --device cuda "$@"; } &
  local process=$!
  for _ in $(seq 15000); do
    [ "$(grep -c . "$work/$name/metrics.jsonl" 2>/dev/null)" -ge 2 ] 2>/dev/null && break
    kill -0 $process 2>/dev/null || break
    sleep 0.02
  done
  victim=$(worker_of $process)
  if [ -n "$victim" ] && kill -KILL "$victim" 2>/dev/null; then
    wait $process
    same "$what" "$name" $?
  else
    wait $process
    bad "$what" "$name" $? "there was no worker to kill"
  fi
}
if wanted killed-tcp; then killed "2 workers, one killed, TCP" killed-tcp --collective tcp; fi
if wanted killed-nccl; then killed "2 workers, one killed, NCCL" killed-nccl --collective nccl; fi

# The CPU computes the first steps of the same job in f32 with the same bf16 weights. The losses
# agree within bf16's precision and differ more with each step, because the parameters differ.
losses() { head -n "$cpu_steps" "$work/$1/metrics.jsonl" 2>/dev/null | sed 's/.*"loss":\([0-9.e-]*\).*/\1/'; }
if wanted cpu; then
  cpu_steps=$((steps < 5 ? steps : 5))
  file=$work/cpu-job.yaml
  job_file "$cpu_steps" > "$file"
  job cpu 1 --device cpu
  status=$?
  compared=$(paste -d' ' <(losses cpu) <(losses one) | awk -v steps="$cpu_steps" '
    NF == 2 {
      d = ($1 - $2) / $1
      if (d < 0) d = -d
      if (d > 0.01 + 0.005 * n) wrong = 1
      n++
      all = all sprintf(" %.2g", d)
    }
    END {
      print (wrong || n != steps ? "WRONG" : "ok"), n + 0 " of " steps " steps, off by" all " of the loss"
    }')
  if [ "${compared%% *}" = ok ]; then
    line "losses as on the CPU" ok "${compared#* }"
  else
    bad "losses as on the CPU" cpu $status "${compared#* }"
  fi
fi

if [ $failures -gt 0 ]; then
  echo "$failures of the lines above are not ok"
  exit 1
fi
echo "all right"
