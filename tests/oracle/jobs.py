"""Whole jobs of PEFT: what `loractl run` makes of a job file and its rows.

Everything that a job's settings decide is computed here again: rows to tokens, batches, dropout,
schedule, clipping, AdamW, evaluation. The base is that of `examples/dates`. Rows are in the file's
order, and each row is computed alone, without padding. The values are computed in f64.

The masks of dropout follow their definition, Philox4x32-10 with the counter (step, row, position,
feature / 4), because torch's masks cannot be had on another device.
"""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import bitsandbytes.functional
import numpy as np
import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, get_scheduler

import adapters
import reference
from batches import IGNORE

quantize_blockwise = bitsandbytes.functional.quantize_blockwise

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/dates"
TRAINING_ROWS = 19
HELD_OUT_ROWS = 5

# The keys are those of a job file. No setting that changes a number has its default.
CASES = {
    "settings": {
        "model": {"dtype": "auto"},
        "adapter": {
            "r": 3,
            "lora_alpha": 7.5,
            "lora_dropout": 0.25,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_rslora": True,
        },
        "training": {
            "num_train_epochs": 3,
            "global_batch_size": 7,
            "micro_batch_size": 3,
            "learning_rate": 2.0e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "adam_beta1": 0.7,
            "adam_beta2": 0.95,
            "adam_epsilon": 1.0e-3,
            "weight_decay": 0.5,
            "max_grad_norm": 3.0,
            "seed": 7,
            "eval_steps": 4,
        },
    },
    "qlora": {
        "model": {"quantization": "nf4", "bnb_4bit_use_double_quant": True},
        "adapter": {"r": 2, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "training": {
            "max_steps": 7,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 5.0e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.2,
            "adam_beta1": 0.85,
            "adam_beta2": 0.98,
            "adam_epsilon": 1.0e-4,
            "weight_decay": 0.6,
            "max_grad_norm": 4.0,
            "seed": 11,
            "eval_steps": 3,
            "activation_checkpointing": "block",
        },
    },
}  # fmt: skip


def make_all(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    rows = make_rows(root / "train.jsonl", EXAMPLE / "train.jsonl", TRAINING_ROWS)
    held_out = make_rows(root / "eval.jsonl", EXAMPLE / "eval.jsonl", HELD_OUT_ROWS)
    with mock.patch.object(bitsandbytes.functional, "quantize_blockwise", quantize_to_nearest):
        for seed, (name, job) in enumerate(CASES.items()):
            make(root / name, job, rows, held_out, 300 + seed)


def quantize_to_nearest(values: torch.Tensor, **settings):
    """bitsandbytes' quantization to 8 bits, with the nearest code for every value.

    Double quantization calls this for the scales. bitsandbytes' own kernel for CPUs takes another
    code for one value in 700; its kernel for GPUs does not.
    """
    _, state = quantize_blockwise(values, **settings)
    scales = state.absmax.repeat_interleave(state.blocksize)[: values.numel()].double()
    distances = values.flatten().double()[:, None] - scales[:, None] * state.code.double()
    return distances.abs().argmin(-1).to(torch.uint8).reshape(values.shape), state


def make_rows(path: Path, source: Path, count: int) -> list[dict]:
    """Writes rows of three formats."""
    rows = []
    for index, line in enumerate(source.read_text().splitlines()[:count]):
        row = json.loads(line)
        prompt, completion = (message["content"] for message in row["messages"])
        if index % 3 == 1:
            row = {"prompt": f"{prompt} is ", "completion": completion}
        elif index % 3 == 2:
            row = {"text": f"{completion}, that is {prompt}"}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def encode(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    """Tokens and labels. The labels are not shifted."""
    if "messages" in row:
        messages = row["messages"]
        tokens = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert tokens[: len(prompt)] == prompt
        trained = [index >= len(prompt) for index in range(len(tokens))]
    else:
        start = len(row.get("prompt", ""))
        encoded = tokenizer(
            row.get("prompt", "") + row.get("completion", row.get("text", "")), return_offsets_mapping=True
        )
        tokens = encoded["input_ids"] + [tokenizer.eos_token_id]
        trained = [end > start or start == 0 for _, end in encoded["offset_mapping"]] + [True]
    return tokens, [token if train else IGNORE for token, train in zip(tokens, trained)]


class PhiloxDropout(torch.nn.Module):
    """Dropout of one module with masks that depend on the step, the row, the position and the feature."""

    step = row = 0

    def __init__(self, module: str, seed: int, probability: float):
        super().__init__()
        self.key = fnv1a(seed.to_bytes(8, "little") + f"dropout {module}".encode())
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        batch, positions, features = x.shape
        assert batch == 1
        blocks = math.ceil(features / 4)
        counter = np.zeros((positions, blocks, 4), np.uint64)
        counter[..., 0], counter[..., 1] = PhiloxDropout.step, PhiloxDropout.row
        counter[..., 2] = np.arange(positions)[:, None]
        counter[..., 3] = np.arange(blocks)
        words = philox(counter, self.key).reshape(positions, -1)[:, :features]
        uniform = (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
        kept = uniform >= np.float32(self.probability)
        return x * torch.from_numpy(kept) / (1.0 - self.probability)


def fnv1a(data: bytes) -> int:
    """The 64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): words [..., 4] for counters [..., 4], as u64."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., index] for index in range(4))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & mask
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def make(directory: Path, job: dict, rows: list[dict], held_out: list[dict], seed: int) -> None:
    lora = job["adapter"]
    adapters.make(EXAMPLE / "base", directory / "adapter", seed, **lora)
    quantized = {}
    if "quantization" in job["model"]:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        quantized = {"quantization_config": config, "device_map": "cpu"}
    load = lambda: reference.load(EXAMPLE / "base", directory / "adapter", torch.float64, **quantized)
    model = load()
    metrics = train(model, job, rows, held_out)

    # The settings matter: without one of them, the curve is another one.
    for section, changed in [
        ("adapter", {"lora_dropout": 0.0}),
        ("training", {"weight_decay": 0.0}),
        ("training", {"adam_beta1": 0.9}),
        ("training", {"adam_beta2": 0.999}),
        ("training", {"adam_epsilon": 1e-8}),
        ("training", {"max_grad_norm": 1e9}),
    ]:
        other = train(load(), job | {section: job[section] | changed}, rows, held_out)
        apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(other, metrics))
        assert apart > 1e-3, f"{changed} changes the losses by only {apart}"
    norms, largest = [row["grad_norm"] for row in metrics], job["training"]["max_grad_norm"]
    assert min(norms) < largest < max(norms), f"not only some steps are clipped: {norms}"

    contents = {"job": job, "metrics": metrics}
    (directory / "expected.json").write_text(json.dumps(contents, indent=1) + "\n")
    adapters.save(model.float(), directory / "final", "dates")


def train(model, job: dict, rows: list[dict], held_out: list[dict]) -> list[dict]:
    """Trains as Transformers' Trainer does; returns the metrics of each step."""
    settings, probability = job["training"], job["adapter"]["lora_dropout"]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "base")
    rows, held_out = ([encode(tokenizer, row) for row in part] for part in (rows, held_out))
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            path = name.removeprefix("base_model.model.")
            module.lora_dropout["default"] = PhiloxDropout(path, settings["seed"], probability).train()

    batch_size = settings["global_batch_size"]
    batches = [range(len(rows))[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    steps = settings.get("max_steps") or settings["num_train_epochs"] * len(batches)
    warmup = settings["warmup_steps"]
    warmup = math.ceil(warmup * steps) if warmup < 1 else warmup
    parameters = list(reference.lora_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings["learning_rate"],
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        eps=settings["adam_epsilon"],
        weight_decay=settings["weight_decay"],
    )
    scheduler = get_scheduler(settings["lr_scheduler_type"], optimizer, warmup, steps)
    metrics = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        num_items_in_batch = sum(labelled(rows[row]) for row in batch)
        loss = 0.0
        for row in batch:
            PhiloxDropout.step, PhiloxDropout.row = step, row
            row_loss = loss_sum(model, rows[row]) / num_items_in_batch
            row_loss.backward()
            loss += row_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        metrics.append(
            {
                "step": step + 1,
                "loss": loss,
                "grad_norm": norm.item(),
                "learning_rate": scheduler.get_last_lr()[0],
                "epoch": (step + 1) / len(batches),
                "num_tokens": sum(len(rows[row][0]) for row in batch)
                + (metrics[-1]["num_tokens"] if metrics else 0),
            }
        )
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % settings["eval_steps"] == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                total = sum(loss_sum(model, row).item() for row in held_out)
            metrics[-1]["eval_loss"] = total / sum(labelled(row) for row in held_out)
            model.train()
    return metrics


def loss_sum(model, row: tuple[list[int], list[int]]) -> torch.Tensor:
    tokens, labels = (torch.tensor([values]) for values in row)
    return reference.loss_sum(model(input_ids=tokens).logits, labels)


def labelled(row: tuple[list[int], list[int]]) -> int:
    return sum(label != IGNORE for label in row[1][1:])
