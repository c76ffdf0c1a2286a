#!/usr/bin/env bash
# Runs our training step and PEFT's in turn on this machine, and prints a table with the ratios.
#
#   benches/peft/compare.sh [VENV_DIR]
#
# VENV_DIR (target/peft-venv) is made with pip where it does not exist. ROUNDS (2) is how often each side runs.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
venv=${1:-target/peft-venv}
rounds=${ROUNDS:-2}
export OMP_NUM_THREADS=2 RAYON_NUM_THREADS=2

if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet -r "$here/requirements.txt"
fi
cargo build --release -p lora-bench --bin train_step

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for dtype in f32 bf16; do
    for ((round = 1; round <= rounds; round++)); do
        echo "$dtype, round $round of $rounds" >&2
        line=$(cargo run --quiet --release -p lora-bench --bin train_step -- --dtype "$dtype" --json)
        echo "ours $dtype $line" >>"$results"
        line=$("$venv/bin/python" "$here/train_step.py" --dtype "$dtype")
        echo "peft $dtype $line" >>"$results"
    done
done
"$venv/bin/python" "$here/table.py" "$results"
