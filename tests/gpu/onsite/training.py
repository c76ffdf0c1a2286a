"""The phases that measure training steps: steps, ours and peft."""

import importlib.util
from collections.abc import Iterable

from phase import Session, Skipped, json_lines
from process import Finished
from settings import PYTHON, SETTINGS

# Least number of seconds for one more quantization of the base: to make the base and run its steps.
ANOTHER_BASE = 20


def steps(session: Session) -> None:
    scale = ("--ceilings-scale", SETTINGS.bench_scale)
    train_steps(session, "none", session.half())
    profile_steps(session, "none", "--profile", *scale)
    if session.has_time(ANOTHER_BASE, "nf4-double"):
        train_steps(session, "nf4-double", session.half())
    if session.has_time(ANOTHER_BASE, "int8"):
        train_steps(session, "int8", session.left())


def ours(session: Session) -> None:
    train_steps(session, "none", session.half())
    if session.has_time(ANOTHER_BASE, "nf4-double"):
        train_steps(session, "nf4-double", session.left())


def train_steps(session: Session, quantization: str, limit: float) -> None:
    finished = session.command(
        f"train_step {quantization}", train_step(session, quantization, SETTINGS.cases), limit
    )
    cases = checked_cases(session, finished)
    missing = missing_cases(finished, quantization, cases)
    if finished.status == 0:
        session.failures += errors(missing)
    session.values.setdefault("cases", []).extend([*cases, *missing])


def profile_steps(session: Session, quantization: str, *flags: str) -> None:
    argv = [*train_step(session, quantization, SETTINGS.profile_cases), *flags]
    finished = session.command(f"train_step {quantization} --profile", argv, session.half())
    session.values["profiles"] = checked_cases(session, finished)


def checked_cases(session: Session, finished: Finished) -> list[dict]:
    """Returns the cases that train_step printed. Their errors are failures of the phase."""
    cases = json_lines(finished.output, "micro_batch")
    session.wrong += [case_name(case) for case in not_finite(cases)]
    session.failures += errors(cases)
    return cases


def train_step(session: Session, quantization: str, cases: str) -> list:
    program = session.bin("train_step")
    return [program, "--json", "--device", "cuda:0", *step_flags(quantization, cases)]


def step_flags(quantization: str, cases: str) -> list[str]:
    return [
        "--model", SETTINGS.model, "--dtype", "bf16", "--quantization", quantization, "--cases", cases,
        "--threads", SETTINGS.threads, "--warmup", SETTINGS.warmup, "--steps", SETTINGS.steps,
    ]  # fmt: skip


def not_finite(cases: list[dict]) -> list[dict]:
    """Returns the cases whose loss is not finite (null in JSON), and adds an error to each."""
    found = [case for case in cases if "error" not in case and case.get("loss") is None]
    for case in found:
        case["error"] = "the loss is not finite"
    return found


def errors(cases: Iterable[dict]) -> list[str]:
    return [f"{case_name(case)}: {case['error'][:100]}" for case in cases if "error" in case]


def case_name(case: dict) -> str:
    return f"{case['quantization']} {case['micro_batch']}x{case['sequence']}"


def missing_cases(finished: Finished, quantization: str, cases: list[dict], sdpa: str = "") -> list[dict]:
    """An error for each case that the program did not print, because it was stopped or crashed."""
    why = "no result" if finished.status == 0 else finished.how()
    shapes = [tuple(map(int, case.split("x"))) for case in SETTINGS.cases.split(",")]
    base = {"model": SETTINGS.model, "quantization": quantization, **({"sdpa": sdpa} if sdpa else {})}
    printed = [(case["micro_batch"], case["sequence"]) for case in cases]
    return [
        {**base, "micro_batch": rows, "sequence": positions, "error": why}
        for rows, positions in shapes
        if (rows, positions) not in printed
    ]


def peft(session: Session) -> None:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"Python has no {', '.join(missing)}")
    profile = session.work / "peft-profile.txt"
    # This command gets more than half of the time, because it imports torch and measures each case
    # with both kernels.
    peft_steps(session, "none", "flash,cudnn", 0.6 * session.left(), "--profile", profile)
    if profile.exists():
        session.append_to_log(profile)
    if importlib.util.find_spec("bitsandbytes") is None:
        session.not_measured.append("nf4-double: Python has no bitsandbytes")
    elif session.has_time(ANOTHER_BASE, "nf4-double"):
        # There is not enough time for both kernels.
        peft_steps(session, "nf4-double", fastest_kernel(session) or "any", session.left())


def peft_steps(session: Session, quantization: str, kernels: str, limit: float, *flags: object) -> None:
    """Measures PEFT's steps; with the kernel that torch chooses if none of `kernels` works."""
    measured = measure_peft(session, quantization, kernels, limit, *flags)
    if not measured and kernels != "any" and session.has_time(ANOTHER_BASE, f"{quantization}, any kernel"):
        measure_peft(session, quantization, "any", session.half())


def measure_peft(session: Session, quantization: str, kernels: str, limit: float, *flags: object) -> bool:
    """Adds PEFT's cases to the values; returns whether at least one was measured."""
    argv = [PYTHON, session.kit / "benches/peft_step.py", "--device", "cuda:0", "--sdpa", kernels, *flags]
    argv += step_flags(quantization, SETTINGS.cases)
    finished = session.command(f"peft_step.py {quantization}", argv, limit)
    cases = json_lines(finished.output, "sdpa")
    not_finite(cases)
    # A case that PEFT cannot run is not a failure of loractl.
    session.not_measured += [f"{case['sdpa']} {text}" for case in cases for text in errors([case])]
    measured = any("error" not in case for case in cases)
    for sdpa in kernels.split(","):
        printed = [case for case in cases if case["sdpa"] == sdpa]
        cases += missing_cases(finished, quantization, printed, sdpa)
    session.values.setdefault("cases", []).extend(cases)
    return measured


def fastest_kernel(session: Session) -> str | None:
    """The attention kernel of the fastest case."""
    measured = [case for case in session.values["cases"] if "error" not in case]
    return max(measured, key=lambda case: case["tokens_per_s"])["sdpa"] if measured else None
