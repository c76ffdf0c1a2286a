"""The phases that start worker processes: doctor, selftest and nccl."""

import re

from phase import Session, json_lines
from settings import SETTINGS

# Limit of one job in seconds.
JOB_SECONDS = 40


def doctor(session: Session) -> None:
    argv = [session.bin("loractl"), "doctor", "--device", "cuda", "--worker", session.bin("lora-worker")]
    session.command("doctor", argv)


def selftest(session: Session) -> None:
    jobs(session, SETTINGS.jobs, int(SETTINGS.job_steps))


def nccl(session: Session) -> None:
    # Both ranks are on this machine. NCCL writes its warnings to stdout without a file for them.
    variables = {
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_DEBUG": "WARN",
        "NCCL_DEBUG_FILE": session.work / "nccl-%h-%p.txt",
    }
    worker = session.bin("lora-worker")
    argv = [worker, "probe", "--device", "auto", "--all-reduce", "2", "--collective", "nccl"]
    limit = session.half()
    # The probe's own timeout is shorter, because its error names the ranks that did not answer.
    timeout = max(int(limit) - 5, 1)
    finished = session.command("all-reduce", [*argv, "--timeout", timeout], limit, **variables)
    session.values["all_reduce"] = next(iter(json_lines(finished.output, "through")), None)
    if finished.status == 0 and session.values["all_reduce"] is None:
        session.failures.append("all-reduce: no result")
    # Ranks that share a GPU take turns on it, so each exchange is slow.
    found = jobs(session, "one nccl2", min(20, int(SETTINGS.job_steps)), **variables)
    result = found.get("2 workers, NCCL")
    if result and result["status"] == "--":
        session.failures.append(f"2 workers, NCCL: {result['detail']}")
    for warnings in sorted(session.work.glob("nccl-*.txt")):
        session.append_to_log(warnings)


def jobs(session: Session, names: str, steps: int, **variables: object) -> dict:
    """Runs jobs of `steps` steps by selftest.sh; returns their results by name."""
    argv = [session.kit / "tests/gpu/selftest.sh", session.kit / "bin"]
    limits = {"STEPS": steps, "JOB_SECONDS": JOB_SECONDS}
    finished = session.command("selftest.sh", argv, JOBS=names, **limits, **variables)
    lines = re.findall(r"^(ok|WRONG|stopped|--) +(.{44}) (.*)$", finished.output, re.MULTILINE)
    found = {name.strip(): {"status": status, "detail": detail} for status, name, detail in lines}
    # selftest.sh prints this line after all jobs.
    complete = re.search(r"^(all right|\d+ of the lines above are not ok)$", finished.output, re.MULTILINE)
    session.values |= {"jobs": found, "complete": complete is not None}
    session.wrong += [name for name, result in found.items() if result["status"] == "WRONG"]
    return found
