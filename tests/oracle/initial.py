"""Adapters that PEFT's `init_lora_weights` computes from a base, and the remaining frozen weights.

The sign of singular vectors is arbitrary, so the products `s B A` are stored.
"""

import inspect
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer
from peft.utils import loftq_utils
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

MODULES = ["0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.gate_proj", "1.mlp.down_proj"]

CASES = {
    "pissa": ("llama-gqa", {"init_lora_weights": "pissa", "lora_alpha": 8}),
    "pissa-rslora": ("qwen2", {"init_lora_weights": "pissa", "lora_alpha": 8, "use_rslora": True}),
    "olora": ("llama-gqa", {"init_lora_weights": "olora", "lora_alpha": 8}),
    # PEFT always assumes a scaling of 1 for LoftQ, so `lora_alpha` is equal to `r`.
    "loftq": (
        "qwen2",
        {
            "init_lora_weights": "loftq",
            "lora_alpha": 4,
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
        },
    ),
    "loftq-iter-5": (
        "qwen2",
        {
            "init_lora_weights": "loftq",
            "lora_alpha": 4,
            "loftq_config": {"loftq_bits": 4, "loftq_iter": 5},
        },
    ),
}


def make_all(models: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, (base, lora) in CASES.items():
        model = start(models / base, **lora)
        tensors = {}
        for module in MODULES:
            linear = model.get_submodule(f"base_model.model.model.layers.{module}")
            a, b = linear.lora_A["default"].weight.data, linear.lora_B["default"].weight.data
            tensors[f"{module}.product"] = (linear.scaling["default"] * b.double() @ a.double()).float()
            tensors[f"{module}.frozen"] = linear.base_layer.weight.data.clone()
        save_file(tensors, root / f"{name}.safetensors", {"base": base})


def start(base: Path, **lora):
    """The base, f32, with an initialized adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **lora))


def loftq_on_cpu() -> None:
    """Makes PEFT's LoftQ, which requires a GPU, run on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init)
    source, n = re.subn("compute_device = .*", 'compute_device = "cpu"', source)
    assert n == 1
    exec(source, loftq_utils.__dict__)
    layer.loftq_init = loftq_utils.loftq_init


loftq_on_cpu()
