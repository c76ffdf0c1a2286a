#!/usr/bin/env bash
# Installs CUDA's compiler from Python wheels on an x86-64 Linux machine. No GPU is needed.
#
#   tests/gpu/toolchain.sh DIR      then:  source DIR/env.sh
#
# Exit code 75: the compiler cannot be installed on this machine (another processor, no Python with
# venv, no packages); the reason is on stderr.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
cannot() { echo "toolchain.sh: $*" >&2; exit 75; }

# Driver 580, the oldest for CUDA 13, accepts PTX of version 13.0, but not of later compilers.
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85)

[ "$(uname -sm)" = "Linux x86_64" ] || cannot "the machine is $(uname -sm); it must be Linux x86_64"
command -v g++ >/dev/null || cannot "nvcc needs g++"
if [ ! -x "$dir/venv/bin/pip" ]; then
  python3 -m venv "$dir/venv" || cannot "python3 cannot make a virtual environment (Debian: python3-venv)"
fi
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}" ||
  cannot "pip cannot install ${packages[*]}"
cuda=$(echo "$dir"/venv/lib/python3*/site-packages/nvidia/cu13)
ln -sfn libcudart.so.13 "$cuda/lib/libcudart.so"
ln -sfn lib "$cuda/lib64"
# CUDA_COMPUTE_CAP: candle's own kernels are not used, so they are compiled for one architecture
# only. CUDAFORGE_THREADS: all cores compile them.
cat > "$dir/env.sh" <<ENV
export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDA_ROOT=$cuda PATH=$cuda/bin:\$PATH
export LIBRARY_PATH=$cuda/lib\${LIBRARY_PATH:+:\$LIBRARY_PATH}
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000 CUDAFORGE_THREADS=$(nproc)
ENV
"$cuda/bin/nvcc" --version | tail -2
