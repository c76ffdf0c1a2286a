"""Serves adapters of every family with llama.cpp, and compares its logits.

    pip install llama-cpp-python gguf torch transformers sentencepiece
    cargo build -p loractl
    python tests/oracle/gguf_served.py --llama-cpp LLAMA_CPP target/debug/loractl

`LLAMA_CPP` is llama.cpp's source tree of the version in `llama-cpp-python`; its program
`convert_hf_to_gguf.py` converts the bases in `tests/golden/models` to f32. The adapters are those
that PEFT saved in `tests/golden/cases`; `loractl convert` converts them. The program prints a table
of relative errors, max|a - b| / max|b| over the logits of a row:

- base with adapter in llama.cpp, and the base that `loractl merge` merged with it in llama.cpp;
- base with adapter in llama.cpp, and Transformers with PEFT;
- the base alone in llama.cpp, and Transformers. Where this error is large, llama.cpp computes the
  small base otherwise than Transformers (windows of a few positions, among others).

The exit code is 1 if the first error is above 1e-3, or if the adapter has no effect.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import llama_cpp
import numpy as np
import tokenizers
from safetensors.numpy import load_file

from families import FAMILIES

GOLDEN = Path(__file__).parent.parent / "golden"
# ggml computes GELU with values in f16.
LIMIT = 1e-3
# llama.cpp does not adapt the projection of the embeddings of blocks, which only one of the
# adapters over a Gemma 4 with shared keys does not have.
CASES = FAMILIES | {
    "Llama with `use_rslora`": "llama-gqa-rslora",
    "Gemma 4 with shared keys": "gemma4-shared-blocks",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare llama.cpp's logits with PEFT's.")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("loractl", type=Path)
    parser.add_argument("--only", help="one case")
    arguments = parser.parse_args()
    quiet()
    print("| base | adapter and merged base | adapter and PEFT | base alone and Transformers |")
    print("| --- | --- | --- | --- |")
    failed = False
    for family, case in CASES.items():
        if arguments.only not in (None, case):
            continue
        try:
            merged, peft, base, effect = compare(arguments, case)
        except RuntimeError as error:
            print(f"| {family} | {error} | | |", flush=True)
            failed = True
            continue
        print(f"| {family} | {merged:.1e} | {peft:.1e} | {base:.1e} |", flush=True)
        failed |= merged > LIMIT or effect < 10 * LIMIT
    return int(failed)


def compare(arguments, case: str) -> tuple[float, float, float, float]:
    """The three errors, and the relative effect of the adapter."""
    golden = GOLDEN / "cases" / case
    expected, inputs = load_file(golden / "expected.safetensors"), load_file(golden / "inputs.safetensors")
    length = int(inputs["attention_mask"][0].sum())
    tokens = inputs["tokens"][0, :length].tolist()
    base_logits, logits = expected["base_logits"][0, :length], expected["logits"][0, :length]
    model = GOLDEN / "models" / json.loads((golden / "case.json").read_text())["model"]
    with tempfile.TemporaryDirectory() as directory:
        prepared = Path(directory) / "model"
        prepare(model, prepared)
        adapter = Path(directory) / "adapter.gguf"
        merged = Path(directory) / "merged"
        run(arguments.loractl, "merge", "--base", prepared, "--adapter", golden / "adapter", "--out", merged,
            "--dtype", "f32", "--data", prepared / "rows.jsonl")
        shutil.copy(prepared / "config.json", merged)
        gguf = {model: Path(directory) / f"{model.name}.gguf" for model in (prepared, merged)}
        for model, out in gguf.items():
            # In a process of its own, because the conversion keeps state in its modules.
            run(sys.executable, Path(__file__).resolve(), "--convert", arguments.llama_cpp, model, out)
        run(arguments.loractl, "convert", "--base", prepared, "--adapter", golden / "adapter", "--to", "gguf",
            "--out", adapter)
        vocabulary = base_logits.shape[1]
        alone = served(gguf[prepared], None, tokens, vocabulary)
        adapted = served(gguf[prepared], adapter, tokens, vocabulary)
        dense = served(gguf[merged], None, tokens, vocabulary)
    return (
        error(adapted, dense), error(adapted, logits), error(alone, base_logits), error(adapted, alone)
    )


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def prepare(model: Path, out: Path) -> None:
    """Copies a base, with what published bases have and the conversion needs."""
    shutil.copytree(model, out)
    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config", config)
    words = {f"w{number}": number for number in range(text["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "unk_token": "w0"}))
    (out / "rows.jsonl").write_text(json.dumps({"text": " ".join(f"w{n}" for n in range(3, 20))}) + "\n")
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = ["attention"] * len(config["layer_types"])
        config["intermediate_size"] = config["shared_intermediate_size"]
    if config["model_type"] == "cohere2":
        config["rotary_pct"] = 1.0
    (out / "config.json").write_text(json.dumps(config))


def convert_here(tree: str, model: str, out: str) -> None:
    sys.path[:0] = [tree, str(Path(tree) / "gguf-py")]
    import conversion.base

    def without_vocabulary(self):
        self._set_vocab_none()
        # llama.cpp needs the number of tokens.
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", Path(tree) / "convert_hf_to_gguf.py")
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    for path in Path(tree, "conversion").glob("*.py"):
        module = importlib.import_module(f"conversion.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and "set_vocab" in vars(value):
                value.set_vocab = without_vocabulary
    sys.argv = ["convert", model, "--outfile", out, "--outtype", "f32"]
    converter.main()


def served(base: Path, adapter: Path | None, tokens: list[int], vocab: int) -> np.ndarray:
    """The logits after each token, as llama.cpp computes them."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), parameters)
    if not model:
        raise RuntimeError("llama.cpp does not load the base")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.type_k = settings.type_v = 0
    settings.flash_attn_type = 0
    settings.swa_full = True
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp creates no context")
    try:
        if adapter is not None:
            lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
            if not lora:
                raise RuntimeError("llama.cpp does not load the adapter")
            scales = (ctypes.c_float * 1)(1.0)
            adapters = (type(lora) * 1)(lora) if not isinstance(lora, int) else (ctypes.c_void_p * 1)(lora)
            if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) != 0:
                raise RuntimeError("llama.cpp does not use the adapter")
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for position, token in enumerate(tokens):
            batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama.cpp does not compute the row")
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, position), (vocab,)).copy()
            for position in range(len(tokens))
        ]
        return np.stack(rows)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def quiet() -> None:
    callback = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    quiet.callback = callback


def run(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert_here(*sys.argv[2:])
    else:
        sys.exit(main())
