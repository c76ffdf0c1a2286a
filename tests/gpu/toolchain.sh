#!/usr/bin/env bash
# Sets CUDA's compiler up on an x86-64 Linux machine that has none, from Python wheels; no GPU is needed.
#
#   tests/gpu/toolchain.sh DIR      then:  source DIR/env.sh
#
# Exit code 75: this machine cannot have it (another processor, no Python with venv, no packages); the reason is on stderr.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
cannot() { echo "toolchain.sh: $*" >&2; exit 75; }

# Driver 580, the oldest for CUDA 13, knows PTX of 13.0 and not of a later compiler.
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85)

[ "$(uname -sm)" = "Linux x86_64" ] || cannot "only for Linux on x86-64, not $(uname -sm)"
command -v g++ >/dev/null || cannot "nvcc needs g++"
if [ ! -x "$dir/venv/bin/pip" ]; then
  python3 -m venv "$dir/venv" || cannot "python3 cannot make a virtual environment (Debian: python3-venv)"
fi
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}" || cannot "pip cannot install ${packages[*]}"
cuda=$(echo "$dir"/venv/lib/python3*/site-packages/nvidia/cu13)
ln -sfn libcudart.so.13 "$cuda/lib/libcudart.so"
ln -sfn lib "$cuda/lib64"
# CUDA_COMPUTE_CAP: candle's own kernels, of which none is used, for one architecture. CUDAFORGE_THREADS: all cores for them.
cat > "$dir/env.sh" <<ENV
export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDA_ROOT=$cuda PATH=$cuda/bin:\$PATH
export LIBRARY_PATH=$cuda/lib\${LIBRARY_PATH:+:\$LIBRARY_PATH}
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000 CUDAFORGE_THREADS=$(nproc)
ENV
"$cuda/bin/nvcc" --version | tail -2
