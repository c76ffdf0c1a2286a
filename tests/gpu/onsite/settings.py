"""Sizes of what is measured, from the environment; `onsite.sh` describes them."""

import os

MODEL = os.environ.get("MODEL", "llama-3.1-8b")
# The case that needs the most memory is last.
CASES = os.environ.get("CASES", "1x2048,2x2048,8x512,4x2048")
PROFILE_CASES = os.environ.get("PROFILE_CASES", "2x2048")
WARMUP = os.environ.get("WARMUP", "2")
STEPS = os.environ.get("STEPS", "8")
THREADS = os.environ.get("THREADS", str(min(8, os.cpu_count() or 1)))
CHECKS = os.environ.get("CHECKS", "")
BENCH = os.environ.get("BENCH", "")
BENCH_SCALE = os.environ.get("BENCH_SCALE", "1")
JOBS = os.environ.get("JOBS", "one tcp2 killed-tcp cpu")
JOB_STEPS = os.environ.get("JOB_STEPS", "200")
PYTHON = os.environ.get("PYTHON", "python3")


def as_dict() -> dict[str, str]:
    """What decides the numbers of a result."""
    return {name.lower(): value for name, value in globals().items() if name.isupper() and name != "PYTHON"}
