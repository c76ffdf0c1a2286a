"""PEFT's side of the training-step benchmark: prints one line of JSON.

A published model's shape with random weights, LoRA r = 16 on every linear layer but the head, every position labelled, one
micro-batch a step, clipping and fused AdamW as the Trainer does them. The base has the given type; the LoRA weights are f32,
PEFT's default. With --quantization the blocks' linear layers are bitsandbytes'. On a GPU the forward pass over a bf16 base runs under autocast, as the Trainer's does with `bf16=True`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

MODELS = Path(__file__).with_name("models")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
QUANTIZATIONS = {
    "none": None,
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps of PEFT + Transformers.")
    parser.add_argument("--model", default="smollm2-135m", help="a file in models/ without .json, or the path of a config.json")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="type of the base")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="of the blocks' linear layers")
    parser.add_argument("--sequence", type=int, default=256, help="positions of a row")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--activation-checkpointing", choices=["none", "block"], default="none")
    parser.add_argument("--attention", choices=ATTENTION, default="sdpa", help="flash: of the package flash-attn")
    parser.add_argument("--threads", type=int, default=2, help="threads of the host")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    args = parser.parse_args()

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    model = build(args, device)
    wait(device)
    load_seconds = time.perf_counter() - started
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=on_gpu)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu and args.dtype == "bf16")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    seconds = []
    for _ in range(args.warmup + args.steps):
        tokens = torch.randint(0, model.config.vocab_size, (args.micro_batch, args.sequence))
        started = time.perf_counter()
        loss = train_step(model, parameters, optimizer, autocast, tokens.to(device))
        wait(device)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[args.warmup :]

    result = {
        "engine": "peft",
        "attention": args.attention,
        "model": args.model,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "dtype": args.dtype,
        "quantization": args.quantization,
        "sequence": args.sequence,
        "micro_batch": args.micro_batch,
        "activation_checkpointing": args.activation_checkpointing,
        "threads": args.threads,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "tokens_per_s": args.micro_batch * args.sequence / statistics.median(seconds),
        "step_seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss(),
        "load_seconds": load_seconds,
        "loss": loss.item(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    print(json.dumps(result))


def build(args: argparse.Namespace, device: torch.device) -> peft.PeftModel:
    """The model with its adapters, made where it is trained."""
    path = MODELS / f"{args.model}.json"
    fields = json.loads((path if path.exists() else Path(args.model)).read_text())
    config = AutoConfig.for_model(**fields)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[args.dtype], attn_implementation=ATTENTION[args.attention]
        )
        if QUANTIZATIONS[args.quantization]:
            model = quantized(model, args, device)
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        model = get_peft_model(model, lora)
    if args.activation_checkpointing == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def quantized(model, args: argparse.Namespace, device: torch.device):
    """The model as Transformers and bitsandbytes load it; a model is quantized while it is read."""
    dtype = DTYPES[args.dtype]
    settings = dict(QUANTIZATIONS[args.quantization])
    if "load_in_4bit" in settings:
        settings["bnb_4bit_compute_dtype"] = dtype
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        del model
        return AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=ATTENTION[args.attention],
            quantization_config=BitsAndBytesConfig(**settings),
        )


def train_step(model, parameters, optimizer, autocast, tokens: torch.Tensor) -> torch.Tensor:
    with autocast:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_rss() -> int:
    """The most physical memory that the process ever held, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
