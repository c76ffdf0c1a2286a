#!/usr/bin/env bash
# Compiles every kernel for each architecture and prints its registers and shared memory. A warning
# or a spilled register is an error.
#
#   tests/gpu/compile.sh [ARCH...]      default: 80 90 100; nvcc must be on PATH
set -euo pipefail
cd "$(dirname "$0")/../.."
archs=("$@")
[ ${#archs[@]} -gt 0 ] || archs=(80 90 100)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

compile() { # architecture, source
  local name
  name=$(basename "$2" .cu)
  nvcc -std=c++17 -O3 -cubin -arch="sm_$1" -Icrates/lora-ops/src/cuda -Werror all-warnings \
    -Xptxas -v,-warn-spills "$2" -o "$out/$name.cubin" 2>"$out/$name.$1" ||
    { cat "$out/$name.$1" >&2; return 1; }
}
export -f compile
export out
sources=$(find crates -name '*.cu' | sort)
for arch in "${archs[@]}"; do
  xargs -P "$(nproc)" -I{} bash -c "compile $arch {}" <<<"$sources"
done

printf '%-48s %6s %10s %10s %8s\n' kernel arch registers 'shared, B' spills
for arch in "${archs[@]}"; do
  cat "$out"/*."$arch" | awk -v arch="sm_$arch" '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2]; spills = "" }
    /spill stores/ { for (i = 1; i <= NF; i++) if ($i == "spill" && $(i + 1) ~ /stores/) spills = $(i - 2) }
    /Used [0-9]+ registers/ {
      shared = 0
      for (i = 1; i <= NF; i++) {
        if ($i == "registers" || $i == "registers,") registers = $(i - 1)
        if ($i ~ /^smem/) shared = $(i - 2)
      }
      printf "%-48s %6s %10s %10s %8s\n", name, arch, registers, shared, spills
      if (spills != 0) bad = 1
    }
    END { exit bad }' || { echo "compile.sh: a kernel spills registers on sm_$arch" >&2; exit 1; }
done
