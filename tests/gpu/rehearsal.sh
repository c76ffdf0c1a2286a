#!/usr/bin/env bash
# Tests the kit on the simulated GPU: packs prebuilt programs and runs every phase that does not
# need a real device, at tiny sizes.
#
#   tests/gpu/rehearsal.sh BIN_DIR
#
# BIN_DIR has lora-gpu, lora-worker and train_step, built with the feature cuda, and loractl.
#
# LD_LIBRARY_PATH must contain the simulated libraries. `simulated.sh` calls this script.
set -euo pipefail
bin=$(cd "${1:?usage: rehearsal.sh BIN_DIR}" && pwd)
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "rehearsal.sh: $*" >&2; exit 1; }
export PYTHONDONTWRITEBYTECODE=1

mkdir "$work/pack"
tests/gpu/pack.sh --programs "$bin" --without-python --level 0 "$work/pack"
kit=$work/pack/kit.tar.xz

# pack.sh must refuse a program that needs a library outside of its list.
mkdir "$work/programs"
cp -L "$bin/"{lora-worker,lora-gpu,train_step} "$work/programs/"
simulated=$(ldd "$bin/lora-worker" | sed -n 's/.*libcuda.so.1 => \(.*\)\/libcuda.so.1 .*/\1/p')
echo 'int nvrtcVersion(int*, int*); int main(void) { int a, b; return nvrtcVersion(&a, &b); }' >"$work/main.c"
cc "$work/main.c" -o "$work/programs/loractl" "-L$simulated" -lnvrtc "-Wl,-rpath-link,$simulated"
if tests/gpu/pack.sh --programs "$work/programs" --without-python --level 0 "$work/refused" \
  2>"$work/refused.log"; then
  fail "pack.sh packed a program that needs libnvrtc.so.13"
fi
grep -q 'loractl needs libnvrtc.so.13' "$work/refused.log" || fail "$(cat "$work/refused.log")"
[ ! -e "$work/refused/kit.tar.xz" ] || fail "pack.sh left an archive that it refused"

# The runs have a Python without PyTorch, and none of NVIDIA's tools.
python3 -m venv --without-pip "$work/venv"
cat >"$work/tiny.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
 "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
 "vocab_size": 160, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
JSON
export PYTHON=$work/venv/bin/python MODEL=$work/tiny.json
export CASES=1x8,2x4 PROFILE_CASES=1x8 WARMUP=1 STEPS=1 THREADS=2
export CHECKS='rms_norm' BENCH='rms_norm' BENCH_SCALE=64 JOBS='one tcp2 cpu' JOB_STEPS=2
onsite() { # OUT PHASES...
  local out=$1
  shift
  PATH=${TOOLS:+$TOOLS:}/usr/bin:/bin tests/gpu/onsite.sh "$kit" "$out" 280 "$@" | tee "$out.log"
}
# Fails unless phase "$2" has status "$3" in "$1.log", the output of onsite.sh.
has() { grep -qE "^$2 +$3 " "$1.log" || fail "$2 is not $3"; }

echo "-- the first half"
onsite "$work/first"
for phase in env doctor ops bench steps selftest; do has "$work/first" $phase ok; done
echo "-- the second half, without PyTorch and without NVIDIA's tools"
onsite "$work/second" second
for phase in env ours nccl; do has "$work/second" $phase ok; done
for phase in peft sanitize ncu; do has "$work/second" $phase skipped; done
grep -q 'Python has no torch' "$work/second.log" || fail "the table has no reason for the skipped phase peft"
grep -q 'ncu is not installed' "$work/second.log" || fail "the table has no reason for the skipped phase ncu"

echo "-- NVIDIA's tools, replaced by stand-ins that only run the program"
mkdir "$work/tools"
for tool in ncu compute-sanitizer; do
  cat >"$work/tools/$tool" <<'TOOL'
#!/bin/sh
# The arguments before the path of lora-gpu are those of the tool.
while [ "${1##*/}" != lora-gpu ]; do shift; done
echo '    Duration                         us     1,234.56'
exec "$@"
TOOL
  chmod +x "$work/tools/$tool"
done
TOOLS=$work/tools onsite "$work/tools-run" sanitize ncu
for phase in sanitize ncu; do has "$work/tools-run" $phase ok; done

echo "-- the results"
for run in first second tools-run; do
  files=$(find "$work/$run" -type f | wc -l)
  [ "$files" -le 8 ] || fail "$run has $files files"
  [ "$(sed '1,/^$/d' "$work/$run.log" | wc -l)" -le 60 ] || fail "the table of $run is too long"
done
mkdir "$work/results"
cp "$work/first/result.json" "$work/results/first.json"
cp "$work/second/result.json" "$work/results/second.json"
cp benches/gpu/RESULTS.md "$work/RESULTS.md"
page() { python3 benches/gpu/results.py --results "$work/results" --page "$work/RESULTS.md"; }
page
for row in 'RMSNorm, residual + norm | .* | never |' '.*; not the default: bench, bench_scale, '; do
  grep -q "^| $row" "$work/RESULTS.md" || fail "the tables took results of other sizes: no row '$row'"
done
# From here on the results pretend that the tiny sizes are the defaults.
sed -i '/"changed_settings": \[/,/\]/c "changed_settings": [],' "$work/results/"*.json
page
for row in 'RMSNorm, residual + norm | .* | ok: Simulated GPU' \
  'reduction through NCCL, abort | .* | ok: Simulated GPU' \
  'tiny, bf16 | 2 x 4 | [0-9].* | [0-9.]* GB | [0-9.]* GB |' \
  'tiny, int8 | 1 x 8 | [0-9]' 'rms_norm forward .* | [0-9.]* | [0-9]' \
  'rms_norm_forward_bf16 | [0-9]' 'frozen products | [0-9]'; do
  grep -q "^| $row" "$work/RESULTS.md" || fail "the tables have no row '$row'"
done
if python3 benches/gpu/results.py --add "$work/first/result.json" --results "$work/results" \
  --page "$work/RESULTS.md"; then
  fail "a run on a simulated GPU was added to the results"
fi
echo "the kit is ready"
