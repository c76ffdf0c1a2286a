"""The modules that PEFT adapts for forms of `target_modules`, and its `adapter_config.json`."""

import json
import tempfile
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import adapters

FORMS = [
    "all-linear",
    ["q_proj", "v_proj"],
    ["self_attn.o_proj", "layers.1.mlp.up_proj"],
    ["gate_proj", "lm_head"],
    ["model.layers.0.self_attn.k_proj"],
    ["proj"],
    r".*\.(q|v)_proj",
    r"model\.layers\.0\.mlp\..*_proj",
    r"layers\.0\.mlp\..*_proj",
    "q_proj",
]


def make_all(models: Path, root: Path) -> None:
    cases = [case(models / name, form) for name in ["llama-gqa", "llama-linear-rope"] for form in FORMS]
    (root / "targets.json").write_text(json.dumps(cases, indent=1) + "\n")


def case(base: Path, form: str | list[str]) -> dict:
    """One case. `resolved` is null if PEFT finds no module.

    A name matches whole components at the end of a path, and an expression matches the whole path.
    """
    result = {"model": base.name, "target_modules": form, "resolved": None}
    model = AutoModelForCausalLM.from_pretrained(base)
    try:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=form))
    except ValueError as error:
        assert "not found in the base model" in str(error), error
        return result
    with tempfile.TemporaryDirectory() as directory:
        adapters.save(model, Path(directory), base.name)
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
    return result | {"resolved": model.targeted_module_names, "written": config["target_modules"]}
