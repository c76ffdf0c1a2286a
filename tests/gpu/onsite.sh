#!/usr/bin/env bash
# Runs a kit (tests/gpu/pack.sh) on a machine with a GPU: checks and measurements in order of their
# value, under a time limit.
#
#   tests/gpu/onsite.sh KIT OUT SECONDS [PHASES]
#
# KIT: kit.tar.xz, or the directory of an unpacked kit. OUT: a new or empty directory for PHASE.txt
# of each phase (what its commands printed), result.json and table.txt; result.json is rewritten
# after each phase. SECONDS: the time for everything. PHASES: `first` (default), `second`, or names
# of phases, at most six a run:
#
#   first    env doctor ops bench steps selftest
#   second   env peft ours nccl sanitize ncu
#
# A phase that needs a missing tool, or more time than is left, is skipped. A phase that reaches its
# limit is stopped, and the next one runs. The table is printed last; it has at most 60 lines. Exit
# code: 0, also with skipped phases; 1: a phase failed or was stopped; 2: invalid arguments.
#
# From the environment: PYTHON (python3); MODEL (llama-3.1-8b) and CASES
# (1x2048,2x2048,8x512,4x2048: rows x positions) of the training steps, PROFILE_CASES (2x2048),
# WARMUP (2), STEPS (8), THREADS (8, at most the processors); CHECKS and BENCH: only checks and
# measurements of operations whose name contains this; BENCH_SCALE (1) divides the sizes of these
# measurements; JOBS (one tcp2 killed-tcp cpu) and JOB_STEPS (200) of tests/gpu/selftest.sh.
set -euo pipefail
started=$(date +%s)
usage() { echo "usage: onsite.sh KIT OUT SECONDS [PHASES]: $*" >&2; exit 2; }
[ $# -ge 3 ] || usage "three arguments are required"
kit=$1 out=$2 budget=$3
shift 3
[[ $budget =~ ^[1-9][0-9]*$ ]] || usage "SECONDS is $budget; it must be a whole number above 0"
[ -e "$kit" ] || usage "$kit does not exist"
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || usage "$out is not empty"
out=$(cd "$out" && pwd)
export PYTHON=${PYTHON:-python3} PYTHONDONTWRITEBYTECODE=1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -f "$kit" ]; then
  "$PYTHON" - "$kit" "$work" <<'PYTHON'
import sys
import tarfile

with tarfile.open(sys.argv[1], "r:xz") as archive:
    archive.extractall(sys.argv[2], filter="data")
PYTHON
  kit=$work/kit
fi
kit=$(cd "$kit" && pwd)
# shellcheck source=tests/gpu/libraries.sh
source "$kit/tests/gpu/libraries.sh"
# Without its libraries each phase fails by itself, with its own message.
find_libraries "$kit/bin/lora-worker" "$PYTHON" || true

# Not `exec`: the trap removes what was unpacked.
"$PYTHON" "$kit/tests/gpu/onsite/main.py" --kit "$kit" --out "$out" --work "$work" --started "$started" \
  --seconds "$budget" "$@"
