#!/usr/bin/env bash
# Builds the CUDA programs and runs the self-test on the simulated GPU (tests/gpu/sim): on a machine without CUDA and
# without a GPU.
#
#   tests/gpu/simulated.sh
#
# Exit code 75: the compiler cannot be had on this machine; the reason is on stderr.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
target=$(cd "$target" && pwd)

if [ -z "${CUDA_HOME:-}" ]; then
  tests/gpu/toolchain.sh "$target/cuda-toolchain"
  # shellcheck source=/dev/null
  source "$target/cuda-toolchain/env.sh"
fi
echo "-- kernels"
tests/gpu/compile.sh
echo "-- the simulated GPU"
cargo fetch --locked
tests/gpu/sim/build.sh "$target/gpu-sim"
echo "-- programs"
# The simulated libraries have the names and symbols of the real ones, so they are what is linked against.
export LIBRARY_PATH=$target/gpu-sim${LIBRARY_PATH:+:$LIBRARY_PATH}
LORA_CUDA_ARCHS=90 cargo build --locked --target-dir "$target/cuda" -p lora-gpu -p lora-worker --features lora-gpu/cuda,lora-worker/cuda
cargo build --locked -p loractl
mkdir -p "$target/gpu-bin"
ln -sf "$target/cuda/debug/lora-gpu" "$target/cuda/debug/lora-worker" "$target/debug/loractl" "$target/gpu-bin/"
echo "-- the self-test on four simulated GPUs"
LD_LIBRARY_PATH=$target/gpu-sim LORA_SIM_GPUS=4 STEPS=3 tests/gpu/selftest.sh "$target/gpu-bin"
