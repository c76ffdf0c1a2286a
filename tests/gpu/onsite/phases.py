"""The phases, with the programs that they run and what they read from the output."""

import importlib.util
import json
import re
from pathlib import Path

import environment
import settings
from phase import Phase, Session, Skipped

# Seconds that one more form of the base needs at least: to make it and to take the steps.
ANOTHER_BASE = 20


def env(session: Session) -> None:
    finished = session.command(
        "environment.py", [settings.PYTHON, Path(__file__).with_name("environment.py")]
    )
    # The libraries that it loads may write lines before and after the document.
    start = max(finished.output.find("{"), 0)
    session.values.update(json.JSONDecoder().raw_decode(finished.output, start)[0])


def doctor(session: Session) -> None:
    session.command(
        "doctor",
        [session.bin("loractl"), "doctor", "--device", "cuda", "--worker", session.bin("lora-worker")],
    )


def ops(session: Session) -> None:
    finished = session.command("lora-gpu", [session.bin("lora-gpu"), "--only", settings.CHECKS])
    checks = re.findall(r"^(ok|WRONG) +(.+?) +([\d.]+) s  (.*)$", finished.output, re.MULTILINE)
    session.values["checks"] = {
        name: {"status": status, "detail": detail} for status, name, _, detail in checks
    }


def bench(session: Session) -> None:
    path = session.work / "bench.json"
    session.command("lora-gpu --bench", [*microbench(session, settings.BENCH), "--json", path])
    if path.exists():
        session.values.update(json.loads(path.read_text()))


def microbench(session: Session, only: str) -> list:
    return [session.bin("lora-gpu"), "--bench", "--bench-scale", settings.BENCH_SCALE, "--only", only]


def steps(session: Session) -> None:
    train_steps(session, "none")
    train_steps(
        session, "none", settings.PROFILE_CASES, "--profile", "--ceilings-scale", settings.BENCH_SCALE
    )
    for quantization in ("nf4-double", "int8"):
        if time_left(session, ANOTHER_BASE, quantization):
            train_steps(session, quantization)


def ours(session: Session) -> None:
    for quantization in ("none", "nf4-double"):
        if time_left(session, ANOTHER_BASE, quantization):
            train_steps(session, quantization)


def train_steps(session: Session, quantization: str, cases: str = settings.CASES, *flags: str) -> None:
    """Our training steps; adds a case for each line of JSON."""
    argv = [
        session.bin("train_step"),
        "--json",
        "--device",
        "cuda:0",
        *flags,
        *step_flags(quantization, cases),
    ]
    finished = session.command(f"train_step {quantization}", argv)
    cases = json_lines(finished.output)
    session.values.setdefault("profiles" if flags else "cases", []).extend(cases)
    session.failures += [
        f"{quantization} {case_name(case)}: {case['error']}" for case in cases if "error" in case
    ]


def case_name(case: dict) -> str:
    return f"{case['micro_batch']}x{case['sequence']}"


def step_flags(quantization: str, cases: str) -> list[str]:
    return [
        "--model", settings.MODEL, "--dtype", "bf16", "--quantization", quantization, "--cases", cases,
        "--threads", settings.THREADS, "--warmup", settings.WARMUP, "--steps", settings.STEPS,
    ]  # fmt: skip


def peft(session: Session) -> None:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"Python has no {', '.join(missing)}")
    profile = session.work / "peft-profile.txt"
    peft_steps(session, "none", "flash,cudnn", "--profile", profile)
    if not any("tokens_per_s" in case for case in session.values["cases"]):
        # Whatever kernel torch takes is better than no comparison.
        peft_steps(session, "none", "any")
    if profile.exists():
        with open(session.log, "a") as log:
            log.write(profile.read_text())
    if importlib.util.find_spec("bitsandbytes") is None:
        session.values["left_out"] = ["nf4-double: Python has no bitsandbytes"]
    elif time_left(session, ANOTHER_BASE, "nf4-double"):
        peft_steps(session, "nf4-double", "flash")


