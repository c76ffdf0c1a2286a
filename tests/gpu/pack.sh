#!/usr/bin/env bash
# Packs the checks and measurements of the CUDA engine for a machine with a GPU into
# OUT_DIR/kit.tar.xz. This script needs cargo, git, g++, binutils, xz, Python, and a Python package
# index, but neither a GPU nor CUDA. On the GPU machine, `onsite.sh kit.tar.xz` needs Python 3.12,
# the driver, and CUDA's libraries.
#
#   tests/gpu/pack.sh [--programs DIR] [--without-python] [--level N] OUT_DIR
#
# --programs: packs lora-worker, lora-gpu, train_step and loractl of DIR instead of building them.
# --without-python: omits bitsandbytes, which PEFT needs for 4 bits. --level: xz's level, default 9.
# OUT_DIR/MANIFEST, also in the archive, is JSON: commit, whether the work tree differs from it
# (untracked files in crates, benches and tests count), whether the programs came from --programs,
# date, and size and SHA-256 of each file.
#
# It is an error if a program needs a library or a version of glibc that a machine with a driver and
# PyTorch's packages is not expected to have, or if the archive is larger than 40 MiB. Exit code 75:
# CUDA's compiler cannot be installed on this machine.
set -euo pipefail
programs='' python=1 level=9 prebuilt=''
usage() { echo "usage: pack.sh [--programs DIR] [--without-python] [--level N] OUT_DIR: $*" >&2; exit 2; }
while [[ ${1:-} == --* ]]; do
  case $1 in
    --programs) programs=$(cd "${2:?usage: --programs DIR}" && pwd); prebuilt=1; shift 2 ;;
    --level) level=${2:?usage: --level N}; shift 2 ;;
    --without-python) python=''; shift ;;
    *) usage "invalid option $1" ;;
  esac
done
[ $# = 1 ] || usage "one directory is required"
[[ $level =~ ^[0-9]$ ]] || usage "--level $level; it must be from 0 to 9"
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
target=$(mkdir -p "$target" && cd "$target" && pwd)
fail() { echo "pack.sh: $*" >&2; exit 1; }
# The state of the sources is read before the long build. Untracked files can be part of the build.
commit=$(git rev-parse HEAD)
changes=$(git status --porcelain --untracked-files=no
  git status --porcelain --untracked-files=normal -- crates benches tests)

# Names of the shared libraries that programs may need, and the newest glibc.
libraries=" libcuda.so.1 libcudart.so.13 libcublas.so.13 libcurand.so.10 libnccl.so.2 "
libraries+="libc.so.6 libm.so.6 libgcc_s.so.1 libstdc++.so.6 ld-linux-x86-64.so.2 "
glibc=2.39
most_bytes=$((40 << 20))
names=(lora-worker lora-gpu train_step loractl)

if [ -z "$programs" ]; then
  if [ -z "${CUDA_HOME:-}" ]; then
    tests/gpu/toolchain.sh "$target/cuda-toolchain"
    # shellcheck source=/dev/null
    source "$target/cuda-toolchain/env.sh"
  fi
  cargo fetch --locked
  # The simulated libraries have the names and symbols of the real ones, so programs can be linked
  # against them. The linker needs none of the engine's kernels in them.
  tests/gpu/sim/build.sh "$target/kit-link" tests/gpu/sim/selftest/kernels.cu
  export LIBRARY_PATH=$target/kit-link${LIBRARY_PATH:+:$LIBRARY_PATH} LORA_CUDA_ARCHS=${LORA_CUDA_ARCHS:-90}
  # loractl has its own build, because in one build it would get the feature too. Both builds have
  # the same target directory, because they share dependencies.
  profile=(--locked --profile kit --target-dir "$target/cuda")
  cargo build "${profile[@]}" -p lora-worker -p lora-gpu -p lora-bench \
    --features lora-worker/cuda,lora-gpu/cuda,lora-bench/cuda --bins
  cargo build "${profile[@]}" -p loractl
  programs=$target/kit-programs
  rm -rf "$programs"
  mkdir "$programs"
  cp "$target/cuda/kit/"{lora-worker,lora-gpu,train_step,loractl} "$programs/"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
kit=$work/kit
mkdir -p "$kit/bin"
for name in "${names[@]}"; do
  [ -x "$programs/$name" ] || fail "$programs/$name does not exist"
  strip -o "$kit/bin/$name" "$programs/$name"
  for library in $(readelf -d "$kit/bin/$name" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
    [[ $libraries == *" $library "* ]] || fail "$name needs $library; allowed are:$libraries"
  done
  newest=$(readelf --version-info "$kit/bin/$name" | grep -oE 'GLIBC_[0-9.]+' | sort -Vu | tail -1)
  newest=${newest#GLIBC_}
  [ "$(printf '%s\n' "$newest" "$glibc" | sort -V | tail -1)" = "$glibc" ] ||
    fail "$name needs glibc $newest; $glibc is the newest allowed"
  echo "$name: $(stat -c %s "$kit/bin/$name") bytes, glibc $newest"
done

# The kit has the paths of the repository, so scripts find each other, and programs find their data.
git ls-files -z benches/compare.sh benches/gpu benches/models benches/peft_step.py benches/table.py \
  examples/dates/base examples/dates/train.jsonl examples/dates/eval.jsonl \
  tests/golden/cases tests/golden/models \
  tests/gpu/libraries.sh tests/gpu/onsite tests/gpu/onsite.sh tests/gpu/selftest.sh |
  xargs -0 cp --parents -t "$kit"

if [ -n "$python" ]; then
  # Only the library for CUDA 13.0, the version of the kit's programs.
  requirement=$(grep '^bitsandbytes==' benches/requirements.txt)
  python3 -m venv "$work/venv"
  if "$work/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --platform manylinux_2_24_x86_64 --dest "$work" "$requirement"; then
    python3 - "$work"/bitsandbytes-*.whl "$kit/python" <<'PYTHON'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    unwanted = re.compile(r"bitsandbytes/libbitsandbytes_(?!cuda130\.so|cpu\.so)")
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if not unwanted.match(name)])
PYTHON
  else
    echo "pack.sh: $requirement cannot be downloaded; the kit will not measure PEFT with 4 bits" >&2
  fi
fi

cat > "$work/manifest.py" <<'PYTHON'
import hashlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

kit, commit, changes, prebuilt = Path(sys.argv[1]), *sys.argv[2:]
files = {}
for path in sorted(kit.rglob("*")):
    if path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[str(path.relative_to(kit))] = {"bytes": path.stat().st_size, "sha256": digest}
date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
state = {"commit": commit, "dirty": bool(changes), "prebuilt": bool(prebuilt), "date": date}
manifest = {**state, "files": files}
(kit / "MANIFEST").write_text(json.dumps(manifest, indent=1) + "\n")
PYTHON
python3 "$work/manifest.py" "$kit" "$commit" "$changes" "$prebuilt"

# xz writes one stream with a dictionary larger than all programs together, so that data that they
# share is stored once.
tar --create --sort=name --owner=0 --group=0 --numeric-owner --directory "$work" kit |
  xz --threads=1 --lzma2="preset=$level,dict=256MiB" > "$work/kit.tar.xz"
bytes=$(stat -c %s "$work/kit.tar.xz")
[ "$bytes" -le "$most_bytes" ] || fail "the archive has $bytes bytes; $most_bytes are the most allowed"
mv "$work/kit.tar.xz" "$kit/MANIFEST" "$out/"
echo "$out/kit.tar.xz: $bytes bytes, unpacked $(du -sb "$work/kit" | cut -f1)"
sha256sum "$out/kit.tar.xz"
