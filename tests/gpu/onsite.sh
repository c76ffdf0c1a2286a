#!/usr/bin/env bash
# Runs a kit (tests/gpu/pack.sh) on a machine with a GPU: checks and measurements in order of their
# value, within a time limit.
#
#   tests/gpu/onsite.sh KIT OUT SECONDS [PHASES]
#   tests/gpu/onsite.sh kit.tar.xz out-first 290 first
#
# KIT: kit.tar.xz, or the directory of an unpacked kit. OUT: a new or empty directory; each run
# needs its own. SECONDS: the time limit of the whole run. PHASES: `first` (default), `second`, or
# names of phases, at most six a run; env always runs first.
#
#   first    env doctor ops bench steps selftest
#   second   env peft ours nccl sanitize ncu
#
#   phase     minimum  limit
#   env           1 s   20 s  card, driver, libraries, packages, processor
#   doctor        5 s   60 s  loractl doctor: reports and measurements of a worker process
#   ops          10 s   80 s  lora-gpu: operations, gradients and steps against the CPU's
#   bench        15 s   60 s  lora-gpu --bench: times of operations
#   steps        30 s  120 s  train_step: bf16, its profile, NF4, int8
#   selftest     15 s  100 s  selftest.sh: jobs with worker processes, a killed worker
#   peft         30 s  170 s  the same training steps by PEFT: bf16, NF4
#   ours         30 s   60 s  train_step, for the comparison with PEFT: bf16, NF4
#   nccl         15 s   70 s  the all-reduce of NCCL, and a job of two workers
#   sanitize     20 s   60 s  compute-sanitizer on the kernels with the most shared memory
#   ncu          20 s   60 s  ncu on the kernels that take most of a step
#
# A phase is skipped if it needs a missing tool, or if less than its minimum is left. A phase that
# reaches its limit or the end of SECONDS is stopped, and the next one runs. The status of a phase:
#
#   ok        its commands succeeded; the reason names what was not measured
#   failed    a command failed, or a result is WRONG: PHASE.txt has the output of every command.
#             A WRONG result is a fault of loractl or of the machine; keep OUT and report it
#   stopped   the time was over, or the run was interrupted. Earlier measurements are kept. Run the
#             phase alone, with a new OUT: onsite.sh KIT OUT SECONDS PHASE
#   skipped   the phase was not run; its reason is in the table
#
# OUT gets PHASE.txt of each phase that ran, result.json, which is rewritten after each phase, and
# table.txt, whose first 60 lines are printed. On SIGTERM, SIGINT and SIGHUP the current phase is
# stopped, the results are written, and all programs are ended. If onsite.sh is killed, the same
# happens, but the unpacked kit is left in TMPDIR.
#
# Exit code: 0, also with skipped phases; 1: a phase failed or was stopped, or all phases except env
# were skipped, or the kit is corrupt; 2: invalid arguments or settings; 143: the run was
# interrupted.
#
# From the environment: PYTHON (python3); MODEL (llama-3.1-8b) and CASES
# (1x2048,2x2048,8x512,4x2048: rows x positions) of the training steps, PROFILE_CASES (2x2048),
# WARMUP (2), STEPS (8), THREADS (8, at most the processors); CHECKS and BENCH: a text; only the
# checks and the measurements of operations whose name contains it are run; BENCH_SCALE (1) divides
# the sizes of these measurements; JOBS (one tcp2 killed-tcp cpu) and JOB_STEPS (200) of
# tests/gpu/selftest.sh. The tables of benches/gpu/RESULTS.md contain only measurements with the
# default settings.
set -euo pipefail
started=$(date +%s)
case ${1:-} in
  -h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit
    ;;
esac
usage() { echo "usage: onsite.sh KIT OUT SECONDS [PHASES]: $*" >&2; exit 2; }
[ $# -ge 3 ] || usage "three arguments are required; onsite.sh --help describes them"
kit=$1 out=$2 budget=$3
shift 3
[[ $budget =~ ^[1-9][0-9]{0,5}$ ]] || usage "SECONDS is $budget; it must be a whole number above 0"
[ -e "$kit" ] || usage "$kit does not exist"
absolute() { echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; }
python=$(command -v "${PYTHON:-python3}") || usage "PYTHON is ${PYTHON:-python3}, which is not a program"
PYTHON=$(absolute "$python")
if [ -f "${MODEL:-}" ]; then MODEL=$(absolute "$MODEL"); export MODEL; fi
export PYTHON PYTHONDONTWRITEBYTECODE=1
# The arguments are checked before the kit is unpacked. A copy of this script without its directory
# cannot do that, so main.py checks them again.
here=$(cd "$(dirname "$0")" && pwd)
if [ -f "$here/onsite/check.py" ]; then "$PYTHON" "$here/onsite/check.py" "$@" || exit; fi
mkdir -p "$out" && [ -d "$out" ] || usage "$out is not a directory"
[ -z "$(ls -A "$out")" ] || usage "$out is not empty"
out=$(cd "$out" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run=''
# shellcheck disable=SC2329 # called by the trap
interrupt() {
  [ -n "$run" ] || exit 143
  kill -TERM "$run" 2>/dev/null || true
}
trap interrupt TERM INT HUP
fail() { echo "onsite.sh: $*" >&2; exit 1; }
if [ -f "$kit" ]; then
  "$PYTHON" - "$kit" "$work" <<'PYTHON' || fail "$kit cannot be unpacked"
import lzma
import sys
import tarfile

try:
    with tarfile.open(sys.argv[1], "r:xz") as archive:
        archive.extractall(sys.argv[2], filter="data")
except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
    sys.exit(f"onsite.sh: {error}")
PYTHON
  kit=$work/kit
fi
[ -f "$kit/tests/gpu/libraries.sh" ] || fail "$kit is not a kit: it has no tests/gpu/libraries.sh"
kit=$(cd "$kit" && pwd)
# shellcheck source=tests/gpu/libraries.sh
source "$kit/tests/gpu/libraries.sh"
# If libraries are missing, the run continues, and each phase fails with its own message.
find_libraries "$kit/bin/lora-worker" "$PYTHON" || true

# main.py runs in the background, so that a signal is forwarded at once. The unpacked kit is removed
# when all programs have ended.
"$PYTHON" "$kit/tests/gpu/onsite/main.py" --kit "$kit" --out "$out" --work "$work" --started "$started" \
  --seconds "$budget" "$@" &
run=$!
while
  status=0
  wait "$run" || status=$?
  kill -0 "$run" 2>/dev/null
do :; done
exit "$status"
