#!/usr/bin/env bash
# Compares training steps on a GPU with PEFT's, at the shapes of published models. It builds
# nothing.
#
#   benches/gpu/run.sh BIN_DIR [OUT]
#
# BIN_DIR contains train_step, built with the feature `cuda`. The default of OUT is gpu-bench.jsonl.
# `../compare.sh` lists the environment variables.
set -euo pipefail
bin=${1:?usage: run.sh BIN_DIR [OUT]}
export MODELS=${MODELS:-llama-3.2-1b llama-3.1-8b qwen2.5-7b} DTYPES=${DTYPES:-bf16}
export SEQUENCES=${SEQUENCES:-512 2048}
export DEVICE=${DEVICE:-cuda:0} TOKENS=${TOKENS:-4096} WARMUP=${WARMUP:-3} STEPS=${STEPS:-10}
exec "$(dirname "${BASH_SOURCE[0]}")/../compare.sh" "$bin" "${2:-gpu-bench.jsonl}"
