"""AdamW with moments in 8 bits: bitsandbytes' `AdamW8bit`, and its code maps.

The optimizer, its dequantization and its update are bitsandbytes' own, on the CPU. Its quantization
is replaced by that of its CUDA kernel (`kOptimizerStatic8bit2StateBlockwise`), because this kernel
is what `adamw_8bit` means elsewhere: the nearest code, the even one of two equally near codes, and
never zero for a negative first moment.

bitsandbytes' quantization on the CPU first rounds `value / absmax` to a grid of 65536 numbers from
-1 to 1, and then takes the nearest code. Small codes therefore do not occur, and a moment of zero
becomes 2e-5 of the maximum of its block, so that parameters without a gradient drift.
`assert_only_the_grid_differs` checks that this is the only difference. The kernel also decays
weights after the update and divides approximately, which these values do not reproduce.
"""

import json
from pathlib import Path
from unittest import mock

import bitsandbytes.backends.cpu.ops as cpu
import bitsandbytes.functional as bnb
import torch
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import save_file

# The last block of the first tensor is not full. Moments of tensors with fewer than 4096 elements
# are f32.
SHAPES = [(4396,), (300,), (16, 256)]
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
RATES = [1e-2, 5e-3, 1e-2, 3e-4]


def make_all(root: Path) -> None:
    with mock.patch.object(cpu, "_quant_blockwise_fp32_direct", quantize):
        make(root / "adamw_8bit.safetensors")


def make(path: Path) -> None:
    generator = torch.Generator().manual_seed(400)
    # bf16 values keep the file small.
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16().float()) for shape in SHAPES
    ]
    optimizer = AdamW8bit(parameters, **SETTINGS)
    maps = {"signed": bnb.create_dynamic_map(signed=True), "unsigned": bnb.create_dynamic_map(signed=False)}
    tensors = {**maps, "initial": flat(parameters).bfloat16()}
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        for parameter in parameters:
            parameter.grad = gradient(parameter.numel(), step, generator).reshape(parameter.shape)
        tensors[f"{step}.gradient"] = flat([p.grad for p in parameters]).bfloat16()
        optimizer.step()
        tensors[f"{step}.params"] = flat(parameters)
        states = [optimizer.state[parameter] for parameter in parameters]
        for name, key in [("exp_avg", "1"), ("exp_avg_sq", "2")]:
            eight_bit = [state for state in states if "absmax1" in state]
            full = [state for state in states if "absmax1" not in state]
            tensors[f"{step}.{name}"] = flat([state[f"state{key}"] for state in full])
            tensors[f"{step}.{name}_codes"] = flat([state[f"state{key}"] for state in eight_bit])
            tensors[f"{step}.{name}_absmax"] = flat([state[f"absmax{key}"] for state in eight_bit])
    metadata = {"settings": json.dumps({**SETTINGS, "lr": RATES, "sizes": [p.numel() for p in parameters]})}
    save_file(tensors, path, metadata)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()


def gradient(n: int, step: int, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers. Tensors with more than 8 blocks of 256 also have extreme blocks."""
    x = torch.randn(n, generator=generator) * 0.02
    blocks = x[: n // 256 * 256].reshape(-1, 256)
    if len(blocks) > 8:
        blocks[1] = 0.0
        blocks[2, ::2] = 0.0
        # Values over twelve orders of magnitude in one block use every code.
        blocks[3] = blocks[3].sign() * 10.0 ** torch.empty(256).uniform_(-9, 3, generator=generator)
        # The squares of these values are 0 in f32.
        blocks[4] *= 1e-25
        blocks[5] *= 1e15
        blocks[6] *= step == 0
        blocks[7] *= step > 0
    return x.bfloat16().float()


def quantize(
    values: torch.Tensor, code: torch.Tensor, absmax_out: torch.Tensor, out: torch.Tensor, blocksize: int
) -> None:
    padding = (0, -values.numel() % blocksize)
    blocks = torch.nn.functional.pad(values.flatten(), padding).reshape(-1, blocksize)
    absmax = blocks.abs().amax(1, keepdim=True)
    x = blocks / absmax
    codes = nearest(x, code)
    if code[0] < 0:
        codes -= ((x < 0) & (code[codes] == 0)).long()
    # A block of zeros has only the first code, as on the CPU.
    codes[absmax.flatten() == 0] = 0
    out.copy_(codes.flatten()[: values.numel()].reshape(out.shape))
    absmax_out.copy_(absmax.flatten())
    assert_only_the_grid_differs(blocks, absmax, code, blocksize)


def nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    bounds = (code[1:] + code[:-1]) * 0.5
    low, high = torch.bucketize(x, bounds), torch.bucketize(x, bounds, right=True)
    return torch.where(low % 2 == 0, low, high)


def assert_only_the_grid_differs(
    blocks: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> None:
    codes, native_absmax = torch.ops.bitsandbytes.quantize_blockwise(blocks.flatten(), code, blocksize)
    assert torch.equal(native_absmax, absmax.flatten())
    grid = torch.floor((blocks * (1 / absmax) + 1) * 32767.5 + 0.5) * (2 / 65535) - 1
    nonzero = absmax.flatten() > 0
    assert torch.equal(codes.reshape(blocks.shape)[nonzero].long(), nearest(grid, code)[nonzero])


if __name__ == "__main__":
    make_all(Path(__file__).resolve().parent.parent / "golden")
