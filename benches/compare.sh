#!/usr/bin/env bash
# Runs our training step and PEFT's alternately on one machine, and prints a table with the ratios.
# `gpu/run.sh` and `cpu/run.sh` call it with the models and shapes to measure.
#
#   benches/compare.sh BIN_DIR OUT
#
# BIN_DIR contains the program train_step. OUT is a new file that gets a line of JSON for each run.
# PEFT's step needs a Python with torch, transformers and peft; without one of them only ours runs.
# If a run fails or exceeds the time limit, its error is printed, and the next run follows.
#
# Environment variables, with their defaults:
#
#   MODELS, DTYPES, SEQUENCES    the models, data types and sequence lengths to measure
#   QUANTIZATIONS (none)         the quantizations to measure
#   DEVICE                       the device
#   TOKENS                       tokens per micro-batch
#   WARMUP, STEPS                unmeasured and measured steps per run
#   CHECKPOINTING (none)         none or block
#   THREADS (2)                  CPU threads
#   ROUNDS (2)                   runs of each program
#   LIMIT (600)                  time limit of a run in seconds
#   PEAK_TFLOPS                  peak of a GPU for which train_step has no peak
#   PYTHON (python3)             the Python for PEFT
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=$1/train_step
out=$2
python=${PYTHON:-python3}
limit=${LIMIT:-600}
threads=${THREADS:-2}

fail() {
    echo "$*" >&2
    exit 1
}
[[ -x $program ]] || fail "invalid BIN_DIR: $program is not a program; BIN_DIR must contain train_step"
[[ ! -e $out ]] || fail "invalid OUT: $out exists; OUT must be a new file"

# shellcheck source=tests/gpu/libraries.sh
source "$here/../tests/gpu/libraries.sh"
libraries=$(find_libraries "$program" "$python" && echo "${LD_LIBRARY_PATH:-}") || exit 1

attentions=()
if reason=$("$python" -c 'import torch, transformers, peft' 2>&1); then
    attentions=(sdpa)
    if [[ $DEVICE != cpu ]] && "$python" -c 'import flash_attn' 2>/dev/null; then attentions+=(flash); fi
else
    echo "PEFT is not measured: $python: ${reason##*: }" >&2
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
ours_failed=0

# run ENGINE ATTENTION COMMAND...: appends the line of JSON that the command prints, or a line with
# its error.
run() {
    local engine=$1 attention=$2 line status=0 why
    shift 2
    line=$(timeout --foreground --kill-after=10 "$limit" "$@" 2>"$log") || status=$?
    line=$(tail -n 1 <<<"$line")
    if [[ $status == 0 && $line == "{"* ]]; then
        echo "$line" >>"$out"
        return
    fi
    why=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr -d '"\\' | tr -c '[:print:]\n' ' ' || true)
    if ((status == 124 || status == 137)); then why="stopped after $limit s"; fi
    why=${why:-no result, exit status $status}
    echo "  $engine $attention failed: $why" >&2
    {
        printf '{"engine": "%s", "attention": "%s", "model": "%s", ' "$engine" "$attention" "$model"
        printf '"dtype": "%s", "quantization": "%s", "sequence": %s, ' "$dtype" "$quantization" "$sequence"
        printf '"error": "%s"}\n' "$why"
    } >>"$out"
    if [[ $engine == loractl ]]; then ours_failed=1; fi
}

: >"$out"
for model in $MODELS; do
    for dtype in $DTYPES; do
        for quantization in ${QUANTIZATIONS:-none}; do
            for sequence in $SEQUENCES; do
                flags=(--model "$model" --device "$DEVICE" --dtype "$dtype" --quantization "$quantization"
                    --sequence "$sequence" --micro-batch $((TOKENS > sequence ? TOKENS / sequence : 1))
                    --threads "$threads" --activation-checkpointing "${CHECKPOINTING:-none}"
                    --warmup "$WARMUP" --steps "$STEPS")
                for ((round = 1; round <= ${ROUNDS:-2}; round++)); do
                    echo "$model, $dtype, quantization $quantization, $sequence tokens," \
                        "round $round of ${ROUNDS:-2}" >&2
                    run loractl "" env LD_LIBRARY_PATH="$libraries" "$program" --json "${flags[@]}" \
                        ${PEAK_TFLOPS:+--peak-tflops "$PEAK_TFLOPS"}
                    for attention in "${attentions[@]}"; do
                        run peft "$attention" \
                            "$python" "$here/peft_step.py" --attention "$attention" "${flags[@]}"
                    done
                done
            done
        done
    done
done

date -u '+%Y-%m-%d %H:%M UTC'
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
"$python" "$here/table.py" "$out" || echo "the table cannot be printed; the results are in $out" >&2
exit "$ours_failed"
