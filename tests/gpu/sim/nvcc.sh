#!/usr/bin/env bash
# nvcc for programs that run on the simulated GPU (variable NVCC). It replaces the kernels of
# candle-kernels, which take minutes to compile and which no program here launches: PTX becomes an
# empty file, and each function of the library ends the program.
#
# CUDA_HOME names the real compiler.
set -euo pipefail
case $PWD in
  */candle-kernels-*) ;;
  *) exec "$CUDA_HOME/bin/nvcc" "$@" ;;
esac
source='' directory='' object='' is_ptx=''
arguments=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --ptx) is_ptx=1 ;;
    --output-directory) shift; directory=$1 ;;
    -o) shift; object=$1 ;;
    *.cu) source=$1 ;;
  esac
  shift
done
if [ -z "$source" ]; then
  exec "$CUDA_HOME/bin/nvcc" "${arguments[@]}"
elif [ -n "$is_ptx" ]; then
  name=$(basename "$source" .cu)
  echo "// not compiled for the simulated GPU" >"$directory/$name.ptx"
else
  # The functions are in the object of one source; the others are empty.
  functions=''
  if [ "$(basename "$source")" = moe_gguf.cu ]; then
    functions=$(sed -n 's/^ *pub fn \([A-Za-z0-9_]*\)(.*/void \1(void) { abort(); }/p' src/ffi.rs)
  fi
  printf '#include <stdlib.h>\n%s\n' "$functions" | cc -x c -fPIC -c -o "$object" -
fi
