#!/usr/bin/env bash
# Builds the training step, makes a Python environment for PEFT's where there is none, and compares them on the CPU.
#
#   benches/cpu/run.sh [OUT]
#
# OUT is target/cpu-bench.jsonl. `../compare.sh` says what can be set; VENV (target/peft-venv) is the environment's directory.
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
