"""Logits of bases whose `config.json` says a thing twice, in another word, or not at all."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# The base, and what changes in its `config.json`.
VARIANTS = {
    "rope-both": ("llama-gqa", {"rope_scaling": LINEAR}),
    "rope-both-theta": ("qwen2", {"rope_scaling": LINEAR}),
    "rope-both-top-theta": ("qwen2", {"rope_scaling": LINEAR, "rope_theta": 700.0}),
    "rope-both-empty": ("llama-linear-rope", {"rope_scaling": {}}),
    "rope-both-layers": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "rope-llama3-no-original": ("llama-gqa", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "rope-llama3-no-original-v4": (
        "llama-gqa",
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": LLAMA3},
    ),
    "swish": ("llama-gqa", {"hidden_act": "swish"}),
    "gelu-new": ("llama-geglu", {"hidden_act": "gelu_new"}),
    "gelu-fast": ("llama-geglu", {"hidden_act": "gelu_fast"}),
    "gelu-accurate": ("llama-geglu", {"hidden_act": "gelu_accurate"}),
    "gelu-python-tanh": ("llama-geglu", {"hidden_act": "gelu_python_tanh"}),
    # The head of this base is another matrix than its embedding.
    "tied-but-head-differs": ("llama-gqa", {"tie_word_embeddings": True}),
}


def make_all(models: Path, root: Path) -> None:
    values, metadata = {}, {}
    for name, (model, changes) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as directory:
            base = Path(directory) / model
            shutil.copytree(models / model, base)
            config = json.loads((base / "config.json").read_text())
            config.update(changes)
            (base / "config.json").write_text(json.dumps(config))
            loaded = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float64, attn_implementation="eager"
            )
        tokens = (torch.arange(40) * 7 + 3) % loaded.config.vocab_size
        with torch.no_grad():
            values[name] = loaded(tokens[None]).logits[0].float().contiguous()
        values[f"{name}.tokens"] = tokens
        metadata[name] = json.dumps({"model": model, "changes": changes})
    save_file(values, root / "configs.safetensors", metadata)