def peft_steps(session: Session, quantization: str, kernels: str, *flags: object) -> None:
    argv = [
        settings.PYTHON,
        session.kit / "benches/peft_step.py",
        "--device",
        "cuda:0",
        "--sdpa",
        kernels,
        *flags,
    ]
    finished = session.command(
        f"peft_step.py {quantization}", argv + step_flags(quantization, settings.CASES)
    )
    session.values.setdefault("cases", []).extend(json_lines(finished.output))


def selftest(session: Session) -> None:
    jobs(session, settings.JOBS, settings.JOB_STEPS)


def nccl(session: Session) -> None:
    worker = session.bin("lora-worker")
    # Both ranks are on this machine.
    variables = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN"}
    argv = [worker, "probe", "--device", "auto", "--all-reduce", "2", "--collective", "nccl"]
    finished = session.command("all-reduce", argv, limit=30, **variables)
    session.values["all_reduce"] = next(iter(json_lines(finished.output)), None)
    # Ranks that share a GPU take turns on it, so each exchange is slow.
    jobs(session, "one nccl2", min(20, int(settings.JOB_STEPS)), **variables)
    if session.values["jobs"].get("2 workers, NCCL", {}).get("status") != "ok":
        session.failures.append("2 workers, NCCL: not the adapter of one worker")


def jobs(session: Session, names: str, steps: int | str, **variables: str) -> None:
    """Jobs of so many steps with worker processes, by selftest.sh."""
    argv = [session.kit / "tests/gpu/selftest.sh", session.kit / "bin"]
    finished = session.command("selftest.sh", argv, JOBS=names, STEPS=str(steps), **variables)
    lines = re.findall(r"^(ok|WRONG|--) +(.{44}) (.*)$", finished.output, re.MULTILINE)
    session.values["jobs"] = {
        name.strip(): {"status": status, "detail": detail} for status, name, detail in lines
    }


# Checks of operations for compute-sanitizer, by tool: first the kernels with the most shared memory
# and barriers.
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
    results = session.values.setdefault("checks", {})
    checks = [(tool, check) for tool, check in SANITIZED if settings.CHECKS in check]
    if not checks:
        raise Skipped(f"no check for compute-sanitizer has {settings.CHECKS} in its name")
    for tool, check in checks:
        name = f"{tool}: {check}"
        if not time_left(session, 5, name):
            continue
        argv = [sanitizer, "--tool", tool, "--error-exitcode", "1", session.bin("lora-gpu"), "--only", check]
        finished = session.command(name, argv, limit=40)
        results[name] = {0: "ok", None: "stopped"}.get(finished.status, "WRONG")


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
    for kernel, measurement in PROFILED:
        if not time_left(session, 5, kernel):
            continue
        argv = [
            profiler, "--set", "basic", "--clock-control", "none", "--kernel-name", f"regex:{kernel}",
            "--launch-skip", "1", "--launch-count", "1", *microbench(session, measurement),
        ]  # fmt: skip
        finished = session.command(f"ncu {kernel}", argv, limit=30)
        metrics = re.findall(NCU_METRIC, finished.output, re.MULTILINE)
        session.values.setdefault("kernels", {})[kernel] = {
            name: f"{value} {unit}" for name, unit, value in metrics
        }


def time_left(session: Session, seconds: float, what: str) -> bool:
    """Whether `seconds` are left; else `what` is left out, which result.json says."""
    if session.left() >= seconds:
        return True
    session.values.setdefault("left_out", []).append(f"{what}: no time")
    return False


def json_lines(output: str) -> list[dict]:
    """The lines of JSON in an output, without other lines and a last line that is cut off."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]


PHASES = {
    phase.name: phase
    for phase in (
        Phase("env", 1, 30, env),
        Phase("doctor", 5, 60, doctor),
        Phase("ops", 10, 80, ops),
        Phase("bench", 15, 60, bench),
        Phase("steps", 15, 120, steps),
        Phase("selftest", 15, 100, selftest),
        Phase("peft", 30, 120, peft),
        Phase("ours", 15, 60, ours),
        Phase("nccl", 10, 70, nccl),
        Phase("sanitize", 10, 60, sanitize),
        Phase("ncu", 10, 60, ncu),
    )
}
HALVES = {
    "first": ["env", "doctor", "ops", "bench", "steps", "selftest"],
    "second": ["env", "peft", "ours", "nccl", "sanitize", "ncu"],
}
