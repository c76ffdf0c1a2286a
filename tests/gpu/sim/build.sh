#!/usr/bin/env bash
# Builds the simulated GPU: shared libraries with the names of CUDA's, for LD_LIBRARY_PATH.
# usage: build.sh OUT_DIR [KERNELS.cu...]     the kernels default to all of the repository (crates/*/src/**/*.cu)
# SANITIZE=address builds with that sanitizer (run with LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0).
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

# The functions that the libraries must have are those that cudarc declares.
cudarc=$(cd "$root" && cargo metadata --format-version 1 --offline 2> /dev/null | grep -oE '"manifest_path":"[^"]*/cudarc-0\.19\.[^"/]*/' | head -1 | cut -d'"' -f4) || true
if [ -z "$cudarc" ]; then
  cudarc=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-0.19.* 2> /dev/null | sort -V | tail -1) || true
fi
if [ -z "$cudarc" ]; then
  echo "build.sh: the source of cudarc 0.19, whose bindings name the functions to provide, is not there; run \`cargo fetch\` first" >&2
  exit 1
fi

cxx=${CXX:-g++}
sanitize=${SANITIZE:+-fsanitize=$SANITIZE -fno-omit-frame-pointer}
common="-std=c++17 -g1 -fPIC -pthread -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas $sanitize"
host="$common -O2"
# Kernels trap on what a GPU does not forgive: accesses that are not aligned.
kernel="$common -O2 -Wno-unused-function -Wno-unused-parameter -Wno-unused-variable -DLORA_SIMULATED -I$root/crates/lora-ops/src/cuda -I$here"
if [ -z "$sanitize" ]; then kernel="$kernel -fsanitize=alignment -fsanitize-undefined-trap-on-error"; fi

# An object is named by the hash of all that it is made of; so nothing is built twice, and nothing is stale.
headers=$(find "$here" "$root"/crates/*/src \( -name '*.h' -o -name '*.cuh' \) | sort | xargs cat | sha256sum)
jobs=$out/jobs
: > "$jobs"
object() { # SOURCE FLAGS TEXT: adds a job where the object is missing, and prints the object's path
  local path
  path=$objects/$(basename "$1").$(printf '%s\n' "$cxx" "$2" "$3" "$headers" | cat - "$1" | sha256sum | cut -c1-20).o
  if [ ! -e "$path" ]; then
    printf '%s' "$3" > "$path.cc"
    printf '%s\0' "$cxx $2 -x c++ -c '$path.cc' -o '$path.tmp' && mv '$path.tmp' '$path'" >> "$jobs"
  else
    touch "$path"
  fi
  echo "$path"
}
runtime() { object "$here/$1" "$host ${2:-} -DLORA_SIMULATED -I$here" "#include \"$here/$1\""$'\n'; }

driver=$(for source in simulated.cpp driver_device.cpp driver_launch.cpp driver_memory.cpp driver_stream.cpp; do runtime $source; done)
# Each file of kernels has a namespace of its own, as each is a module of its own on a GPU.
driver+=" $(for source in $kernels; do
  object "$source" "$kernel" "#include \"kernel.cuh\""$'\n'"#include \"mma.cuh\""$'\n'"namespace {"$'\n'"#include \"$source\""$'\n'"}"$'\n'
done)"
cudart=$(runtime cudart.cpp)
cublas=$(runtime cublas.cpp -O3)
curand=$(runtime curand.cpp)
nccl=$(for source in nccl.cpp nccl_communicator.cpp; do runtime $source; done)
if ! xargs -0 -r -P "$(nproc)" -n 1 sh -c < "$jobs"; then
  echo "build.sh: the simulation did not compile; see above" >&2
  exit 1
fi

library() { # NAME SONAME PREFIX MODULE ERROR VERSION OBJECTS...: what OBJECTS lack of the bindings' functions returns ERROR
  local name=$1 soname=$2 prefix=$3 module=$4 error=$5 version=$6
  shift 6
  {
    echo '#include <stdio.h>'
    echo 'static int missing(const char* name, int* said) { if (!*said) fprintf(stderr, "simulated GPU: %s is not simulated\n", name); *said = 1; return '"$error"'; }'
    # The runtime's functions have variants for the stream that each thread has, which no bindings name.
    grep -oE "fn ${prefix}[A-Za-z0-9_]+" "$cudarc/src/$module/sys/mod.rs" | awk -v "library=$name" '{ print $2 } library == "cudart" { print $2 "_ptsz"; print $2 "_ptds" }' | sort -u |
      sed 's/.*/__attribute__((weak)) int &(void) { static int said; return missing("&", \&said); }/'
  } > "$objects/$name.c"
  echo "$version { global: ${prefix}*; __${prefix}*; lora_sim_*; local: *; };" > "$objects/$name.map"
  local above=()
  if [ "$name" != cuda ]; then above=("-L$out" -l:libcuda.so.1 '-Wl,-rpath,$ORIGIN'); fi
  ${CC:-gcc} -w -fno-builtin -fPIC -c "$objects/$name.c" -o "$objects/$name.o"
  $cxx $sanitize -shared -pthread -o "$out/$soname.tmp" "$@" "$objects/$name.o" "${above[@]}" -Wl,-soname,"$soname" -Wl,--version-script="$objects/$name.map"
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

# What has not been part of it for days.
find "$objects" -type f -mtime +2 -delete
