#!/usr/bin/env bash
# Runs our training step and PEFT's in turn on one machine, and prints a table with the ratios: `gpu/run.sh` and `cpu/run.sh`
# call it with what they measure.
#
#   benches/compare.sh BIN_DIR OUT
#
# BIN_DIR holds the program train_step. OUT, a new file, gets a line of JSON for each run. PEFT's side needs a PYTHON (python3)
# with torch, transformers and peft; where one is missing ours runs alone. A run that fails or takes too long is reported, and
# the others go on.
#
# From the environment: MODELS, DTYPES, QUANTIZATIONS (none) and SEQUENCES to measure on DEVICE; TOKENS of a micro-batch; WARMUP and STEPS of a run;
# CHECKPOINTING (none, or block); THREADS (2) of the host; ROUNDS (2), how often each side runs; LIMIT (600), the seconds that
# a run may take; PEAK_TFLOPS of a GPU that train_step does not know.
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
[[ -x $program ]] || fail "$program is no program; BIN_DIR must hold train_step"
[[ ! -e $out ]] || fail "$out exists; name another file for the results"

# shellcheck source=tests/gpu/libraries.sh
source "$here/../tests/gpu/libraries.sh"
libraries=$(find_libraries "$program" "$python" && echo "${LD_LIBRARY_PATH:-}") || exit 1

attentions=()
if reason=$("$python" -c 'import torch, transformers, peft' 2>&1); then
    attentions=(sdpa)
    if [[ $DEVICE != cpu ]] && "$python" -c 'import flash_attn' 2>/dev/null; then attentions+=(flash); fi
else
    echo "PEFT's side is left out: $python: ${reason##*: }" >&2
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
ours_failed=0

# run ENGINE ATTENTION COMMAND...: appends the line of JSON that the command prints, or one that says why there is none.
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
    printf '{"engine": "%s", "attention": "%s", "model": "%s", "dtype": "%s", "quantization": "%s", "sequence": %s, "error": "%s"}\n' \
        "$engine" "$attention" "$model" "$dtype" "$quantization" "$sequence" "$why" >>"$out"
    if [[ $engine == loractl ]]; then ours_failed=1; fi
}

: >"$out"
for model in $MODELS; do
    for dtype in $DTYPES; do
        for quantization in ${QUANTIZATIONS:-none}; do
            for sequence in $SEQUENCES; do
                flags=(--model "$model" --device "$DEVICE" --dtype "$dtype" --quantization "$quantization" --sequence "$sequence"
                    --micro-batch $((TOKENS > sequence ? TOKENS / sequence : 1)) --threads "$threads"
                    --activation-checkpointing "${CHECKPOINTING:-none}" --warmup "$WARMUP" --steps "$STEPS")
                for ((round = 1; round <= ${ROUNDS:-2}; round++)); do
                    echo "$model, $dtype, quantization $quantization, $sequence tokens, round $round of ${ROUNDS:-2}" >&2
                    run loractl "" env LD_LIBRARY_PATH="$libraries" "$program" --json "${flags[@]}" ${PEAK_TFLOPS:+--peak-tflops "$PEAK_TFLOPS"}
                    for attention in "${attentions[@]}"; do
                        run peft "$attention" "$python" "$here/peft_step.py" --attention "$attention" "${flags[@]}"
                    done
                done
            done
        done
    done
done

date -u '+%Y-%m-%d %H:%M UTC'
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
"$python" "$here/table.py" "$out" || echo "the results are in $out; the table needs a Python" >&2
exit "$ours_failed"
