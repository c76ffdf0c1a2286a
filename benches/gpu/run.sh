#!/usr/bin/env bash
# Training steps on a GPU against PEFT's, at the shapes of published models; nothing is built here.
#
#   benches/gpu/run.sh BIN_DIR [OUT]
#
# BIN_DIR holds train_step, built with the feature `cuda`; OUT is gpu-bench.jsonl. `../compare.sh` says what can be set.
set -euo pipefail
bin=${1:?usage: run.sh BIN_DIR [OUT]}
export MODELS=${MODELS:-llama-3.2-1b llama-3.1-8b qwen2.5-7b} DTYPES=${DTYPES:-bf16} SEQUENCES=${SEQUENCES:-512 2048}
export DEVICE=${DEVICE:-cuda:0} TOKENS=${TOKENS:-4096} WARMUP=${WARMUP:-3} STEPS=${STEPS:-10}
exec "$(dirname "${BASH_SOURCE[0]}")/../compare.sh" "$bin" "${2:-gpu-bench.jsonl}"
