"""Logits, loss and all adapter gradients of one batch, with one base and adapter, in f64."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import adapters
import batches
import reference

# Cases with their base and LoRA settings. A case with the name of its base has longer rows. The
# other cases keep the files small.
CASES = {
    "llama-gqa": ("llama-gqa", {"target_modules": "all-linear"}),
    "llama-gqa-list": ("llama-gqa", {"target_modules": ["q_proj", "v_proj", "mlp.down_proj"]}),
    "llama-gqa-regex": (
        "llama-gqa",
        {"target_modules": r".*\.layers\.1\.(self_attn\.(k|o)_proj|mlp\.(gate|down)_proj)"},
    ),
    "llama-gqa-rslora": ("llama-gqa", {"target_modules": "all-linear", "use_rslora": True, "r": 3}),
    "llama3-rope": ("llama3-rope", {"target_modules": "all-linear"}),
    "llama-linear-rope": ("llama-linear-rope", {"target_modules": "all-linear"}),
    "qwen2": ("qwen2", {"target_modules": "all-linear"}),
    "llama-bf16": ("llama-bf16", {"target_modules": "all-linear"}),
    "qwen2-window": ("qwen2-window", {"target_modules": "all-linear"}),
    "llama-geglu": ("llama-geglu", {"target_modules": "all-linear"}),
    "llama-nf4": ("llama-nf4", {"target_modules": "all-linear"}),
    "qwen2-nf4": ("qwen2-nf4", {"target_modules": "all-linear"}),
    "llama-int8": ("llama-int8", {"target_modules": "all-linear"}),
    "qwen3": ("qwen3", {"target_modules": "all-linear"}),
    "mistral": ("mistral", {"target_modules": "all-linear"}),
    "smollm3": ("smollm3", {"target_modules": "all-linear"}),
    "olmo2": ("olmo2", {"target_modules": "all-linear"}),
    "olmo3": ("olmo3", {"target_modules": "all-linear"}),
    "granite": ("granite", {"target_modules": "all-linear"}),
    "llama-yarn": ("llama-yarn", {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
    "llama-dynamic": ("llama-dynamic", {"target_modules": "all-linear"}),
    "phi3": ("phi3", {"target_modules": "all-linear"}),
    "phi3-longrope": ("phi3-longrope", {"target_modules": "all-linear"}),
    "phi3-longrope-short": ("phi3-longrope", {"target_modules": ["qkv_proj", "down_proj"]}),
    "ministral3": ("ministral3", {"target_modules": "all-linear"}),
    "gemma2": ("gemma2", {"target_modules": "all-linear"}),
    "gemma3-vision": ("gemma3-vision", {"target_modules": r"model\.language_model\..*_proj"}),
    "phi3-nf4": ("phi3-nf4", {"target_modules": "all-linear"}),
    "qwen3-int8": ("qwen3-int8", {"target_modules": "all-linear"}),
    "granite4": ("granite4", {"target_modules": "all-linear"}),
    "granite4-nope": ("granite4-nope", {"target_modules": ["q_proj", "v_proj", "input_linear"]}),
    "gemma4": ("gemma4", {"target_modules": "all-linear"}),
    "gemma4-vision": ("gemma4-vision", {"target_modules": r"model\.language_model\..*_proj"}),
    "gemma4-shared": ("gemma4-shared", {"target_modules": "all-linear", "r": 4}),
    "gemma4-shared-blocks": (
        "gemma4-shared",
        {"target_modules": r"model\.layers\.[1-5]\.(self_attn\.[kv]_proj|mlp\.up_proj|per_layer_input_gate)"},
    ),
    "gemma4-shared-embedding": ("gemma4-shared", {"target_modules": ["per_layer_model_projection"]}),
    "starcoder2": ("starcoder2", {"target_modules": "all-linear"}),
    "cohere2": ("cohere2", {"target_modules": "all-linear"}),
    "cohere2-attention": (
        "cohere2",
        {"target_modules": r"model\.layers\.(1\.self_attn\.(k|o)_proj|2\.mlp\.(gate|down)_proj)"},
    ),
}


def make_all(models: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    for seed, (name, (model, lora)) in enumerate(CASES.items()):
        make(models / model, root / name, 100 + seed, lora)


def make(base: Path, directory: Path, seed: int, lora: dict) -> None:
    config = AutoConfig.from_pretrained(base)
    lengths = [37, 21, 30] if directory.name == base.name else [19, 11, 14]
    vocab_size = config.get_text_config().vocab_size
    batch = batches.ragged(vocab_size, lengths, prompts=[9, 4, 6], seed=seed)
    adapters.make(base, directory / "adapter", seed, **lora)
    save_file(batch, directory / "inputs.safetensors")
    (directory / "case.json").write_text(json.dumps({"model": base.name}) + "\n")

    expected = evaluate(base, directory, batch, torch.float64)
    errors = {"peft_f32": compare(evaluate(base, directory, batch, torch.float32), expected)}
    # Gemma 2 has eager attention, whose softmax is in f32 whatever the type of the model.
    limit = 4e-6 if base.name == "gemma2" else 2e-6
    assert errors["peft_f32"]["logits"] < limit and errors["peft_f32"]["grad_max"] < 1e-5, errors
    if config.dtype == torch.bfloat16:
        errors["peft_bf16"] = compare(evaluate(base, directory, batch, torch.bfloat16), expected)
        # Under autocast the adapter's products are in bf16 too, as in the Trainer with `bf16`.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors["peft_autocast"] = compare(evaluate(base, directory, batch, torch.bfloat16), expected)
    (directory / "errors.json").write_text(json.dumps(errors, indent=2) + "\n")

    stored = {name: x if name == "loss_sum" else x.float() for name, x in expected.items()}
    assert all(x.abs().max() > 0 for x in stored.values())
    save_file({name: x.contiguous() for name, x in stored.items()}, directory / "expected.safetensors")


def evaluate(base: Path, directory: Path, batch: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return reference.evaluate(reference.load(base, directory / "adapter", dtype), batch)


def compare(values: dict, expected: dict) -> dict:
    errors = {name: reference.relative_error(values[name], expected[name]) for name in expected}
    return {
        "logits": errors.pop("logits"),
        "base_logits": errors.pop("base_logits"),
        "loss_sum": errors.pop("loss_sum"),
        "grad_max": max(errors.values()),
        **errors,
    }
