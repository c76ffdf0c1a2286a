#!/usr/bin/env bash
# Compares training steps on the CPU with PEFT's. It builds our program, and creates a Python
# environment for PEFT if there is none.
#
#   benches/cpu/run.sh [OUT]
#
# The default of OUT is target/cpu-bench.jsonl. `../compare.sh` lists the environment variables.
# VENV is the directory of the Python environment (default: target/peft-venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${VENV:-target/peft-venv}
if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet -r benches/requirements.txt
fi
cargo build --release -p lora-bench
export MODELS=${MODELS:-smollm2-135m} DTYPES=${DTYPES:-f32 bf16} SEQUENCES=${SEQUENCES:-256}
export DEVICE=cpu TOKENS=${TOKENS:-512} WARMUP=${WARMUP:-2} STEPS=${STEPS:-8}
PYTHON=$venv/bin/python exec benches/compare.sh target/release "${1:-target/cpu-bench.jsonl}"
