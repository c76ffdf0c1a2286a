"""The phases that run lora-gpu: ops, bench, and, with NVIDIA's tools, sanitize and ncu."""

import json
import re

import environment
from phase import Session, Skipped, message
from settings import SETTINGS

# compute-sanitizer's exit status if it found errors; lora-gpu itself exits with 1.
ERRORS_FOUND = 86
# Least number of seconds for a check or a measurement under a tool.
ONE_MORE = 5


def ops(session: Session) -> None:
    finished = session.command("lora-gpu", [session.bin("lora-gpu"), "--only", SETTINGS.checks])
    checks = re.findall(r"^(ok|WRONG) +(.+?) +([\d.]+) s  (.*)$", finished.output, re.MULTILINE)
    session.values["checks"] = {
        name: {"status": status, "detail": detail} for status, name, _, detail in checks
    }
    # lora-gpu prints this line after all checks.
    complete = re.search(r"^\d+ passed, \d+ failed$", finished.output, re.MULTILINE)
    session.values["complete"] = complete is not None


def bench(session: Session) -> None:
    path = session.work / "bench.json"
    session.command("lora-gpu --bench", [*microbench(session, SETTINGS.bench), "--json", path])
    try:
        session.values.update(json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except ValueError as error:
        session.failures.append(f"invalid {path.name}: {error}")


def microbench(session: Session, only: str) -> list:
    return [session.bin("lora-gpu"), "--bench", "--bench-scale", SETTINGS.bench_scale, "--only", only]


# Tools of compute-sanitizer with checks of operations. The kernels with the most shared memory and
# barriers come first.
SANITIZED = [
    ("racecheck", "attention forward and backward bf16"),
    ("memcheck", "attention forward and backward bf16"),
    ("memcheck", "quantized linear"),
    ("racecheck", "cross-entropy small"),
    ("racecheck", "rms_norm backward"),
    ("memcheck", "cross-entropy small"),
    ("memcheck", "adamw"),
]


def sanitize(session: Session) -> None:
    sanitizer = environment.tool("compute-sanitizer")
    if sanitizer is None:
        raise Skipped("compute-sanitizer is not installed")
    checks = [(tool, check) for tool, check in SANITIZED if SETTINGS.checks in check]
    if not checks:
        raise Skipped(f"no check for compute-sanitizer has {SETTINGS.checks} in its name")
    results = session.values["checks"] = {}
    for tool, check in checks:
        name = f"{tool}: {check}"
        if not session.has_time(ONE_MORE, name):
            results[name] = "no time"
            continue
        argv = [
            sanitizer, "--tool", tool, "--error-exitcode", ERRORS_FOUND,
            session.bin("lora-gpu"), "--only", check,
        ]  # fmt: skip
        finished = session.command(name, argv, session.half())
        results[name] = {0: "ok", None: "stopped", ERRORS_FOUND: "WRONG"}.get(finished.status, "failed")
    session.wrong += [name for name, status in results.items() if status == "WRONG"]
    missing = [name for name, status in results.items() if status not in ("ok", "WRONG")]
    if missing:
        session.not_measured.insert(0, f"{len(missing)} of {len(checks)} checks")


# Kernels for ncu, each with the measurement of lora-gpu that launches it.
PROFILED = [
    ("attention_forward", "attention forward 2x"),
    ("attention_backward_keys", "attention backward 2x"),
    ("attention_backward_queries", "attention backward 2x"),
    ("quant_", "dequantize"),
    ("rms_norm_backward", "rms_norm backward"),
]
NCU_METRIC = r"^ +(Duration|(?:Memory|DRAM|Compute \(SM\)) Throughput) +(\S+) +([\d.,]+) *$"


def ncu(session: Session) -> None:
    profiler = environment.tool("ncu")
    if profiler is None:
        raise Skipped("ncu is not installed")
    kernels = session.values["kernels"] = {}
    for kernel, measurement in PROFILED:
        if not session.has_time(ONE_MORE, kernel):
            continue
        argv = [
            profiler, "--set", "basic", "--clock-control", "none", "--kernel-name", f"regex:{kernel}",
            "--launch-skip", "1", "--launch-count", "1", *microbench(session, measurement),
        ]  # fmt: skip
        finished = session.command(f"ncu {kernel}", argv, session.half())
        metrics = re.findall(NCU_METRIC, finished.output, re.MULTILINE)
        if metrics:
            kernels[kernel] = {name: f"{value} {unit}" for name, unit, value in metrics}
        elif finished.status == 0:
            session.failures.append(f"ncu {kernel}: no metrics: {message(finished.output)}")
