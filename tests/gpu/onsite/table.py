"""The table at the end of a run: failures and measurements, the most important first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benches/gpu"))

from run_data import QUANTIZATIONS, Case, Run  # noqa: E402

WIDTH = 150
PROFILE_LINES = 8


def lines(result: dict) -> list[str]:
    run = Run.from_result(result)
    sections = (outcomes(run), wrong(run), steps(run), jobs(run), tools(run), profile(run), bench(run))
    header = f"{run.date}  {run.card}, driver {run.driver}, commit {run.commit[:12]}{run.source()}"
    return [line[:WIDTH] for section in ([header], *sections) for line in section]


def outcomes(run: Run) -> list[str]:
    return [
        f"{name:<10}{phase['status']:<9}{phase['seconds']:>7.1f} s  {phase['reason']}".rstrip()
        for name, phase in run.phases.items()
    ]


def wrong(run: Run) -> list[str]:
    checks = run.values("ops").get("checks", {})
    bad = [f"WRONG  {name}: {check['detail']}" for name, check in checks.items() if check["status"] != "ok"]
    return [*([f"operations: {len(checks) - len(bad)} ok, {len(bad)} WRONG"] if checks else []), *bad]


def steps(run: Run) -> list[str]:
    cases = run.cases()
    if not cases:
        return []
    ours = f"{'tokens/s':>10}{'MFU':>7}{'GB':>7}{'held GB':>9}"
    heads = f"{'training steps':<34}{ours}{'PEFT':>10}{'GB':>7}{'ratio':>7}"
    return [heads, *(step(key, case) for key, case in cases.items())]


def step(key: tuple[str, str, int, int], case: Case) -> str:
    model, quantization, rows, positions = key
    name = f"{model} {QUANTIZATIONS.get(quantization, quantization)[:5]} {rows}x{positions}"
    ours = case.ours[-1] if case.ours else {}
    theirs = case.fastest_peft() or {}
    cells = (
        number(ours.get("tokens_per_s"), 10, 0),
        number(ours.get("mfu"), 7, 1, 100),
        number(ours.get("peak_memory_bytes"), 7, 1, 1e-9),
        number(ours.get("peak_reserved_memory_bytes"), 9, 1, 1e-9),
        number(theirs.get("tokens_per_s"), 10, 0),
        number(theirs.get("peak_memory_bytes"), 7, 1, 1e-9),
        number(case.ratio(), 7, 2),
    )
    errors = "; ".join(f"{what}: {error}" for what, error in case.errors.items())
    return f"{name:<34}{''.join(cells)}  {errors}".rstrip()


def number(value: float | None, width: int, digits: int, factor: float = 1) -> str:
    return f"{'-' if value is None else f'{value * factor:.{digits}f}':>{width}}"


def jobs(run: Run) -> list[str]:
    return [
        f"{job['status']:<8}{prefix}{name}: {job['detail']}"
        for phase, prefix in (("selftest", ""), ("nccl", "nccl: "))
        for name, job in run.values(phase).get("jobs", {}).items()
    ]


def tools(run: Run) -> list[str]:
    sanitized = [f"{result:<8}{name}" for name, result in run.values("sanitize").get("checks", {}).items()]
    kernels = run.values("ncu").get("kernels", {})
    return sanitized + [
        f"ncu {kernel}: " + ", ".join(f"{k} {v}" for k, v in m.items()) for kernel, m in kernels.items()
    ]


def profile(run: Run) -> list[str]:
    """The time of a step by class of kernels, and the kernels and products with the most time."""
    lines = []
    for case in run.values("steps").get("profiles", []):
        if "profile" not in case:
            continue
        shape = f"{case['quantization']} {case['micro_batch']}x{case['sequence']}"
        lines.append(
            f"{f'profile of a step, {shape}':<60}{'%':>7}{'ms':>10}{'GB/s':>9}{'TFLOP/s':>9}{'count':>8}"
        )
        for entry in case["profile_classes"] + case["profile"][:PROFILE_LINES]:
            share, milliseconds = entry["percent_of_step"], entry["milliseconds"]
            cells = (
                number(share, 7, 1) + number(milliseconds, 10, 3) + rates(entry) + f"{entry['count']:>8.0f}"
            )
            lines.append(f"{entry['name'][:59]:<60}{cells}")
        lines.append(f"{'between kernels':<67}{number(case['gap_milliseconds'], 10, 3)}")
    return lines


def bench(run: Run) -> list[str]:
    """Single operations; those with the lowest share of the ceilings come first."""
    measured = run.values("bench")
    if not measured:
        return []
    ceilings = measured["ceilings"]
    heads = f"ceilings {ceilings['tflop_s']:.0f} TFLOP/s, {ceilings['gb_s']:.0f} GB/s; operations:"
    lines = [f"{heads:<60}{'%':>7}{'ms':>10}{'GB/s':>9}{'TFLOP/s':>9}"]
    for row in sorted(measured["rows"], key=lambda row: row.get("percent", 0)):
        cells = row.get("error") or number(row["percent"], 7, 1) + number(row["milliseconds"], 10, 3) + rates(
            row
        )
        lines.append(f"{row['name'][:59]:<60}{cells}")
    return lines


def rates(entry: dict) -> str:
    return number(entry.get("gb_s"), 9, 0) + number(entry.get("tflop_s"), 9, 1)
