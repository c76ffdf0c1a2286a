"""AdamW and clipping by torch, and learning-rate schedules by Transformers."""

import json
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler

SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup"]
WARMUP_AND_TOTAL = [(0, 10), (2, 10), (3, 7), (1, 1), (5, 5), (10, 100), (0, 1)]
# In the last but one case 100 * 0.07 is 7.000000000000001, which Transformers rounds up to 8.
WARMUP_SETTINGS = [(0, 50), (0.03, 100), (0.03, 101), (0.1, 7), (0.5, 1), (0.07, 100), (4, 100)]


def make_all(root: Path) -> None:
    schedules = [schedule(name, warmup, total) for name in SCHEDULES for warmup, total in WARMUP_AND_TOTAL]
    warmups = [warmup(setting, total) for setting, total in WARMUP_SETTINGS]
    write(root / "schedules.json", {"schedules": schedules, "warmups": warmups})
    write(root / "adamw.json", [adamw(1e-2, 0.0), adamw(1e-2, 0.1), adamw(3e-4, 0.1)])
    write(root / "clip.json", [clip(scale) for scale in [0.01, 0.2, 1.0, 37.0, 1e-6, 0.0]])


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value) + "\n")


def schedule(name: str, warmup: int, total: int) -> dict:
    """`multipliers[k]` scales the learning rate of step k, counted from 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    multipliers = []
    for _ in range(total):
        multipliers.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return {"lr_scheduler_type": name, "warmup_steps": warmup, "max_steps": total, "multipliers": multipliers}


def warmup(setting: float, total: int) -> dict:
    """The number of warm-up steps for `warmup_steps`, a fraction of all steps if below 1."""
    steps = TrainingArguments(warmup_steps=setting).get_warmup_steps(total)
    return {"warmup_steps": setting, "max_steps": total, "resolved": steps}


def adamw(lr: float, weight_decay: float) -> dict:
    """12 steps of 17 f32 values; gradients have very different sizes, and one is always 0."""
    generator = torch.Generator().manual_seed(7)
    parameter = torch.nn.Parameter(torch.randn(17, generator=generator))
    scale = 10.0 ** torch.linspace(-9, 3, 17)
    scale[5] = 0.0
    settings = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([parameter], foreach=False, **settings)
    case = {**settings, "initial": parameter.tolist(), "steps": []}
    for _ in range(12):
        parameter.grad = torch.randn(17, generator=generator) * scale
        optimizer.step()
        state = optimizer.state[parameter]
        case["steps"].append(
            {
                "grad": parameter.grad.tolist(),
                "param": parameter.tolist(),
                "exp_avg": state["exp_avg"].tolist(),
                "exp_avg_sq": state["exp_avg_sq"].tolist(),
            }
        )
    return case


def clip(scale: float) -> dict:
    """Clips two gradients by their common norm, which is `max_norm`, exactly 5, at `scale` 1."""
    grads = [torch.tensor([3.0, 0.0, 0.0]) * scale, torch.tensor([[0.0, -4.0], [0.0, 0.0]]) * scale]
    if scale not in (0.0, 1.0):
        generator = torch.Generator().manual_seed(8)
        grads = [torch.randn(shape, generator=generator) * scale * 2 for shape in [(3,), (2, 2)]]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 5.0, foreach=False)
    return {
        "max_norm": 5.0,
        "grads": [grad.flatten().tolist() for grad in grads],
        "norm": norm.item(),
        "clipped": [p.grad.flatten().tolist() for p in parameters],
    }
