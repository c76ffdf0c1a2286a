#!/usr/bin/env bash
# Builds the simulated GPU: shared libraries with the names of CUDA's, for LD_LIBRARY_PATH.
#
#   tests/gpu/sim/build.sh OUT_DIR [KERNELS.cu...]
#
# The kernels default to all of the repository (crates/*/src/**/*.cu). SANITIZE=address builds with
# that sanitizer; run programs with LD_PRELOAD=$(g++ -print-file-name=libasan.so) and
# ASAN_OPTIONS=detect_leaks=0.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
if [ $# -lt 1 ]; then echo "usage: build.sh OUT_DIR [KERNELS.cu...]" >&2; exit 2; fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
if [ $# -gt 0 ]; then
  kernels=$(realpath "$@")
else
  kernels=$(find "$root"/crates/*/src -name '*.cu' | sort)
fi
objects=$out/objects
mkdir -p "$objects"
exec 9> "$out/lock"
flock 9

# The libraries must have the functions that cudarc declares.
cudarc=$(cd "$root" && cargo metadata --format-version 1 --offline 2> /dev/null |
  grep -oE '"manifest_path":"[^"]*/cudarc-0\.19\.[^"/]*/' | head -1 | cut -d'"' -f4) || true
if [ -z "$cudarc" ]; then
  registry=${CARGO_HOME:-$HOME/.cargo}/registry
  cudarc=$(ls -d "$registry"/src/*/cudarc-0.19.* 2> /dev/null | sort -V | tail -1) || true
fi
if [ -z "$cudarc" ]; then
  echo "build.sh: the source of cudarc 0.19, which lists the functions to provide, is not downloaded;" \
    "run \`cargo fetch\` first" >&2
  exit 1
fi

cxx=${CXX:-g++}
sanitize=${SANITIZE:+-fsanitize=$SANITIZE -fno-omit-frame-pointer}
common="-std=c++17 -g1 -fPIC -pthread -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off"
common+=" -Wall -Wextra -Werror -Wno-unknown-pragmas $sanitize"
host="$common -O2"
# Kernels trap on unaligned accesses, which a GPU does not support.
kernel="$common -O2 -Wno-unused-function -Wno-unused-parameter -Wno-unused-variable -DLORA_SIMULATED"
kernel+=" -I$root/crates/lora-ops/src/cuda -I$here"
if [ -z "$sanitize" ]; then kernel="$kernel -fsanitize=alignment -fsanitize-undefined-trap-on-error"; fi

# The name of an object contains the hash of everything that it is built from, so no object is built
# twice, and no object is stale.
headers=$(find "$here" "$root"/crates/*/src \( -name '*.h' -o -name '*.cuh' \) | sort | xargs cat | sha256sum)
jobs=$out/jobs
: > "$jobs"
# object SOURCE FLAGS TEXT: prints the path of an object. If the object does not exist, adds a job
# that compiles TEXT.
object() {
  local hash path
  hash=$(printf '%s\n' "$cxx" "$2" "$3" "$headers" | cat - "$1" | sha256sum | cut -c1-20)
  path=$objects/$(basename "$1").$hash.o
  if [ ! -e "$path" ]; then
    printf '%s' "$3" > "$path.cc"
    printf '%s\0' "$cxx $2 -x c++ -c '$path.cc' -o '$path.tmp' && mv '$path.tmp' '$path'" >> "$jobs"
  else
    touch "$path"
  fi
  echo "$path"
}
runtime() { object "$here/$1" "$host ${2:-} -DLORA_SIMULATED -I$here" "#include \"$here/$1\""$'\n'; }

driver=$(for source in simulated driver_device driver_launch driver_memory driver_stream; do
  runtime $source.cpp
done)
# Each file of kernels has its own namespace, because on a GPU each file is a module.
driver+=" $(for source in $kernels; do
  object "$source" "$kernel" \
    $'#include "kernel.cuh"\n#include "mma.cuh"\nnamespace {\n#include "'"$source"$'"\n}\n'
done)"
cudart=$(runtime cudart.cpp)
cublas=$(runtime cublas.cpp -O3)
curand=$(runtime curand.cpp)
nccl=$(for source in nccl.cpp nccl_communicator.cpp; do runtime $source; done)
if ! xargs -0 -r -P "$(nproc)" -n 1 sh -c < "$jobs"; then
  echo "build.sh: the simulation did not compile; see above" >&2
  exit 1
fi

# library NAME SONAME PREFIX MODULE ERROR VERSION OBJECTS...: links a library. Functions of cudarc's
# bindings that OBJECTS do not define return ERROR.
library() {
  local name=$1 soname=$2 prefix=$3 module=$4 error=$5 version=$6
  shift 6
  {
    echo '#include <stdio.h>'
    echo 'static int missing(const char* name, int* said) {'
    echo '  if (!*said) fprintf(stderr, "simulated GPU: %s is not simulated\n", name);'
    echo '  *said = 1;'
    echo '  return '"$error"';'
    echo '}'
    # The runtime's functions have variants for the default stream of a thread, which the bindings
    # do not list.
    grep -oE "fn ${prefix}[A-Za-z0-9_]+" "$cudarc/src/$module/sys/mod.rs" |
      awk -v "library=$name" '{ print $2 } library == "cudart" { print $2 "_ptsz"; print $2 "_ptds" }' |
      sort -u |
      sed 's/.*/__attribute__((weak)) int &(void) { static int said; return missing("&", \&said); }/'
  } > "$objects/$name.c"
  echo "$version { global: ${prefix}*; __${prefix}*; lora_sim_*; local: *; };" > "$objects/$name.map"
  local above=()
  if [ "$name" != cuda ]; then above=("-L$out" -l:libcuda.so.1 '-Wl,-rpath,$ORIGIN'); fi
  ${CC:-gcc} -w -fno-builtin -fPIC -c "$objects/$name.c" -o "$objects/$name.o"
  $cxx $sanitize -shared -pthread -o "$out/$soname.tmp" "$@" "$objects/$name.o" "${above[@]}" \
    -Wl,-soname,"$soname" -Wl,--version-script="$objects/$name.map"
  mv "$out/$soname.tmp" "$out/$soname"
  ln -sfn "$soname" "$out/lib$name.so"
}
library cuda libcuda.so.1 cu driver 801 '' $driver
library cudart libcudart.so.13 cuda runtime 801 libcudart.so.13 $cudart
library cublas libcublas.so.13 cublas cublas 15 libcublas.so.13 $cublas
library cublasLt libcublasLt.so.13 cublasLt cublaslt 15 libcublasLt.so.13
library curand libcurand.so.10 curand curand 999 libcurand.so.10 $curand
library nvrtc libnvrtc.so.13 nvrtc nvrtc 11 libnvrtc.so.13
library nccl libnccl.so.2 nccl nccl 3 '' $nccl

# Remove objects that no build has used for two days.
find "$objects" -type f -mtime +2 -delete
