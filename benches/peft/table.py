"""Prints the comparison: medians of tokens/s over the rounds, the largest peak of memory, and ours divided by PEFT's."""

import json
import statistics
import sys
from collections import defaultdict


def main(path: str) -> None:
    runs = defaultdict(list)
    with open(path) as lines:
        for line in lines:
            side, dtype, result = line.split(" ", 2)
            runs[dtype, side].append(json.loads(result))

    print(f"{'base':<6}{'':<16}{'ours':>10}{'PEFT':>10}{'ratio':>8}")
    for dtype in dict.fromkeys(dtype for dtype, _ in runs):
        ours, peft = runs[dtype, "ours"], runs[dtype, "peft"]
        row(dtype, "tokens/s", *(statistics.median(run["tokens_per_s"] for run in side) for side in (ours, peft)), 1)
        row(dtype, "peak RSS, GB", *(max(run["peak_rss_bytes"] for run in side) / 1e9 for side in (ours, peft)), 2)
    print(f"PEFT's side: {runs[dtype, 'peft'][0]['versions']}")


def row(dtype: str, what: str, ours: float, peft: float, digits: int) -> None:
    print(f"{dtype:<6}{what:<16}{ours:>10.{digits}f}{peft:>10.{digits}f}{ours / peft:>8.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
