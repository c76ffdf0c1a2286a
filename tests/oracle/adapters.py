"""Adapter directories saved by PEFT."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def make(base: Path, directory: Path, seed: int, **lora) -> None:
    """Saves an adapter with PEFT's initial A and a random B (with B = 0 the gradient of A is 0)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8} | lora)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.15)
    save(model, directory, base.name)


def save(model, directory: Path, base_name: str) -> None:
    """Saves an adapter as PEFT does, without the model card, and with sets in sorted order."""
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
