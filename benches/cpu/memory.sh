#!/usr/bin/env bash
# Compares the memory of a worker that `plan` prints with the memory of training steps, for dense
# and quantized bases.
#
#   benches/cpu/memory.sh [OUT]
#
# OUT gets one line of JSON per run (default: target/memory-bench.jsonl). MODEL is a shape of
# train_step (default: smollm2-135m), and THREADS the number of threads (default: 2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-target/memory-bench.jsonl}
cargo build --release -p lora-bench
: >"$out"
printf '%-12s %-22s %-9s %12s %12s %7s\n' base recomputed positions planned measured ratio
for quantization in none nf4 nf4-double int8; do
    for checkpointing in none block-save-attention block; do
        for positions in 256 1024; do
            target/release/train_step --json --model "${MODEL:-smollm2-135m}" --threads "${THREADS:-2}" \
                --warmup 1 --steps 2 --quantization "$quantization" \
                --activation-checkpointing "$checkpointing" --sequence "$positions" --micro-batch 1 >>"$out"
            field() { tail -n 1 "$out" | sed 's/.*"'"$1"'":\([0-9]*\).*/\1/'; }
            awk -v planned="$(field planned_memory_bytes)" -v measured="$(field peak_memory_bytes)" \
                -v base="$quantization" -v recomputed="$checkpointing" -v positions="$positions" \
                'BEGIN { printf "%-12s %-22s %-9s %8.1f MiB %8.1f MiB %7.3f\n", base, recomputed, positions,
                    planned / 1048576, measured / 1048576, planned / measured }'
        done
    done
done
