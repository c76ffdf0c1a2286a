"""PEFT's side of the training-step benchmark: prints one line of JSON.

SmolLM2-135M's published shape with random weights, LoRA r = 16 on every linear layer but the head, every position labelled,
one micro-batch a step, clipping and AdamW as the Trainer does them. The base has the given type; the LoRA weights are f32,
PEFT's default.
"""

import argparse
import json
import os
import platform
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)  # fmt: skip
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps of PEFT + Transformers on the CPU.")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="type of the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rss_after_imports = memory("VmRSS")
    model = AutoModelForCausalLM.from_config(SHAPE, dtype=DTYPES[args.dtype])
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)

    seconds = []
    for _ in range(args.warmup + args.steps):
        tokens = torch.randint(0, SHAPE.vocab_size, (args.micro_batch, args.sequence))
        start = time.perf_counter()
        loss = train_step(model, parameters, optimizer, tokens)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[args.warmup :]

    result = {
        "engine": "peft",
        "dtype": args.dtype,
        "threads": args.threads,
        "sequence": args.sequence,
        "micro_batch": args.micro_batch,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "tokens_per_s": args.micro_batch * args.sequence / statistics.median(seconds),
        "step_seconds": seconds,
        "peak_rss_bytes": memory("VmHWM"),
        "rss_after_imports_bytes": rss_after_imports,
        "loss": loss,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    print(json.dumps(result))


def train_step(model, parameters, optimizer, tokens: torch.Tensor) -> float:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is what the process holds now, VmHWM the most it ever held."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
