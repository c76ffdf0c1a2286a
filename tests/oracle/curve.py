"""Training steps of PEFT as in Transformers' Trainer.

A curve has losses, gradient norms and learning rates. The curves of `make` also have the final
adapter.

The values are computed in f64, and the error of the same run in f32 is stored too. QLoRA is PEFT
with bitsandbytes' layers on the CPU, in f32.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler

import adapters
import batches
import initial
import reference

SETTINGS = {
    "learning_rate": 1e-2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.01,
    "max_grad_norm": 5.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_steps": 10,
}


# Curves of adapters that are initialized from the base, with their case in `initial.py`.
STARTED = {"llama-gqa-pissa": "pissa", "llama-gqa-olora": "olora", "qwen2-loftq": "loftq-iter-5"}


# Seeds, learning rates, and norms that clip some of the steps.
FAMILIES = {
    "qwen3": (206, 2e-2, 7.0),
    "mistral": (210, 2e-2, 6.4),
    "smollm3": (211, 2e-2, 7.0),
    "olmo2": (212, 2e-2, 6.7),
    "olmo3": (213, 2e-2, 9.0),
    "granite": (214, 2e-2, 0.8),
    "gemma2": (226, 2e-2, 9.0),
    "gemma3": (216, 1e-2, 18.0),
    "phi3": (217, 2e-2, 6.4),
    "ministral3": (218, 2e-2, 7.0),
    "granite4": (219, 2e-2, 0.8),
    "gemma4": (220, 2e-2, 2.8),
    "gemma4-shared": (221, 2e-2, 4.0),
    "starcoder2": (222, 2e-2, 6.0),
    "cohere2": (223, 2e-2, 3.0),
}


def make_all(models: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    for seed, name in enumerate(["llama-gqa", "qwen2"]):
        make(models / name, root / name, 200 + seed)
    make_qlora(models / "qwen2", root / "qwen2-nf4", 202)
    for seed, (name, case) in enumerate(STARTED.items()):
        base, lora = initial.CASES[case]
        make_started(models / base, root / name, 203 + seed, lora)
    for name, (seed, learning_rate, norm) in FAMILIES.items():
        make(models / name, root / name, seed, learning_rate=learning_rate, max_grad_norm=norm)


def make(base: Path, directory: Path, seed: int, **changed) -> None:
    """Ten steps; `changed` replaces some of the settings."""
    settings = SETTINGS | changed
    adapters.make(base, directory / "adapter", seed, target_modules="all-linear")
    batch = make_batches(AutoConfig.from_pretrained(base).vocab_size, SETTINGS["max_steps"], seed)
    save_file(batch, directory / "batches.safetensors")

    model = reference.load(base, directory / "adapter", torch.float64)
    curve = train(model, batch, settings)
    f32 = train(reference.load(base, directory / "adapter", torch.float32), batch, settings)
    norms = curve["grad_norm"]
    assert min(norms) < settings["max_grad_norm"] < max(norms), f"not only some steps are clipped: {norms}"
    at_rest = settings | {"learning_rate": 0.0}
    frozen = train(reference.load(base, directory / "adapter", torch.float64), batch, at_rest)
    losses = zip(curve["loss"][4:], frozen["loss"][4:])
    assert all(a < 0.98 * b for a, b in losses), (curve["loss"], frozen["loss"])
    errors = largest_errors(f32, curve)
    assert max(errors.values()) < 1e-4, errors

    contents = {"model": base.name, "settings": settings, **curve, "peft_f32_errors": errors}
    (directory / "curve.json").write_text(json.dumps(contents, indent=2) + "\n")
    adapters.save(model.float(), directory / "final", base.name)


def make_qlora(base: Path, directory: Path, seed: int) -> None:
    """Twenty steps with the base in NF4 with double quantization."""
    settings = SETTINGS | {"max_steps": 20}
    quantized = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "device_map": "cpu",
    }
    adapters.make(base, directory / "adapter", seed, target_modules="all-linear")
    batch = make_batches(AutoConfig.from_pretrained(base).vocab_size, settings["max_steps"], seed)
    save_file(batch, directory / "batches.safetensors")

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **quantized)
    model = PeftModel.from_pretrained(model, directory / "adapter", is_trainable=True).train()
    curve = train(model, batch)
    f64 = train(reference.load(base, directory / "adapter", torch.float64, **quantized), batch)
    dense = train(reference.load(base, directory / "adapter", torch.float64), batch)
    errors = largest_errors(curve, f64)
    assert max(errors.values()) < 1e-4, errors
    differs = any(abs(a - b) > 1e-2 * b for a, b in zip(dense["loss"], f64["loss"]))
    assert differs, "quantization does not change the losses"
    contents = {"model": base.name, "settings": settings, **curve, "peft_f32_errors": errors}
    (directory / "curve.json").write_text(json.dumps(contents, indent=2) + "\n")


def make_started(base: Path, directory: Path, seed: int, lora: dict) -> None:
    """Ten steps of an adapter that is initialized from the base's weights."""
    directory.mkdir(parents=True)
    batch = make_batches(AutoConfig.from_pretrained(base).vocab_size, SETTINGS["max_steps"], seed)
    save_file(batch, directory / "batches.safetensors")
    curve = train(reference.in_f64(initial.start(base, **lora)).train(), batch)
    f32 = train(initial.start(base, **lora).train(), batch)
    plain = {"init_lora_weights": True, "lora_alpha": lora["lora_alpha"]}
    fresh = train(initial.start(base, **plain).train(), batch)
    differs = any(abs(a - b) > 1e-2 * b for a, b in zip(fresh["loss"], curve["loss"]))
    assert differs, "the initialization does not change the losses"
    errors = largest_errors(f32, curve)
    assert max(errors.values()) < 1e-4, errors
    contents = {"model": base.name, "settings": SETTINGS, **curve, "peft_f32_errors": errors}
    (directory / "curve.json").write_text(json.dumps(contents, indent=2) + "\n")


def largest_errors(curve: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    """The largest relative errors of losses and gradient norms."""
    return {
        key: max(abs(a - b) / abs(b) for a, b in zip(curve[key], expected[key]))
        for key in ["loss", "grad_norm"]
    }


def make_batches(vocab: int, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """`tokens`, `attention_mask`, `labels`: [steps, micro-batches, rows, T of longest row] i64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 21, (steps * 4,), generator=generator).tolist()
    prompts = [int(torch.randint(1, length // 2, (), generator=generator)) for length in lengths]
    batch = batches.ragged(vocab, lengths, prompts, seed)
    return {name: x.reshape(steps, 2, 2, -1) for name, x in batch.items()}


def train(model, batch: dict[str, torch.Tensor], settings: dict = SETTINGS) -> dict[str, list[float]]:
    steps = batch["tokens"].shape[0]
    parameters = list(reference.lora_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings["learning_rate"],
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        eps=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
    )
    scheduler = get_scheduler(settings["lr_scheduler_type"], optimizer, settings["warmup_steps"], steps)
    curve = {"loss": [], "grad_norm": [], "learning_rate": []}
    for step in range(steps):
        tokens, mask, labels = (batch[key][step] for key in ["tokens", "attention_mask", "labels"])
        num_items_in_batch = reference.labelled_tokens(labels)
        total = 0.0
        for micro in range(tokens.shape[0]):
            logits = model(input_ids=tokens[micro], attention_mask=mask[micro]).logits
            loss = reference.loss_sum(logits, labels[micro]) / num_items_in_batch
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        curve["loss"].append(total)
        curve["grad_norm"].append(norm.item())
        curve["learning_rate"].append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return curve
