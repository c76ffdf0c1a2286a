"""Prints the comparison of our training step with PEFT's from lines of JSON.

It prints the medians of tokens/s over the rounds, the largest peak of memory, and our number divided
by the better one of PEFT's. PEFT's utilization is computed with our count of the model's operations.
"""

import json
import statistics
import sys
from collections import defaultdict

SIDES = {"loractl": "ours", "peft sdpa": "PEFT sdpa", "peft flash": "PEFT flash"}


def main(path: str) -> None:
    cases, failed, versions, device = defaultdict(lambda: defaultdict(list)), [], None, None
    with open(path) as lines:
        for run in map(json.loads, lines):
            side = " ".join(filter(None, (run["engine"], run.get("attention"))))
            if "error" in run:
                label = f"{run['model']}, {run['dtype']}, {run['quantization']}, {run['sequence']} tokens"
                failed.append(f"{SIDES[side]}, {label}: {run['error']}")
                continue
            case = (
                run["model"],
                run["dtype"],
                run["quantization"],
                run["micro_batch"],
                run["sequence"],
                run["activation_checkpointing"],
            )
            cases[case][side].append(run)
            versions = run.get("versions", versions)
            device = run["device"] if side == "loractl" else device

    print(f"{'':<36}{'':<12}" + "".join(f"{name:>12}" for name in SIDES.values()) + f"{'ratio':>8}")
    for (model, dtype, quantization, rows, sequence, checkpointing), sides in cases.items():
        ours = sides["loractl"][0] if sides["loractl"] else {}
        tokens = {
            side: statistics.median(run["tokens_per_s"] for run in runs)
            for side, runs in sides.items()
            if runs
        }
        peaks = {side: [run["peak_memory_bytes"] for run in runs] for side, runs in sides.items() if runs}
        base = dtype if quantization == "none" else f"{quantization} {dtype}"
        name = f"{model} {base} {rows}x{sequence}" + (" recomputed" if checkpointing == "block" else "")
        row(name, "tokens/s", tokens, 1, max)
        if ours.get("peak_tflops"):
            percent = 100 * ours["flops_per_token"] / (ours["peak_tflops"] * 1e12)
            row("", "MFU, %", {side: value * percent for side, value in tokens.items()}, 1, max)
        row("", "peak, GB", {side: max(v) / 1e9 for side, v in peaks.items()}, 2, min)
    print(f"ours: {device or 'no result'}")
    print(f"PEFT: {versions or 'no result'}")
    for line in failed:
        print(f"failed: {line}")


def row(name: str, what: str, values: dict[str, float], digits: int, best) -> None:
    """Prints one measure of a case. `best` chooses the better one of PEFT's numbers."""
    cells = [f"{values[side]:.{digits}f}" if side in values else "-" for side in SIDES]
    theirs = [value for side, value in values.items() if side != "loractl"]
    ratio = f"{values['loractl'] / best(theirs):.2f}" if theirs and "loractl" in values else "-"
    if values:
        print(f"{name:<36}{what:<12}" + "".join(f"{cell:>12}" for cell in cells) + f"{ratio:>8}")


if __name__ == "__main__":
    main(sys.argv[1])
