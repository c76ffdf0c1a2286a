"""Exchanges adapters of every family with PEFT, in both directions, in f32.

    cargo build -p loractl -p lora-model --bin loractl --example logits
    python tests/oracle/interchange.py target/debug

For each base in `tests/golden/models`, `loractl run` trains an adapter, which PEFT loads
(`check_adapter.py`); and loractl computes the logits with the adapter that PEFT saved in
`tests/golden/cases`. The program prints a table of relative errors, max|a - b| / max|b| over all
logits. The exit code is 1 if an error is above 1e-5, or if PEFT does not use exactly the tensors of
the file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import transformers

import check_adapter
from families import FAMILIES

GOLDEN = Path(__file__).parent.parent / "golden"

BASES = FAMILIES | {
    "Llama with `linear`": "llama-linear-rope",
    "Llama with `dynamic`": "llama-dynamic",
    "Llama with `yarn`": "llama-yarn",
    "Qwen2": "qwen2-window",
    "Phi-3 with `longrope`": "phi3-longrope",
    "Gemma 3, multimodal": "gemma3-vision",
    "Gemma 4, multimodal": "gemma4-vision",
}

JOB = """
name: interchange
model: {base: base}
adapter: {r: 4, lora_alpha: 8, target_modules: all-linear}
data: {train: train.jsonl}
training: {max_steps: 5, global_batch_size: 4, micro_batch_size: 2, learning_rate: 5.0e-2}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Exchange adapters with PEFT.")
    parser.add_argument("programs", type=Path, help="the directory of loractl and examples/logits")
    programs = parser.parse_args().programs.resolve()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    print("| base | trained here, loaded by PEFT | saved by PEFT, loaded here |")
    print("| --- | --- | --- |")
    worst = 0.0
    for family, name in BASES.items():
        with tempfile.TemporaryDirectory() as directory:
            base = write_job(Path(directory), GOLDEN / "models" / name)
            run(programs / "loractl", "run", Path(directory) / "job.yaml", "--out", Path(directory) / "out")
            ours = compare(programs, base, Path(directory) / "out")
            theirs = compare(programs, base, GOLDEN / "cases" / name / "adapter")
        print(f"| {family} | {ours:.1e} | {theirs:.1e} |", flush=True)
        worst = max(worst, ours, theirs)
    return 0 if worst <= check_adapter.LIMIT else 1


def write_job(directory: Path, model: Path) -> Path:
    """Writes a job over a copy of the base, which gets a tokenizer with a token for each word."""
    base = directory / "base"
    shutil.copytree(model, base)
    words = {f"w{number}": number for number in range(80)} | {"<unk>": 80}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "unk_token": "<unk>"}))
    sentence = lambda row: " ".join(f"w{(row * 31 + 7 * word) % 80}" for word in range(5 + row))
    rows = [json.dumps({"text": sentence(row)}) for row in range(20)]
    (directory / "train.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "job.yaml").write_text(JOB)
    return base


def compare(programs: Path, base: Path, adapter: Path) -> float:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "logits.safetensors"
        run(programs / "examples" / "logits", base, adapter, file)
        return check_adapter.error(base, adapter, file)


def run(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
