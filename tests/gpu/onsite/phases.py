"""The phases, and the halves in which they run."""

from pathlib import Path

import jobs
import operations
import training
from phase import Phase, Session, json_lines
from settings import PYTHON

# Six files PHASE.txt; with result.json and table.txt a run has eight files.
MOST_PHASES = 6


def env(session: Session) -> None:
    program = Path(__file__).with_name("environment.py")
    finished = session.command("environment.py", [PYTHON, program])
    documents = json_lines(finished.output, "card")
    if documents:
        session.values.update(documents[-1])
    elif finished.status == 0:
        session.failures.append("environment.py: no document")
    if error := (session.values.get("nvidia_smi") or {}).get("error"):
        session.not_measured.append(f"nvidia-smi: {error}")


PHASES = {
    phase.name: phase
    for phase in (
        Phase("env", 1, 20, env),
        Phase("doctor", 5, 60, jobs.doctor),
        Phase("ops", 10, 80, operations.ops),
        Phase("bench", 15, 60, operations.bench),
        Phase("steps", 30, 120, training.steps),
        Phase("selftest", 15, 100, jobs.selftest),
        Phase("peft", 30, 170, training.peft),
        Phase("ours", 30, 60, training.ours),
        Phase("nccl", 15, 70, jobs.nccl),
        Phase("sanitize", 20, 60, operations.sanitize),
        Phase("ncu", 20, 60, operations.ncu),
    )
}
HALVES = {
    "first": ["env", "doctor", "ops", "bench", "steps", "selftest"],
    "second": ["env", "peft", "ours", "nccl", "sanitize", "ncu"],
}


def chosen(words: list[str]) -> list[str]:
    """The phases that the words name. `env` comes first, because it describes the machine.

    Raises ValueError if a word or the number of phases is invalid.
    """
    names = [name for word in words or ["first"] for name in HALVES.get(word, [word])]
    for name in names:
        if name not in PHASES:
            raise ValueError(f"invalid phase {name}: must be {', '.join([*HALVES, *PHASES])}")
    names = list(dict.fromkeys(["env", *names]))
    if len(names) > MOST_PHASES:
        raise ValueError(f"invalid phases: {len(names)}, with env; at most {MOST_PHASES} fit in a run")
    return names
