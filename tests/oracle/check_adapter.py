"""Proves that an adapter loads in PEFT and gives the logits it was exported with.

    python tests/oracle/check_adapter.py BASE_DIR ADAPTER_DIR LOGITS.safetensors

LOGITS.safetensors holds `tokens` [B, T] (i64 or u32, no padding) and `logits` [B, T, V]. Prints the relative error
max|logits - PEFT's| / max|PEFT's|, computed in f32; exits with 1 when it is past 1e-5 or not a number, and when PEFT does
not take exactly the tensors of the file.
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
    file = load_file(args.logits)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    # PEFT itself only warns of a missing tensor, and drops one it does not know.
    taken = {name.replace(".default.", ".") for name, _ in model.named_parameters() if "lora_" in name}
    stored = set(load_file(args.adapter / "adapter_model.safetensors"))
    if taken != stored:
        print(f"tensors that PEFT lacks: {sorted(taken - stored)}, that it does not take: {sorted(stored - taken)}")
        return 1
    with torch.no_grad():
        expected = model(input_ids=file["tokens"].long()).logits
    if file["logits"].shape != expected.shape:
        print(f"logits have shape {tuple(file['logits'].shape)}, PEFT's {tuple(expected.shape)}")
        return 1
    error = float((file["logits"].double() - expected.double()).abs().max() / expected.double().abs().max())
    good = error <= LIMIT
    print(f"relative error {error:.3e} ({'within' if good else 'past'} {LIMIT:.0e})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
