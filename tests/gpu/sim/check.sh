#!/usr/bin/env bash
# Tests the simulated GPU itself. If nvcc is on PATH, also checks that the tests' kernels compile
# for real GPUs without a warning.
#
#   tests/gpu/sim/check.sh [WORK_DIR]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
if [ $# -gt 0 ]; then
  mkdir -p "$1"
  work=$(cd "$1" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

"$here/build.sh" "$work" "$here"/selftest/{kernels,faults}.cu
sanitize=${SANITIZE:+-fsanitize=$SANITIZE}
${CXX:-g++} -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread $sanitize "$here"/selftest/*.cpp \
  -o "$work/selftest" "-L$work" -lcublas -lcurand -lnccl -lcuda "-Wl,-rpath,$work"
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0}
"$work/selftest" > "$work/expected"
for variables in LORA_SIM_SEED=2 LORA_SIM_SEED=3 LORA_SIM_LATE=1; do
  env "$variables" "$work/selftest" > "$work/result" ||
    { echo "check.sh: the tests fail with $variables" >&2; exit 1; }
  cmp "$work/expected" "$work/result" ||
    { echo "check.sh: the results differ with $variables" >&2; exit 1; }
done
tail -1 "$work/expected"

if command -v nvcc > /dev/null; then
  for arch in 80 90 100; do
    for kernels in "$here"/selftest/*.cu; do
      nvcc -std=c++17 -O3 -cubin "-arch=sm_$arch" -Werror all-warnings -Xptxas -warn-spills \
        "-I$root/crates/lora-ops/src/cuda" "$kernels" -o "$work/kernels.cubin"
    done
  done
  echo "nvcc compiles the tests' kernels for sm_80, sm_90 and sm_100"
else
  echo "skipped: compiling the tests' kernels with nvcc, which is not on PATH"
fi
