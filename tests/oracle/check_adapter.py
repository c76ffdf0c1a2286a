"""Checks that an exported adapter loads in PEFT and gives the logits it was exported with.

    python tests/oracle/check_adapter.py BASE_DIR ADAPTER_DIR LOGITS.safetensors

LOGITS.safetensors has `tokens` [B, T] (i64 or u32, no padding) and `logits` [B, T, V]. The program
prints the relative error max|logits - PEFT's| / max|PEFT's|, where PEFT computes in f32. The exit
code is 1 if the error is above 1e-5 or NaN, or if PEFT does not use exactly the tensors of the
file.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LIMIT = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare an adapter's logits with PEFT's.")
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("logits", type=Path)
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    found = error(args.base, args.adapter, args.logits)
    good = found <= LIMIT
    print(f"relative error {found:.3e} ({'within' if good else 'above'} {LIMIT:.0e})")
    return 0 if good else 1


def error(base: Path, adapter: Path, logits: Path) -> float:
    """The relative error of the logits in a file; exits if PEFT does not use all tensors."""
    file = load_file(logits)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    # PEFT only warns about a missing tensor, and ignores an unknown one.
    used = {name.replace(".default.", ".") for name, _ in model.named_parameters() if "lora_" in name}
    stored = set(load_file(adapter / "adapter_model.safetensors"))
    if used != stored:
        missing, unused = sorted(used - stored), sorted(stored - used)
        sys.exit(f"invalid tensors: missing in the file: {missing}, not used by PEFT: {unused}")
    with torch.no_grad():
        expected = model(input_ids=file["tokens"].long()).logits
    if file["logits"].shape != expected.shape:
        shapes = f"{tuple(file['logits'].shape)}; PEFT's shape is {tuple(expected.shape)}"
        sys.exit(f"invalid logits: shape {shapes}")
    return float((file["logits"].double() - expected.double()).abs().max() / expected.double().abs().max())


if __name__ == "__main__":
    sys.exit(main())
