"""Adapters that start from the base's weights, as PEFT's `init_lora_weights` makes them, and the weights that are left frozen.

Singular vectors have no sign of their own, so the products `s B A` are what is stored.
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
    # PEFT takes the scaling of a LoftQ adapter for 1, whatever it is.
    "loftq": ("qwen2", {"init_lora_weights": "loftq", "lora_alpha": 4, "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
    "loftq-iter-5": ("qwen2", {"init_lora_weights": "loftq", "lora_alpha": 4, "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}),
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
    """The base with an adapter before its first step, f32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **lora))


def loftq_on_cpu() -> None:
    """PEFT's LoftQ asks for a GPU; the same code computes on the CPU."""
    source, n = re.subn("compute_device = .*", 'compute_device = "cpu"', inspect.getsource(loftq_utils.loftq_init))
    assert n == 1
    exec(source, loftq_utils.__dict__)
    layer.loftq_init = loftq_utils.loftq_init


loftq_on_cpu()
