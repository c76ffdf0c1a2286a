"""PEFT's side of the training-step benchmark: prints a line of JSON for each case.

The model has the shape of a published model and random weights. A step has LoRA r = 16 on every
linear layer except the head, every position labelled, one micro-batch, and clipping and fused AdamW
as in the Trainer. The base has the given data type. The LoRA weights are f32, which is PEFT's
default. With --quantization the linear layers of the blocks are those of bitsandbytes. On a GPU the
forward pass over a bf16 base runs under autocast, as in the Trainer with `bf16=True`.

With --cases several shapes of a micro-batch are measured over one base. If a case fails, its line
has an `error`, and the next case runs. The exit status is 1 if all cases fail.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

MODELS = Path(__file__).with_name("models")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
QUANTIZATIONS = ["none", "nf4", "nf4-double", "int8"]
ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2"}
SDPA = {
    "any": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# The number of steps under torch.profiler.
PROFILED_STEPS = 2


def main() -> None:
    args = arguments()
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

    def step(rows: int, positions: int) -> tuple[float, torch.Tensor]:
        """Makes one step and returns its time in seconds and its loss."""
        tokens = torch.randint(0, model.config.vocab_size, (rows, positions))
        started = time.perf_counter()
        loss = train_step(model, parameters, optimizer, autocast, tokens.to(device))
        wait(device)
        return time.perf_counter() - started, loss

    measured, error = None, ""
    for sdpa in args.sdpa:
        for rows, positions in args.cases:
            case = {
                "engine": "peft",
                "attention": args.attention,
                "sdpa": sdpa,
                "model": args.model,
                "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
                "dtype": args.dtype,
                "quantization": args.quantization,
                "sequence": positions,
                "micro_batch": rows,
                "activation_checkpointing": args.activation_checkpointing,
                "threads": args.threads,
                "trainable_parameters": sum(p.numel() for p in parameters),
                "load_seconds": load_seconds,
                "versions": versions(),
            }
            with kernels(sdpa):
                try:
                    case |= measure(args, device, lambda: step(rows, positions))
                    case["tokens_per_s"] = rows * positions / statistics.median(case["step_seconds"])
                    measured = measured or (sdpa, rows, positions)
                except RuntimeError as raised:
                    # Out of memory, or a kernel that does not support this shape.
                    optimizer.zero_grad()
                    case["error"] = error = " ".join(str(raised).split())[:300]
            print(json.dumps(case), flush=True)
    if args.profile and measured:
        sdpa, rows, positions = measured
        with kernels(sdpa):
            profile(lambda: step(rows, positions), args.profile, on_gpu)
    if not measured:
        sys.exit(error)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the time of training steps with PEFT + Transformers.",
        epilog="example: peft_step.py --model llama-3.2-1b --device cuda:0 --dtype bf16 --sequence 2048",
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="name of a file in models/ without .json, or path of a config.json",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="data type of the base")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="none",
        help="quantization of the blocks' linear layers",
    )
    parser.add_argument("--sequence", type=int, default=256, help="positions per row")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows per micro-batch")
    parser.add_argument(
        "--cases",
        type=cases,
        help="micro-batches to measure over one base, as ROWSxPOSITIONS,...; replaces --sequence and "
        "--micro-batch",
    )
    parser.add_argument("--activation-checkpointing", choices=["none", "block"], default="none")
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        default="sdpa",
        help="attention of Transformers; flash requires the package flash-attn",
    )
    parser.add_argument(
        "--sdpa",
        type=sdpa_names,
        default=["any"],
        help=f"kernels that torch's SDPA must use, one after the other, comma-separated: {', '.join(SDPA)}",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured steps before the measured steps")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument(
        "--profile",
        type=Path,
        help=f"file for the torch.profiler table of {PROFILED_STEPS} steps of the first case that succeeds",
    )
    args = parser.parse_args()
    args.cases = args.cases or [(args.micro_batch, args.sequence)]
    return args


def cases(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(map(int, case.split("x"))) for case in text.split(",")]
        if all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
            return pairs
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"invalid cases {text}: must be ROWSxPOSITIONS, such as 1x2048,8x512")


def sdpa_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SDPA]:
        raise argparse.ArgumentTypeError(f"invalid kernel {unknown[0]}: must be one of {', '.join(SDPA)}")
    return names


def build(args: argparse.Namespace, device: torch.device) -> peft.PeftModel:
    """Returns the model with its adapters, created on the device that trains it."""
    path = MODELS / f"{args.model}.json"
    fields = json.loads((path if path.exists() else Path(args.model)).read_text())
    config = AutoConfig.for_model(**fields)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[args.dtype], attn_implementation=ATTENTION[args.attention]
        )
    if args.quantization != "none":
        quantize(model, args.quantization, DTYPES[args.dtype], device)
    with device:
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        )
        model = get_peft_model(model, lora)
    if args.activation_checkpointing == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def quantize(model, quantization: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the blocks' linear layers with bitsandbytes layers that have Transformers' settings."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    linear = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear and layer is not head
    ]
    for name, layer in linear:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        # The initial weight of the new layer is never used. On the device meta it needs no memory.
        if quantization == "int8":
            quantized = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            # Only a move from the CPU to the device quantizes to int8.
            quantized.weight = bnb.nn.Int8Params(
                layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
            )
        else:
            double = quantization == "nf4-double"
            quantized = bnb.nn.Linear4bit(
                *sizes, compute_dtype=dtype, compress_statistics=double, quant_type="nf4", device="meta"
            )
            quantized.weight = bnb.nn.Params4bit(
                layer.weight.data,
                requires_grad=False,
                compress_statistics=double,
                quant_type="nf4",
                module=quantized,
            )
        quantized.bias = layer.bias
        # The move to the device quantizes the weight.
        quantized.weight = quantized.weight.to(device)
        model.set_submodule(name, quantized.requires_grad_(False))
    # PEFT chooses the types of its layers by these attributes.
    setattr(model, "is_loaded_in_8bit" if quantization == "int8" else "is_loaded_in_4bit", True)


def kernels(sdpa: str):
    """Returns the context in which torch's SDPA uses only this kernel."""
    return sdpa_kernel(SDPA[sdpa]) if SDPA[sdpa] else contextlib.nullcontext()


def measure(args: argparse.Namespace, device: torch.device, step) -> dict:
    """Measures a case."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    steps = [step() for _ in range(args.warmup + args.steps)]
    seconds = [seconds for seconds, _ in steps[args.warmup :]]
    _, loss = steps[-1]
    measured = {
        "step_seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss(),
        "loss": loss.item(),
    }
    if on_gpu:
        measured["peak_reserved_memory_bytes"] = torch.cuda.max_memory_reserved(device)
    return measured


def profile(step, path: Path, on_gpu: bool) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    path.write_text(
        profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60) + "\n"
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
    """Returns the peak resident set size of the process, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


if __name__ == "__main__":
    main()
