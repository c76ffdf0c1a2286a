#!/usr/bin/env bash
# Builds the CUDA programs, and runs the self-test and the kit (rehearsal.sh) on the simulated GPU
# (tests/gpu/sim), on a machine without CUDA and without a GPU.
#
#   tests/gpu/simulated.sh
#
# Needs cargo, git, g++, binutils, xz, Python, and a Python package index.
#
# Exit code 75: CUDA's compiler cannot be installed on this machine; the reason is on stderr.
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
tests/gpu/sim/check.sh
# The simulated libraries have the names and symbols of the real ones, so the programs are linked
# with them.
export NVCC=$PWD/tests/gpu/sim/nvcc.sh
export LIBRARY_PATH=$target/gpu-sim${LIBRARY_PATH:+:$LIBRARY_PATH} LORA_CUDA_ARCHS=90
# The whole workspace, and no directory of its own: only what the feature changes is built again.
cuda=(--workspace --locked --features lora-collective/cuda,lora-worker/cuda,lora-gpu/cuda,lora-bench/cuda)
echo "-- lints"
cargo clippy "${cuda[@]}" --all-targets -- -D warnings
echo "-- the all-reduce over NCCL"
export LD_LIBRARY_PATH=$target/gpu-sim
for late in 0 1; do
  NCCL_MULTI_RANK_GPU_ENABLE=1 LORA_SIM_LATE=$late cargo test "${cuda[@]}" --test nccl
done
echo "-- training steps at tiny shapes"
cargo test "${cuda[@]}" --test train_step
echo "-- programs"
cargo build "${cuda[@]}" --bins
# The next build without CUDA replaces the programs in debug/.
mkdir -p "$target/gpu-bin"
cp "$target/debug/"{loractl,lora-gpu,lora-worker,train_step} "$target/gpu-bin/"
export LORA_SIM_MEMORY=4G
echo "-- the checks, with work that starts as late as possible, and blocks and threads in another order"
LORA_SIM_LATE=1 LORA_SIM_SEED=2 "$target/gpu-bin/lora-gpu"
echo "-- a memory pool that fragments, and a driver without pools"
LORA_SIM_MEMORY=128M LORA_SIM_FRAGMENT=1 "$target/gpu-bin/lora-gpu" --only "memory of many sizes"
if refused=$(LORA_SIM_POOLS=0 "$target/gpu-bin/lora-gpu" --only rope 2>&1); then
  echo "simulated.sh: a GPU without memory pools was opened" >&2
  exit 1
fi
grep "the driver offers no memory pools" <<<"$refused"
echo "-- the self-test on four simulated GPUs"
# Without `ops`: these checks ran above.
LORA_SIM_GPUS=4 STEPS=3 JOBS="doctor one tcp2 nccl2 tcp4 nccl4 killed-tcp killed-nccl cpu" \
  tests/gpu/selftest.sh "$target/gpu-bin"
echo "-- an old and a new version of NCCL on one simulated GPU"
for version in 22809 23003; do
  LORA_SIM_NCCL_VERSION=$version STEPS=3 tests/gpu/nccl.sh "$target/gpu-bin"
done
echo "-- an old version of NCCL with its log, and with a variable for shared GPUs that it ignores"
LORA_SIM_NCCL_VERSION=22809 NCCL_DEBUG=VERSION NCCL_MULTI_RANK_GPU_ENABLE=1 STEPS=3 \
  tests/gpu/nccl.sh "$target/gpu-bin"
echo "-- the fallback from NCCL to TCP"
tests/gpu/sim/fallback.sh "$target/gpu-bin"
echo "-- the kit"
tests/gpu/rehearsal.sh "$target/gpu-bin"
