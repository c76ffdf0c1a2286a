"""The table that a run ends with: what failed and what was measured, the most important first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benches/gpu"))

from run_data import QUANTIZATIONS, Case, Run  # noqa: E402

WIDTH = 150


def lines(result: dict) -> list[str]:
    run = Run.from_result(result)
    sections = (outcomes(run), wrong(run), steps(run), profile(run), bench(run), jobs(run), tools(run))
    header = f"{run.date}  {run.card}, driver {run.driver}, commit {run.commit[:12]}{' with changes' if run.dirty else ''}"
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
    heads = f"{'training steps':<34}{'tokens/s':>10}{'MFU':>7}{'GB':>7}{'held GB':>9}{'PEFT':>10}{'GB':>7}{'ratio':>7}"
    return [heads, *(step(key, case) for key, case in cases.items())]


def step(key: tuple[str, str, int, int], case: Case) -> str:
    model, quantization, rows, positions = key
    name = f"{model} {QUANTIZATIONS.get(quantization, quantization)[:5]} {rows}x{positions}"
    ours = case.ours[-1] if case.ours else {}
    theirs = max(case.peft.values(), key=lambda line: line["tokens_per_s"], default={})
    cells = (
        number(ours.get("tokens_per_s"), 10, 0),
        number(ours.get("mfu"), 7, 1, 100),
        number(ours.get("peak_memory_bytes"), 7, 1, 1e-9),
        number(ours.get("reserved_memory_bytes"), 9, 1, 1e-9),
        number(theirs.get("tokens_per_s"), 10, 0),
        number(theirs.get("peak_memory_bytes"), 7, 1, 1e-9),
        number(case.ratio(), 7, 2),
    )
    return f"{name:<34}{''.join(cells)}  {'; '.join(case.errors)}".rstrip()


def number(value: float | None, width: int, digits: int, factor: float = 1) -> str:
    return f"{'-' if value is None else f'{value * factor:.{digits}f}':>{width}}"


def jobs(run: Run) -> list[str]:
    found = {**run.values("selftest").get("jobs", {}), **run.values("nccl").get("jobs", {})}
    return [f"{job['status']:<6}{name}: {job['detail']}" for name, job in found.items()]


def tools(run: Run) -> list[str]:
    sanitized = [f"{result:<8}{name}" for name, result in run.values("sanitize").get("checks", {}).items()]
    kernels = run.values("ncu").get("kernels", {})
    return sanitized + [f"ncu {kernel}: " + ", ".join(f"{k} {v}" for k, v in m.items()) for kernel, m in kernels.items()]
