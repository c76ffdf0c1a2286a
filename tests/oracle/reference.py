"""Transformers + PEFT in a chosen precision: logits, the sum of token losses, gradients.

In f64 the RMS norms, which Transformers always computes in f32, are computed in f64 too. The rotary
angles are Transformers' f32 angles (`inv_freq` in f32 times the position, cosine and sine in f32),
because these define the model.
"""

import types
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.cohere2 import modeling_cohere2

import quant
from batches import IGNORE


def load(base: Path, adapter: Path, dtype: torch.dtype, **quantized) -> PeftModel:
    """The base with its adapter, ready to train.

    The adapter is f64 for `torch.float64` and otherwise f32 (PEFT's default). A base that is
    quantized, or that `quantization_config` quantizes, gets dense layers with the dequantized
    values.
    """
    load_as = torch.float32 if dtype == torch.float64 else dtype
    model = dequantized(AutoModelForCausalLM.from_pretrained(base, dtype=load_as, **quantized)).to(load_as)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return (in_f64(model) if dtype == torch.float64 else model).train()


def in_f64(model):
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(rms_norm_f64, module)
        elif type(module).__name__ == "Cohere2LayerNorm":
            module.forward = types.MethodType(layer_norm_f64, module)
        elif type(module).__name__ == "Cohere2Attention":
            # Rotates in f32.
            modeling_cohere2.apply_rotary_pos_emb = rotate_f64
    return model


def dequantized(model):
    """Replaces quantized layers by dense f32 layers with the dequantized weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            weight = bnb.functional.dequantize_4bit(module.weight.data, state)
            absmax = state.absmax
            if state.nested:
                absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
            packed, shape = module.weight.data, state.shape
            expected = quant.definition(packed, absmax, state.quant_type, state.blocksize, shape)
            assert torch.equal(weight, expected), name
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float().mul_(module.weight.SCB.unsqueeze(1).mul(1.0 / 127.0))
        else:
            continue
        dense = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        dense.weight.data = weight
        if module.bias is not None:
            dense.bias.data = module.bias.data
        model.set_submodule(name, dense)
    quantized = ["is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"]
    quantized += ["hf_quantizer", "quantization_method"]
    for attribute in quantized:
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model


def rms_norm_f64(self, x: torch.Tensor) -> torch.Tensor:
    name = type(self).__name__
    eps = self.eps if name.startswith("Gemma") else self.variance_epsilon
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if not getattr(self, "with_scale", True):
        return normed
    return normed * (1.0 + self.weight if name in ("Gemma2RMSNorm", "Gemma3RMSNorm") else self.weight)


def layer_norm_f64(self, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)


def rotate_f64(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = modeling_cohere2.rotate_half
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(labels[t + 1] | tokens[..=t]) over labelled positions, in f32 or f64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def labelled_tokens(labels: torch.Tensor) -> int:
    return int((labels[..., 1:] != IGNORE).sum())


def lora_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trained parameters under their names in `adapter_model.safetensors`."""
    return {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}


def evaluate(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`logits`, `base_logits`, `loss_sum`, and `grad.<name>` of the mean token loss.

    The values have the model's precision.
    """
    tokens, mask, labels = batch["tokens"], batch["attention_mask"], batch["labels"]
    logits = model(input_ids=tokens, attention_mask=mask).logits
    loss = loss_sum(logits, labels)
    (loss / labelled_tokens(labels)).backward()
    with torch.no_grad(), model.disable_adapter():
        base_logits = model(input_ids=tokens, attention_mask=mask).logits
    valid = mask.bool()[..., None]
    values = {
        "logits": (logits * valid).detach(),
        "base_logits": base_logits * valid,
        "loss_sum": loss.detach().reshape(1),
    }
    return values | {f"grad.{name}": p.grad for name, p in lora_parameters(model).items()}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b|, where `b` is the reference."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())
