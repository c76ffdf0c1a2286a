"""Weights quantized by bitsandbytes on the CPU: checkpoint tensors, dequantized values."""

import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

GENERATOR = torch.Generator()


def make_all(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    GENERATOR.manual_seed(300)
    odd = random(7, 33)
    # 301 blocks, the last with three elements, and two blocks of scales.
    long = random(37, 519)
    four_bit(root / "nf4-odd", odd, nested=False)
    four_bit(root / "nf4-odd-nested", odd, nested=True)
    four_bit(root / "nf4-long-nested", long.bfloat16(), nested=True)
    four_bit(root / "nf4-f16-nested", random(9, 64).half(), nested=True)
    four_bit(root / "nf4-extreme", extreme(), nested=False)
    four_bit(root / "nf4-extreme-nested", extreme(), nested=True)
    four_bit(root / "nf4-zero-nested", torch.zeros(3, 50), nested=True)
    four_bit(root / "nf4-block-128", random(5, 100), nested=True, blocksize=128)
    four_bit(root / "nf4-block-4096", random(5, 1000), nested=False, blocksize=4096)
    four_bit(root / "fp4", odd, nested=False, kind="fp4")
    four_bit(root / "fp4-nested", long.bfloat16(), nested=True, kind="fp4")
    rows = [random(6, 33), torch.zeros(1, 33), 1e-3 * random(2, 33), 1e4 * random(1, 33)]
    int8(root / "int8", torch.cat(rows))
    int8(root / "int8-bf16", random(4, 64).bfloat16())
    save_file({"signed": bnb.create_dynamic_map(signed=True)}, root / "dynamic_map.safetensors")


def random(rows: int, cols: int) -> torch.Tensor:
    """Normal numbers with a scale for each row, so that the blocks' maxima differ."""
    x = torch.randn(rows, cols, generator=GENERATOR)
    return x * (0.2 + torch.rand(rows, 1, generator=GENERATOR))


def extreme() -> torch.Tensor:
    """Blocks of zeros, one number, huge numbers, subnormals, bounds between codes, and ±0.7."""
    code = bnb.get_4bit_type("nf4", device="cpu")
    x = torch.zeros(7, 64)
    x[1, 5] = -3.0
    x[2] = 1e30 * random(1, 64)
    x[3] = 1e-41 * random(1, 64)
    x[4, :15], x[4, 15] = (code[:-1] + code[1:]) / 2, 1.0
    x[5, ::2], x[5, 1::2] = 0.7, -0.7
    # The last block is partial and contains zeros.
    return x.reshape(-1)[: 6 * 64 + 20].reshape(4, -1)


def four_bit(path: Path, x: torch.Tensor, nested: bool, kind: str = "nf4", blocksize: int = 64) -> None:
    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    # A layer with f32 activations does not round the values to the weight's type.
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    dequantized = dequantize(packed, absmax, blocksize, kind, x.shape, torch.float32)
    assert torch.equal(dequantized, definition(packed, absmax, kind, blocksize, x.shape))
    tensors = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    tensors = {"input": x, "weight": packed, "dequantized": dequantized.contiguous(), **tensors}
    save_file(tensors, path.with_suffix(".safetensors"))


def definition(packed, absmax, kind: str, blocksize: int, shape) -> torch.Tensor:
    """Dequantizes to f32 by the definition of the format, to check bitsandbytes' kernels."""
    elements = shape[0] * shape[1]
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[:elements].long()
    values = bnb.get_4bit_type(kind, device="cpu")[codes]
    return (values * absmax.repeat_interleave(blocksize)[:elements]).reshape(shape)


def int8(path: Path, x: torch.Tensor) -> None:
    codes, scales, _ = bnb.int8_vectorwise_quant(x.half())
    dequantized = codes.float().mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    weight_format = torch.tensor(0, dtype=torch.uint8)
    tensors = {"input": x, "weight": codes, "SCB": scales, "weight_format": weight_format}
    save_file({"dequantized": dequantized, **tensors}, path.with_suffix(".safetensors"))


if __name__ == "__main__":
    make_all(Path(__file__).resolve().parent.parent / "golden" / "quant")
