"""Results of invented runs, for the tests."""


def step(phase: str, tokens_per_s: float, **more: object) -> dict:
    """Returns a case of a phase: a measured one, or with `error` one that failed."""
    line = {
        "model": "llama-3.1-8b",
        "quantization": "none",
        "micro_batch": 2,
        "sequence": 2048,
        "loss": 1.5,
        "tokens_per_s": tokens_per_s,
        "step_seconds": [0.33, 0.32, 0.34],
        "peak_memory_bytes": 40_000_000_000,
        **more,
    }
    return line if phase == "peft" else {"mfu": 0.4, "peak_reserved_memory_bytes": 44_000_000_000, **line}


def outcome(values: dict, status: str = "ok", reason: str = "", wrong: tuple = ()) -> dict:
    """Returns a phase of result.json."""
    return {"status": status, "reason": reason, "seconds": 3.0, "wrong": list(wrong), "values": values}


def result(date: str, changed_settings: tuple = (), **phases: dict) -> dict:
    """Returns the result that onsite.sh writes.

    `phases` has outcomes, or values of phases that are ok.
    """
    env = {"card": "NVIDIA H100 80GB HBM3", "driver": "580.159.04"}
    outcomes = {
        name: phase if "status" in phase else outcome(phase) for name, phase in {"env": env, **phases}.items()
    }
    return {
        "format": 1,
        "date": date,
        "commit": "0123456789abcdef",
        "dirty": False,
        "prebuilt": False,
        "settings": {},
        "changed_settings": list(changed_settings),
        "phases": outcomes,
    }


def ops(statuses: dict[str, str], complete: bool = True) -> dict:
    """Returns values of the phase ops with these statuses of checks by name."""
    checks = {name: {"status": status, "detail": ""} for name, status in statuses.items()}
    return {"checks": checks, "complete": complete}


def jobs(statuses: dict[str, str], complete: bool = True) -> dict:
    """Returns values of the phase selftest or nccl with these statuses of jobs by name."""
    jobs = {name: {"status": status, "detail": ""} for name, status in statuses.items()}
    return {"jobs": jobs, "complete": complete}


def row(name: str, milliseconds: float, gb_s: float | None, tflop_s: float | None, **more: object) -> dict:
    """Returns a row of microbenchmarks or of a profile."""
    return {"name": name, "milliseconds": milliseconds, "gb_s": gb_s, "tflop_s": tflop_s, **more}


CEILINGS = {"product_side": 8192, "tflop_s": 790.0, "copy_bytes": 4 << 30, "gb_s": 3000.0}
SHARES = {"count": 64, "percent_of_step": 27.0, "percent_of_ceiling": 82.3}
PROFILE = {
    "profile": [row("product 4096x14336x4096", 90.0, None, 650.0, **SHARES)],
    "profile_classes": [row("frozen products", 90.0, None, 650.0, **SHARES)],
    "profiled_step_milliseconds": 333.0,
    "gap_milliseconds": 5.5,
}
FIRST = result(
    "2026-12-01T10:00:00Z",
    ops={
        "checks": {
            "rms_norm forward f32": {"status": "ok", "detail": "y 1e-7"},
            "rope forward f32": {"status": "WRONG", "detail": "y off"},
            "unlisted operation f32": {"status": "ok", "detail": ""},
        },
        "complete": True,
    },
    bench={
        "ceilings": CEILINGS,
        "rows": [
            row("dequantize nf4 down", 0.1, 1500.0, None, percent=50.0),
            {"name": "too large", "error": "CUDA_ERROR_OUT_OF_MEMORY: out of memory while allocating"},
        ],
    },
    steps={
        "cases": [step("steps", 12_000.0), step("steps", 0.0, micro_batch=4, error="out of memory")],
        "profiles": [step("steps", 9_000.0, **PROFILE), step("steps", 0.0, error="out of memory")],
    },
    selftest=jobs({"2 workers, TCP": "ok"}),
)
SECOND = result(
    "2026-12-01T10:10:00Z",
    ours={"cases": [step("ours", 12_500.0)]},
    peft={"cases": [step("peft", 9_000.0, sdpa="flash"), step("peft", 10_000.0, sdpa="cudnn")]},
    nccl=jobs({"1 worker": "ok"}),
    sanitize={"checks": {"racecheck: attention": "ok"}},
    ncu={"kernels": {"quant_": {"Duration": "10 us"}}},
)
